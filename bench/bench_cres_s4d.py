"""Speed and memory of our S4D layer beside that of the published CRES networks, on this machine in one run.

    python bench/bench_cres_s4d.py --published PUBLISHED

PUBLISHED is a checkout of the published networks (neutrino_project). Its `src/models` is imported from there as it is;
beside our requirements it needs einops. Without --published only our own numbers are taken.

Each program runs in a process of its own. Both work in turns, A B A B, one always waiting for the other, so that both
see the same machine; the ratio is taken turn by turn. H = 128 channels, N = 64, records of 8,192 samples:

- check: the published kernel's parameters in our kernel; the largest difference of the two, relative to the largest
  value, and that of each from the sum in double precision.
- kernel: forward and backward of the convolution kernel alone.
- training: a step (forward, MSE, backward, AdamW) of the network of 6 layers on 2 channels at batch 2, the same
  architecture and number of parameters on both sides. The published network computes each layer twice, to save memory.
- training_stored: the same with that saving switched off in the published network; two turns at most.
- long: one layer of ours on 163,840 samples, forward and backward, with the peak memory of its process.

On a machine with a GPU all but `check` run there too. On a busy machine give --threads 1: threads that wait for each
other lose more than their share.
"""
import argparse
import importlib
import importlib.util
import os
import resource
import statistics
import sys
import time
from pathlib import Path

import machine
from workers import Worker, WorkerError, rounded, say, spread, summary

ROOT = Path(__file__).resolve().parents[1]
CHANNELS, STATE, SAMPLES, BATCH, LAYERS, LONG = 128, 64, 8192, 2, 6, 163_840
TARGETS = {"kernel": 30, "training": 4}  # how many times faster we mean to be
LONG_TARGET_MB = 4096


def median_seconds(step, seconds: float, device: str) -> dict:
    "Median time of `step()` called for `seconds`, at least once."
    import torch

    times, start = [], time.perf_counter()
    while not times or time.perf_counter() - start < seconds:
        begun, cpu = time.perf_counter(), time.process_time()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begun, time.process_time() - cpu))
    wall, cpu = zip(*times, strict=True)
    return {"seconds": statistics.median(wall), "cpu_seconds": statistics.median(cpu), "calls": len(times)}


class Program:
    "What both programs do alike; they differ in how kernel and network are made."

    def __init__(self, options):
        import torch

        self.torch, self.options = torch, options

    def prepare(self, task: str, device: str) -> dict:
        "Build what `task` needs, and do it once for warming up."
        torch = self.torch
        torch.manual_seed(0)
        self.device, self.step = device, None  # frees what the task before has used
        if task == "kernel":
            module, target = self.kernel().to(device), torch.randn(CHANNELS, SAMPLES, device=device)
            self.step = lambda: (self.evaluate(module).reshape_as(target) * target).sum().backward()
        else:
            module = self.network(task).to(device)
            x, y = torch.randn(BATCH, SAMPLES, 2, device=device), torch.randn(BATCH, 2, device=device)
            optimiser = torch.optim.AdamW(module.parameters(), lr=1e-3)

            def step():
                optimiser.zero_grad()
                torch.nn.functional.mse_loss(module(x), y).backward()
                optimiser.step()

            self.step = step
        self.step()
        return {"parameters": sum(p.numel() for p in module.parameters())}

    def time(self, seconds: float) -> dict:
        return median_seconds(self.step, seconds, self.device)


class Published(Program):
    "The published S4D and the network around it."

    def __init__(self, options):
        super().__init__(options)
        sys.path.insert(0, os.fspath(options.published))
        self.s4d, self.networks = (importlib.import_module(f"src.models.{name}") for name in ("s4d", "networks"))
        self.checkpoint = self.networks.checkpoint

    def kernel(self):
        return self.s4d.S4DKernel(CHANNELS, N=STATE, lr=1e-3)

    def evaluate(self, kernel):
        return kernel(SAMPLES)

    def network(self, task: str):
        self.networks.checkpoint = (
            (lambda f, *x, **_: f(*x)) if task == "training_stored" else self.checkpoint)
        return self.networks.S4DModel(2, 2, d_model=CHANNELS, n_layers=LAYERS, dropout=0.0, fc_hidden=[])

    def example(self) -> dict:
        "Parameters of a kernel, and its values."
        self.torch.manual_seed(0)
        kernel = self.kernel()
        with self.torch.no_grad():
            values = {name: p.numpy() for name, p in kernel.named_parameters()}
            return {"parameters": values, "kernel": kernel(SAMPLES).numpy()}


