"""Speed and memory of the dead-layer half beside the published RNN's own code: same spectra, same machine, on its CPU.

    python bench/bench_deadlayer_speed.py --published PUBLISHED --spectra RANDOM_DLF --reference DLF1

PUBLISHED is a checkout of the published RNN (A. Alexander, RNN_DeadLayerFit), RANDOM_DLF and DLF1 its two folders of
histograms. Its code is imported from there as it is; beside our requirements it needs pandas, tables and scikit-learn.
Without --published only our own numbers are taken.

Each program runs in a process of its own, so that its peak memory is its own. Both do their work in turns, A B A B, a
few seconds each, one always waiting for the other, so that both see the same machine. Rates are pairs per second, by
the clock and, less troubled by what else the machine does, by the processor time that the program used.

- pairs: what reaches the network. Published: its data loader, batches of 4, both histograms read from their files and
  scaled one by one. Ours: batches of 512 from memory, fresh Poisson noise, the channels of the reference network.
- training: steps of the optimiser with all that they need, data included. Published: its network, losses and optimiser
  settings. Ours: the reference network, as `deadlayer train` trains it.
- architecture: for information, our implementation of the published architecture on our data.

What is done once (reading our spectra into memory, the pass of the published scaler over all files) is timed apart.
On two cores all of it takes about three minutes; when --budget is spent, what is left is cut short or left out.
"""
import argparse
import importlib.util
import os
import sys
import tempfile
import time
import types
from pathlib import Path

import machine
from workers import Worker, WorkerError, rounded, say, spread, summary

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"pairs": 100, "training": 200}  # how many times faster we mean to be
PUBLISHED_BATCH, PUBLISHED_EPOCH = 4, 10_000  # its batch size and its number of trials, of which it trains on 70 %


def repeat_for(step, seconds: float, least: int = 1) -> dict:
    "Call `step()`, which returns a number of pairs, for `seconds` and at least `least` times."
    pairs, calls, start, cpu = 0, 0, time.perf_counter(), time.process_time()
    while calls < least or time.perf_counter() - start < seconds:
        pairs, calls = pairs + step(), calls + 1
    return {"pairs": pairs, "calls": calls, "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu}


class Published:
    "The published RNN's own code: data set, data loader, network and losses, from a checkout of it."

    def __init__(self, options):
        sys.path.insert(0, os.fspath(options.published))
        if importlib.util.find_spec("torchsnooper") is None:
            sys.modules["torchsnooper"] = types.ModuleType("torchsnooper")  # imported for debugging, never called
        self.data, self.rnn = (importlib.import_module(f"src.{name}") for name in ("data", "RNN"))
        self.first, self.second = options.spectra, options.reference

    def setup(self) -> dict:
        "Index the files, and let its scaler read all of the first folder."
        second = None if self.second is None else f"{self.second}/"
        self.loader, _, dataset = self.data.load_data(
            PUBLISHED_BATCH, size=PUBLISHED_EPOCH, path=f"{self.first}/", path_MC2=second)
        self.bins, self.batches = dataset.get_histlen(), self.endless()
        return {"spectra": dataset.data_size + (0 if second is None else dataset.data_size_MC2), "bins": self.bins}

    def endless(self):
        while True:
            yield from self.loader

    def pairs(self, seconds: float) -> dict:
        return repeat_for(lambda: len(next(self.batches)[0]), seconds, 2)

    def prepare_training(self) -> dict:
        import torch

        torch.manual_seed(0)
        outputs = 2 if self.second is None else 4
        self.net = self.rnn.RNN(self.bins, outputs).train()
        self.optimiser = torch.optim.AdamW(self.net.parameters(), lr=0.005, betas=(0.9, 0.98), eps=1e-9)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda k: min((k + 1) ** -0.5, (k + 1) * 400**-1.5))
        self.bce, self.quantiles = torch.nn.BCELoss(), [self.rnn.QuantileLoss(q) for q in (0.9, 0.5, 0.1)]
        self.train_step()
        return {"batch": PUBLISHED_BATCH, "parameters": sum(p.numel() for p in self.net.parameters())}

    def train_step(self) -> int:
        import torch

        x, fccd, dlf, *_ = next(self.batches)
        out, fccd, dlf = self.net(x.float()), fccd.float(), dlf.float()
        if self.second is None:
            loss = self.bce(out, torch.stack([fccd, dlf], 1))
        else:
            loss = self.bce(out[:, :1], fccd[:, None])
            loss = loss + sum(q(out[:, k:k + 1], dlf[:, None]) for k, q in enumerate(self.quantiles, 1))
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.schedule.step()
        loss.item()  # it prints the loss at every step
        return len(x)

    def training(self, seconds: float) -> dict:
        return repeat_for(self.train_step, seconds, 2)


