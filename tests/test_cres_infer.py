"""Inference on files and full tracks, with a network trained in seconds and with readers whose answers are known."""
import os
import pickle
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from deadlayer_cres.core import ConfigError, DataError, RunError
from deadlayer_cres.cres import infer as inf
from deadlayer_cres.cres.data import COLUMNS, Events, EventStore, shared_data, write_seed_hdf5, write_store
from deadlayer_cres.cres.evaluate import observe, read_columns, read_table, reconstruct
from deadlayer_cres.cres.model import EncoderConfig, ModelConfig, Prediction
from deadlayer_cres.cres.prep import Prep, PrepConfig
from deadlayer_cres.cres.simulate import ElectronConfig, ReceiverConfig, SimulateConfig, simulate_events
from deadlayer_cres.cres.train import Config, DataConfig, train
from deadlayer_cres.cres.trap import energy_from_frequency, larmor_power
from deadlayer_cres.train import Pipeline, TrainConfig

SMALL = SimulateConfig(receiver=ReceiverConfig(samples=256))


def config_of(**options) -> Config:
    data = DataConfig(simulate=SMALL, batches_per_epoch=3, valid_batches=1, batch_size=32)
    model = ModelConfig(encoders=[EncoderConfig(kind="cnn", d_model=8, layers=1)], head="quantiles", hidden=[])
    settings = {"data": data, "model": model, "prep": PrepConfig(representation="time"),
                "train": TrainConfig(epochs=1, progress=False)}
    return Config(**(settings | options))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(config_of(), tmp_path_factory.mktemp("runs") / "run", device="cpu")


@pytest.fixture(scope="module")
def trained(run):
    return inf.Trained.open(run.path, "cpu")


@pytest.fixture(scope="module")
def events():
    return simulate_events(23, SMALL, noise="added")


def pickled(events: Events, path) -> None:
    frame = pd.DataFrame({k: events.columns[k] for k in COLUMNS})
    frame["output_ts_I"], frame["output_ts_Q"] = list(events.ts[:, 0]), list(events.ts[:, 1])
    frame.to_pickle(path)


WRITERS = {"a.h5": write_store, "store": lambda e, p: write_store(e, p, shard_events=10), "phyts.hdf5": write_seed_hdf5,
           "a.pkl": pickled, "a.pkl.gz": pickled}


