"""How well the energy is known after so many samples: the limit and the methods, on the same electrons at each length.

    python bench/bench_cres_length.py [--runs RUNS] [--lengths 2048 ...]

The electrons of the test set `cca-24k` (18.55 to 18.65 keV, pitch angles from 88 degrees) are recorded for 2,048 to
163,840 samples; a shorter record is the beginning of a longer one, and that of 24,576 samples is the one of the set. At
a length all rows are of the same events; there are fewer of them in records of more than 49,152 samples.

- `mean`: the mean of the training events;
- `brightest_bin`, `matched_filter`, `matched_filter_mean`: of `cres.detect` (the bank's time grows with the square of
  the length, so it is left out beyond 24,576 samples);
- `comb`: `cres.comb`, combs without a trap model and a regression on labelled events of another seed;
- `posterior`: `cres.fit.Ridge`, default settings;
- `likelihood`: `cres.refine.Fitter` from the best places of the posterior of the whole record, no network, where its
  modes hold all of the evidence, else the posterior (`Fitter.combined`);
- `network`: the networks `RUNS/cca-8k/fold` and `RUNS/cca-24k/fold` of bench_cres_compare.py, at their own lengths. The
  first was trained on 18.5 to 18.7 keV, and so knows less beforehand than the other rows;
- `limit`: the mean of the posterior with cells as fine as the likelihood. Beyond 100 microseconds (40,300 samples) each
  line has a chirp of its own, which `Ridge` neglects and `Fitter` knows: there it would be no limit, and is left out.

`published` holds the widths of the cores that the published network reaches (public notebooks of neutrino_project: S4D,
6 x 128, on the FFT), and what the collaboration aims at: of another trap, other energies and another coupling, so that
they tell orders of magnitude. Results go to bench/results/cres_length.json, a length at a time; lengths that are not
asked for keep their last results. With `--rows likelihood limit` only these rows are renewed, for the events that the
length has.
"""
import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from bench_cres_comb import fitted
from machine import about

from deadlayer_cres.core import read_json, write_json
from deadlayer_cres.cres.comb import CombRegression
from deadlayer_cres.cres.detect import BrightestBin, MatchedFilter, bank_mean
from deadlayer_cres.cres.evaluate import Predictions, figures_of_merit, mean_baseline, reconstruct
from deadlayer_cres.cres.fit import Ridge, RidgeConfig, summaries
from deadlayer_cres.cres.refine import Fitter
from deadlayer_cres.cres.simulate import TEST_SETS, Simulator

HERE = Path(__file__).resolve().parent
LENGTHS = (2048, 4096, 8192, 12_000, 24_576, 49_152, 163_840)
WHAT = {"mean": "predict the mean", "brightest_bin": "brightest bin",
        "matched_filter": "matched-filter bank, best template", "matched_filter_mean": "matched-filter bank, mean",
        "comb": "trap-agnostic comb + regression", "posterior": "ridge posterior", "likelihood": "ridge + likelihood",
        "network": "network", "limit": "limit"}
TARGETS = ("energy_eV", "pitch_angle_deg")
PUBLISHED = {"core_sigma_eV": {"4096": 3.51, "8192": 1.43, "12000": 1.26}, "goal_eV": 0.3,
             "source": "notebooks of chreissel/neutrino_project; goal: Project 8, indico.global/event/15740"}
BANK, LONG = 24_576, 49_152  # samples of the longest records for the bank; of longer ones there are fewer events


def simulator_of(samples: int) -> Simulator:
    "The electrons of `cca-24k` in records of another length."
    config = TEST_SETS["cca-24k"]
    return Simulator(replace(config, receiver=replace(config.receiver, samples=samples)), device="cpu")


def fewer(n: int, samples: int) -> int:
    "Number of events of a length."
    return int(n * min(1, LONG / samples))


def exact(samples: int) -> bool:
    "Whether the chirps of all lines are alike."
    return samples <= 100e-6 * TEST_SETS["cca-24k"].receiver.sampling_rate_Hz


def posterior(ridge: Ridge, events) -> Predictions:
    s = summaries(ridge, events.ts)
    mean, sigma = (np.stack([s[f"{k}_{what}"] for k in TARGETS], 1) for what in ("mean", "sigma"))
    return Predictions(TARGETS, mean, sigma, truth=events.columns)


def likelihood(simulator: Simulator, events) -> Predictions:
    "Moments of the modes that the likelihood has about the best places of the posterior, or of the posterior."
    fitter, ridge, parts = Fitter(simulator), Ridge(simulator), []
    for a in range(0, len(events), 16):
        ts = torch.as_tensor(events.ts[a:a + 16])
        parts.append(torch.stack(fitter.combined(ts, ridge(ts))[:2], 1))
    both = torch.cat(parts).numpy()  # (n, 2, energy, pitch angle and radius)
    return Predictions(TARGETS, both[:, 0, :2], both[:, 1, :2], truth=events.columns)


def trained(run: Path, events) -> Predictions:
    from deadlayer_cres.cres.train import load_run

    return reconstruct(load_run(run)[2], events, "none")


