"""Encoders and inputs of the CRES half, trained for the same time on the same stream, beside baselines and the limit.

    python bench/bench_cres_compare.py --runs RUNS [--set cca-8k] [--minutes 3] [--published PUBLISHED] [--limit LIMIT]

A row is one network trained in RUNS/SET/ROW for so many minutes, its validation included, with as many batches as fit
into them, found by timing a few. A run that is there already is not trained again. Then all are evaluated on the
fixed test set with its fixed noise. Beside them: predict-the-mean, peak-frequency, and the published S4D network on FFT
input if PUBLISHED, a checkout of neutrino_project, is given. LIMIT is the table of posteriors that bench_cres_limit.py
writes; with it each row has its ratio to the limit. Results go to bench/results/cres_compare.json, a set at a time.
"""
import argparse
import copy
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from machine import about
from torch import nn

from deadlayer_cres.core import config_from_dict, read_json, write_json
from deadlayer_cres.cres import train as training
from deadlayer_cres.cres.evaluate import (
    Predictions,
    figures_of_merit,
    mean_baseline,
    observe,
    peak_baseline,
    read_table,
    reconstruct,
)
from deadlayer_cres.cres.model import count_parameters
from deadlayer_cres.cres.simulate import TEST_SETS, Simulator, test_set

HERE = Path(__file__).resolve().parent
TARGETS = ("energy_eV", "pitch_angle_deg")
EPOCHS, VALID, TIMED = 3, 256, 4  # of a training; events of a validation (fewer in small batches); batches to time
FEW = {"published": 512}  # test events of a row, where all of them would take an hour

BAND = {"representation": "spectrum"}
TIME = {"representation": "time"}  # mixed down and decimated to the band
POLES = {"state": 64, "init": "fourier", "memory_samples": 2048, "band_low": 0.0, "band_high": 0.3127}
SPECTRUM_S4D = {"kind": "s4d", "d_model": 48, "layers": 4, "dropout": 0.0, "s4d": {"bidirectional": True}}
TIME_S4D = {"kind": "s4d", "d_model": 48, "layers": 4, "dropout": 0.0, "s4d": POLES}


def plain(kind, layers=4, **settings):
    return {"kind": kind, "d_model": 48, "layers": layers, "dropout": 0.0, **settings}


ROWS = {  # name: (what it is, settings besides those of all)
    "fold": ("folded spectrum, mixture (configs/cres.yaml)", None),
    "s4d_spectrum": ("S4D on the spectrum", {"prep": BAND, "model": {"encoders": [SPECTRUM_S4D]}}),
    "s4d_spectrum_attention": ("S4D on the spectrum, attention pooling",
                               {"prep": BAND, "model": {"encoders": [{**SPECTRUM_S4D, "pool": "attention"}]}}),
    "s4d_time": ("S4D on the decimated time series, poles on the Fourier grid",
                 {"prep": TIME, "model": {"encoders": [TIME_S4D]}}),
    "s4d_time_lin": ("S4D on the decimated time series, default poles",
                     {"prep": TIME, "model": {"encoders": [{**TIME_S4D, "s4d": {"init": "lin"}}]}}),
    "s4d_both_gated": ("S4D on time series and S4D on spectrum, gated",
                       {"prep": TIME, "second": BAND,
                        "model": {"encoders": [TIME_S4D, SPECTRUM_S4D], "fusion": "gated"}}),
    "s4d_cnn": ("S4D on time series and CNN on spectrum",
                {"prep": TIME, "second": BAND, "model": {"encoders": [TIME_S4D, plain("cnn", 6)]}}),
    "cnn_spectrum": ("CNN on the spectrum", {"prep": BAND, "model": {"encoders": [plain("cnn", 6)]}}),
    "cnn_stft": ("CNN on the STFT", {"prep": {"representation": "stft", "log_power": True},
                                     "model": {"encoders": [plain("cnn", 4, kernel=3)]}}),
    "cnn_q_transform": ("CNN on the Q-transform", {"prep": {"representation": "q_transform", "log_power": True},
                                                   "model": {"encoders": [plain("cnn", 4, kernel=3)]}}),
    "lstm_spectrum": ("LSTM on the spectrum, patches of 8",
                      {"prep": BAND, "model": {"encoders": [plain("lstm", 2, patch=8)]}}),
    "conformer_spectrum": ("Conformer on the spectrum, patches of 8",
                           {"prep": BAND, "model": {"encoders": [plain("conformer", patch=8)]}}),
    "linoss_time": ("LinOSS on the decimated time series", {"prep": TIME, "model": {"encoders": [plain("linoss")]}}),
    "published": ("published S4D, 6 x 128, on the FFT, mean squared error", "cres-fft-8192.yaml"),
}


