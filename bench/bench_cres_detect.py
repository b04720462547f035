"""The searches for electrons that people use: efficiency at fixed false-alarm probabilities, energies and speed.

    python bench/bench_cres_detect.py [--set cca-8k] [--limit LIMIT]

Brightest bin, clusters of the spectrogram with line fits, and the bank of matched filters (best template, and mean of
the bank) on the first events of a fixed test set. The two first learn the shift of the energy from 2,048 events of the
training stream. False alarms are measured on noise alone; efficiencies are those at the fitted thresholds, per record
of the set's length. LIMIT is the table of posteriors that bench_cres_limit.py writes; with it each row has its ratio to
the limit. With `--data FOLDER`, that of epsilon_grid.npz, the published efficiencies of the same events stand beside.
Times are processor times of one thread. Results go to bench/results/cres_detect.json, a set at a time; `--searches`
renews some rows, and keeps the others if they are of the same events.
"""
import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from machine import about

from deadlayer_cres.core import read_json, write_json
from deadlayer_cres.cres.data import read_efficiency
from deadlayer_cres.cres.detect import (
    BrightestBin,
    ClusterConfig,
    LineTracks,
    MatchedFilter,
    bank_mean,
    detected,
    efficiency_map,
    wilson,
)
from deadlayer_cres.cres.evaluate import Predictions, figures_of_merit, read_table
from deadlayer_cres.cres.simulate import TEST_SETS, Simulator, test_set

HERE = Path(__file__).resolve().parent
PROBABILITIES = (1e-2, 1e-3)
SEARCHES = ("brightest_bin", "clusters", "matched_filter")


def share(found: np.ndarray) -> dict:
    "Mean of a bool array with its one-sigma interval."
    low, high = wilson(found.sum(), len(found))
    return {"value": float(found.mean()), "low": float(low), "high": float(high), "n": len(found)}


def merit(p: Predictions, limit: Predictions | None) -> dict:
    "Figures of merit of all events, and the ratio to the limit for those whose posterior is known."
    found = figures_of_merit(p)
    if limit is not None:
        both = min(len(p), len(limit))
        shared = figures_of_merit(p[:both], limit=limit[:both])
        for target in p.targets:
            found[target]["limit"] = shared[target]["limit"] | {"events": both}
    return found


def by_cell(found: np.ndarray, columns: dict) -> dict:
    "Efficiency in cells of pitch angle and radius, and in each of the two alone."
    m = efficiency_map(found, columns["pitch_angle_deg"], columns["radius_m"])
    rows = {}
    for name, k, n in (("pitch", np.nansum(m.efficiency * m.events, 1), m.events.sum(1)),
                       ("radius", np.nansum(m.efficiency * m.events, 0), m.events.sum(0))):
        low, high = wilson(k, n)
        rows[name] = {"efficiency": k / np.maximum(n, 1), "low": low, "high": high, "events": n}
    return rows | {"pitch_edges_deg": m.pitch_edges_deg, "radius_edges_m": m.radius_edges_m}


def false_alarms(detector, simulator: Simulator, records: int, fresh: int) -> dict:
    "Thresholds from noise, and how often other noise passes them."
    start = time.process_time()
    detector.listen(simulator, records)
    seconds = time.process_time() - start
    law, other = detector.false_alarm, simulator.reseeded("other noise")
    samples, size = other.config.receiver.samples, detector.batch
    scores = np.concatenate([detector.score(other.noise.counted(min(size, fresh - a), samples, other.seed, a)).numpy()
                             for a in range(0, fresh, size)])
    return {"records": records, "location": law.location, "scale": law.scale, "records_per_second": records / seconds,
            "thresholds": {f"{q:g}": dict(zip(("value", "error"), law.threshold(q), strict=True))
                           for q in PROBABILITIES},
            "measured": {f"{q:g}": share(law.probability(scores) <= q) for q in PROBABILITIES}}


def row(what: str, p: Predictions, limit: Predictions | None) -> dict:
    "What is said of a search."
    return {"what": what, "merit": merit(p, limit),
            "efficiency": {f"{q:g}": share(detected(p, q)) for q in PROBABILITIES},
            "by_cell": {f"{q:g}": by_cell(detected(p, q), p.truth) for q in PROBABILITIES}}


