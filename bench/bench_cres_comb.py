"""Combs without a trap, and what a regression on labelled events makes of them, beside baselines and the limit.

    python bench/bench_cres_comb.py [--set cca-8k] [--limit LIMIT]

For a test set: combs of training events (of another seed) and of the first events of the set, a `CombRegression`, and
its figures of merit beside predict-the-mean, peak-frequency and the exact posterior. LIMIT is a table of the
posteriors of the first events of the set; with it rows have their ratio to it. `--set bathtub` does the same in a
bathtub trap with no change of settings, `--set calibration` recovers a planted trap (currents 2 %, field 0.1 mT, other
electrons and noise each time). Results go to bench/results/cres_comb.json, one set at a time.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
from machine import about

from deadlayer_cres.core import read_json, write_json
from deadlayer_cres.cres.comb import (
    TARGETS,
    CombConfig,
    CombFit,
    CombRegression,
    calibrate_trap,
    fit_comb,
    two_pair_trap,
)
from deadlayer_cres.cres.evaluate import (
    Predictions,
    figures_of_merit,
    mean_baseline,
    observe,
    peak_baseline,
    read_table,
)
from deadlayer_cres.cres.simulate import CHECKSUMS, TEST_SETS, Simulator
from deadlayer_cres.cres.trap import BathtubTrap

HERE = Path(__file__).resolve().parent
CONFIG = CombConfig(band_Hz=(-90e6, -30e6))  # of all sets
PLANTED = {"background_T": 0.9591, "current_A": 1.02 * 32.87, "bucking_A": -1.02 * 2.33, "amplitude_V": 0.012}
START = {"background_T": 0.959, "current_A": 32.87, "bucking_A": -2.33, "amplitude_V": 0.010}


def fitted(simulator: Simulator, n: int) -> tuple[CombFit, dict, dict, float]:
    "Combs, labels and observables of the first n events, and CPU seconds of the fit alone."
    fits, labels, seen, seconds = [], [], [], 0.0
    size = min(512, 2**24 // simulator.config.receiver.samples)
    for a in range(0, n, size):
        events = simulator.events(min(size, n - a), a, noise="added")
        began = time.process_time()
        fits.append(fit_comb(events, CONFIG))
        seconds += time.process_time() - began
        labels.append(events.columns)
        seen.append(observe(torch.from_numpy(events.ts), events.sampling_rate_Hz, events.lo_frequency_Hz))
    joined = CombFit(*(torch.cat(v) for v in zip(*(f[:-1] for f in fits), strict=True)), fits[0].length_s)
    return joined, *({k: np.concatenate([p[k] for p in parts]) for k in parts[0]} for parts in (labels, seen)), seconds


def merit(p: Predictions, limit: Predictions | None) -> dict:
    "Figures of merit, and the ratio to the limit for the events whose posterior is known."
    found = figures_of_merit(p)
    if limit is not None:
        both = min(len(p), len(limit))
        shared = figures_of_merit(p[:both], limit=limit[:both])
        for target in set(p.targets) & set(limit.targets):
            found[target]["limit"] = shared[target]["limit"] | {"events": both}
    return found


def regression(simulator: Simulator, train: int, test: int, limit: Predictions | None) -> dict:
    "The rows of a set."
    combs, truth, seen, _ = fitted(simulator.reseeded("train"), train)
    began = time.process_time()
    learnt = CombRegression().fit(combs, truth)
    training = time.process_time() - began
    known = Predictions(TARGETS, np.zeros((train, 3)), truth=truth, observables=seen)
    combs, truth, seen, seconds = fitted(simulator, test)
    began = time.process_time()
    p = learnt.predict(combs, truth)
    predicting = time.process_time() - began
    blank = Predictions(TARGETS, np.zeros((test, 3)), truth=truth, observables=seen)
    rows = {"comb": ("trap-agnostic comb + regression", p), "mean": ("predict the mean", mean_baseline(known, blank)),
            "peak": ("peak frequency", peak_baseline(known, blank))}
    if limit is not None:
        rows["limit"] = "exact posterior", limit
    off = [abs(v[:, 0].cpu().numpy() - truth[k]) < 1.5 / combs.length_s for v, k in
           zip(combs[:2], ("avg_carrier_frequency_Hz", "avg_axial_frequency_Hz"), strict=True)]
    return {"training_events": train, "test_events": test, "carrier_right": float(off[0].mean()),
            "comb_right": float((off[0] & off[1]).mean()), "fit_events_per_cpu_second": test / seconds,
            "predict_events_per_cpu_second": test / predicting, "training_cpu_seconds": training,
            "rows": {k: {"what": what, "merit": merit(v, None if k == "limit" else limit)}
                     for k, (what, v) in rows.items()}}


def calibration(repeats: int, events: int) -> dict:
    "Recovery of a planted trap."
    trap, off, rows = two_pair_trap(*list(PLANTED.values())[:-1]), [], []
    for i in range(repeats):
        combs, truth, _, _ = fitted(Simulator(TEST_SETS["cca-8k"], trap=trap).reseeded("planted", i), events)
        began = time.process_time()
        c = calibrate_trap(combs, truth, START)
        seconds = time.process_time() - began
        d = c.values - list(PLANTED.values())
        off.append(d / c.sigma)
        rows.append({"values": c.values.tolist(), "sigma": c.sigma.tolist(), "chi2": c.chi2, "degrees": c.degrees,
                     "kept": int(c.kept.sum()), "of": len(c.kept),
                     "distance": float(d @ np.linalg.solve(c.covariance, d)),
                     "cpu_seconds": seconds, "pull_rms_before": np.sqrt(np.nanmean(c.start_pulls[c.kept, :2]**2, 0)),
                     "pull_rms_after": np.sqrt(np.nanmean(c.pulls[c.kept, :2]**2, 0))})
        print(i, c, flush=True)
    off = np.array(off)
    return {"events": events, "planted": PLANTED, "start": START, "fits": rows,
            "pulls_of_parameters": {k: {"mean": float(v.mean()), "rms": float(np.sqrt((v**2).mean()))}
                                    for k, v in zip(PLANTED, off.T, strict=True)},
            "mean_distance_of_4_parameters": float(np.mean([r["distance"] for r in rows]))}


def shown(result: dict) -> str:
    lines = [f"{'':34}  RMS           core sigma    median |r|    tail        best 25 %     cov 1, 2 sigma, z RMS"]
    for row in result["rows"].values():
        m = row["merit"]["energy_eV"]
        value = [m["all"][k] for k in ("rms", "core_sigma", "median_abs", "tail_fraction")]
        value += [m["resolution_at_efficiency"]["25"]["rms"]]
        value += [m["calibration"][k] for k in ("coverage_1_sigma", "coverage_2_sigma", "z_rms")]
        lines.append(f"{row['what']:34}  " + "  ".join(f"{v['value']:6.3f}({v['error']:.3f})" for v in value))
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--set", default="cca-8k", choices=[*TEST_SETS, "bathtub", "calibration"])
    p.add_argument("--train", type=int, default=3072, help="labelled events of the regression")
    p.add_argument("--events", type=int, default=2048, help="of the test set; of each fit of a planted trap 500")
    p.add_argument("--repeats", type=int, default=8, help="of the planted trap")
    p.add_argument("--limit", type=Path, help="table of the posteriors of the first events of the test set")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, default=HERE / "results" / "cres_comb.json")
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    if o.set == "calibration":
        result = calibration(o.repeats, 500)
    else:
        trap = BathtubTrap(0.959, 0.8, 0.05) if o.set == "bathtub" else None
        simulator = Simulator(TEST_SETS.get(o.set, TEST_SETS["cca-8k"]), trap=trap)
        result = regression(simulator, o.train, o.events, None if o.limit is None else read_table(o.limit))
        result |= {"checksum": CHECKSUMS.get(o.set)}
        print(shown(result))
    result = {"machine": about() | {"threads": o.threads}, "settings": CONFIG} | result
    write_json(o.out, (read_json(o.out) if o.out.exists() else {}) | {o.set: result})


if __name__ == "__main__":
    main()
