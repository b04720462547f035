"""Speed, accuracy and memory of the simulation of CRES events.

    python bench/bench_cres_simulate.py

For records of 8,192, 24,576 and 163,840 samples, each in a process of its own: events per second with and without
noise, all included (random parameters, axial motion, comb, waveform, noise, labels); the processor time of each stage
(on a GPU, the time by the clock); the peak memory. The settings are those of the test sets, with the seeded noise that
can be made again event by event. The clock is read several times in turns; rates are given by the clock and, less
troubled by what else the machine does, by the processor time. The accuracy is the largest difference between the
single-precision waveform and the same lines summed sample by sample in double precision, in units of the noise.

On CUDA, where present, the same is measured on the GPU. About two minutes on two cores.
"""
import argparse
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import about
from workers import rounded

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = (8192, 24_576, 163_840)
TARGETS = {"events_per_second": 2000, "error_sigma": 1e-3}


def clocked(stages: dict, seconds: float, wait) -> dict:
    "Run all `stages` in turns for about `seconds`; name -> list of (seconds, processor seconds)."
    for step in stages.values():
        step()
    times = {name: [] for name in stages}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(stages))]) < 3:
        for name, step in stages.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            wait()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def rates(times: list[tuple[float, float]], n: int) -> dict:
    "Events per second: median and best by the clock, median by the processor time."
    wall, cpu = zip(*times, strict=True)
    return {"events_per_second": {"median": rounded(n / statistics.median(wall)), "best": rounded(n / min(wall))},
            "events_per_cpu_second": rounded(n / max(statistics.median(cpu), 1e-9)), "turns": len(times)}


def largest_error(simulator, n: int) -> float:
    "Largest difference of the waveforms of `n` events from the formula in double precision, in units of the noise."
    import torch

    r, worst = simulator.config.receiver, 0.0
    ts, _ = simulator.signal(n)
    tracks = simulator.tracks(n)[0]
    t = torch.arange(r.samples, dtype=torch.float64, device=ts.device) / r.sampling_rate_Hz
    for i in range(n):
        f = tracks.comb.frequency_Hz[i] - r.lo_frequency_Hz
        cycles = f[:, None] * t + tracks.slope_Hz_per_s[i].reshape(-1, 1) * t**2 / 2
        z = r.amplitude_V * tracks.comb.amplitude[i] @ torch.exp(2j * math.pi * (cycles - cycles.round()))
        worst = max(worst, float((torch.complex(*ts[i].double()) - z).abs().max()))
    return worst / simulator.noise.sigma_V


def measure(samples: int, seconds: float, threads: int, device: str) -> dict:
    "All numbers of one length of record, in this process."
    import torch

    from deadlayer_cres.cres.simulate import ReceiverConfig, SimulateConfig, Simulator

    torch.set_num_threads(threads)
    gpu = device.startswith("cuda")
    n = max(16, (2**26 if gpu else 2**22) // samples)
    simulator = Simulator(SimulateConfig(seed=1, receiver=ReceiverConfig(samples=samples)), device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    tracks = simulator.tracks(n)[0]
    ts = torch.empty(n, 2, samples, device=simulator.device)

    def with_noise():
        out, _ = simulator.signal(n)
        for part in simulator.slices(n):
            out[part] += simulator.noise.counted(len(out[part]), samples, 1, part.start, simulator.device)

    def noise(draw):
        for part in simulator.slices(n):
            ts[part] = draw(len(ts[part]), part.start)

    stages = {
        "clean": lambda: simulator.signal(n),
        "noisy": with_noise,
        "parameters": lambda: simulator.draw(n),
        "parameters and comb": lambda: simulator.tracks(n),
        "waveform": lambda: simulator.add_lines(ts, tracks, fresh=True),
        "seeded noise": lambda: noise(lambda m, first: simulator.noise.counted(m, samples, 1, first, simulator.device)),
        "noise of the device": lambda: noise(lambda m, first: simulator.noise.fresh(m, samples, generator)),
    }
    times = clocked(stages, seconds, torch.cuda.synchronize if gpu else lambda: None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    micro = {k: 1e6 * statistics.median(t[0 if gpu else 1] for t in v) / n for k, v in times.items()}
    micro["comb"] = micro.pop("parameters and comb") - micro["parameters"]
    noisy = micro.pop("noisy")
    micro.pop("clean")
    return {
        "batch": n, "clean": rates(times["clean"], n), "noisy": rates(times["noisy"], n),
        "microseconds_per_event": {k: rounded(micro[k]) for k in
                                   ("parameters", "comb", "waveform", "seeded noise", "noise of the device")},
        "share_of_noisy": {k: rounded(micro[k] / noisy) for k in ("parameters", "comb", "waveform", "seeded noise")},
        "error_sigma": rounded(largest_error(simulator, 4)),
        "peak_MB": round(peak), "peak_GPU_MB": round(torch.cuda.max_memory_allocated() / 2**20) if gpu else None,
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--seconds", type=float, default=15, help="how long each length of record is measured")
    p.add_argument("--threads", type=int, nargs="*", default=sorted({1, len(os.sched_getaffinity(0))}),
                   help="of torch; default: one, and one for each core. Several are slow where other programs run")
    p.add_argument("--samples", type=int, nargs="*", default=list(SAMPLES), help="lengths of the records")
    p.add_argument("--device", nargs="*", help="cpu, cuda or both; default: all that there are")
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cres_simulate.json")
    p.add_argument("--one", help=argparse.SUPPRESS)  # device:samples:threads, measured in this process and printed
    options = p.parse_args(argv)
    if min(options.seconds, *options.threads, *options.samples) <= 0:
        p.error("--seconds, --threads and --samples must be above 0")
    return options


def main() -> None:
    options = parse()
    if options.one:
        device, samples, threads = options.one.split(":")
        print(json.dumps(measure(int(samples), options.seconds, int(threads), device)))
        return
    import torch

    from deadlayer_cres.core import write_json

    report = {"environment": about(), "targets": TARGETS}
    for device in options.device or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        report[device] = {}
        for samples, threads in itertools.product(options.samples, options.threads[:1 if device == "cuda" else None]):
            command = [sys.executable, __file__, f"--one={device}:{samples}:{threads}", f"--seconds={options.seconds}"]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                sys.exit(f"{device}, {samples} samples: {run.stderr.strip().splitlines()[-1]}")
            row = json.loads(run.stdout.splitlines()[-1])
            report[device].setdefault(str(samples), {})[f"{threads} threads"] = row
            noisy, clean = (row[k]["events_per_second"]["median"] for k in ("noisy", "clean"))
            print(f"{device}, {samples} samples, {threads} threads: {noisy:g} events/s with noise, {clean:g} without; "
                  f"with noise {row['noisy']['events_per_cpu_second']:g} per CPU second; "
                  f"error {row['error_sigma']:g} sigma, peak {row['peak_MB']} MB; us per event: "
                  f"{row['microseconds_per_event']}", flush=True)
    write_json(options.out, report)


if __name__ == "__main__":
    main()