class Ours:
    "This library, set as in configs/deadlayer.yaml."

    def __init__(self, options):
        import yaml

        from deadlayer_cres.core import config_from_dict
        from deadlayer_cres.deadlayer.train import Config

        def read(name):
            return config_from_dict(Config, yaml.safe_load((ROOT / "configs" / name).read_text()))

        self.config, self.published_config = read("deadlayer.yaml"), read("deadlayer-published.yaml")
        self.published_config.pairs.noise = self.config.pairs.noise
        if options.reference is None:
            self.config.pairs.reference = self.published_config.pairs.reference = "same"
        self.folders = [p for p in (options.spectra, options.reference) if p is not None]

    def setup(self) -> dict:
        "Read all spectra into memory and fit the scaling of the inputs."
        from deadlayer_cres.deadlayer.data import read_spectra
        from deadlayer_cres.deadlayer.prep import PairInputs
        from deadlayer_cres.deadlayer.train import pair_source

        data, pairs = self.config.data, self.config.pairs
        self.spectra = [read_spectra(p).select_energy(data.low_keV, data.high_keV).rebin(data.rebin)
                        for p in self.folders]
        parts = {name: {"train": s} for name, s in zip(("random_dlf", "dlf1"), self.spectra, strict=False)}
        self.source = pair_source(parts, "train", pairs, "cpu")
        self.bins = self.spectra[0].counts.shape[1]
        self.inputs = PairInputs(self.bins, self.config.inputs).fit(self.source, **pairs.draw_options())
        return {"spectra": sum(map(len, self.spectra)), "bins": self.bins}

    def pairs(self, seconds: float) -> dict:
        import torch

        n, options = self.config.pairs.batch_size, self.config.pairs.draw_options()

        def step():
            pairs = self.source.draw(n, **options)
            return len(self.inputs(pairs.counts1, pairs.counts2))

        with torch.no_grad():
            return repeat_for(step, seconds, 2)

    def build(self, config, batch: int, steps: int):
        "The learner that `deadlayer train` would make, for `steps` batches in an epoch, and a stopwatch in it."
        from deadlayer_cres.deadlayer.model import PairLoss
        from deadlayer_cres.deadlayer.prep import PairBatches
        from deadlayer_cres.deadlayer.train import build_pipeline
        from deadlayer_cres.train import as_dataloaders, build_learner

        config.train.progress = False
        pipeline, options = build_pipeline(config, self.bins), config.pairs.draw_options()
        pipeline.prep.fit(self.source, n=64 if batch < 64 else 4096, **options)
        batches = [PairBatches(self.source, n, batch, **options) for n in (steps, 1)]
        watch = stopwatch()
        learn = build_learner(pipeline, as_dataloaders(*batches, n_inp=2, device="cpu"),
                              PairLoss(config.model.mode, config.loss), config.train, cbs=[watch])
        return learn, watch

    def prepare_training(self) -> dict:
        batch = self.config.pairs.batch_size
        self.learn, self.watch = self.build(self.config, batch, 1_000_000)
        self.training(0)
        return {"batch": batch, "parameters": sum(p.numel() for p in self.learn.model.parameters())}

    def training(self, seconds: float) -> dict:
        return self.watch.time(self.learn, seconds)

    def prepare_architecture(self) -> dict:
        self.learn = self.watch = None
        return {}

    def architecture(self, seconds: float, batch: int) -> dict:
        learn, watch = self.build(self.published_config, batch, 1_000_000)
        if batch <= 8:
            watch.time(learn, 0)
        return watch.time(learn, seconds)