# --- files ---


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_every_layout_gives_what_reconstruct_gives(tmp_path, trained, events, name, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    WRITERS[name](events, tmp_path / name)
    done = inf.infer_files(trained, tmp_path / name, tmp_path / f"out.{ending}", batch_size=7)
    found, want = read_table(tmp_path / f"out.{ending}"), reconstruct(trained.pipeline, events)
    assert done.events == 23 and not done.shortened and not done.clean
    for a in ("mean", "sigma", "quantiles"):
        assert np.allclose(getattr(found, a), getattr(want, a), rtol=1e-6, atol=1e-4), a
    assert np.allclose(found.truth["energy_eV"], events.columns["energy_eV"])
    assert np.allclose(found.observables["total_power"], want.observables["total_power"], rtol=1e-4)
    raw = read_columns(tmp_path / f"out.{ending}")
    assert set(raw["file"]) == {str(tmp_path / name)} and raw["event"].tolist() == list(range(23))


def test_eggs_too(tmp_path, trained):
    folder = shared_data()
    if folder is None:
        pytest.skip("the real files are not here: set DEADLAYER_CRES_DATA")
    egg = folder / "locust_mc_testSignal.egg"
    with pytest.raises(DataError, match=r"testSignal\.egg.*403000000"):
        inf.infer_files(trained, egg, tmp_path / "out.csv")
    data = replace(trained.config.data, sampling_rate_Hz=2e8)
    done = inf.infer_files(replace(trained, config=replace(trained.config, data=data)), egg, tmp_path / "out.csv")
    assert done.events == done.shortened == 1


def test_several_files_with_different_labels_make_one_table(tmp_path, trained, events):
    write_store(events, tmp_path / "a.h5")
    write_store(replace(events, columns={}), tmp_path / "b.h5")
    pickled(events[:3], tmp_path / "c.pkl")
    inf.infer_files(trained, [tmp_path / "*.h5", tmp_path / "c.pkl"], tmp_path / "out.csv")
    p = read_table(tmp_path / "out.csv")
    assert len(p) == 49 and np.isnan(p.truth["energy_eV"]).sum() == 23 and set(p.truth) >= set(COLUMNS)
    assert np.allclose(p.mean[:23], p.mean[23:46])


def test_long_records_are_cut_and_flagged(tmp_path, trained, events):
    longer = replace(events, ts=np.concatenate([events.ts, 9 * np.ones_like(events.ts)], 2))
    write_store(longer, tmp_path / "a.h5")
    done = inf.infer_files(trained, tmp_path / "a.h5", tmp_path / "out.csv")
    assert done.shortened == 23 and read_columns(tmp_path / "out.csv")["shortened"].all()
    assert np.allclose(read_table(tmp_path / "out.csv").mean, reconstruct(trained.pipeline, events).mean, atol=1e-3)


def test_answers_outside_of_the_training_are_flagged(tmp_path, trained, events):
    write_store(events, tmp_path / "a.h5")
    scale = trained.pipeline.net.scale
    before = scale.mean.clone()
    assert trained.ranges()["energy_eV"] == (18_500.0, 18_700.0)
    try:
        scale.mean[0] += 300
        assert inf.infer_files(trained, tmp_path / "a.h5", tmp_path / "out.csv").outside_range == 23
    finally:
        scale.mean.copy_(before)
    assert inf.infer_files(trained, tmp_path / "a.h5", tmp_path / "two.csv").outside_range == 0


def test_ranges_of_files_come_from_the_labels(trained):
    data = replace(trained.config.data, source="files", files=["a.h5"])
    low, high = replace(trained, config=replace(trained.config, data=data)).ranges()["energy_eV"]
    assert abs(low - 18_500) < 6 and abs(high - 18_700) < 6


def test_clean_files_get_noise_and_are_named(tmp_path, trained):
    clean = simulate_events(9, SMALL)
    write_store(clean, tmp_path / "a.h5")
    done = inf.infer_files(trained, tmp_path / "a.h5", tmp_path / "out.csv", batch_size=4)
    assert done.clean == [str(tmp_path / "a.h5")]
    want = reconstruct(trained.pipeline, clean, "add")
    assert np.allclose(read_table(tmp_path / "out.csv").mean, want.mean, atol=1e-3)
    bare = inf.infer_files(trained, tmp_path / "a.h5", tmp_path / "bare.csv", noise="none")
    assert not bare.clean
    assert np.allclose(read_table(tmp_path / "bare.csv").mean, reconstruct(trained.pipeline, clean, "none").mean,
                       atol=1e-3)


def test_recorded_noise_is_added_by_its_name(tmp_path, trained):
    kept = simulate_events(5, SMALL, noise="kept")
    write_store(kept, tmp_path / "a.h5")
    inf.infer_files(trained, tmp_path / "a.h5", tmp_path / "out.csv", noise="gauss")
    want = reconstruct(trained.pipeline, replace(kept, ts=kept.ts + kept.noise["gauss"], noise={}), "none")
    assert np.allclose(read_table(tmp_path / "out.csv").mean, want.mean, atol=1e-3)
    with pytest.raises(ConfigError, match="cav"):
        inf.infer_files(trained, tmp_path / "a.h5", tmp_path / "two.csv", noise="cav")


def bad_file(kind: str, events: Events, path) -> None:
    if kind == "rate":
        events = replace(events, sampling_rate_Hz=2e8)
    if kind == "oscillator":
        events = replace(events, lo_frequency_Hz=20e9)
    if kind == "short":
        events = replace(events, ts=events.ts[:, :, :100])
    write_store(events, path)
    if kind == "truncated":
        os.truncate(path, os.path.getsize(path) // 2)
    if kind == "nan":
        import h5py
        with h5py.File(path, "r+") as f:
            f["output_ts_I"][17, 5] = np.nan


@pytest.mark.parametrize(("kind", "word"), [("rate", "sampling_rate_Hz"), ("oscillator", "lo_frequency_Hz"),
                                            ("short", "256 samples"), ("truncated", "truncated"), ("nan", "row 17")])
def test_bad_files_are_named_and_nothing_is_left(tmp_path, trained, events, kind, word):
    write_store(events, tmp_path / "a.h5")
    bad_file(kind, events, tmp_path / "b.h5")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DataError, match=rf"b\.h5.*{word}"):
        inf.infer_files(trained, [tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "out.csv", batch_size=8)
    assert sorted(os.listdir(tmp_path)) == before


def test_more_bad_input(tmp_path, trained, events, run):
    write_store(events, tmp_path / "a.h5")
    with pytest.raises(DataError, match="nothing"):
        inf.infer_files(trained, tmp_path / "nothing*.h5", tmp_path / "out.csv")
    with pytest.raises(ConfigError, match="parquet"):
        inf.infer_files(trained, tmp_path / "a.h5", tmp_path / "out.txt")
    with pytest.raises(RunError):
        inf.infer_files(tmp_path, tmp_path / "a.h5", tmp_path / "out.csv")
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(DataError, match="existing"):
        inf.infer_files(trained, tmp_path / "a.h5", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "mine"
    inf.infer_files(run.path, tmp_path / "a.h5", tmp_path / "out.csv", overwrite=True, device="cpu")
    assert len(read_table(tmp_path / "out.csv")) == 23
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(DataError, match=r"evil\.pkl"):
        inf.infer_files(trained, tmp_path / "evil.pkl", tmp_path / "two.csv")


# --- physics of tracks ---


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    data = DataConfig(simulate=SimulateConfig(), batches_per_epoch=2, valid_batches=1, batch_size=4)
    return train(config_of(data=data), tmp_path_factory.mktemp("runs") / "long", device="cpu")


def test_refined_files_hold_posteriors_and_flags(tmp_path, long_run):
    trained, clean = inf.Trained.open(long_run.path, "cpu"), simulate_events(8, SimulateConfig(seed=8192), noise="none")
    write_store(clean, tmp_path / "clean.h5")
    done = inf.infer_files(trained, tmp_path / "clean.h5", tmp_path / "out.csv", batch_size=5, refine=True)
    p, raw = read_table(tmp_path / "out.csv"), read_columns(tmp_path / "out.csv")
    assert p.targets == ("energy_eV", "pitch_angle_deg", "radius_m") and done.events == 8 and done.clean
    plain = reconstruct(trained.pipeline, clean)
    assert np.allclose(p.observables["network_energy_eV"], plain.mean[:, 0], atol=1e-2)
    for name in ("single_mode", "ambiguous", "outlier", "not_refined"):
        assert getattr(done, name) == raw[name].sum()
    assert done.single_mode + done.ambiguous + done.not_refined == 8 and done.outlier == 0
    assert np.sqrt(np.mean((p.mean - p.truth["energy_eV"][:, None])[:, 0] ** 2)) < np.sqrt(np.mean(
        (plain.mean[:, 0] - clean.columns["energy_eV"]) ** 2))
    noisy = replace(clean, ts=inf._as_seen(trained.pipeline, clean, "add", 8192, 0).numpy())
    write_store(noisy, tmp_path / "noisy.h5")
    inf.infer_files(trained, tmp_path / "noisy.h5", tmp_path / "two.csv", refine=SimulateConfig())
    assert np.allclose(read_table(tmp_path / "two.csv").mean, p.mean, atol=1e-3)


def test_refining_needs_a_simulation_that_fits(tmp_path, trained, events):
    files = replace(trained, config=replace(trained.config, data=replace(trained.config.data, source="files")))
    write_store(events, tmp_path / "a.h5")
    with pytest.raises(ConfigError, match="simulation"):
        inf.infer_files(files, tmp_path / "a.h5", tmp_path / "out.csv", refine=True)
    other = SimulateConfig(receiver=ReceiverConfig(sampling_rate_Hz=2e8))
    known = replace(trained, config=replace(trained.config, data=replace(trained.config.data, sampling_rate_Hz=403e6)))
    with pytest.raises(ConfigError, match="sampling_rate_Hz"):
        inf.infer_files(known, tmp_path / "a.h5", tmp_path / "out.csv", refine=other)
    assert not (tmp_path / "out.csv").exists()



def test_energy_after_solves_its_equation():
    t = np.linspace(0, 1e-3, 2001)
    e = inf.energy_after(18_600.0, t, 89.0, 0.959)
    power = larmor_power(e, 89.0, 0.959) / 1.602176634e-19
    assert np.abs(np.gradient(e, t)[1:-1] + power[1:-1]).max() < 1e-3 * power[0]
    assert np.allclose(inf.energy_after(e, -t, 89.0, 0.959), 18_600, atol=1e-8)


def windows_of(energy, sigma=0.5, event=0, step=50e-6):
    n = len(energy)
    return {"event": np.full(n, event), "window": np.arange(n), "time_s": step * np.arange(n), "energy_eV": energy,
            "energy_sigma_eV": np.broadcast_to(sigma, n).astype(float)}


def tracks_of(*energy):
    return Events(np.zeros((len(energy), 2, 8)), {"energy_eV": np.array(energy)})


@pytest.mark.parametrize("loss", ["larmor", "fit", 5000.0])
def test_the_correction_is_exact_without_noise(loss):
    parts = []
    for k, e0 in enumerate((18_505.0, 18_690.0)):
        t = 50e-6 * np.arange(7)
        parts.append(windows_of(inf.energy_after(e0, t) if loss == "larmor" else e0 - 5000.0 * t, event=k))
    windows = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    r = inf.combine_tracks(windows, tracks_of(18_505.0, 18_690.0), ["energy_eV"], 1, 1, loss)
    assert np.allclose(r.tracks["energy_eV"], r.tracks["true_energy_eV"], rtol=0, atol=1e-6)
    assert np.allclose(r.tracks["chi2_energy_eV"], 0, atol=1e-9) and r.tracks["windows"].tolist() == [7, 7]
    assert np.allclose(r.windows["energy_at_start_eV"], np.repeat([18_505.0, 18_690.0], 7), rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", ["larmor", "fit"])
def test_uncertainties_of_combined_tracks_are_honest(loss):
    rng, pulls, scale = np.random.default_rng(0), [], []
    for _ in range(1500):
        sigma = rng.uniform(0.3, 1.5, 10)
        energy = inf.energy_after(18_600.0, 50e-6 * np.arange(10)) + sigma * rng.normal(size=10)
        r = inf.combine_tracks(windows_of(energy, sigma), tracks_of(18_600.0), ["energy_eV"], 1, 1, loss).tracks
        enlarged = max(1.0, r["chi2_energy_eV"][0]) ** 0.5
        pulls.append((r["energy_eV"][0] - 18_600) / r["energy_sigma_eV"][0] * enlarged)
        scale.append(enlarged)
    assert 0.9 < np.std(pulls) < 1.1 and np.mean(scale) < 1.3


def test_windows_that_disagree_enlarge_the_uncertainty():
    mean, error, chi2 = inf.combine_windows(np.array([0.0, 10.0]), np.array([1.0, 1.0]))
    assert mean == 5 and chi2 == 50 and error == pytest.approx(5.0)
    assert inf.combine_windows(np.array([1.0]), np.array([0.5]))[1] == 0.5
    assert inf.combine_windows(np.array([0.0, 10.0]), np.full(2, np.nan))[1] == pytest.approx(5.0)


def test_weights_are_inverse_variances():
    mean, error, _ = inf.combine_windows(np.array([0.0, 1.0]), np.array([1.0, 2.0]))
    assert mean == pytest.approx(0.2) and error == pytest.approx(0.8**0.5)


# --- tracks through a pipeline ---


class LineReader(torch.nn.Module):
    "Reads the energy off the strongest line; right for electrons at 90 degrees in a known field."

    config, targets, denoiser = ModelConfig(), ("energy_eV",), None

    def __init__(self, field_T: float):
        super().__init__()
        self.field_T = field_T

    def forward(self, ts):
        f = torch.from_numpy(observe(ts)["peak_frequency_Hz"]) - 0.33e9 * ts.shape[2] / 403e6 / 2
        return energy_from_frequency(f, self.field_T)[:, None]

    def read(self, energy):
        return Prediction(energy, torch.full_like(energy, 0.2), None, None, None, None)


LONG = SimulateConfig(receiver=ReceiverConfig(samples=65_536),
                      electrons=ElectronConfig(pitch="flat", pitch_low_deg=89.999, radius_max_m=1e-4))


@pytest.fixture(scope="module")
def reader(trained):
    c = replace(trained.config, prep=PrepConfig(), data=replace(
        trained.config.data, simulate=LONG, samples=8192))
    return inf.Trained(None, c, Pipeline(Prep({}), LineReader(inf._field_T(c))))


@pytest.fixture(scope="module")
def tracks():
    return simulate_events(6, LONG)


@pytest.mark.parametrize(("stride", "windows"), [(None, 8), (4096, 15), (10_000, 6)])
def test_clean_tracks_lead_back_to_the_start(reader, tracks, stride, windows):
    r = inf.infer_track(reader, tracks, stride=stride)
    assert (r.tracks["windows"] == windows).all()
    start = r.windows["energy_at_start_eV"].reshape(6, windows)
    assert np.ptp(start, axis=1).max() < 0.02, "all windows agree once brought to the start"
    drift = r.windows["energy_eV"].reshape(6, windows)
    assert ((drift[:, 0] - drift[:, -1]) > 0.8).all(), "before, they differ by what the electron has lost"
    assert np.abs(r.tracks["energy_eV"] - tracks.columns["energy_eV"]).max() < 0.06
    assert np.allclose(r.tracks["energy_sigma_eV"], 0.2, rtol=0.05), "no scatter: all of the error is common"


def test_noise_on_tracks_is_the_same_whatever_the_stride(trained):
    tracks = simulate_events(4, replace(SMALL, receiver=ReceiverConfig(samples=1024)))
    a, b = (inf.infer_track(trained, tracks, stride=s).windows for s in (256, 128))
    assert np.allclose(a["energy_eV"], b["energy_eV"].reshape(4, 7)[:, ::2].ravel(), atol=1e-3)
    clean = inf.infer_track(trained, tracks, stride=256, noise="none").windows
    assert np.abs(a["energy_eV"] - clean["energy_eV"]).max() > 1e-3


def test_windows_are_those_that_reconstruct_would_see(trained):
    tracks = simulate_events(3, replace(SMALL, receiver=ReceiverConfig(samples=1024)), noise="added")
    w = inf.infer_track(trained, tracks, stride=300).windows
    assert w["window"].tolist() == [0, 1, 2] * 3 and w["event"].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    for k in range(3):
        part = replace(tracks, ts=tracks.ts[:, :, 300 * k:300 * k + 256])
        assert np.allclose(w["energy_eV"][k::3], reconstruct(trained.pipeline, part).mean[:, 0], atol=1e-3)
    assert np.allclose(w["time_s"][:3], np.arange(3) * 300 / 403e6)


def test_windows_of_another_length(trained):
    tracks = simulate_events(2, replace(SMALL, receiver=ReceiverConfig(samples=1024)), noise="added")
    r = inf.infer_track(trained, tracks, window=512)
    assert r.samples == 512 and r.tracks["windows"].tolist() == [2, 2]


@pytest.mark.parametrize(("options", "word"), [({"window": 2000}, "length of the tracks"), ({"loss": "much"}, "larmor"),
                                               ({"noise": "cav"}, "cav"), ({"stride": -1}, "stride")])
def test_bad_settings_of_tracks(trained, options, word):
    tracks = simulate_events(2, replace(SMALL, receiver=ReceiverConfig(samples=1024)), noise="added")
    with pytest.raises((ConfigError, DataError), match=word):
        inf.infer_track(trained, tracks, **options)


def test_tracks_without_labels(trained):
    tracks = simulate_events(2, replace(SMALL, receiver=ReceiverConfig(samples=1024)), noise="added")
    r = inf.infer_track(trained, replace(tracks, columns={}))
    assert len(r) == 2 and not any(k.startswith("true_") for k in r.tracks)
    with pytest.raises(DataError, match="energy_eV"):
        inf.plot_windows(r)
    assert inf.plot_track(r, 1).axes


@pytest.mark.parametrize("at_once", [2**24, 2048])
def test_track_files_are_two_tables_or_none(tmp_path, trained, monkeypatch, at_once):
    monkeypatch.setattr(inf, "_AT_ONCE", at_once)
    tracks = simulate_events(5, replace(SMALL, receiver=ReceiverConfig(samples=1024)), noise="added")
    write_store(tracks, tmp_path / "a.h5")
    write_store(tracks[:2], tmp_path / "b.h5")
    summary, first = inf.infer_track_files(trained, [tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "t.csv")
    whole = inf.infer_track(trained, tracks)
    assert summary.events == 7 and len(first) == min(5, at_once // 1024)
    table, windows = read_columns(tmp_path / "t.csv"), read_columns(tmp_path / "t_windows.csv")
    energy = whole.tracks["energy_eV"]
    assert np.allclose(table["energy_eV"], np.append(energy, energy[:2]), atol=1e-3)
    assert table["event"].tolist() == [0, 1, 2, 3, 4, 0, 1] and len(windows["event"]) == 28
    assert np.allclose(table["true_energy_eV"][:5], tracks.columns["energy_eV"])
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    write_store(replace(tracks, ts=tracks.ts[:, :, :100]), tmp_path / "c.h5")
    with pytest.raises(DataError, match=r"c\.h5"):
        inf.infer_track_files(trained, [tmp_path / "a.h5", tmp_path / "c.h5"], tmp_path / "u.csv")
    assert not (tmp_path / "u.csv").exists() and not (tmp_path / "u_windows.csv").exists()


def test_figures_of_tracks(reader, tracks):
    r = inf.infer_track(reader, tracks)
    assert len(inf.plot_track(r, 2).axes) == 1 and len(inf.plot_windows(r).axes) == 2


def test_a_network_of_full_tracks_stands_beside(reader, tracks):
    longer = replace(reader, config=replace(reader.config, data=replace(reader.config.data, samples=tracks.samples)))
    r = inf.infer_track(reader, tracks, full=longer)
    whole = longer.pipeline.net(torch.from_numpy(tracks.ts))[:, 0].numpy()
    assert np.allclose(r.tracks["full_energy_eV"], whole) and "full_energy_sigma_eV" in r.tracks
    assert "full track at once" in inf.plot_track(r, 2).axes[0].get_legend_handles_labels()[1]
    with pytest.raises(DataError, match="samples"):
        inf.infer_track(reader, replace(tracks, ts=tracks.ts[:, :, :-1]), full=longer)


def test_what_windows_have_in_common_does_not_average_out():
    rng, pulls = np.random.default_rng(3), []
    for _ in range(2000):
        mean, error, _ = inf.combine_windows(rng.normal(0, 3, 10) * 0.3 + rng.normal(0, 3) * (1 - 0.3**2) ** 0.5,
                                             np.full(10, 3.0))
        pulls.append(mean / error)
    assert 0.9 < np.std(pulls) < 1.15


def test_a_network_of_spectra_takes_no_windows_of_another_length(trained, events):
    config = replace(trained.config, prep=replace(trained.config.prep, representation="spectrum"))
    with pytest.raises(ConfigError, match="bins"):
        inf.infer_track(replace(trained, config=config), events, window=events.samples // 2)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), "none"])
def test_a_loss_is_a_law_or_a_finite_number(reader, tracks, loss):
    with pytest.raises(ConfigError, match="larmor"):
        inf.infer_track(reader, tracks, loss=loss)


def test_stores_are_read_in_blocks(tmp_path, trained, events, monkeypatch):
    write_store(events, tmp_path / "store", shard_events=10)
    sizes, read = [], EventStore.read
    monkeypatch.setattr(EventStore, "read", lambda self, *a, **k: sizes.append(len(e := read(self, *a, **k))) or e)
    inf.infer_files(trained, tmp_path / "store", tmp_path / "out.csv", batch_size=6)
    assert sizes == [6, 6, 6, 5]


# --- whole tracks by their likelihood ---


STRONG = SimulateConfig(receiver=ReceiverConfig(samples=16_384, amplitude_V=0.03))


def strong_refiner(samples):
    from deadlayer_cres.cres.refine import Refiner

    return Refiner(replace(STRONG, receiver=replace(STRONG.receiver, samples=samples)))


def test_whole_tracks_are_refined_wherever_they_lie():
    "A track in the middle of its record gives the same posterior as one that fills its record."
    tracks = simulate_events(6, STRONG, noise="added")
    plain = inf.refine_tracks(strong_refiner, tracks)
    error = plain["refined_energy_eV"] - tracks.columns["energy_eV"]
    z = error / plain["refined_energy_sigma_eV"]
    assert np.sqrt((z**2).mean()) < 2 and plain["refined_energy_sigma_eV"].min() < 0.5
    around = np.random.default_rng(0).normal(0, 0.0471, (6, 2, 20_000)).astype("float32")
    around[:, :, 1500:1500 + 16_384] = tracks.ts
    columns = tracks.columns | {"start_time_s": np.full(6, 1500 / 403e6), "track_length_s": np.full(6, 16_384 / 403e6)}
    moved = inf.refine_tracks(strong_refiner, replace(tracks, ts=around, columns=columns))
    assert all(np.array_equal(moved[k], plain[k]) for k in plain)
    assert plain["refined_converged"].all() and not (plain["refined_outlier"] + plain["refined_not_refined"]).any()
    assert (plain["refined_single_mode"] + plain["refined_ambiguous"] == 1).all()
    tone = 0.02 * np.exp(2j * np.pi * -30e6 / 403e6 * np.arange(16_384))
    noise = np.random.default_rng(1).normal(0, 0.0471, (1, 2, 16_384))
    ts = np.concatenate([tracks.ts[:1] + np.stack([tone.real, tone.imag]), noise]).astype("float32")
    other = inf.refine_tracks(strong_refiner, Events(ts, {}))
    assert other["refined_outlier"][0] == 1 and other["refined_not_refined"].tolist() == [0, 1]
    assert not (other["refined_single_mode"][1] or other["refined_ambiguous"][1])


def test_recordings_in_millivolts_are_refused_before_the_network(tmp_path, long_run, monkeypatch):
    loud = simulate_events(6, SimulateConfig(), noise="added")
    loud.ts[4:] *= 1000
    write_store(loud, tmp_path / "loud.h5")
    trained = inf.Trained.open(long_run.path, "cpu")
    monkeypatch.setattr(inf, "reconstruct", lambda *a, **k: pytest.fail("asked the network"))
    with pytest.raises(DataError, match=r"loud\.h5.*0\.0471 V.*4[0-9.]+ V") as e:
        inf.infer_files(trained, tmp_path / "loud.h5", tmp_path / "out.csv", "none", refine=True)
    assert e.value.row == 4 and not (tmp_path / "out.csv").exists()
    with pytest.raises(DataError, match=r"0\.0471 V") as e:
        inf.refine_tracks(partial(inf.refiner_for, trained), loud)
    assert e.value.row == 4
    monkeypatch.undo()
    for sigma in (0.0, -1.0):
        with pytest.raises(ConfigError, match="noise_sigma_V"):
            silent = SimulateConfig(receiver=ReceiverConfig(noise_sigma_V=sigma))
            inf.infer_files(trained, tmp_path / "loud.h5", tmp_path / "out.csv", "none", refine=silent)


def test_tracks_of_different_lengths_keep_their_order():
    tracks = simulate_events(4, STRONG, noise="added")
    length = np.array([16_384, 8192, 16_384, 8192])
    parts = inf.refine_tracks(strong_refiner, replace(tracks, columns={"track_length_s": length / 403e6}))
    for n in (8192, 16_384):
        rows = np.flatnonzero(length == n)
        alone = inf.refine_tracks(strong_refiner, replace(tracks[rows], ts=tracks.ts[rows][:, :, :n], columns={}))
        assert np.allclose(parts["refined_energy_eV"][rows], alone["refined_energy_eV"], rtol=0, atol=1e-3)


def test_tracks_through_a_network_and_the_likelihood(tmp_path, long_run):
    tracks = simulate_events(3, STRONG, noise="added")
    write_store(tracks, tmp_path / "tracks.h5")
    _, first = inf.infer_track_files(long_run.path, tmp_path / "tracks.h5", tmp_path / "out.csv", refine=STRONG)
    alone = inf.refine_tracks(strong_refiner, tracks)
    assert all(np.allclose(first.tracks[k], alone[k]) for k in alone)
    assert np.allclose(read_columns(tmp_path / "out.csv")["refined_energy_eV"], alone["refined_energy_eV"], atol=1e-4)
    legend = inf.plot_track(first).axes[0].get_legend().get_texts()
    assert legend[-1].get_text() == "likelihood of the track"


def test_tracks_too_short_to_refine_are_named():
    tracks = simulate_events(2, STRONG, noise="added")
    columns = {"start_time_s": np.array([0, 16_000 / 403e6])}
    with pytest.raises(DataError, match="1024 samples.*384"):
        inf.refine_tracks(strong_refiner, replace(tracks, columns=columns))
