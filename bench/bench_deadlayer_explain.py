"""Explains a trained pair network: where it looks beside where the information is, planted causes, artefacts of
position, and what the Monte-Carlo or the transition layer would change. Writes bench/results/deadlayer_explain.json.

    python bench/bench_deadlayer_explain.py --run RUN --spectra FOLDER_OR_STORE [--measured FILE]
    python bench/bench_deadlayer_explain.py --run RUN --spectra FOLDER_OR_STORE --rolled RUN

Attributions are of the test spectra of the run. `--rolled` is a run on the same spectra with their bins moved by half
the range (np.roll of the counts by 445 of 890 bins): what a method shows at the same energies for both, it shows
because of the energies; what it shows at the same positions, because of the positions. With it only this comparison
is made, and added to the file. `--report` keeps the figures.
"""
import argparse
import time
from pathlib import Path

import numpy as np
from machine import about
from scipy.stats import rankdata

from deadlayer_cres.core import numpy_rng, read_json, write_json
from deadlayer_cres.deadlayer import explain as why
from deadlayer_cres.deadlayer.data import concatenate, read_spectra, shared_data
from deadlayer_cres.deadlayer.infer import validation_temperature
from deadlayer_cres.deadlayer.likelihood import fit_emulator, split_simulation
from deadlayer_cres.deadlayer.prep import Pairs, PairSource
from deadlayer_cres.deadlayer.simulate import simulate_hits
from deadlayer_cres.deadlayer.train import load_run, load_spectra, pair_source, split_spectra

RESULT = Path(__file__).resolve().parent / "results" / "deadlayer_explain.json"


def rolled_twin(pipeline, pairs: Pairs, edges_keV: np.ndarray, path: Path, seed: int) -> dict:
    "Rank correlation of a network's attributions and its rolled twin's: at the same energies and the same positions."
    run, _, twin = load_run(path, "cpu")
    found = why.explain_pairs(pipeline, pairs, edges_keV)
    bins = pairs.counts1.shape[1]
    roll = bins // 2
    moved = pairs._replace(counts1=pairs.counts1.roll(roll, 1), counts2=pairs.counts2.roll(roll, 1))
    other = why.explain_pairs(twin, moved, edges_keV)
    rng, out = numpy_rng(seed, "twin"), {"epochs": len(run.history), "pairs": len(pairs.labels), "machine": about(),
                                         "accuracy": [other.right.value, other.right.error]}
    for name in other.values:
        here, there = (f.values[name] * (np.sign(f.logit)[:, None] if name in why.SIGNED else 1)
                       for f in (found, other))
        a, b, back = (v.reshape(len(v), -1, 10).sum(2) for v in (here, there, np.roll(there, -roll, 1)))
        rows = [np.arange(len(a))] + [rng.integers(0, len(a), len(a)) for _ in range(100)]
        r = np.array([[np.corrcoef(rankdata(a[k].mean(0)), rankdata(c[k].mean(0)))[0, 1] for c in (back, b)]
                      for k in rows])
        out[name] = {"same energies": [r[0, 0], r[1:, 0].std(ddof=1)],
                     "same positions": [r[0, 1], r[1:, 1].std(ddof=1)],
                     "last 25 keV": {"network": a[:, -5:].sum() / a.sum(), "twin, same energies": back[:, -5:].sum()
                                     / back.sum(), "twin, same positions": b[:, -5:].sum() / b.sum()}
                     if name != "attention, corrected" else None}
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=None)
    parser.add_argument("--spectra", type=Path, default=None)
    parser.add_argument("--measured", type=Path, default=None)
    parser.add_argument("--rolled", type=Path, default=None)
    parser.add_argument("--report", type=Path, default=None)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--decays", type=int, default=3_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.run is None:
        print("give --run, a run folder of `deadlayer train` on the published spectra")
        return
    start, seed = time.perf_counter(), args.seed
    run, config, pipeline = load_run(args.run, "cpu")
    if args.spectra:
        config.data.spectra = [str(args.spectra)]
    folder = shared_data() and shared_data() / "V05268A"
    path = args.measured or (folder / "experimental_data_V05268A.h5" if folder else None)
    measured = read_spectra(path).select_energy(5, 450) if path else None
    spectra = load_spectra(config.data)
    parts = split_spectra(spectra, config.data.split)
    source = pair_source(parts, "test", config.pairs, "cpu")
    if args.rolled:
        twin = rolled_twin(pipeline, why.independent_pairs(source, args.pairs, 0.1, 0.2, seed), spectra.edges_keV,
                           args.rolled, seed)
        write_json(RESULT, (read_json(RESULT) if RESULT.exists() else {}) | {"rolled_twin": twin})
        return
    emulator = fit_emulator(split_simulation(spectra, seed)[0])
    references = concatenate(list(parts["dlf1"].values()))
    valid = PairSource(parts["random_dlf"]["valid"], parts["dlf1"]["valid"], device="cpu")
    temperature = validation_temperature(pipeline, valid, seed=config.train.seed)
    hits = [simulate_hits(args.decays, seed=seed + 1 + k) for k in range(4)]
    common = (emulator, references, spectra, hits)
    planted = {"size": 30.0, "detectors": 6, "n": 1, "null": 40}
    answers = why.explain(pipeline, source, *common, measured, temperature, pairs=args.pairs, planted=planted,
                          seed=seed)
    result = {"machine": about("captum"), "checksum": spectra.checksum, "seed": seed, "temperature": temperature,
              "max_dfccd_in_mm": 0.1, "decays_per_simulation": args.decays, "planted_options": planted}
    result |= answers.summary()
    pairs = why.independent_pairs(source, args.pairs, 0.1, 0.2, seed)
    close = why.with_information(why.explain_pairs(pipeline, pairs, spectra.edges_keV), emulator)
    result["close_in_dlf"] = {
        "max_ddlf": 0.2, "pairs": len(close.logit), "rank_correlation": why.rank_correlation(close),
        "shares": {m: dict(zip(("share", "error"), close.shares(m), strict=True)) for m in close.values}}
    if args.report:
        why.write_explanation(answers, args.report, source.mean1[len(source.mean1) // 2].numpy(),
                              pipeline.net.config.segment, facts={"run": run.path.name})
    result["seconds"] = time.perf_counter() - start
    write_json(RESULT, result)
    print("bench/results/deadlayer_explain.json")


if __name__ == "__main__":
    main()
