"""Fits the measured spectrum by the peak ratio and by the full likelihood, and tests the emulator and the intervals.
Writes bench/results/deadlayer_fit.json.

    python bench/bench_deadlayer_fit.py [--spectra FOLDER_OR_STORE] [--measured FILE] [--experiments 300]

Without options the published files are taken: `V05268A` in $DEADLAYER_CRES_DATA or ../shared/data. The emulator is
fitted to the training blocks of the simulation; its pulls and the coverage are those of the test blocks.
"""
import argparse
import time
from pathlib import Path

from machine import about

from deadlayer_cres.core import write_json
from deadlayer_cres.deadlayer.data import concatenate, read_spectra, shared_data
from deadlayer_cres.deadlayer.fit import fisher_information, fisher_sigma
from deadlayer_cres.deadlayer.likelihood import (
    check_emulator,
    coverage,
    fit_emulator,
    full_spectrum_fit,
    split_simulation,
)
from deadlayer_cres.deadlayer.peaks import MODELS, count_lines, fccd_from_peaks, line_rows

HERE = Path(__file__).resolve().parent
PUBLISHED = {"ratio": 0.71785, "ratio_error": 0.0043, "fccd_in_mm": 0.971, "up_in_mm": 0.049, "down_in_mm": 0.056,
             "source": "legend-FCCD-analysis, resultsAll"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spectra", type=Path, default=None)
    parser.add_argument("--measured", type=Path, default=None)
    parser.add_argument("--experiments", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = shared_data() and shared_data() / "V05268A"
    if (args.spectra is None or args.measured is None) and (folder is None or not folder.is_dir()):
        print("the published spectra are not here: give --spectra and --measured, or set DEADLAYER_CRES_DATA")
        return
    start = time.perf_counter()
    sources = [args.spectra] if args.spectra else sorted(folder.glob("training_data_*"))
    mc = concatenate([read_spectra(p).select_energy(5, 450) for p in sources])
    data = read_spectra(args.measured or folder / "experimental_data_V05268A.h5").select_energy(5, 450)
    train, test = split_simulation(mc, args.seed)
    result = {"machine": about(), "checksums": {"simulated": mc.checksum, "measured": data.checksum},
              "seed": args.seed, "spectra": {"fitted": len(train), "held_out": len(test)}, "published": PUBLISHED}
    result["lines"] = {m: line_rows(count_lines(data, m)) for m in MODELS}
    result["peak_ratio"] = {m: fccd_from_peaks(data, mc, m).summary() for m in ("step", "published")}
    emulator = fit_emulator(train)
    result["emulator"] = check_emulator(emulator, test).summary()
    full = full_spectrum_fit(data, emulator)
    result["likelihood"] = full.summary()
    whole = full["whole"]
    at = (whole.fccd_in_mm, whole.dlf)
    limit = fisher_sigma(fisher_information(train, at), "free", "free")
    result["fisher_mm"] = {"at": at, "scale free, whole": float(limit)}
    result["coverage"] = coverage(emulator, test, args.experiments, seed=args.seed)
    result["seconds"] = time.perf_counter() - start
    write_json(HERE / "results" / "deadlayer_fit.json", result)
    print("bench/results/deadlayer_fit.json")


if __name__ == "__main__":
    main()