def predictions(samples: int, n: int, train: int, runs: Path | None) -> dict[str, tuple[Predictions, float]]:
    "All rows of a length, with their CPU seconds."
    simulator = simulator_of(samples)
    some = fewer(train, samples)
    combs, labels, _, _ = fitted(simulator.reseeded("train"), some)
    events, found = simulator.events(n), {}

    def row(name, function, *args):
        began = time.process_time()
        found[name] = function(*args), time.process_time() - began
        print(f"{samples} {name}: {found[name][1] / n:.3g} CPU seconds an event", flush=True)

    known = Predictions((), np.zeros((len(labels["energy_eV"]), 0)), truth=labels)
    row("mean", mean_baseline, known, Predictions((), np.zeros((n, 0)), truth=events.columns))
    bin_ = BrightestBin()
    bin_.learn(simulator.reseeded("train").events(min(some, 1024), noise="added"))
    row("brightest_bin", search, bin_, events)
    if samples <= BANK:
        bank = MatchedFilter(simulator, batch=max(1, 32 * 8192 // max(samples, 8192)))
        row("matched_filter", search, bank, events)
        found["matched_filter_mean"] = bank_mean(found["matched_filter"][0]), found["matched_filter"][1]
    regression = CombRegression().fit(combs, labels)
    began = time.process_time()
    combs, truth, _, seconds = fitted(simulator, n)
    found["comb"] = regression.predict(combs, truth), seconds + time.process_time() - began
    row("posterior", posterior, Ridge(simulator), events)
    row("likelihood", likelihood, simulator, events)
    run = None if runs is None else {8192: runs / "cca-8k" / "fold", 24_576: runs / "cca-24k" / "fold"}.get(samples)
    if run is not None:
        row("network", trained, run, events)
    if exact(samples):
        row("limit", posterior, Ridge(simulator, RidgeConfig.exact()), events)
    return found


def search(detector, events) -> Predictions:
    "What a search says of events, without its false alarms."
    found = detector.found(events)
    mean, sigma = detector.estimate(found)
    return Predictions(detector.targets, mean, sigma, events.columns, found)


def renewed(before: dict, names: list[str]) -> dict:
    "The rows of a length with `likelihood` and `limit`, or one of them, calculated anew."
    samples, n, rows = before["samples"], before["events"], dict(before["rows"])
    simulator, found = simulator_of(samples), {}
    events = simulator.events(n)
    for name in ("limit", "likelihood"):
        if name in names and name in rows:
            began = time.process_time()
            found[name] = (posterior(Ridge(simulator, RidgeConfig.exact()), events) if name == "limit" else
                           likelihood(simulator, events))
            m = figures_of_merit(found[name], limit=None if name == "limit" else found.get("limit"))["energy_eV"]
            rows[name] = {"what": WHAT[name], "merit": m, "machine": about(),
                          "events_per_cpu_second": n / (time.process_time() - began)}
    return before | {"rows": rows}


def at_length(samples: int, n: int, train: int, runs: Path | None) -> dict:
    "The rows of a length."
    found = predictions(samples, n, train, runs)
    limit, rows = found.get("limit", (None,))[0], {}
    for name, (p, seconds) in found.items():
        m = figures_of_merit(p, limit=None if name == "limit" else limit)["energy_eV"]
        rows[name] = {"what": WHAT[name], "merit": m}
        if name != "mean":
            rows[name]["events_per_cpu_second"] = n / seconds
    return {"machine": about(), "samples": samples, "events": n, "rows": rows}


def shown(result: dict) -> str:
    "The table of a length."
    lines = [f"{result['samples']:,} samples, {result['events']} events; eV        "
             "RMS           core sigma    median |r|    tail          best 25 %      z RMS         limit"]
    for r in result["rows"].values():
        m = r["merit"]
        value = [m["all"][k] for k in ("rms", "core_sigma", "median_abs", "tail_fraction")]
        value += [m["resolution_at_efficiency"]["25"]["rms"], m["calibration"]["z_rms"]]
        value += [m["limit"]["rms_ratio"]] if "limit" in m else []
        lines.append(f"{r['what']:36}" + "  ".join(f"{v['value']:6.3f}({v['error']:.3f})" for v in value))
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="in samples")
    p.add_argument("--events", type=int, default=256, help="of records of up to 49,152 samples")
    p.add_argument("--train", type=int, default=2048, help="labelled events of the regression, likewise")
    p.add_argument("--runs", type=Path, help="folder of the runs of bench_cres_compare.py; without it no network")
    p.add_argument("--rows", nargs="+", choices=("likelihood", "limit"), help="renew only these")
    p.add_argument("--out", type=Path, default=HERE / "results" / "cres_length.json")
    o = p.parse_args()
    torch.set_num_threads(1)
    for samples in o.lengths:
        before = read_json(o.out)["lengths"] if o.out.exists() else {}
        result = renewed(before[str(samples)], o.rows) if o.rows else at_length(
            samples, fewer(o.events, samples), o.train, o.runs)
        print(shown(result), flush=True)
        lengths = {k: v for k, v in sorted((before | {str(samples): result}).items(), key=lambda kv: int(kv[0]))}
        write_json(o.out, {"published": PUBLISHED, "lengths": lengths})


if __name__ == "__main__":
    main()
