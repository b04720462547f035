"""How fast the explorers follow a control, beside a bare redraw of the same figure.

    python bench/bench_apps.py [--moves 24]

Each control of each explorer is moved, and a move is timed from the new value to the first picture, and to the last
where an explorer draws in stages (that of CRES: the record, then posterior and limit). After each move the whole figure
is drawn and written as a PNG by Matplotlib alone, in the same process, as the baseline: an explorer that drew
everything at each move could not be faster. The aim is 200 ms on two cores. Writes bench/results/apps.json.

EXPLORERS names the explorers: a function of a working folder that makes one, and the values that its controls go
through, in turn. The network of the spectrum explorer has the size of the reference network; its weights, and hence
the length of its training, do not matter for the time.
"""
import argparse
import io
import tempfile
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter

import numpy as np
from machine import about

from deadlayer_cres.apps import Brush, Explorer, RunBrowser
from deadlayer_cres.apps_cres import cres_explorer
from deadlayer_cres.apps_deadlayer import BUILT_IN_DECAYS, spectrum_explorer
from deadlayer_cres.core import numpy_rng, write_json
from deadlayer_cres.cres.evaluate import Predictions, write_table
from deadlayer_cres.deadlayer.data import write_store
from deadlayer_cres.deadlayer.simulate import simulate_hits, spectra_of_hits
from deadlayer_cres.deadlayer.train import Config, DataConfig, PairConfig, train
from deadlayer_cres.train import Run, TrainConfig

RESULT = Path(__file__).resolve().parent / "results" / "apps.json"
AIM_MS = 200

LAYERS = {"fccd1": np.linspace(0.2, 1.8, 24), "dlf1": np.linspace(0.02, 0.98, 24), "fccd2": np.linspace(0.2, 1.8, 24),
          "dlf2": np.linspace(0.02, 0.98, 24), "exposure": 10 ** np.linspace(-1, 1, 24), "noise": [True, False],
          "seed": range(1, 25)}


def trained(folder: Path) -> Path:
    "A run with a network of the reference size, hardly trained."
    rng = numpy_rng(0, "bench")
    labels = rng.uniform(0, 2, 300), np.where(np.arange(300) % 3, rng.uniform(0, 1, 300), 1.0)
    write_store(spectra_of_hits(simulate_hits(BUILT_IN_DECAYS, seed=1), *labels), folder / "mc.h5")
    config = Config(data=DataConfig(spectra=[str(folder / "mc.h5")]),
                    pairs=PairConfig(batch_size=32, batches_per_epoch=2, valid_batches=1),
                    train=TrainConfig(epochs=1, progress=False))
    train(config, folder / "run", device="cpu")
    return folder / "run"


def histories(folder: Path) -> RunBrowser:
    "Six runs of fifty epochs."
    for k in range(6):
        run = Run.create(folder / f"runs/{k}", {"prep": {}, "train": {"lr": 10.0**-k, "seed": 0}})
        rows = [{"epoch": e, "valid_loss": 10 ** (-e / 20 - k / 9), "train_loss": 0.9**e} for e in range(50)]
        run.settle({"best_epoch": None, "best": None, "history": rows})
    return RunBrowser(folder / "runs")


def events(folder: Path) -> Brush:
    "Twenty thousand predictions."
    rng = numpy_rng(0, "bench")
    truth = rng.uniform(18_500, 18_700, 20_000)
    mean, sigma = truth + rng.normal(size=20_000), np.ones((20_000, 1))
    write_table(folder / "p.csv", Predictions(("energy_eV",), mean[:, None], sigma, {"energy_eV": truth}))
    return Brush(folder)


RANGES = {"x_range": [(low, low + 60) for low in np.linspace(18_500, 18_640, 24)],
          "y_range": [(low, low + 2) for low in np.linspace(-3, 1, 24)],
          "quantity": ["energy_pull", "energy_residual_eV"]}
ELECTRONS = {"energy_eV": np.linspace(18_550, 18_650, 24), "pitch_angle_deg": np.linspace(88.2, 89.9, 24),
             "radius_mm": np.linspace(0.5, 6, 24), "axial_phase_deg": np.linspace(-170, 170, 24),
             "cyclotron_phase_deg": np.linspace(-170, 170, 24), "noise": np.linspace(0.1, 2, 24),
             "noise_number": range(1, 25),
             "samples": [2048, 24_576, 8192], "map": ["Q-transform", "spectrogram"]}
EXPLORERS: dict[str, tuple[Callable[[Path], Explorer], dict]] = {
    "spectra": (lambda folder: spectrum_explorer(), LAYERS),
    "spectra with network": (lambda folder: spectrum_explorer(run=trained(folder)), LAYERS),
    "electrons": (lambda folder: cres_explorer(), ELECTRONS),
    "runs": (histories, {"quantity": ["train_loss", "valid_loss"], "differences": [False, True]}),
    "predictions": (events, RANGES),
}


def spread(seconds: list[float]) -> dict:
    ms = 1e3 * np.array(seconds)
    return {"median": float(np.median(ms)), "min": float(ms.min()), "max": float(ms.max())}


def bare_redraw(explorer: Explorer) -> float:
    "Seconds that Matplotlib takes for the whole figure, without a layout."
    start = perf_counter()
    explorer.figure.savefig(io.BytesIO(), format="png", dpi=90, pil_kwargs={"compress_level": 1})
    return perf_counter() - start


def measure(explorer: Explorer, control: str, values, moves: int) -> dict:
    "Move one control."
    explorer.set(**{control: list(values)[-1]})  # the first move is one too
    took, whole, bare = [], [], []
    for value in islice(cycle(values), moves):
        explorer.controls[control].value = value
        if explorer.message.value:
            raise RuntimeError(f"{control}: {explorer.message.value}")
        took.append(explorer.seconds[0])
        whole.append(explorer.seconds[-1])
        bare.append(bare_redraw(explorer))
    return {"moves": moves, "move_ms": spread(took), "move_ms_90_percent": float(1e3 * np.quantile(took, 0.9)),
            "all_stages_ms": spread(whole),
            "redraw_ms": spread(bare), "ratio_to_redraw": float(np.median(np.array(took) / np.array(bare)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=24, help="of each control")
    args = parser.parse_args()
    results = {"machine": about("matplotlib", "ipywidgets"), "aim_ms": AIM_MS, "explorers": {}}
    for name, (make, controls) in EXPLORERS.items():
        with tempfile.TemporaryDirectory() as folder:
            start = perf_counter()
            explorer = make(Path(folder))
            print(f"{name}: first figure after {perf_counter() - start:.1f} s")
            rows = results["explorers"][name] = {}
            for control, values in controls.items():
                rows[control] = row = measure(explorer, control, values, args.moves)
                print(f"  {control:12s} median {row['move_ms']['median']:4.0f} ms, 90 % below "
                      f"{row['move_ms_90_percent']:4.0f} ms; all stages {row['all_stages_ms']['median']:4.0f} ms; "
                      f"whole redraw {row['redraw_ms']['median']:4.0f} ms")
            explorer.close()
    slow = [f"{n}, {c}" for n, rows in results["explorers"].items() for c, r in rows.items()
            if r["move_ms_90_percent"] > AIM_MS]
    results["slower_than_aim"] = slow
    print("slower than the aim:", ", ".join(slow) or "none")
    write_json(RESULT, results)


if __name__ == "__main__":
    main()
