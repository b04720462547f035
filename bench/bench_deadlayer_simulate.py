"""Compares the simulation with the published one and with the measurement, and times it. Writes
bench/results/deadlayer_simulate.json.

    python bench/bench_deadlayer_simulate.py [--decays 10_000_000] [--processes 2] [--hits FILE ...]
        [--more_hits FILE ...]

The published files are `V05268A` in $DEADLAYER_CRES_DATA or ../shared/data. Hits are simulated on the bench
with all its surroundings, twice: without X-rays after internal conversion, as in the published
simulation, and with them, as in nature, for the measurement (a third of the
decays). Hits saved earlier by `save_hits` can be given instead: --hits without, --more_hits with these X-rays.
"""
import argparse
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from machine import about

from deadlayer_cres.core import write_json
from deadlayer_cres.deadlayer.data import PUBLISHED_EXPOSURE, concatenate, read_spectra, shared_data
from deadlayer_cres.deadlayer.detector import Setup, bench_setup
from deadlayer_cres.deadlayer.simulate import (
    concatenate_hits,
    grid_spectra,
    load_hits,
    simulate_hits,
    spectra_of_hits,
    spectrum,
)
from deadlayer_cres.deadlayer.validation import compare, print_comparisons, validate

HERE = Path(__file__).resolve().parent
MEASURED = ((0.97, 1.0), (0.97, 0.1), (1.0, 0.25), (1.05, 0.26))  # FCCD in mm and DLF of fits to the measurement


def simulate(job):
    "Hits of one process, and its CPU seconds."
    decays, conversion, seed = job
    start = time.process_time()
    hits = simulate_hits(decays, bench_setup(conversion_xrays=conversion), seed)
    return hits, time.process_time() - start


def run(decays, processes, conversion, seed):
    "Hits of `processes` side by side, CPU seconds, wall seconds."
    start = time.perf_counter()
    jobs = [(decays // processes, conversion, seed + k) for k in range(processes)]
    with ProcessPoolExecutor(processes) as pool:
        parts = list(pool.map(simulate, jobs))
    return concatenate_hits([h for h, _ in parts]), sum(s for _, s in parts), time.perf_counter() - start


def speed(processes, decays):
    "Time of the full path and of the fast path, and of the grid against one spectrum at a time."
    simulate_hits(1000, bench_setup())
    _, cpu, wall = run(decays, processes, True, 100)
    found = {"decays": decays, "processes": processes, "cpu_seconds_per_million": cpu / decays * 1e6,
             "decays_per_cpu_second": decays / cpu, "decays_per_minute": decays / wall * 60,
             "load_average": os.getloadavg()}
    start = time.process_time()
    hits = simulate_hits(1_000_000, Setup(), seed=1)
    found["fast_path_cpu_seconds_per_million"] = time.process_time() - start
    fccd, dlf = (g.ravel() for g in np.meshgrid(np.linspace(0, 2, 20), np.linspace(0, 1, 10)))
    times = []
    for _ in range(3):
        start = time.process_time()
        grid = grid_spectra(hits, fccd, dlf)
        middle = time.process_time()
        one = np.array([spectrum(hits, f, d) for f, d in zip(fccd, dlf, strict=True)])
        times.append((middle - start, time.process_time() - middle))
    times = np.array(times)
    found["grid"] = {"spectra": len(fccd), "events": hits.events, "cpu_seconds": float(np.median(times[:, 0])),
                     "one_by_one_cpu_seconds": float(np.median(times[:, 1])),
                     "speed_up": (times[:, 1] / times[:, 0]).tolist(), "counts": int(one.sum()),
                     "counts_that_differ": int(np.abs(grid - one).sum()),
                     "peak_memory_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decays", type=int, default=10_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hits", type=Path, nargs="*", default=[])
    parser.add_argument("--more_hits", type=Path, nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = shared_data() and shared_data() / "V05268A"
    if folder is None or not folder.is_dir():
        print("the published spectra are not here: set DEADLAYER_CRES_DATA")
        return
    result = {"machine": about("xraylib"), "seed": args.seed, "speed": speed(args.processes, 400_000)}
    hits = (concatenate_hits(map(load_hits, args.hits)) if args.hits
            else run(args.decays, args.processes, False, args.seed)[0])
    more = (concatenate_hits(map(load_hits, args.more_hits)) if args.more_hits
            else run(args.decays // 3, args.processes, True, args.seed + 50)[0])
    result["decays"] = {"published": hits.decays, "measured": more.decays}
    result["setup"] = hits.provenance["setup"]
    mc = concatenate([read_spectra(p).select_energy(5, 450) for p in sorted(folder.glob("training_data_*"))])
    data = read_spectra(folder / "experimental_data_V05268A.h5").select_energy(5, 450)
    result["checksums"] = {"simulated": mc.checksum, "measured": data.checksum}
    published = validate(hits, mc) | validate(hits, mc, ((0.1, 1.0),))
    print_comparisons(published)
    result["published"] = {label: c.rows() for label, c in published.items()}
    result["misses"] = {label: c.misses() for label, c in published.items()}
    on = validate(more, mc, ((0.1, 1.0), (1.0, 0.1), (1.0, 1.0)))
    result["published, ours with conversion X-rays"] = {label: c.rows() for label, c in on.items()}
    measured = {f"{f:g} mm, DLF {d:g}": compare(spectra_of_hits(more, [f], [d]).select_energy(5, 450), data, "356")
                for f, d in MEASURED}
    print_comparisons(measured)
    result["measured"] = {label: c.rows() for label, c in measured.items()}
    result["measured, decays per decay assumed"] = {label: c.scale * more.decays / (1e8 / PUBLISHED_EXPOSURE)
                                                    for label, c in measured.items()}
    write_json(HERE / "results" / "deadlayer_simulate.json", result)
    print("bench/results/deadlayer_simulate.json")


if __name__ == "__main__":
    main()
