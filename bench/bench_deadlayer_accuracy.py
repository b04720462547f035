"""Trains the reference network on the published spectra, scores it and infers the measured spectrum.
Writes bench/results/deadlayer_accuracy.json.

    python bench/bench_deadlayer_accuracy.py [--spectra FOLDER] [--run RUN] [--config FILE]

FOLDER holds the published files (default: `V05268A` in $DEADLAYER_CRES_DATA or ../shared/data). With a finished RUN
nothing is trained again.
"""
import argparse
import json
import tempfile
from pathlib import Path

from deadlayer_cres.cli import deadlayer
from deadlayer_cres.core import environment, read_json, write_json
from deadlayer_cres.deadlayer.data import shared_data
from deadlayer_cres.train import Run

HERE = Path(__file__).resolve().parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spectra", type=Path, default=None)
    parser.add_argument("--run", type=Path, default=None)
    parser.add_argument("--config", type=Path, default=HERE.parent / "configs" / "deadlayer.yaml")
    parser.add_argument("--pairs", type=int, default=40000)
    args = parser.parse_args()
    folder = args.spectra or (shared_data() and shared_data() / "V05268A")
    if folder is None or not folder.is_dir():
        print("the published spectra are not here: give --spectra, or set DEADLAYER_CRES_DATA")
        return
    with tempfile.TemporaryDirectory() as tmp:
        store, run = Path(tmp) / "mc.h5", args.run or Path(tmp) / "run"
        deadlayer(["prepare", *map(str, sorted(folder.glob("training_data_*"))), "--out", str(store)])
        if args.run is None or not args.run.exists():
            deadlayer(["train", "-c", str(args.config), "--data.spectra", json.dumps([str(store)]), "--run", str(run)])
        deadlayer(["evaluate", str(run), "--data", str(store), "--pairs", str(args.pairs)])
        measured = next(folder.glob("experimental_data_*.h5"))
        deadlayer(["infer", str(run), "--spectrum", str(measured), "--reference", str(store)])
        answer = read_json(run / "infer" / measured.stem / "result.json")
        done = Run.open(run)
        history = done.history
        result = {
            "config": args.config.name, "machine": environment(), "trained_on": done.environment,
            "epochs": len(history), "minutes_of_training": sum(row["seconds"] for row in history) / 60,
            "metrics": done.metrics,
            "measured": {k: answer[k] for k in ("fccd_in_mm", "fccd_intervals_in_mm", "dlf", "agreement", "warnings")},
        }
        for about in (result["machine"], result["trained_on"]):
            about.pop("argv", None)
        name = args.config.stem.replace("deadlayer", "deadlayer_accuracy").replace("-", "_")
        write_json(HERE / "results" / f"{name}.json", result)
        print(f"bench/results/{name}.json")


if __name__ == "__main__":
    main()
