"""deadlayer_cres.cres.train: every promise of the page, killed trainings, and two processes that train as one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import in_child
from fastai.callback.core import Callback
from safetensors.torch import load_file

from deadlayer_cres.core import ConfigError, DataError, RunError, config_from_dict, to_plain
from deadlayer_cres.cres.data import SplitConfig, read_events, write_seed_hdf5, write_store
from deadlayer_cres.cres.model import EncoderConfig, LossConfig, ModelConfig
from deadlayer_cres.cres.prep import AddNoise, PrepConfig
from deadlayer_cres.cres.simulate import ReceiverConfig, SimulateConfig, simulate_events
from deadlayer_cres.cres.train import (
    Config,
    CurriculumConfig,
    DataConfig,
    Diagnostics,
    FileSource,
    StartConfig,
    build_pipeline,
    fit_statistics,
    load_run,
    open_source,
    train,
    where_to_hold,
)
from deadlayer_cres.train import Run, TrainConfig, predict

torch.set_num_threads(1)
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMALL = SimulateConfig(seed=11, receiver=ReceiverConfig(samples=512))


def encoder(**kw):
    return EncoderConfig(**{"kind": "cnn", "d_model": 6, "layers": 1, "kernel": 3, "dropout": 0.0} | kw)


def config(model=None, data=None, fit=None, **kw):
    data = {"simulate": SMALL, "batches_per_epoch": 3, "valid_batches": 2, "batch_size": 8} | (data or {})
    model = {"encoders": [encoder()], "hidden": [8]} | (model or {})
    fit = {"epochs": 2, "lr": 1e-2, "progress": False} | (fit or {})
    return Config(data=DataConfig(**data), model=ModelConfig(**model), train=TrainConfig(**fit), **kw)


def go(c, path, **kw):
    return train(c, path, device="cpu", **kw)


def rows(run):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in run.history]


def same(a: Run, b: Run):
    "The same bits in weights, optimiser and history (but for the seconds)."
    for name in ("model.safetensors", "last.safetensors"):
        one, two = load_file(a.path / name), load_file(b.path / name)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert rows(a) == rows(b)


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    "Figures take longer than these trainings: only the tests marked for it draw them."
    if "draws" not in request.fixturenames:
        monkeypatch.setattr(Diagnostics, "draw", lambda self: None)


@pytest.fixture
def draws():
    pass


@pytest.fixture(scope="module")
def events():
    return simulate_events(120, SMALL, noise="kept", device="cpu")


@pytest.fixture(scope="module")
def store(events, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "events"
    write_store(events, path)
    return str(path)


def from_files(*paths, **data):
    return {"source": "files", "files": [str(p) for p in paths], "batch_size": 16, **data}


class See(Callback):
    "Keep what the network sees and is told, and how strong the noise is."

    order = 7

    def __init__(self):
        self.seen = {True: [], False: []}

    def before_batch(self):
        sigma = [m.sigma_V for m in self.learn.pipeline.prep.modules() if isinstance(m, AddNoise)]
        xs = [x.clone() for x in self.learn.xb]
        self.seen[self.learn.training].append((self.learn.epoch, xs, self.learn.yb, sigma))


# Config


def test_config_survives_yaml():
    c = config(second=PrepConfig(representation="time"), model={"encoders": [encoder(), encoder(kind="s4d")]},
               curriculum=CurriculumConfig("root", 3), start_from=StartConfig(branches=[None, "a"], freeze=True),
               trackers=["tensorboard"], loss=LossConfig(kind="nll", weights=[1.0, 2.0]))
    assert config_from_dict(Config, yaml.safe_load(yaml.safe_dump(to_plain(c)))) == c
    with pytest.raises(ConfigError, match="layerz"):
        config_from_dict(Config, {"model": {"encoders": [{"layerz": 2}]}})
    with pytest.raises(ConfigError, match="trackers"):
        config_from_dict(Config, {"trackers": ["visdom"]})


@pytest.mark.parametrize("row, make", [
    ("second", lambda: config(second=PrepConfig())),
    ("second", lambda: config(model={"encoders": [encoder(), encoder()]})),
    ("second", lambda: config(second=PrepConfig(), model={"task": "denoise", "encoders": [encoder(), encoder()]})),
    ("start_from.branches", lambda: config(start_from=StartConfig(branches=["a", "b"]))),
    ("data.noise", lambda: config(data={"noise": "gauss"})),
    ("data.noise", lambda: config(data={"source": "files", "noise": "gauss"})),
    ("data.noise", lambda: config(data={"source": "files"}, prep=PrepConfig(noise="coloured"))),
    ("prep.sigma_V", lambda: config(prep=PrepConfig(sigma_V=0.1))),
    ("prep.noise", lambda: config(prep=PrepConfig(noise="none"), curriculum=CurriculumConfig("root"))),
    ("prep.noise", lambda: config(prep=PrepConfig(noise="none"), model={"task": "denoise"})),
    ("curriculum.epochs", lambda: CurriculumConfig(epochs=0)),
    ("data.batch_size", lambda: DataConfig(batch_size=0)),
    ("data.targets", lambda: DataConfig(targets=[])),
    ("data.targets", lambda: DataConfig(targets=["energy_eV", "energy_eV"])),
])
def test_config_is_checked(row, make):
    with pytest.raises(ConfigError) as e:
        make()
    assert e.value.row == row


def test_nothing_is_written_before_all_is_well(tmp_path, store, monkeypatch):
    two = config(second=PrepConfig(representation="time"), model={"encoders": [encoder(), encoder()]})
    for bad, what in [
        (config(data={"source": "files"}), "data.files"),
        (config(data=from_files(tmp_path / "none.h5")), "none.h5"),
        (config(data=from_files(store, targets=["energy"])), "energy"),
        (config(data=from_files(store, samples=9999)), "512 samples"),
        (config(data=from_files(store, noise="cav"), prep=PrepConfig(noise="none")), "cav"),
        (config(data=from_files(store, split=SplitConfig(valid=0, test=0.1))), "valid part"),
        (config(data={"targets": ["colour"]}), "colour"),
        (config(data={"samples": 100}), "data.samples"),
        (config(data={"sampling_rate_Hz": 1e6}), "data.sampling_rate_Hz"),
        (config(fit={"monitor": "accuracy"}), "accuracy"),
        (config(loss=LossConfig(kind="mse")), "gaussian"),
        (replace(two, start_from=StartConfig(branches=[str(tmp_path / "no")])), "a run folder"),
    ]:
        with pytest.raises((ConfigError, DataError, RunError), match=what):
            go(bad, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        go(config(trackers=["wandb"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# The run


def test_run_and_load(tmp_path, draws):
    c = config(prep=PrepConfig(noise_seed=3))
    run = go(c, tmp_path / "a")
    assert list(rows(run)[0]) == ["epoch", "train_loss", "valid_loss", "rms_energy_eV", "core_sigma_energy_eV",
                                  "coverage_1sigma", "lr"]
    assert (run.path / "figures/training.png").stat().st_size < 100_000
    again, resolved, pipeline = load_run(run.path, "cpu")
    data = resolved.data
    assert (data.samples, data.sampling_rate_Hz, data.lo_frequency_Hz) == (512, 403e6, 25.9702e9)
    assert replace(resolved, data=replace(data, samples=None, sampling_rate_Hz=None, lo_frequency_Hz=None)) == c
    assert not pipeline.training and again.environment["data_checksum"]
    batches = open_source(c, "cpu").batches("valid", c.data.targets)
    truth = torch.cat([y[:, 0] for _, y in batches])
    residual = pipeline.net.read(predict(pipeline, batches, n_inp=2)).mean[:, 0] - truth
    best = min(run.history, key=lambda row: row["valid_loss"])
    assert best["rms_energy_eV"] == pytest.approx(residual.square().mean().sqrt().item(), rel=1e-5)
    core = np.diff(np.quantile(residual.numpy(), [0.158655, 0.841345]))[0] / 2
    assert best["core_sigma_energy_eV"] == pytest.approx(core, rel=1e-5)
    with pytest.raises(RunError, match="overwrite"):
        go(c, run.path)
    go(replace(c, train=replace(c.train, epochs=1)), run.path, overwrite=True)
    (run.path / "config.yaml").write_text("data: {samples: many}")
    with pytest.raises(RunError, match="config.yaml"):
        load_run(run.path)


def test_mean_head_has_no_coverage(tmp_path):
    run = go(config(model={"head": "mean"}, data={"targets": ["pitch_angle_deg"]}, fit={"epochs": 1}), tmp_path / "a")
    assert list(rows(run)[0])[3:] == ["rms_pitch_angle_deg", "core_sigma_pitch_angle_deg", "lr"]


class Kill(Callback):
    order = 100

    def __init__(self, epoch, training):
        self.when = epoch, training, int(training)

    def after_batch(self):
        if (self.learn.epoch, self.learn.training, self.learn.iter) == self.when:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["stream", "files"])
def test_killed_and_resumed_is_the_same_bit_by_bit(tmp_path, store, kind):
    data = None if kind == "stream" else from_files(store, repeat=2, in_memory="never")
    model, fit = {"encoders": [encoder(kind="s4d", dropout=0.2)]}, {"epochs": 4, "schedule": "cosine", "grad_clip": 1.0}
    c = config(model, data, fit, curriculum=CurriculumConfig("root", 3), numbered_noise=kind == "files")
    whole = go(c, tmp_path / "whole")
    for epoch, training in ((0, True), (2, True), (2, False)):
        path = tmp_path / f"{epoch}{training}"
        assert in_child(lambda e=epoch, t=training, p=path: go(c, p, cbs=[Kill(e, t)])) == signal.SIGKILL
        with pytest.raises(RunError, match="resume"):
            load_run(path)
        same(whole, go(c, path, resume=True))
    other = replace(c, curriculum=CurriculumConfig("linear", 3))
    with pytest.raises(RunError, match="curriculum"):
        go(other, whole.path, resume=True)
    with pytest.raises(AssertionError):
        same(whole, go(other, tmp_path / "other"))


# Events


def test_validation_noise_is_the_same_in_every_epoch_and_for_every_batch_size(tmp_path, store):
    for data in ({"valid_batches": 4}, from_files(store)):
        seen = []
        for size in (4, 8):
            see = See()
            sizes = {"batch_size": size} | ({"valid_batches": 16 // size} if "files" not in data else {})
            go(config(data=data | sizes), tmp_path / "a", cbs=[see], overwrite=True)
            for epoch in (0, 1):
                seen.append(torch.cat([xs[0] for e, xs, *_ in see.seen[False] if e == epoch]))
            first, second = (torch.cat([xs[0] for e, xs, *_ in see.seen[True] if e == epoch])[:4] for epoch in (0, 1))
            assert not torch.equal(first, second)
        assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
        assert torch.allclose(seen[0], seen[2], atol=1e-5) and seen[0].std() > 0.1


@pytest.mark.parametrize("numbered", [False, True])
def test_training_noise_is_fresh(tmp_path, store, numbered):
    "An event that comes twice in an epoch has two noises, and others in the next epoch."
    see = See()
    prep = PrepConfig(representation="time", scale="none")
    c = config(data=from_files(store, repeat=2), numbered_noise=numbered, prep=prep)
    go(c, tmp_path / "a", cbs=[see])
    y = torch.cat([y[0][:, 0] for _, _, y, _ in see.seen[True]])
    x = torch.cat([xs[0] for _, xs, *_ in see.seen[True]])
    mine = x[y == y[0]]
    assert len(mine) == 4
    noise = mine - mine.mean(0)
    correlation = torch.corrcoef(noise.flatten(1))
    assert (correlation - torch.eye(4)).abs().max() < 0.5  # -1/3 for what is independent, less its mean
    epochs = x.unflatten(0, (2, -1)).flatten(2)  # the noise by its place in the epoch, whatever event came there
    assert all(torch.corrcoef(pair)[0, 1].abs() < 0.5 for pair in epochs.transpose(0, 1))


def test_no_event_is_on_two_sides(tmp_path, events, store):
    write_seed_hdf5(events[:60], tmp_path / "again.h5")  # half of the events once more, from another file
    split = SplitConfig(seed=5, valid=0.2, test=0.2)
    see = See()
    go(config(data=from_files(store, tmp_path / "again.h5", split=split)), tmp_path / "run", cbs=[see])
    energies = events.columns["energy_eV"].astype(np.float32)
    train_part, valid, test = (set(energies[part]) for part in split.split(events))
    seen = {t: {np.float32(e) for _, _, y, _ in see.seen[t] for e in y[0][:, 0]} for t in (True, False)}
    assert seen == {True: train_part, False: valid}
    assert not (seen[True] | seen[False]) & test and not seen[True] & seen[False]


def test_stream_never_trains_on_what_it_validates(tmp_path):
    see = See()
    go(config(), tmp_path / "run", cbs=[see])
    energies = {t: [float(e) for _, _, y, _ in see.seen[t] for e in y[0][:, 0]] for t in (True, False)}
    assert len(set(energies[True])) == 2 * 3 * 8 and len(set(energies[False])) == 2 * 8
    assert not set(energies[True]) & set(energies[False])


def test_statistics_come_from_the_training_part_alone(tmp_path, events, store):
    split = SplitConfig(valid=0.2, test=0.2)
    rows_, _, _ = split.split(events)
    loud = np.ones(len(events), bool)
    loud[rows_] = False
    other = replace(events, ts=np.where(loud[:, None, None], 1e3 * events.ts, events.ts))
    write_store(other, tmp_path / "loud")
    found = []
    for path in (store, tmp_path / "loud"):
        c = config(data=from_files(path, split=split))
        source = open_source(c, "cpu")
        pipeline = build_pipeline(c, source.samples, source.sampling_rate_Hz)
        fit_statistics(pipeline, source)
        found.append(pipeline)
    assert torch.equal(found[0].prep.steps.scale.std, found[1].prep.steps.scale.std)
    for i, name in enumerate(("energy_eV", "pitch_angle_deg")):
        column = events.columns[name][rows_]
        assert float(found[0].net.scale.mean[i]) == pytest.approx(column.mean(), rel=1e-12)
        assert float(found[0].net.scale.std[i]) == pytest.approx(column.std(), rel=1e-9)


def test_where_events_are_held(tmp_path, store):
    cpu = torch.device("cpu")
    assert where_to_hold(2**20, "auto", cpu) == cpu and where_to_hold(2**62, "auto", cpu) is None
    assert where_to_hold(2**62, "always", cpu) == cpu and where_to_hold(1, "never", cpu) is None
    seen = {}
    for mode in ("always", "never"):
        source = FileSource(DataConfig(**from_files(store, in_memory=mode, samples=300)), cpu)
        seen[mode] = [t for (ts, number), y in source.batches("valid", ["energy_eV"]) for t in (ts, number, y)]
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True)) and seen["never"][0].shape[2] == 300


def test_recorded_noise_is_added_once(tmp_path, events, store):
    c = config(data=from_files(store, noise="gauss"), prep=PrepConfig(noise="none", representation="time", scale="none",
                                                                      whole_band=True))
    see = See()
    go(c, tmp_path / "a", cbs=[see])
    valid = SplitConfig().split(events)[1]
    seen = torch.cat([xs[0] for e, xs, *_ in see.seen[False] if e == 1]).numpy()
    assert np.allclose(seen, (events.ts + events.noise["gauss"])[valid], atol=1e-6)


def test_coloured_noise_imitates_the_recorded(tmp_path, events, store):
    run = go(config(data=from_files(store, noise="gauss"), prep=PrepConfig(noise="coloured"), fit={"epochs": 1},
                    curriculum=CurriculumConfig("linear", 2)), tmp_path / "a")
    _, _, pipeline = load_run(run.path, "cpu")
    sigma = pipeline.prep.steps.noise.sigma_V
    assert sigma.square().mean().sqrt().item() == pytest.approx(events.noise["gauss"].std(), rel=0.02)
    source = open_source(config(prep=PrepConfig(noise="coloured")), "cpu")
    assert source.sample()[2].std().item() == pytest.approx(SMALL.receiver.noise_sigma_V, rel=0.02)


def test_published_layout_and_pickles(tmp_path, events):
    import pandas as pd

    write_seed_hdf5(events, tmp_path / "phyts.hdf5")
    c = config(data=from_files(tmp_path / "phyts.hdf5", noise="gauss"), prep=PrepConfig(noise="none"))
    assert len(go(c, tmp_path / "a").history) == 2
    names = [k for k in events.columns if k in read_events(tmp_path / "phyts.hdf5").columns]
    frame = pd.DataFrame({k: events.columns[k] for k in names})
    for channel, name in enumerate("IQ"):
        frame[f"output_ts_{name}"] = list(events.ts[:, channel])
    frame.to_pickle(tmp_path / "frame.pkl.gz")
    c = config(data=from_files(tmp_path / "frame.pkl.gz"))
    assert len(go(c, tmp_path / "b").history) == 2


def test_unknown_labels_are_refused(tmp_path, events):
    columns = events.columns | {"pitch_angle_deg": np.where(np.arange(len(events)) == 7, np.nan, 89.0)}
    write_store(replace(events, columns=columns), tmp_path / "events")
    with pytest.raises(DataError) as e:
        go(config(data=from_files(tmp_path / "events")), tmp_path / "run")
    assert e.value.row == 7


# Noise, steps, tasks


@pytest.mark.parametrize("schedule, power", [("linear", 1), ("root", 0.5), ("quadratic", 2), ("none", 0)])
def test_curriculum(tmp_path, schedule, power):
    see = See()
    c = config(curriculum=CurriculumConfig(schedule, 2), fit={"epochs": 4}, data={"batches_per_epoch": 1})
    go(c, tmp_path / "a", cbs=[see])
    for epoch, _, _, (sigma,) in see.seen[True]:
        assert sigma == pytest.approx(0.0471 * min(epoch / 2, 1) ** power)
    assert all(sigma == [0.0471] for *_, sigma in see.seen[False]) and len(see.seen[False]) == 8
    if schedule != "none":
        quiet, loud = (torch.cat([xs[0] for e, xs, *_ in see.seen[True] if e == k]).std() for k in (0, 3))
        assert quiet < 0.5 * loud


def test_accumulated_batches_are_one_large_one(tmp_path):
    fit = {"epochs": 1, "schedule": "constant", "weight_decay": 0.0}
    one = go(config(data={"batches_per_epoch": 2, "batch_size": 16}, numbered_noise=True, fit=fit), tmp_path / "one")
    two = go(config(data={"batches_per_epoch": 4, "batch_size": 8, "valid_batches": 4}, numbered_noise=True,
                    fit=fit | {"accumulate": 2}), tmp_path / "two")
    a, b = (load_file(r.path / "model.safetensors") for r in (one, two))
    start = build_pipeline(config(), 512, 403e6).state_dict()
    for k in a:
        if k.endswith("weight"):
            assert torch.allclose(a[k], b[k], atol=2e-5), k
    assert any(not torch.allclose(a[k], start[k], atol=1e-3) for k in a)


def test_two_branches_see_one_event(tmp_path):
    see = See()
    plain = {"scale": "none", "whole_band": True}
    c = config(prep=PrepConfig(representation="time", **plain), second=PrepConfig(sigma_V=0.3, noise_seed=9, **plain),
               model={"encoders": [encoder(), encoder(kind="lstm", patch=64)], "fusion": "gated"})
    go(c, tmp_path / "a", cbs=[see])
    for training in (True, False):
        for _, (wave, spectrum), *_ in see.seen[training]:
            z = torch.fft.fftshift(torch.fft.fft(torch.complex(wave[:, 0], wave[:, 1]), norm="ortho"), dim=1)
            assert torch.allclose(torch.stack([z.real, z.imag], 1)[..., :spectrum.shape[2]], spectrum, atol=1e-4)


@pytest.mark.parametrize("task", ["denoise", "both"])
def test_denoising(tmp_path, task):
    see = See()
    c = config(prep=PrepConfig(representation="time"), model={"task": task, "denoiser": encoder(kind="s4d", d_model=4)},
               loss=LossConfig(denoise="mse_spectral"))
    run = go(c, tmp_path / "a", cbs=[see])
    assert ("rms_energy_eV" in run.history[0]) == (task == "both")
    _, (x,), (_, clean), _ = see.seen[False][0]
    source = open_source(c, "cpu")
    (ts, _), _ = next(iter(source.batches("valid", ["energy_eV"])))
    _, _, pipeline = load_run(run.path, "cpu")
    assert torch.allclose(clean, pipeline.prep.without_noise()(ts), atol=1e-6) and clean.shape == x.shape
    assert not torch.allclose(x, clean, atol=0.1)


# Starting from other runs


def test_start_from(tmp_path):
    wave, spectrum = PrepConfig(representation="time"), PrepConfig()
    others = {"simulate": replace(SMALL, seed=12)}  # other events, and so other statistics
    first = go(config(prep=wave, data=others), tmp_path / "wave")
    denoiser = {"denoiser": encoder(kind="s4d", d_model=4)}
    quiet = go(config(prep=wave, data=others, model={"task": "denoise", **denoiser}), tmp_path / "quiet")
    c = config(prep=wave, second=spectrum, model={"encoders": [encoder(), encoder()], "task": "both", **denoiser})
    start = StartConfig(branches=[str(first.path)], denoiser=str(quiet.path), freeze=True)
    frozen = go(replace(c, start_from=start), tmp_path / "frozen")
    moving = go(replace(c, start_from=replace(start, freeze=False)), tmp_path / "moving")
    a, b, f, m = (load_file(r.path / "model.safetensors") for r in (first, quiet, frozen, moving))
    branch, denoiser = ([k for k in f if k.startswith(p)] for p in ("net.branches.0.", "net.denoiser."))
    assert branch and denoiser
    assert all(torch.equal(f[k], a[k]) for k in branch) and all(torch.equal(f[k], b[k]) for k in denoiser)
    assert not all(torch.equal(m[k], a[k]) for k in branch)
    assert torch.equal(f["prep.branches.0.steps.scale.std"], b["prep.steps.scale.std"])
    same(frozen, go(replace(c, start_from=start), frozen.path, resume=True))
    for bad, what in [(replace(c, prep=replace(wave, window="hann")), "window of branch 0"),
                      (replace(c, model=replace(c.model, encoders=[encoder(d_model=8), encoder()])), "architecture")]:
        with pytest.raises(ConfigError, match=what):
            go(replace(bad, start_from=replace(start, denoiser=None)), tmp_path / "bad")


# Trackers


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Stop(Callback):
        order = 57.7  # the tracker has had this epoch, the checkpoint has not

        def after_epoch(self):
            if self.learn.epoch == 1:
                raise KeyboardInterrupt

    c = config(trackers=["tensorboard"], fit={"epochs": 3})
    with pytest.raises(KeyboardInterrupt):
        go(c, tmp_path / "a", cbs=[Stop()])
    run = go(c, tmp_path / "a", resume=True)
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    for name in ("valid_loss", "rms_energy_eV", "core_sigma_energy_eV", "coverage_1sigma", "lr"):
        found = events.Scalars(name)
        assert [e.step for e in found] == [0, 1, 2]
        assert [e.value for e in found] == pytest.approx([row[name] for row in run.history], rel=1e-6)
    assert sum(b for b in events.Histograms("residual")[-1].histogram_value.bucket) == 16


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = go(config(trackers=["wandb"], fit={"epochs": 1}), tmp_path / "a")
    (written,) = (run.path / "wandb").glob("offline-run-*/*.wandb")
    expected = (b"core_sigma_energy_eV", b"residual", b"batches_per_epoch")
    for _ in range(100):  # a process of its own writes the file
        if all(name in written.read_bytes() for name in expected):
            return
        time.sleep(0.1)
    raise AssertionError(written.read_bytes())


# Reference configs


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("cres*.yaml")))
def test_reference_config(tmp_path, name):
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    c = config_from_dict(Config, settings)
    tiny = [replace(e, d_model=8, layers=1, patch=max(e.patch, 16), checkpoint=e.checkpoint) for e in c.model.encoders]
    simulate = replace(c.data.simulate, receiver=replace(c.data.simulate.receiver, samples=1024))
    c = replace(c, data=replace(c.data, simulate=simulate, batches_per_epoch=2, valid_batches=1, batch_size=4),
                model=replace(c.model, encoders=tiny, denoiser=replace(c.model.denoiser, d_model=8, layers=1)),
                train=replace(c.train, epochs=1, progress=False, accumulate=min(c.train.accumulate, 2)))
    run = go(c, tmp_path / "run")
    assert np.isfinite([v for v in run.history[0].values()]).all()
    _, _, pipeline = load_run(run.path, "cpu")
    assert sum(p.numel() for p in pipeline.parameters()) > 0


# Two processes


def parallel_config(kind, store):
    data = {"batch_size": 8, "batches_per_epoch": 4} if kind == "stream" else from_files(store, batch_size=12)
    return config(data=data, model={"encoders": [encoder(kind="s4d")]}, numbered_noise=True,
                  fit={"epochs": 3, "accumulate": 2, "grad_clip": 0.5, "early_stopping": 2})


def launch(*command) -> list[subprocess.Popen]:
    "Start a Python program in two processes, by Hugging Face's launcher where it is installed."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    if find_spec("accelerate"):
        launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 " \
                   f"--mixed_precision no --dynamo_backend no --main_process_port {port}"
        return [subprocess.Popen([sys.executable, *launcher.split(), *command], stderr=subprocess.PIPE, text=True)]
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [subprocess.Popen([sys.executable, *command], env=env | {"RANK": r, "LOCAL_RANK": r},
                             stderr=subprocess.PIPE, text=True) for r in ("0", "1")]


def test_two_processes_train_as_one(tmp_path, store):
    children = launch(__file__, str(tmp_path), store)
    one = {kind: go(parallel_config(kind, store), tmp_path / f"one-{kind}") for kind in ("stream", "files")}
    for child in children:
        error = child.communicate(timeout=120)[1]
        assert child.returncode == 0, error
    for kind, alone in one.items():
        both = Run.open(tmp_path / f"two-{kind}")
        assert len(both.history) == len(alone.history)
        for a, b in zip(rows(alone), rows(both), strict=True):
            assert a == pytest.approx(b, rel=2e-4, abs=1e-6)
        a, b = (load_file(r.path / "last.safetensors") for r in (alone, both))
        for k in a:
            if k.startswith("model.") and a[k].is_floating_point():
                assert torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-4), k
    assert not list((tmp_path / "two-stream").glob("*.part"))


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_slurm_template(tmp_path):
    show = "printf '%s\\n' \"$@\""
    stubs = {"scontrol": "echo first; echo second", "srun": 'shift; SLURM_NODEID=1 exec "$@"', "accelerate": show}
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2",
           "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "a[1-2]"}
    template = str(CONFIGS.parent / "howto/slurm/train.sbatch")

    def submit(*options):
        done = subprocess.run(["bash", template, *options], env=env, capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines()

    code, words = submit("c.yaml", "runs/a b", "--data.files", "[a, b]")
    assert code == 0 and words[words.index("--no_python"):] == [
        "--no_python", "cres", "train", "-c", "c.yaml", "--run", "runs/a b", "--data.files", "[a, b]"]
    for name, value in (("--num_processes", "8"), ("--machine_rank", "1"), ("--main_process_ip", "first")):
        assert words[words.index(name) + 1] == value
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.yaml").touch()
    assert submit("c.yaml", str(tmp_path / "old"))[1][-1] == "--resume" and submit("c.yaml")[0] == 2


if __name__ == "__main__":
    folder, events_path = Path(sys.argv[1]), sys.argv[2]
    for kind in ("stream", "files"):
        train(parallel_config(kind, events_path), folder / f"two-{kind}", device="cpu")
    with pytest.raises(RunError, match="overwrite"):  # in both processes
        train(parallel_config("stream", events_path), folder / "two-stream", device="cpu")


def test_noise_is_not_added_twice(tmp_path):
    write_store(simulate_events(40, SMALL, noise="added"), tmp_path / "noisy.h5")
    c = config(data={"source": "files", "files": [str(tmp_path / "noisy.h5")]})
    with pytest.raises(ConfigError, match="prep.noise none"):
        go(c, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert go(replace(c, prep=replace(c.prep, noise="none")), tmp_path / "run").history


def test_there_must_be_something_to_freeze():
    with pytest.raises(ConfigError, match="branches"):
        StartConfig(freeze=True)
