"""Speed of the CRES batch preparation beside the published data set class: same events, same machine, on its CPU.

    python bench/bench_cres_prep.py --published PUBLISHED

PUBLISHED is a checkout of the published code (C. Reissel, neutrino_project). Its data set class `Project8Sim` is
imported from there as it is; its file imports `lightning` without using it, so an empty module stands in where that is
missing. Without --published only our own numbers are taken.

The events are made here: chirped lines, 8,192 samples of I and Q, in one HDF5 file laid out as the published code
writes it. Each program runs in a process of its own, in turns, A B C A B C, a few seconds each, the others waiting.
Rates are events per second by the clock and, less troubled by what else the machine does, by the processor time of the
process; in batches of 128 and in shuffled order, reading included.

- published: its class in PyTorch's loader, in one process: it reads an event, draws noise for I and Q, scales both,
  transforms them and scales real and imaginary part.
- published, workers: the same with as many worker processes as there are cores.
- ours: the same work on whole batches (noise, both scales, both outputs), reading the file in blocks of a batch.
- ours, memory: the same from events held in memory.
- ours, default: the default `PrepConfig` from memory, which keeps the band of the signal.

Without noise, the outputs of both are compared, number by number.
"""
import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
import time
import types
from pathlib import Path

import machine
import numpy as np
from workers import Worker, WorkerError, rounded, say, spread, summary

ROOT = Path(__file__).resolve().parents[1]
RATE_HZ, TARGET = 403e6, 5  # sampling rate; how many times faster than its class in one process we mean to be
INPUTS, VARIABLES = ["output_ts_I", "output_ts_Q"], ["energy_eV", "pitch_angle_deg"]
OBSERVABLES = ["avg_axial_frequency_Hz", "avg_carrier_frequency_Hz", "radius_m"]


def make_events(path: Path, events: int, samples: int) -> None:
    "Write `events` events of five chirped lines each to an HDF5 file with the published names, float32."
    import h5py

    rng = np.random.default_rng(0)
    time_s = np.arange(samples) / RATE_HZ
    with h5py.File(path, "w") as f:
        columns = {name: f.create_dataset(name, (events, samples), np.float32) for name in INPUTS}
        carrier, axial = rng.uniform(-70e6, -47e6, events), rng.uniform(3e6, 8.5e6, events)
        for row in range(events):
            phase, axial_phase = rng.uniform(0, 1, 2)
            z = sum(height * np.exp(2j * np.pi * (
                (carrier[row] + order * axial[row]) * time_s + 0.33e9 * time_s**2 / 2 + phase + order * axial_phase))
                for order, height in ((-4, 0.06), (-2, 0.35), (0, 0.85), (2, -0.35), (4, 0.06)))
            z *= rng.uniform(5e-3, 12e-3)
            columns["output_ts_I"][row], columns["output_ts_Q"][row] = z.real, z.imag
        others = {"energy_eV": rng.uniform(18500, 18700, events), "pitch_angle_deg": rng.uniform(88, 90, events),
                  "radius_m": rng.uniform(0, 6e-3, events), "avg_axial_frequency_Hz": axial,
                  "avg_carrier_frequency_Hz": carrier + 25.9702e9}
        for name, values in others.items():
            f.create_dataset(name, data=values.astype(np.float32))