def stopwatch():
    "A callback that ends the training after some seconds and counts the pairs until then."
    from fastai.callback.core import Callback, CancelFitException

    class Stopwatch(Callback):
        order = 1000

        def time(self, learn, seconds: float, least: int = 1) -> dict:
            self.seconds, self.least, self.pairs, self.calls = seconds, least, 0, 0
            with learn.no_bar() if hasattr(learn, "progress") else learn.no_logging():
                learn.fit(1)
            return {"pairs": self.pairs, "calls": self.calls, "seconds": self.end[0] - self.start[0],
                    "cpu_seconds": self.end[1] - self.start[1]}

        def before_train(self):
            self.start = time.perf_counter(), time.process_time()

        def after_batch(self):
            self.pairs, self.calls = self.pairs + len(self.yb[0]), self.calls + 1
            self.end = time.perf_counter(), time.process_time()
            if self.calls >= self.least and self.end[0] - self.start[0] >= self.seconds:
                raise CancelFitException

    return Stopwatch()


def measure(workers: list[Worker], task: str, options, deadline: float) -> dict:
    "Run `task` on all workers in turns; rates in pairs/s, and their ratios turn by turn."
    prepared = {w.name: w.ask(f"prepare_{task}") if task != "pairs" else w.ask(task, seconds=0) for w in workers}
    turns = {w.name: [] for w in workers}
    for k in range(options.repeats):
        if k > 1 and time.perf_counter() > deadline:
            say(f"{task}: the budget is spent after {k} of {options.repeats} turns")
            break
        for w in workers:
            turns[w.name].append(w.ask(task, seconds=options.seconds / options.repeats))
        say(f"{task} {k + 1}/{options.repeats}: "
            + ", ".join(f"{name} {rate(rows[-1]):.4g} pairs/s" for name, rows in turns.items()))
    result = {}
    for name, rows in turns.items():
        peaks = [r["peak_MB"] for r in (prepared[name], *rows) if r["peak_MB"] is not None]
        result[name] = {
            **{k: v for k, v in prepared[name].items() if k in ("batch", "parameters")},
            "pairs_per_second": summary([rate(r) for r in rows]),
            "pairs_per_cpu_second": summary([rate(r, "cpu_seconds") for r in rows]),
            "turns": [rounded(rate(r)) for r in rows], "pairs": sum(r["pairs"] for r in rows),
            "seconds": rounded(sum(r["seconds"] for r in rows)), "peak_MB": max(peaks, default=None)}
    if len(workers) == 2:
        for key, clock in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
            result[key] = summary([rate(b, clock) / rate(a, clock) for a, b in zip(*turns.values(), strict=True)])
        result["ratio"] |= {"target": TARGETS[task], "reached": result["ratio"]["median"] >= TARGETS[task]}
    return result


def rate(turn: dict, clock: str = "seconds") -> float:
    return turn["pairs"] / max(turn[clock], 1e-9)


def measure_architecture(worker: Worker, options, deadline: float) -> dict:
    "Our implementation of the published architecture at several batch sizes; one step at least."
    result = {}
    for batch in options.architecture_batches:
        if time.perf_counter() > deadline:
            say(f"architecture, batch {batch}: left out, the budget is spent")
            continue
        worker.ask("prepare_architecture")
        row = worker.ask("architecture", seconds=options.seconds / 4, batch=batch)
        result[f"batch {batch}"] = {
            "pairs_per_second": rounded(rate(row)), "pairs_per_cpu_second": rounded(rate(row, "cpu_seconds")),
            "steps": row["calls"], "seconds": rounded(row["seconds"]), "peak_MB": row["peak_MB"]}
        say(f"architecture, batch {batch}: {rate(row):.4g} pairs/s in {row['calls']} steps")
    return result


