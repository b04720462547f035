"""Calibrated posteriors of trained networks: coverage, width beside the limit, bias under nuisance parameters, guard,
loop. Writes bench/results/deadlayer_posterior.json.

    python bench/bench_deadlayer_posterior.py --runs reference=RUN robust=RUN [--spectra STORE] [--measured FILE]

Without --spectra and --measured the published files are taken: `V05268A` in $DEADLAYER_CRES_DATA or ../shared/data.
Networks whose run draws nuisance parameters are calibrated and tested with them, the others without. Calibration and
coverage use the validation and test parts of the run's split, cross-fitted: their blocks are dealt into ten folds, and
each fold is judged by a calibration on the other nine; errors are by block. Bias, guard and the measurement use the
calibration on all of them, bias and the power of the guard the test part; the references come from an emulator of the
training part. Networks that the file holds already, and that are not named, stay in it.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
from machine import about

from deadlayer_cres.core import read_json, write_json
from deadlayer_cres.deadlayer import posterior as ps
from deadlayer_cres.deadlayer.data import concatenate, read_spectra, shared_data
from deadlayer_cres.deadlayer.likelihood import fit_emulator
from deadlayer_cres.deadlayer.peaks import calibrate as calibrate_peaks
from deadlayer_cres.deadlayer.peaks import intensity_table, peak_ratio
from deadlayer_cres.deadlayer.prep import NuisanceConfig
from deadlayer_cres.deadlayer.train import load_run, split_spectra

HERE = Path(__file__).resolve().parent
CHANGES = {"none": {}, "shift 0.1 keV": {"shift_keV": 0.1}, "shift -0.1 keV": {"shift_keV": -0.1},
           "resolution 2 %": {"resolution": 0.02}, "resolution -2 %": {"resolution": -0.02},
           "scale 3 %": {"scale": 1.03}, "scale -3 %": {"scale": 0.97}, "gain 0.05 %": {"gain": 5e-4},
           "gain -0.05 %": {"gain": -5e-4}, "flat background 0.25 %": {"flat": 0.0025},
           "exponential background 0.25 %": {"exponential": 0.0025}}
DEFECTS = {"1 % more in 210-290 keV": (210, 290, 1.01), "2 % more in 45-70 keV": (45, 70, 1.02),
           "5 % more in 395-450 keV": (395, 450, 1.05), "5 % more in 25-45 keV": (25, 45, 1.05),
           "1 % more in 100-140 keV": (100, 140, 1.01)}


def by_spectra(values: np.ndarray, row: np.ndarray) -> tuple[float, float]:
    "Mean, and its error from the scatter between spectra, or between blocks of them."
    group = np.unique(row, return_inverse=True)[1]
    mean = values.mean()
    return float(mean), float(np.sqrt((np.bincount(group, values - mean) ** 2).sum()) / len(values))


def coverage(scans, e, split, law, emulator, seed):
    "Cross-fitted rank histograms, coverages, and widths beside the limits, nuisance parameters known or not."
    block, fold = ps.folds(e, split, seed=seed)
    ranks, half = {k: np.empty(len(e)) for k in ("FCCD", "DLF")}, {k: np.empty(len(e)) for k in ("68", "90")}
    median, dlf_half, dlf_median = (np.empty(len(e)) for _ in range(3))
    for k in range(fold.max() + 1):
        here, others = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
        answer = ps.Posteriors(scans[here], ps.fit_calibration(scans[others], e[others]))
        ranks["FCCD"][here], ranks["DLF"][here] = answer.rank(e.fccd_in_mm[here]), answer.dlf_rank(e.dlf[here])
        for name in half:
            half[name][here] = np.diff(answer.interval(name))[:, 0] / 2
        median[here], dlf_median[here] = answer.quantile(0.5), answer.dlf(0.5)
        dlf_half[here] = (answer.dlf(0.84) - answer.dlf(0.16)) / 2
    found = {k: ps.sbc(r, block) for k, r in ranks.items()}
    found["DLF < 0.1"] = ps.sbc(ranks["DLF"][e.dlf < 0.1], block[e.dlf < 0.1])
    found["DLF >= 0.1"] = ps.sbc(ranks["DLF"][e.dlf >= 0.1], block[e.dlf >= 0.1])
    free = NuisanceConfig(shift_keV=0, gain=0, resolution=0, scale=0.9, background=0)
    limits = {"nuisance known": None, "scale free": free} | ({"nuisance free": law} if law else {})
    found["width_mm"] = {f"half of {name} %": by_spectra(half[name], block) for name in half}
    found["width of DLF"] = {"half of 68 %": by_spectra(dlf_half, block),
                             "rms of median - truth": float(np.sqrt(((dlf_median - e.dlf) ** 2).mean()))}
    half, n = half["68"], len(e)
    for name, these in limits.items():
        limit = np.concatenate([ps.fisher_limit(emulator, e.fccd_in_mm[k:k + 250], e.dlf[k:k + 250], these)
                                for k in range(0, n, 250)])
        mean, error = by_spectra(half, block)
        found[f"limit, {name}"] = {"mean_mm": float(limit.mean()), "width / limit": mean / limit.mean(),
                                   "error": error / limit.mean(),
                                   "rms of (median - truth) / limit": float(np.sqrt((((median - e.fccd_in_mm)
                                                                                      / limit) ** 2).mean()))}
    return found


def bias(net, test, references, calibration, n, seed):
    "Shift of the median by each change, in units of the quoted error, on the same spectra with the same seed."
    rows, base = {}, None
    for name, change in CHANGES.items():
        e = ps.pseudo_experiments(test, n, change, seed, (0.3, 1.7))
        answer = ps.infer_posterior(net, e.counts, references, calibration)
        off, half = answer.quantile(0.5) - e.fccd_in_mm, np.diff(answer.interval("68"))[:, 0] / 2
        base = off if base is None else base
        (mean, error), (pull, pull_error) = by_spectra(off - base, e.row), by_spectra((off - base) / half, e.row)
        near = (e.fccd_in_mm > 0.8) & (e.fccd_in_mm < 1.2)
        rows[name] = {"bias_mm": mean, "error_mm": error, "bias / quoted error": pull, "error": pull_error,
                      "rms / quoted error": float(np.sqrt((((off - base) / half) ** 2).mean())),
                      "bias / quoted error, 0.8-1.2 mm": float(((off - base) / half)[near].mean()),
                      "total bias / quoted error": by_spectra(off / half, e.row)[0],
                      "quoted_error_mm": float(half.mean())}
    return rows


def guard_power(guard, test, law, n, seed):
    "Share of pseudo-experiments that are flagged, as they are and with planted defects."
    rows, centres = {}, test.centres_keV
    for name, (low, high, factor) in ({"as simulated": (0, 0, 1.0)} | DEFECTS).items():
        e = ps.pseudo_experiments(test, n, law, seed)
        inside = torch.as_tensor((centres > low) & (centres < high))
        extra = e.counts * inside * (factor - 1)
        counts = e.counts + torch.poisson(extra, generator=torch.Generator().manual_seed(seed))
        verdicts = guard.check(counts, e.fccd_in_mm, e.dlf)
        flagged = np.array([not v["described"] for v in verdicts])
        there = [any(float(d.split("-")[0]) < high and float(d.split("-")[1].split()[0]) > low for d in v["disagree"])
                 for v in verdicts]
        share, error = by_spectra(flagged.astype(float), e.row)
        rows[name] = {"flagged": share, "error": error, "experiments": n,
                      "window named": float(np.mean(there)) if high else None}
    return rows


def measured_answer(net, data, references, calibration, guard, emulator, start):
    "Posterior, verdict and loop of the measured spectrum."
    answer = ps.infer_posterior(net, data.counts, references, calibration)
    verdict = guard.check(data.counts, answer.quantile(0.5), answer.dlf(0.5))[0]
    loop = ps.iterate(net, data, emulator, start, calibration)
    return {"posterior": answer.summary(), "described": verdict["described"], "disagree": verdict["disagree"],
            "windows": verdict["windows"], "best_description": verdict["parameters"],
            "loop": {"start_in_mm": start, "fccd_in_mm": loop.fccd_in_mm, "dlf": loop.dlf, "balanced": loop.balanced,
                     "steps": loop.steps}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, help="NAME=RUN")
    parser.add_argument("--spectra", type=Path, default=None)
    parser.add_argument("--measured", type=Path, default=None)
    parser.add_argument("--experiments", type=int, default=3000)
    parser.add_argument("--bias", type=int, default=400)
    parser.add_argument("--guard", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "deadlayer_posterior.json")
    args = parser.parse_args()
    folder = shared_data() and shared_data() / "V05268A"
    if (args.spectra is None or args.measured is None) and (folder is None or not folder.is_dir()):
        print("the published spectra are not here: give --spectra and --measured, or set DEADLAYER_CRES_DATA")
        return
    start = time.perf_counter()
    sources = [args.spectra] if args.spectra else sorted(folder.glob("training_data_*"))
    mc = concatenate([read_spectra(p).select_energy(5, 450) for p in sources])
    data = read_spectra(args.measured or folder / "experimental_data_V05268A.h5").select_energy(5, 450)
    result = read_json(args.out) if args.out.exists() else {}
    result |= {"checksums": {"simulated": mc.checksum, "measured": data.checksum}, "seed": args.seed}
    share = intensity_table("HADES")[0]
    peak = calibrate_peaks(mc, "step", share, 0.0, 60).invert(peak_ratio(data, "step", share, 0.0).value, 1.0)
    emulator, split = None, None
    for name, path in (r.split("=", 1) for r in args.runs):
        _, config, net = load_run(path, "cpu")
        parts = split_spectra(mc, config.data.split)
        valid, test = parts["random_dlf"]["valid"], parts["random_dlf"]["test"]
        if emulator is None or split != config.data.split:
            emulator, split = fit_emulator(concatenate([p["train"] for p in parts.values()])), config.data.split
            references = ps.reference_spectra(emulator)
            guard = ps.fit_guard(emulator, valid, n=args.guard, seed=args.seed)  # the test part is for its power
            power = guard_power(guard, test, NuisanceConfig(draw=True), args.guard, args.seed + 1)
            result["guard"] = {"p_value": guard.p_value, "inflation": guard.inflation, "law": guard.law,
                               "false_alarm": guard.false_alarm, "experiments": guard.experiments, "power": power}
            print(f"{time.perf_counter() - start:.0f} s  guard {result['guard']}", flush=True)
        law = config.pairs.nuisance if config.pairs.nuisance.draw else None
        e = ps.pseudo_experiments(concatenate([valid, test]), args.experiments, law, args.seed)
        scans = ps.scan_spectra(net, e.counts, references)
        calibration = ps.fit_calibration(scans, e)
        found = {"machine": about(), "calibration": {"experiments": calibration.experiments,
                                                     "spectra": calibration.spectra}}
        found["coverage"] = coverage(scans, e, config.data.split, law, emulator, args.seed)
        print(f"{time.perf_counter() - start:.0f} s  {name} coverage {found['coverage']}", flush=True)
        found["bias"] = bias(net, test, references, calibration, args.bias, args.seed + 2)
        print(f"{time.perf_counter() - start:.0f} s  {name} bias {found['bias']}", flush=True)
        found["measured"] = measured_answer(net, data, references, calibration, guard, emulator, peak)
        result[name] = found | {"seconds": time.perf_counter() - start}
        write_json(args.out, result)
        print(f"{time.perf_counter() - start:.0f} s  {name} {found['measured']['posterior']}", flush=True)
    print(f"written to {args.out.name}")


if __name__ == "__main__":
    main()