def repeat_for(batches, seconds: float) -> dict:
    "Take batches for `seconds`, at least two; the length of each is a number of events."
    events, start, cpu = 0, time.perf_counter(), time.process_time()
    for count, n in enumerate(batches, 1):
        events += n
        if count >= 2 and time.perf_counter() - start >= seconds:
            break
    return {"events": events, "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


class Published:
    "The published data set class, from a checkout of it."

    workers = 0

    def __init__(self, options):
        sys.path.insert(0, os.fspath(options.published))
        if importlib.util.find_spec("lightning") is None:
            sys.modules["lightning"] = types.ModuleType("lightning")
        self.code, self.options = importlib.import_module("src.data.dataset"), options

    def dataset(self, noise: float):
        return self.code.Project8Sim(INPUTS, VARIABLES, OBSERVABLES, self.options.data, cutoff=self.options.samples,
                                     noise_const=noise)

    def setup(self) -> dict:
        from torch.utils.data import DataLoader

        clean = self.dataset(noise=0)
        check = [clean[i][1].numpy().T for i in range(8)]
        clean.close()
        many = {"multiprocessing_context": "fork", "persistent_workers": True} if self.workers else {}
        loader = DataLoader(self.dataset(noise=1), self.options.batch, shuffle=True, num_workers=self.workers,
                            worker_init_fn=self.code.worker_init_fn, **many)

        def endless():
            while True:
                yield from loader

        self.batches = (len(batch[0]) for batch in endless())
        return {"check": np.stack(check)}

    def measure(self, seconds: float) -> dict:
        return repeat_for(self.batches, seconds)


class PublishedWorkers(Published):
    "The same, with worker processes."

    def __init__(self, options):
        super().__init__(options)
        self.workers = len(os.sched_getaffinity(0))


class Ours:
    "The same work by our batch steps, reading the file in blocks."

    in_memory = False

    def __init__(self, options):
        import h5py

        self.options, self.file = options, h5py.File(next(options.data.iterdir()))
        self.events = self.read(slice(None)) if self.in_memory else None

    def read(self, rows):
        "Events (n, 2, samples) of the file."
        import torch

        return torch.stack([torch.from_numpy(self.file[name][rows]) for name in INPUTS], 1)

    def build(self):
        "Noise, standard deviation 1 of I and Q, transform, and mean 0 and standard deviation 1 of its parts."
        from torch import nn

        from deadlayer_cres.cres.prep import AddNoise, Prep, ScaleEvent, Spectrum
        from deadlayer_cres.cres.simulate import noise_sigma_V

        class UnitDeviation(nn.Module):
            def forward(self, x):
                deviation = (x - x.mean(2, keepdim=True)).square().mean(2, keepdim=True).sqrt()
                return x / (deviation + 1e-8)

        self.noise = AddNoise(noise_sigma_V(2.2e-13, RATE_HZ))
        self.series = Prep({"noise": self.noise, "unit": UnitDeviation()})
        self.transform = Prep({"spectrum": Spectrum(self.options.samples), "scale": ScaleEvent()})

    def prepare(self, x):
        series = self.series(x)
        return series, self.transform(series)

    def setup(self) -> dict:
        import torch

        self.build()
        if self.in_memory:
            return {}
        sigma, self.noise.sigma_V = self.noise.sigma_V, 0.0
        check = torch.fft.ifftshift(self.prepare(self.read(slice(0, 8)))[1], dim=2)  # in the published order
        self.noise.sigma_V = sigma
        return {"check": check.numpy()}

    def batches(self):
        import torch

        n, size = self.options.events, self.options.batch
        while True:
            if self.in_memory:
                for rows in torch.randperm(n).split(size):
                    yield self.events[rows]
            else:
                for start in size * torch.randperm(n // size):
                    yield self.read(slice(int(start), int(start) + size))

    def measure(self, seconds: float) -> dict:
        import torch

        with torch.no_grad():
            return repeat_for((len(self.prepare(x)[0]) for x in self.batches()), seconds)


class OursMemory(Ours):
    "The same, from events in memory."

    in_memory = True


class OursDefault(OursMemory):
    "The default preparation, from events in memory."

    def build(self):
        from deadlayer_cres.cres.prep import PrepConfig, build_prep

        prep = build_prep(PrepConfig(), self.options.samples, RATE_HZ).fit(self.events)
        self.prepare = lambda x: (prep(x),)


def compare(turns: dict[str, list[float]]) -> dict:
    "Ratios of our rates to the published ones, turn by turn."
    return {f"{ours} / {theirs}": summary([a / b for a, b in zip(turns[ours], turns[theirs], strict=True)])
            for theirs in turns if theirs.startswith("published") for ours in turns if ours.startswith("ours")}


def measure(workers: list[Worker], options) -> dict:
    "All programs in turns: their rates, and the ratios of ours to the published ones turn by turn."
    checks = {w.name: w.ask("setup").get("check") for w in workers}
    for w in workers:
        w.ask("measure", seconds=0)
    turns, cpu = ({w.name: [] for w in workers} for _ in range(2))
    for k in range(options.repeats):
        for w in workers:
            done = w.ask("measure", seconds=options.seconds)
            turns[w.name].append(done["events"] / done["seconds"])
            cpu[w.name].append(done["events"] / done["cpu_seconds"])
        rates = ", ".join(f"{name} {row[-1]:.4g}" for name, row in turns.items())
        say(f"turn {k + 1}/{options.repeats}: {rates} events/s")
    cpu.pop("published, workers", None)  # the time of its workers is not in that of the process
    report = {"events_per_second": {name: summary(rates) for name, rates in turns.items()},
              "events_per_cpu_second": {name: summary(rates) for name, rates in cpu.items()},
              "ratios": compare(turns), "cpu_ratios": compare(cpu)}
    if "published" in turns:
        ratio = report["ratios"]["ours / published"]
        ratio |= {"target": TARGET, "reached": ratio["median"] >= TARGET}
        a, b = checks["ours"], checks["published"]
        report["largest_difference"] = rounded(float(np.abs(a - b).max() / np.abs(b).max()))
    return report


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--published", type=Path, help="checkout of the published code; without it there are no ratios")
    p.add_argument("--events", type=int, default=1024, help="number of events, a multiple of the batch size")
    p.add_argument("--samples", type=int, default=8192, help="samples of an event")
    p.add_argument("--batch", type=int, default=128, help="batch size")
    p.add_argument("--seconds", type=float, default=3, help="how long each program works in each turn")
    p.add_argument("--repeats", type=int, default=5, help="number of turns")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch, in each program")
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cres_prep.json")
    options = p.parse_args(argv)
    whole = (options.events, options.samples, options.batch, options.repeats, options.threads)
    if min(whole) < 1 or options.seconds <= 0:
        p.error("all numbers must be above 0")
    if options.events % options.batch:
        p.error("--events must be a multiple of --batch")
    if options.published is not None and not (options.published / "src" / "data" / "dataset.py").is_file():
        p.error(f"{options.published}: not a checkout of the published code: no src/data/dataset.py in it")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    from deadlayer_cres.core import write_json

    about = machine.about(threads=options.threads, events=options.events, samples=options.samples, batch=options.batch)
    if about["load_average"][0] > 0.5:
        say(f"warning: the machine is busy, load average {about['load_average'][0]:.1f}")
    programs = {"published": Published, "published, workers": PublishedWorkers, "ours": Ours,
                "ours, memory": OursMemory, "ours, default": OursDefault}
    if options.published is None:
        say("no --published: the published code is not timed, and there are no ratios")
        programs = {name: p for name, p in programs.items() if name.startswith("ours")}
    with tempfile.TemporaryDirectory() as folder:
        options.data = Path(folder)
        make_events(options.data / "events.hdf5", options.events, options.samples)
        workers = [Worker(name, program, options) for name, program in programs.items()]
        try:
            report = measure(workers, options)
        except WorkerError as e:
            raise SystemExit(f"bench: {e}") from None
        finally:
            for w in workers:
                w.close()
    write_json(options.out, {"environment": about, **report, "load_average_after": os.getloadavg()})
    for part in ("events_per_second", "ratios", "cpu_ratios"):
        for name, row in report[part].items():
            target = f"; target {row['target']}: {'reached' if row['reached'] else 'MISSED'}" if "target" in row else ""
            print(f"{part:18s} {name:36s} {spread(row)}{target}")
    if "largest_difference" in report:
        print(f"largest difference of the outputs without noise: {report['largest_difference']:g} of the largest value")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