class Ours(Program):
    "Our layer, in a network of the same architecture."

    def kernel(self):
        from deadlayer_cres.cres.s4d import S4DConfig, S4DKernel

        return S4DKernel(S4DConfig(channels=CHANNELS, state=STATE))

    def evaluate(self, kernel):
        return kernel(SAMPLES)

    def network(self, task: str):
        from deadlayer_cres.cres.s4d import S4D, S4DConfig

        nn, config = self.torch.nn, S4DConfig(channels=CHANNELS, state=STATE)

        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder, self.decoder = nn.Linear(2, CHANNELS), nn.Linear(CHANNELS, 2)
                self.layers = nn.ModuleList(S4D(config) for _ in range(LAYERS))
                self.norms = nn.ModuleList(nn.LayerNorm(CHANNELS) for _ in range(LAYERS))

            def forward(self, x):  # (B, L, 2)
                x = self.encoder(x).transpose(1, 2)
                for layer, norm in zip(self.layers, self.norms, strict=True):
                    x = norm((x + layer(x)).transpose(1, 2)).transpose(1, 2)
                return self.decoder(x.mean(-1))

        return Network()

    def check(self, parameters: dict, kernel) -> dict:
        "Our kernel with the published parameters, beside the published one and the plain sum in float64."
        torch = self.torch
        p, ours = {k: torch.from_numpy(v) for k, v in parameters.items()}, self.kernel()
        with torch.no_grad():
            ours.log_step.copy_(p["log_dt"][:, None])
            ours.log_decay.copy_(p["log_A_real"])
            ours.frequency.copy_(p["A_imag"])
            ours.C.copy_(p["C"].movedim(-1, 0)[:, None])
            found = ours(SAMPLES)[0].double()
        a = torch.complex(-p["log_A_real"].double().exp(), p["A_imag"].double())
        w = a * p["log_dt"].double().exp()[:, None]
        c = torch.view_as_complex(p["C"].double()) * (w.exp() - 1) / a
        samples = torch.arange(SAMPLES).double()
        plain = torch.stack([2 * (ci @ (wi[:, None] * samples).exp()).real for ci, wi in zip(c, w, strict=True)])
        published, size = torch.from_numpy(kernel).double(), plain.abs().max()
        pairs = {"ours_published": (found, published), "ours_float64": (found, plain),
                 "published_float64": (published, plain)}
        return {k: ((a - b).abs().max() / size).item() for k, (a, b) in pairs.items()}

    def long(self, device: str) -> dict:
        "One layer on a full track, forward and backward."
        from deadlayer_cres.cres.s4d import S4D, S4DConfig

        torch = self.torch
        layer = S4D(S4DConfig(channels=CHANNELS, state=STATE)).to(device)
        u = torch.randn(1, CHANNELS, LONG, device=device, requires_grad=True)
        result = median_seconds(lambda: layer(u).square().mean().backward(), 0, device)
        if device == "cuda":
            return result | {"device_peak_MB": rounded(torch.cuda.max_memory_allocated() / 2**20)}
        kB = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux
        return result | {"process_peak_MB": rounded(kB / 1024)}


def measure(workers: list[Worker], task: str, device: str, options) -> dict:
    "Run `task` on all workers in turns; seconds per call, and the ratios to ours turn by turn."
    result = {w.name: w.ask("prepare", task=task, device=device) for w in workers}
    turns = {w.name: [] for w in workers}
    for k in range(min(options.repeats, 2) if task == "training_stored" else options.repeats):
        for w in workers:
            turns[w.name].append(w.ask("time", seconds=options.seconds))
        say(f"{device} {task} {k + 1}/{options.repeats}: "
            + ", ".join(f"{name} {rows[-1]['seconds']:.3g} s" for name, rows in turns.items()))
    for name, rows in turns.items():
        result[name] = {
            "parameters": result[name]["parameters"], "seconds": summary([r["seconds"] for r in rows]),
            "cpu_seconds": summary([r["cpu_seconds"] for r in rows]), "calls": sum(r["calls"] for r in rows),
            "peak_MB": max((r["peak_MB"] for r in rows if r["peak_MB"]), default=None)}
        if name != "ours":
            for key, clock in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
                result[name][key] = summary([a[clock] / b[clock] for a, b in zip(rows, turns["ours"], strict=True)])
    if task in TARGETS and device == "cpu" and "published" in result:
        reached = result["published"]["ratio"]["median"] >= TARGETS[task]
        result["published"]["ratio"] |= {"target": TARGETS[task], "reached": reached}
    return result


