"""What the likelihood adds to a network, and to the posterior: errors, coverage and time, beside the limit.

    python bench/bench_cres_refine.py --run cca-8k=runs/cca-8k/fold --run cca-24k=runs/cca-24k/fold \\
        --exact cca-8k=limit_cca8k.csv --exact cca-24k=limit_cca24k.csv

On the first events of `cca-8k` and `cca-24k`, with standard errors:

- `blind`: the middle of the ranges;
- `network`: the runs given with `--run`;
- `posterior`: the mean of the posterior of `cres.fit.Ridge`, default settings;
- `network, refined`: what `cres infer --refine` writes, `cres.refine.Refiner` with its default settings;
- `network modes, fitted`: `cres.refine.Fitter` from the modes of the network alone, at three radii each, weighed
  by evidence;
- `posterior, fitted`: `Fitter` from the best places of the posteriors, where its modes hold all of the evidence, else
  the posteriors (`Fitter.combined`);
- `limit`: the mean of the exact posterior, from a table of `cres.evaluate.write_table` given with `--exact`, else
  calculated by `cres.fit.Ridge` with the settings `RidgeConfig.exact()`.

`network kept` tells what would be lost and gained if the network's answer stood for part of the events, those of the
smallest or of the largest sigma of the network: RMS error over that of refining all, the same of the best quarter by
the final sigma, and the speed over that of refining all.

Single-mode events are those that the refined table flags. `merit` holds the figures of merit of
`cres.evaluate.figures_of_merit`. Times are those of the process (CPU seconds) per event.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from machine import about

from deadlayer_cres.core import atomic_path, write_json
from deadlayer_cres.cres.evaluate import Predictions, figures_of_merit, read_table, reconstruct, residual
from deadlayer_cres.cres.fit import Ridge, RidgeConfig, summaries
from deadlayer_cres.cres.refine import Fitter, Refiner, compare_posteriors
from deadlayer_cres.cres.simulate import CHECKSUMS, TEST_SETS, Simulator, test_set

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("energy_eV", "pitch_angle_deg")
SLOW = 512  # most events whose fits begin with the modes of the network


def rounded(value) -> float:
    return float(f"{float(value):.4g}")


def rms(x: np.ndarray) -> dict:
    "Root of the mean square with its standard error."
    value = np.sqrt(np.mean(x**2))
    return {"value": rounded(value), "error": rounded(np.std(x**2) / np.sqrt(len(x)) / (2 * value)), "n": len(x)}


def share(x: np.ndarray) -> dict:
    p = float(np.mean(x))
    return {"value": rounded(p), "error": rounded(np.sqrt(max(p * (1 - p), 1e-9) / len(x))), "n": len(x)}


def merits(p: Predictions, limit: Predictions, single: np.ndarray, seconds: float | None) -> dict:
    r, sigma = residual(p), p.sigma[:, 0]
    best = np.argsort(sigma)[:len(r) // 4]
    out = {"rms_eV": rms(r), "ratio_to_limit": rounded(np.sqrt(np.mean(r**2) / np.mean(residual(limit) ** 2))),
           "away_from_limit_rms_eV": rounded(np.sqrt(np.mean((p.mean[:, 0] - limit.mean[:, 0]) ** 2))),
           "median_abs_error_eV": rounded(np.median(np.abs(r))), "best_quarter": rms(r[best]),
           "single_mode_rms_eV": rms(r[single]),
           "single_mode_ratio": rounded(np.median(np.abs(r[single]) / limit.sigma[single, 0]) / 0.6745),
           "coverage_1_sigma": share(np.abs(r) < sigma), "coverage_2_sigma": share(np.abs(r) < 2 * sigma),
           "z_score_rms": rms(r / sigma), "merit": figures_of_merit(p, limit=limit)["energy_eV"]}
    return out | ({} if seconds is None else {"seconds_per_event": rounded(seconds / len(r))})


def timed(function, *args):
    began = time.process_time()
    return function(*args), time.process_time() - began


def exact_of(name: str, events, table: str | None) -> tuple[Predictions, float | None]:
    "Exact posterior means of the events, from a table or calculated."
    if table is not None:
        return read_table(table)[:len(events)], None
    return timed(means, Ridge(Simulator(TEST_SETS[name]), RidgeConfig.exact()), events)


def means(ridge: Ridge, events) -> Predictions:
    "Means and standard deviations of posteriors."
    s = summaries(ridge, events.ts)
    mean, sigma = (np.stack([s[f"{k}_{what}"] for k in TARGETS], 1) for what in ("mean", "sigma"))
    return Predictions(TARGETS, mean, sigma, truth=events.columns)


def fitted(fitter: Fitter, events, starts, keep: int = 2) -> Predictions:
    "Moments of the modes of fits."
    parts = []
    for a in range(0, len(events), 64):
        f = fitter(events.ts[a:a + 64], starts(a), keep)
        parts.append(torch.stack([torch.stack(f.moments(k), 1) for k in TARGETS], 2))
    both = torch.cat(parts).cpu().numpy()  # (n, 2, targets)
    return Predictions(TARGETS, both[:, 0], both[:, 1], truth=events.columns)


def main(name: str, n: int, table: str | None, run: str | None) -> dict:
    events, simulator = test_set(name, n), Simulator(TEST_SETS[name])
    limit, seconds = exact_of(name, events, table)
    middle = np.array([[sum(v) / 2, (v[1] - v[0]) / 12**0.5] for v in (
        (simulator.config.electrons.energy_low_eV, simulator.config.electrons.energy_high_eV), (88.0, 90.0))])
    blind = Predictions(TARGETS, np.tile(middle[:, 0], (n, 1)), np.tile(middle[:, 1], (n, 1)), truth=events.columns)
    found, times = {"blind": blind}, {"limit": seconds}
    if run is not None:
        from deadlayer_cres.cres.train import load_run

        pipeline = load_run(run, simulator.device)[2]
        reconstruct(pipeline, events[:64], "none")
        found["network"], times["network"] = timed(reconstruct, pipeline, events, "none")
    refiner = Refiner(simulator)
    found["posterior"], times["posterior"] = timed(means, refiner.ridge, events)
    (refined, flags), times["network, refined"] = timed(refiner, found.get("network", blind), events.ts)
    found["network, refined"] = refined
    times["network, refined"] += times.get("network") or 0
    fitter = refiner.fitter
    if "network" in found:
        radii = torch.tensor([2e-3, 3.5e-3, 5e-3], dtype=torch.float64)

        def network_modes(a):
            m = torch.as_tensor(found["network"].modes[a:a + 64], dtype=torch.float64)
            grid = torch.cat([m.repeat_interleave(3, 1), radii.repeat(m.shape[1]).expand(len(m), -1)[..., None]], 2)
            return grid

        label = "network modes, fitted"
        found[label], times[label] = timed(fitted, fitter, events[:SLOW], network_modes)
        times[label] += times["network"] * len(found[label]) / n

    def from_posterior():
        parts = []
        for a in range(0, n, 16):
            ts = torch.as_tensor(events.ts[a:a + 16])
            parts.append(torch.stack(fitter.combined(ts, refiner.ridge(ts))[:2], 1))
        both = torch.cat(parts).cpu().numpy()[..., :2]
        return Predictions(TARGETS, both[:, 0], both[:, 1], truth=events.columns)

    found["posterior, fitted"], times["posterior, fitted"] = timed(from_posterior)
    found["limit"] = limit
    single = flags["single_mode"]
    out = {"events": n, "checksum": CHECKSUMS[name], "flags": {k: share(v) for k, v in flags.items()},
           **{k: merits(p, limit[:len(p)], single[:len(p)], times.get(k)) for k, p in found.items()}}
    if "network" in found:
        out["network kept"] = kept(found["network"], refined, times["network"] / times["network, refined"])
        out["network against posterior"] = compared(refiner, found["network"][:256], events.ts[:256])
    return out


def kept(network: Predictions, refined: Predictions, share: float) -> dict:
    "Refining part of the events; the network takes `share` of the time that refining all takes with it."
    order, all_, out = np.argsort(network.sigma[:, 0]), residual(refined), {}
    best = lambda r, sigma: np.sqrt(np.mean(r[np.argsort(sigma)[:len(r) // 4]] ** 2))  # noqa: E731
    for part in (0.1, 0.2, 0.3, 0.5, 0.7):
        k = round(part * len(order))
        row = {"speed": rounded(1 / (1 - part * (1 - share)))}
        for name, i in (("smallest", order[:k]), ("largest", order[len(order) - k:])):
            r, sigma = all_.copy(), refined.sigma[:, 0].copy()
            r[i], sigma[i] = residual(network)[i], network.sigma[i, 0]
            row[name] = {"rms": rounded(np.sqrt(np.mean(r**2) / np.mean(all_**2))),
                         "best_quarter": rounded(best(r, sigma) / best(all_, refined.sigma[:, 0]))}
        out[f"{part:g}"] = row
    return out


def compared(refiner: Refiner, p: Predictions, ts) -> dict:
    "Medians over events of the distances of `compare_posteriors`, all and where the posterior is narrow."
    posteriors = ((a, refiner.ridge(torch.as_tensor(ts[a:a + 16]))) for a in range(0, len(p), 16))
    parts = [compare_posteriors(p[a:a + 16], exact) for a, exact in posteriors]
    c = {k: np.concatenate([q[k] for q in parts]) for k in parts[0]}
    groups = {"all": c["sigma_eV"] > 0, "sigma below 5 eV": c["sigma_eV"] < 5, "sigma above 5 eV": c["sigma_eV"] >= 5}
    return {g: {"events": int(m.sum()), **{k: rounded(np.median(v[m])) for k, v in c.items()}}
            for g, m in groups.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--events", type=int, default=1024)
    parser.add_argument("--sets", nargs="+", default=["cca-8k", "cca-24k"])
    parser.add_argument("--run", action="append", default=[], help="set=folder of a run trained on its length")
    parser.add_argument("--exact", action="append", default=[], help="set=table of its exact posteriors")
    parser.add_argument("--out", default=str(ROOT / "bench/results/cres_refine.json"))
    args = parser.parse_args()
    tables, runs = (dict(pair.split("=", 1) for pair in pairs) for pairs in (args.exact, args.run))
    results = about()
    for name in args.sets:
        results[name] = main(name, args.events, tables.get(name), runs.get(name))
        rows = {k: v["rms_eV"] for k, v in results[name].items() if isinstance(v, dict) and "rms_eV" in v}
        print(name, rows, flush=True)
        with atomic_path(args.out) as part:
            write_json(part, results)
    sys.exit(0)
