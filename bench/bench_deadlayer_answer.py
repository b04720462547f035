"""FCCD and DLF of the measured spectrum by all methods, as `deadlayer infer` answers.

    python bench/bench_deadlayer_answer.py --run runs/V05268A --robust runs/V05268A-robust \
        --measured experimental_data_V05268A.h5

The runs are those of configs/deadlayer.yaml and configs/deadlayer-robust.yaml, trained on the published spectra. Writes
bench/results/deadlayer_answer.json.
"""
import argparse
import json
import tempfile
import time
from pathlib import Path

import machine

from deadlayer_cres.cli import deadlayer
from deadlayer_cres.core import write_json


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", required=True)
    p.add_argument("--robust", required=True)
    p.add_argument("--measured", required=True)
    p.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results" / "deadlayer_answer.json")
    options, start = p.parse_args(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "infer"
        deadlayer(["infer", options.run, "--robust", options.robust, "--spectrum", options.measured, "--out", str(out)])
        found = json.loads((out / "answer/answer.json").read_text())
    del found["facts"]
    write_json(options.out, {"machine": machine.about(), **found, "seconds": time.perf_counter() - start})
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