def run_device(device: str, options) -> dict:
    "All tasks on one device; each in fresh processes, whose peak memory is its own."
    report = {}
    for task in options.tasks:
        programs = {"published": Published, "ours": Ours}
        if options.published is None:
            del programs["published"]
        if task == "long":
            programs = {"ours": Ours}
        if task in ("check", "training_stored") and "published" not in programs or task == "check" and device != "cpu":
            continue
        workers = [Worker(name, program, options) for name, program in programs.items()]
        try:
            if task == "check":
                example = workers[0].ask("example")
                report[task] = {k: rounded(v) for k, v in workers[1].ask(
                    "check", parameters=example["parameters"], kernel=example["kernel"]).items()
                    if k not in ("wall_seconds", "peak_MB")}
            elif task == "long":
                row = {k: rounded(v) for k, v in workers[0].ask("long", device=device).items() if v}
                peak = row.get("device_peak_MB", row.get("process_peak_MB"))
                report[task] = row | {"samples": LONG, "target_MB": LONG_TARGET_MB, "reached": peak <= LONG_TARGET_MB}
            else:
                report[task] = measure(workers, task, device, options)
        except WorkerError as e:
            say(f"warning: {device} {task}: {e}")
            report[task] = {"error": str(e)}
        finally:
            for w in workers:
                w.close()
    return report


def print_summary(report: dict) -> None:
    for device in ("cpu", "cuda"):
        for task, rows in report.get(device, {}).items():
            for name, row in rows.items() if task not in ("check", "long") and "error" not in rows else ():
                print(f"{device} {task:16s}{name:10s} {spread(row['seconds'])} s, peak {row['peak_MB']} MB"
                      + (f"; {spread(row['ratio'])} times ours" if "ratio" in row else "")
                      + (f", target {row['ratio']['target']}: {'reached' if row['ratio']['reached'] else 'MISSED'}"
                         if "target" in row.get("ratio", {}) else ""))
            if task in ("check", "long") or "error" in rows:
                print(f"{device} {task:16s}{rows}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--published", type=Path, help="checkout of the published networks; without it there are no ratios")
    p.add_argument("--repeats", type=int, default=5, help="number of turns of each program at each task")
    p.add_argument("--seconds", type=float, default=1, help="how long a turn lasts, at least one call")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch, in each program")
    p.add_argument("--tasks", nargs="*", default=["check", "kernel", "training", "training_stored", "long"])
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cres_s4d.json")
    options = p.parse_args(argv)
    if options.published is not None and not (options.published / "src" / "models" / "s4d.py").is_file():
        p.error(f"{options.published}: not a checkout of the published networks: no src/models/s4d.py in it")
    if options.published is not None and importlib.util.find_spec("einops") is None:
        p.error("the published networks need einops: pip install einops")
    return options


def main(argv: list[str] | None = None) -> None:
    options, begun = parse(argv), time.perf_counter()
    import torch

    from deadlayer_cres.core import write_json

    about = machine.about(threads=options.threads)
    if about["load_average"][0] > 0.5:
        say(f"warning: the machine is busy, load average {about['load_average'][0]:.1f}")
    sizes = {"channels": CHANNELS, "state": STATE, "samples": SAMPLES, "batch": BATCH, "layers": LAYERS}
    report = {"environment": about, "sizes": sizes}
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        report[device] = run_device(device, options)
    report |= {"load_average_after": os.getloadavg(), "total_seconds": rounded(time.perf_counter() - begun)}
    write_json(options.out, report)
    print_summary(report)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