def link_some(folder: Path, n: int, to: Path) -> Path:
    "A folder of links to `n` evenly spaced files of `folder`."
    names, new = sorted(p.name for p in folder.iterdir()), to / folder.name
    new.mkdir()
    for k in range(min(n, len(names))):
        name = names[k * len(names) // min(n, len(names))]
        (new / name).symlink_to(folder.resolve() / name)
    return new


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--published", type=Path, help="checkout of the published RNN; without it there are no ratios")
    p.add_argument("--spectra", type=Path, required=True, help="folder of histograms with random DLF")
    p.add_argument("--reference", type=Path, help="folder of histograms with DLF = 1, for the second spectra")
    p.add_argument("--seconds", type=float, default=20, help="how long each program works at each task, in all")
    p.add_argument("--repeats", type=int, default=5, help="number of turns these seconds are divided into")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch, in each program")
    p.add_argument("--architecture_batches", type=int, nargs="*", default=[4, 64],
                   help="batch sizes of the task `architecture`; one step of 512 pairs takes minutes and much memory")
    p.add_argument("--budget", type=float, default=200, help="seconds after which no further measurement begins")
    p.add_argument("--limit", type=int, help="only so many files of each folder, for a quick look")
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "deadlayer_speed.json")
    options = p.parse_args(argv)
    for path in (options.spectra, options.reference, options.published):
        if path is not None and not path.is_dir():
            p.error(f"{path}: no such folder")
    if options.published is not None and not (options.published / "src" / "data.py").is_file():
        p.error(f"{options.published}: not a checkout of the published RNN: no src/data.py in it")
    if min(options.seconds, options.repeats, options.threads) <= 0:
        p.error("--seconds, --repeats and --threads must be above 0")
    return options


def print_summary(report: dict) -> None:
    for task in TARGETS:
        for name in ("published", "ours"):
            if name in report[task]:
                row = report[task][name]
                print(f"{task:9s} {name:10s} {spread(row['pairs_per_second'])} pairs/s, "
                      f"{row['pairs_per_cpu_second']['median']:g} per CPU second, peak {row['peak_MB']} MB")
        if "ratio" in report[task]:
            ratio, cpu = report[task]["ratio"], report[task]["cpu_ratio"]
            print(f"{task:9s} ratio      {spread(ratio)}, of CPU time {spread(cpu)}; "
                  f"target {ratio['target']}: {'reached' if ratio['reached'] else 'MISSED'}")
    for name, row in report["architecture"].items():
        print(f"published architecture, our implementation, {name}: {row['pairs_per_second']:g} pairs/s, "
              f"peak {row['peak_MB']} MB")


def run(workers: list[Worker], options, deadline: float) -> dict:
    "All tasks on all workers; a published program that fails is noted, and the rest done without it."
    tasks = {
        "setup": lambda: {w.name: {k: rounded(v) for k, v in w.ask("setup").items() if v} for w in workers},
        **{task: lambda task=task: measure(workers, task, options, deadline) for task in TARGETS},
        "architecture": lambda: measure_architecture(workers[-1], options, deadline),
    }
    report = {}
    for name, task in tasks.items():
        try:
            report[name] = task()
        except WorkerError as e:
            if e.worker is workers[-1]:
                raise SystemExit(f"bench: {e}") from None
            say(f"warning: {e}; going on without it")
            workers.remove(e.worker)
            e.worker.close()
            report |= {"published_error": str(e), name: task()}
        if name == "setup":
            for who, row in report["setup"].items():
                say(f"{who}: {row['spectra']:g} spectra set up in {row['wall_seconds']:g} s")
    return report


def main(argv: list[str] | None = None) -> None:
    options, begun = parse(argv), time.perf_counter()
    from deadlayer_cres.core import write_json

    about = machine.about("pandas", "tables", "scikit-learn", threads=options.threads)
    if about["load_average"][0] > 0.5:
        say(f"warning: the machine is busy, load average {about['load_average'][0]:.1f}; the rates will be too low")
    programs = {"published": Published, "ours": Ours}
    if options.published is None:
        say("no --published: the published code is not timed, and there are no ratios")
        del programs["published"]
    with tempfile.TemporaryDirectory() as d:
        if options.limit:
            options.spectra, options.reference = (
                p and link_some(p, options.limit, Path(d)) for p in (options.spectra, options.reference))
        workers = [Worker(name, program, options) for name, program in programs.items()]
        try:
            report = run(workers, options, begun + options.budget)
        finally:
            for w in workers:
                w.close()
    report = {"environment": about, "limit": options.limit, **report, "load_average_after": os.getloadavg(),
              "total_seconds": rounded(time.perf_counter() - begun)}
    write_json(options.out, report)
    print_summary(report)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