def shown(result: dict) -> str:
    "The table of a set."
    lines = [f"{'':44}  RMS           core sigma    median |r|    tail          efficiency at 1e-2, 1e-3   events/s"]
    for r in result["rows"].values():
        m = r["merit"]["energy_eV"]["all"]
        value = [m[k] for k in ("rms", "core_sigma", "median_abs", "tail_fraction")]
        text = "  ".join(f"{v['value']:6.2f}({v['error']:.2f})" for v in value)
        text += "".join(f"  {e['value']:.3f}" for e in r.get("efficiency", {}).values())
        text += f"  {r['events_per_second']:9.1f}" if "events_per_second" in r else ""
        lines.append(f"{r['what']:44}  {text}")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--set", default="cca-8k", choices=list(TEST_SETS))
    p.add_argument("--events", type=int, default=1024, help="of the test set")
    p.add_argument("--records", type=int, default=4000, help="of noise; twice as many for clusters")
    p.add_argument("--bank_records", type=int, default=2000, help="of noise, for the matched filter")
    p.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=SEARCHES, help="whose rows are renewed")
    p.add_argument("--minimal_match", type=float, default=0.9, help="of the matched filter")
    p.add_argument("--limit", type=Path, help="table of the posteriors of the first events of the test set")
    p.add_argument("--data", type=Path, help="folder of epsilon_grid.npz")
    p.add_argument("--out", type=Path, default=HERE / "results" / "cres_detect.json")
    o = p.parse_args()
    torch.set_num_threads(1)
    simulator = Simulator(TEST_SETS[o.set], device="cpu")
    events, train = test_set(o.set, o.events, device="cpu"), simulator.reseeded("train").events(2048, noise="added")
    limit = None if o.limit is None else read_table(o.limit)
    samples = events.samples
    made = {
        "brightest_bin": ("brightest bin", lambda: BrightestBin().learn(train), o.records),
        "clusters": ("threshold, DBSCAN, line fit", lambda: LineTracks(ClusterConfig(samples // 4)).learn(train),
                     2 * o.records),
        "matched_filter": ("matched-filter bank, best template", lambda: MatchedFilter(simulator, o.minimal_match),
                           o.bank_records)}
    before = read_json(o.out) if o.out.exists() else {}
    old = before.get(o.set, {})
    rows = dict(old["rows"]) if old.get("checksum") == events.checksum else {}
    for name in o.searches:
        what, make, records = made[name]
        detector = make()
        alarms = false_alarms(detector, simulator, records, records)
        start = time.process_time()
        found = detector(events)
        speed = {"events_per_second": len(events) / (time.process_time() - start), "false_alarm": alarms}
        rows[name] = row(what, found, limit) | speed
        if name == "matched_filter":
            rows[name] |= {"templates": len(detector.first), "minimal_match": o.minimal_match}
            mean = row("matched-filter bank, mean", bank_mean(found), limit)
            rows["matched_filter_mean"] = mean | speed
        print(shown({"rows": rows}), flush=True)
    if limit is not None and "limit" not in rows:
        rows["limit"] = {"what": "exact posterior", "merit": merit(limit, None)}
    published = None
    if o.data is not None:
        grid = read_efficiency(o.data / "epsilon_grid.npz")
        c = events.columns
        published = by_cell(grid(c["energy_eV"], c["pitch_angle_deg"], c["radius_m"]), c)
    spread = figures_of_merit(Predictions(("energy_eV",), np.full((len(events), 1), events.columns["energy_eV"].mean()),
                                          truth=events.columns))["energy_eV"]["all"]["rms"]
    result = {"machine": about(), "events": len(events), "samples": samples, "checksum": events.checksum,
              "rms_of_the_energies_eV": spread, "published_efficiency": published, "rows": rows}
    write_json(o.out, before | {o.set: result})
    print(shown(result))
    assert all(math.isfinite(r["merit"]["energy_eV"]["all"]["rms"]["value"]) for r in rows.values())


if __name__ == "__main__":
    main()