def config_of(row: str, name: str, batches: int, epochs: int = EPOCHS):
    "The config of a row, on the stream of a test set."
    settings = ROWS[row][1]
    if settings is None or isinstance(settings, str):
        settings = yaml.safe_load((HERE.parent / "configs" / (settings or "cres.yaml")).read_text())
    settings = copy.deepcopy(settings)
    simulate = {"electrons": vars(TEST_SETS[name].electrons), "receiver": vars(TEST_SETS[name].receiver)}
    size = 4 if row == "published" else 32  # slow
    settings["data"] = {"simulate": {**simulate, "seed": 1}, "batch_size": size, "batches_per_epoch": batches,
                        "valid_batches": VALID // 32}
    settings.setdefault("model", {}).setdefault("hidden", [64])
    lr = 3e-3 if row == "fold" else 1e-3
    settings["train"] = {"epochs": epochs, "lr": lr, "schedule": "one_cycle", "warmup": 0.1, "grad_clip": 1.0,
                         "progress": False}
    return config_from_dict(training.Config, settings)


class Published(nn.Module):
    "The published network behind our interface: (n, 2, L) to scaled targets."

    def __init__(self, folder: Path):
        super().__init__()
        sys.path.insert(0, os.fspath(folder))
        from src.models.networks import S4DModel

        self.encoder = None  # what a branch of ours has
        self.net = S4DModel(2, 2, d_model=128, n_layers=6, dropout=0.0, fc_hidden=[])

    def forward(self, x):
        return self.net(x.transpose(1, 2))


def with_published(build, folder: Path):
    "`build_pipeline` with the published network in place of ours."
    def built(config, *args):
        pipeline = build(config, *args)
        torch.manual_seed(config.train.seed)
        pipeline.net.branches[0], pipeline.net.head.net = Published(folder), nn.Identity()
        return pipeline
    return built


def seconds_per_batch(config, folder: Path) -> float:
    "By a training of a few batches."
    start = time.perf_counter()
    training.train(config, folder, overwrite=True)
    run = training.Run(folder)
    seconds = run.history[-1]["seconds"] / (config.data.batches_per_epoch + 1 / 3)  # one batch of validation
    print(f"  {seconds:.3f} s a batch ({time.perf_counter() - start:.0f} s to find out)", flush=True)
    return seconds


def train_row(row: str, name: str, runs: Path, minutes: float) -> None:
    "Train a row unless its run is there."
    folder = runs / name / row
    if (folder / "environment.json").exists():
        return
    print(f"{name} {row}", flush=True)
    few = config_of(row, name, TIMED, epochs=2)
    few.data.valid_batches = 1
    each = seconds_per_batch(few, runs / name / f".{row}-timing")
    batches = max(2, int(60 * minutes / EPOCHS / each - VALID // 32 / 3))
    training.train(config_of(row, name, batches), folder)


def merit(p: Predictions, limit: Predictions | None) -> dict:
    "Figures of merit of all events, and the ratio to the limit for those whose posterior is known."
    found = figures_of_merit(p)
    if limit is not None:
        both = min(len(p), len(limit))
        shared = figures_of_merit(p[:both], limit=limit[:both])
        for target in p.targets:
            found[target]["limit"] = shared[target]["limit"] | {"events": both}
    return found


def evaluate_row(row: str, name: str, runs: Path, events, limit: Predictions | None) -> dict:
    "Figures of merit and costs of a trained row."
    run, config, pipeline = training.load_run(runs / name / row)
    events = events[:FEW.get(row, len(events))]
    reconstruct(pipeline, events[:64], noise="none")
    start = time.perf_counter()
    p = reconstruct(pipeline, events, noise="none")
    seconds, history = time.perf_counter() - start, run.history
    return {"what": ROWS[row][0], "events": len(events), "parameters": count_parameters(pipeline.net),
            "training_seconds": sum(h["seconds"] for h in history),
            "training_events": len(history) * config.data.batches_per_epoch * config.data.batch_size,
            "events_per_second": len(events) / seconds, "merit": merit(p, limit)}


def baselines(name: str, events, limit: Predictions | None) -> dict:
    "Predict-the-mean and peak-frequency, fitted on training events, and the posterior itself."
    simulator = Simulator(TEST_SETS[name]).reseeded("train")
    ts, labels = simulator.signal(2048)
    ts = ts + simulator.noise.counted(len(ts), ts.shape[2], simulator.seed)
    labels = {k: v.cpu().numpy() for k, v in labels.items()}
    rate, lo = events.sampling_rate_Hz, events.lo_frequency_Hz
    learnt = Predictions(TARGETS, np.stack([labels[k] for k in TARGETS], 1), truth=labels,
                         observables=observe(ts, rate, lo))
    blank = np.stack([events.columns[k] for k in TARGETS], 1)
    seen = Predictions(TARGETS, blank, truth=events.columns,
                       observables=observe(torch.from_numpy(events.ts), rate, lo))
    rows = {"mean": ("predict the mean", mean_baseline(learnt, seen)),
            "peak": ("peak frequency", peak_baseline(learnt, seen))}
    found = {k: {"what": what, "merit": merit(p, limit)} for k, (what, p) in rows.items()}
    return found if limit is None else found | {"limit": {"what": "exact posterior", "merit": merit(limit, None)}}


def shown(result: dict) -> str:
    "The table of a set."
    lines = [f"{'':58}  RMS           core sigma    median |r|    tail        RMS of best 25 %"]
    for row in result["rows"].values():
        m = row["merit"]["energy_eV"]
        value = [m["all"][k] for k in ("rms", "core_sigma", "median_abs", "tail_fraction")]
        best = m.get("resolution_at_efficiency", {}).get("25", {}).get("rms")
        lines.append(f"{row['what']:58}  " + "  ".join(f"{v['value']:6.2f}({v['error']:.2f})" for v in value)
                     + (f"  {best['value']:6.2f}({best['error']:.2f})" if best else ""))
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--runs", type=Path, required=True, help="folder for the trained runs")
    p.add_argument("--set", default="cca-8k", choices=list(TEST_SETS))
    p.add_argument("--minutes", type=float, default=3.0, help="of training for each row")
    p.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    p.add_argument("--published", type=Path, help="checkout of neutrino_project; without it that row is left out")
    p.add_argument("--limit", type=Path, help="table of the posteriors of the first events of the test set")
    p.add_argument("--events", type=int, default=4096, help="of the test set")
    p.add_argument("--threads", type=int, default=1, help="of the processor, of training and evaluation")
    p.add_argument("--train_only", action="store_true", help="leave the evaluation for later")
    p.add_argument("--out", type=Path, default=HERE / "results" / "cres_compare.json")
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    build, made = training.build_pipeline, {}
    events = None if o.train_only else test_set(o.set, o.events)
    limit = None if o.limit is None else read_table(o.limit)
    for row in o.rows:
        if row == "published" and o.published is None:
            continue
        training.build_pipeline = with_published(build, o.published) if row == "published" else build
        train_row(row, o.set, o.runs, o.minutes)
        if events is not None:
            made[row] = evaluate_row(row, o.set, o.runs, events, limit)
    if events is not None:
        result = {"machine": about() | {"threads": o.threads}, "minutes": o.minutes, "events": o.events,
                  "rows": made | baselines(o.set, events, limit)}
        write_json(o.out, (read_json(o.out) if o.out.exists() else {}) | {o.set: result})
        print(shown(result))


if __name__ == "__main__":
    main()
