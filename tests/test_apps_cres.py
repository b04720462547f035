"""The explorer of CRES events: what moves, what stays, and what is said when something is wrong."""
import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("ipywidgets")

from PIL import Image

from deadlayer_cres import apps_cres as apps
from deadlayer_cres.apps import Explorer
from deadlayer_cres.core import ConfigError, DataError
from deadlayer_cres.cres.data import Events, shared_data, write_store
from deadlayer_cres.cres.evaluate import reconstruct
from deadlayer_cres.cres.fit import Posterior, Ridge, RidgeConfig, fisher, modes
from deadlayer_cres.cres.infer import Trained
from deadlayer_cres.cres.model import EncoderConfig, ModelConfig
from deadlayer_cres.cres.prep import PrepConfig
from deadlayer_cres.cres.simulate import ReceiverConfig, SimulateConfig, simulate_events
from deadlayer_cres.cres.train import Config, DataConfig, train
from deadlayer_cres.train import Run, TrainConfig

SHORT = SimulateConfig(receiver=ReceiverConfig(samples=2048))


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    "A working folder without runs and files."
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path_factory.mktemp("work"))
        yield


@pytest.fixture(scope="module")
def explorer():
    x = apps.cres_explorer(config=SHORT)
    yield x
    x.close()


@pytest.fixture(scope="module")
def setup(explorer):
    return explorer.setup


@pytest.fixture
def fresh(explorer):
    "The explorer at its first values."
    explorer.set(**FIRST)
    assert not explorer.message.value
    return explorer


FIRST = {"energy_eV": 18_600.0, "pitch_angle_deg": 89.0, "radius_mm": 3.0, "axial_phase_deg": 0.0,
         "cyclotron_phase_deg": 0.0, "noise": 1.0, "noise_number": 0, "samples": 2048, "map": "spectrogram", "run": "",
         "file": "", "event": 0}
MOVES = {"energy_eV": 18_560.0, "pitch_angle_deg": 88.4, "radius_mm": 4.5, "axial_phase_deg": 50.0,
         "cyclotron_phase_deg": 70.0, "noise": 0.5, "noise_number": 3, "samples": 4096, "map": "Q-transform"}


def picture(explorer) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(explorer.image.value)))


def first_stage(explorer) -> tuple[bytes, dict]:
    fig, numbers = next(explorer.draw(explorer.values))
    return explorer._screen.png(explorer.moving), numbers


# --- the figure ---


@pytest.mark.parametrize("name", MOVES)
def test_each_control_moves_the_picture_in_the_first_stage(fresh, name):
    before = first_stage(fresh)
    assert first_stage(fresh) == before
    fresh.controls[name].value = MOVES[name]
    after = first_stage(fresh)
    assert not fresh.message.value and after[0] != before[0]
    changed = any(after[1][k] != (v if isinstance(v, str) else pytest.approx(v)) for k, v in before[1].items())
    assert changed == (name in ("energy_eV", "pitch_angle_deg", "radius_mm", "noise", "samples"))


def test_a_figure_that_was_moved_is_the_figure_made_there(fresh):
    there = FIRST | MOVES
    fresh.set(**dict(list(MOVES.items())[:5]))
    fresh.set(**dict(list(MOVES.items())[5:]))
    other = apps.cres_explorer(config=SHORT, **there)
    assert np.array_equal(picture(fresh), picture(other))
    assert fresh.numbers == other.numbers
    other.close()


def test_the_quick_picture_looks_like_the_whole_figure(fresh):
    buffer = io.BytesIO()
    fresh.figure.savefig(buffer, format="png", dpi=fresh.figure.dpi)
    whole = np.asarray(Image.open(buffer))[..., :3].astype(int)
    assert whole.shape == picture(fresh).shape
    far = np.abs(whole - picture(fresh)).max(2) > 60
    assert far.mean() < 0.01 and (whole.min(2) < 200).mean() > 0.03


def test_a_saved_figure_is_drawn_at_its_own_resolution(fresh, tmp_path):
    path = fresh.save(tmp_path)
    width, height = fresh.figure.get_size_inches()
    assert Image.open(path).size == (round(120 * width), round(120 * height))


def test_the_outline_keeps_the_extremes():
    y = np.random.default_rng(0).normal(size=10_000)
    x, found = apps.outline(np.arange(10_000.0), y, 100)
    assert len(x) == len(found) == 200 and found.max() == y.max() and found.min() == y.min()
    assert apps.outline(np.arange(150.0), y[:150], 100)[1] is not None and len(apps.outline(y, y, 9000)[0]) == 10_000


# --- electrons ---


def test_an_electron_that_is_not_trapped_is_an_error_line(fresh):
    image, numbers = fresh.image.value, fresh.numbers
    fresh.controls["pitch_angle_deg"].value = 86.5
    assert "that the trap holds, found 86.5 degrees" in fresh.message.value
    assert fresh.image.value == image and fresh.numbers == numbers
    fresh.controls["pitch_angle_deg"].value = 89.0
    assert not fresh.message.value and fresh.image.value == image


@pytest.mark.parametrize("there", [{"pitch_angle_deg": 90.0}, {"radius_mm": 0.0}, {"noise": 0.0}])
def test_nothing_to_be_learnt_has_no_limit(fresh, there):
    fresh.set(**there)
    assert not fresh.message.value
    assert fresh.numbers.get("limit", "none").startswith("none")
    if "noise" in there:
        assert "exact posterior" not in fresh.numbers and fresh.numbers["signal-to-noise ratio"] == "no noise"


def test_a_truth_outside_of_the_prior_is_said(fresh):
    fresh.set(pitch_angle_deg=87.9, radius_mm=6.0)
    assert "outside of its prior" in fresh.numbers["exact posterior"]


def test_posterior_and_limit_are_those_of_the_fit(fresh, setup):
    e = apps.electron(setup, 18_600.0, 89.0, 3e-3)
    record = apps.simulated(setup, e, 2048)
    p = Ridge(SHORT, RidgeConfig(step=0.5))(record.ts)
    want = apps.estimate(*([float(f(k)) for k in apps.TARGETS] for f in (p.mean, p.sigma)))
    assert fresh.numbers["exact posterior"] == want
    f = fisher(setup.simulator, *e[:5], orders=setup.orders)
    bound, covariance = f.bound(), apps.limit_covariance(f)
    assert math.isclose(covariance[0, 0] ** 0.5, float(bound["energy_eV"]), rel_tol=1e-6)
    assert math.isclose(covariance[1, 1] ** 0.5, float(bound["pitch_angle_deg"]), rel_tol=1e-6)
    away = np.linalg.solve(covariance, apps.ellipse(np.zeros(2), covariance))
    assert np.allclose((away * apps.ellipse(np.zeros(2), covariance)).sum(0), 1)


def test_noise_is_that_of_its_number_and_scale(setup):
    e = apps.electron(setup, 18_600.0, 89.0, 3e-3)
    one, half, other = (apps.simulated(setup, e, 2048, *a) for a in ((1.0, 4), (0.5, 4), (1.0, 5)))
    assert torch.allclose(one.ts - one.clean, 2 * (half.ts - half.clean), atol=1e-6) and half.sigma_V == one.sigma_V / 2
    assert not torch.equal(one.ts, other.ts) and torch.equal(one.clean, other.clean)
    longer = apps.simulated(setup, e, 4096, 1.0, 4)
    assert torch.allclose(longer.ts[..., :2048], one.ts, atol=1e-6)
    assert setup.ridge(2048, one.sigma_V) is setup.ridge(2048, one.sigma_V)


def test_visible_lines_and_numbers(fresh):
    fresh.set(noise=0.0)
    e = apps.electron(fresh.setup, 18_600.0, 89.0, 3e-3)
    power = apps.line_powers(fresh.setup, e)
    assert fresh.numbers["visible side lines"] == (power > 1e-6 * 0.012**2).sum() - 1
    assert math.isclose(fresh.numbers["main line [mV]"], 1e3 * power[e.comb.order == 0][0] ** 0.5)


def test_draw_again_draws_other_noise(fresh):
    before = fresh.image.value
    fresh.again.click()
    assert fresh.controls["noise_number"].value == 1 and fresh.image.value != before


def test_threads_are_as_before(fresh):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    list(fresh.draw(fresh.values))
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError), apps.one_thread():
        assert torch.get_num_threads() == 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


# --- files ---


@pytest.fixture(scope="module")
def events():
    return simulate_events(4, SHORT, noise="added")


def test_the_sliders_go_to_the_labels_of_an_event(fresh, events, tmp_path):
    write_store(events, tmp_path / "events.h5")
    fresh.set(file=str(tmp_path / "events.h5"), event=2, noise=2.0)
    assert not fresh.message.value
    for name, label, factor in (("energy_eV", "energy_eV", 1), ("pitch_angle_deg", "pitch_angle_deg", 1),
                                ("radius_mm", "radius_m", 1e3), ("axial_phase_deg", "axial_phase", 180 / math.pi)):
        assert math.isclose(fresh.values[name], factor * events.columns[label][2]), name
    p = Ridge(SHORT, RidgeConfig(step=0.5))(torch.from_numpy(events.ts[2:3]))
    want = apps.estimate(*([float(f(k)) for k in apps.TARGETS] for f in (p.mean, p.sigma)))
    assert fresh.numbers["exact posterior"] == want
    assert "electron of the sliders, not of the file" not in fresh.numbers
    energy = fresh.values["energy_eV"]
    fresh.controls["energy_eV"].value = energy + 20
    assert fresh.values["energy_eV"] == energy + 20
    assert math.isclose(fresh.panels.close_up.centre[0], energy)
    assert "electron of the sliders, not of the file" in fresh.numbers
    fresh.controls["event"].value = 9
    assert "expected an event from 0 to 3, found 9" in fresh.message.value


def test_noise_is_added_to_clean_events_alone(events, setup, tmp_path):
    clean = simulate_events(1, SHORT, noise="none")
    for name, given in (("noisy.h5", events), ("clean.h5", clean)):
        write_store(given, tmp_path / name)
        file = apps.EventFile(tmp_path / name)
        record, labels = apps.from_file(setup, file, 0, 2048, 0.5)
        file.close()
        sigma = setup.simulator.noise.sigma_V
        if name == "noisy.h5":
            assert torch.equal(record.ts, torch.from_numpy(given.ts[:1])) and record.clean is None
            assert record.sigma_V == sigma
        else:
            assert math.isclose(float((record.ts - record.clean).std()), sigma / 2, rel_tol=0.05)
            assert torch.equal(record.clean, torch.from_numpy(given.ts)) and record.sigma_V == sigma / 2
        assert labels["energy_eV"] == given.columns["energy_eV"][0]


def test_long_records_without_labels_are_cut(tmp_path):
    ts = np.random.default_rng(1).normal(size=(2, 2, 1000)).astype(np.float32)
    write_store(Events(ts, {}), tmp_path / "long.h5")
    file = apps.EventFile(tmp_path / "long.h5")
    assert np.array_equal(file.read(4, 300)[0][0].numpy(), ts[1, :, 300:600])
    assert file.read(0, 5000)[0].shape == (1, 2, 1000)
    with pytest.raises(DataError, match="from 0 to 5, found 6"):
        file.read(6, 300)
    file.close()


def test_another_receiver_has_no_electron(fresh, tmp_path):
    t = np.arange(2048) / 200e6
    z = 1e-7 * np.exp(2j * np.pi * 30e6 * t)
    write_store(Events(np.stack([z.real, z.imag])[None], {}, 200e6, 20.65e9), tmp_path / "tone.h5")
    fresh.set(file=str(tmp_path / "tone.h5"))
    assert not fresh.message.value and set(fresh.numbers) == {"record"}
    assert fresh.panels.orbit.note.get_visible() and not fresh.panels.spectrum.lines.get_visible()
    assert "another receiver" in fresh.panels.plane.note.get_text()
    assert fresh.panels.waveform.ax.get_ylabel() == "voltage [µV]"
    x, y = fresh.panels.spectrum.curve.get_data()
    assert abs(x[y.argmax()] - 30) < 0.25
    fresh.set(file="", samples=2048)
    assert not fresh.panels.orbit.note.get_visible() and "limit" in fresh.numbers


def test_the_egg_file(fresh):
    folder = shared_data()
    if folder is None:
        pytest.skip("no published files")
    fresh.set(file=str(folder / "locust_mc_testSignal.egg"), samples=2048)
    assert not fresh.message.value and fresh.numbers["record"].startswith("2,048 samples, 10.24 µs")
    fresh.controls["event"].value = 3
    assert not fresh.message.value


def test_an_event_without_truth_is_not_that_of_the_sliders(fresh, events, tmp_path):
    write_store(Events(events.ts, {}), tmp_path / "own.h5")
    fresh.set(file=f" {tmp_path / 'own.h5'} ")
    assert not fresh.message.value and "electron of the sliders, not of the file" in fresh.numbers
    fresh.set(file="")
    assert "electron of the sliders, not of the file" not in fresh.numbers


def test_an_event_that_is_not_finite_is_named(tmp_path):
    ts = np.zeros((2, 2, 2048), np.float32)
    ts[1, 0, 7] = np.nan
    file = apps.EventFile.__new__(apps.EventFile)
    file.path, file.events = tmp_path / "own.h5", Events(ts, {})
    file.read(0, 2048)
    with pytest.raises(DataError, match=r"own.h5: event 1: expected finite I and Q"):
        file.read(1, 2048)


def test_a_bad_file_is_an_error_line(fresh, tmp_path):
    image = fresh.image.value
    for name in ("none.h5", "text.txt"):
        (tmp_path / "text.txt").write_text("no events")
        fresh.set(file=str(tmp_path / name))
        assert name in fresh.message.value and fresh.image.value == image


# --- networks ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = DataConfig(simulate=SHORT, batches_per_epoch=2, valid_batches=1, batch_size=16)
    model = ModelConfig(encoders=[EncoderConfig(kind="fold", d_model=8)], head="mixture", hidden=[])
    config = Config(data=data, model=model, prep=PrepConfig(representation="spectrum"),
                    train=TrainConfig(epochs=1, progress=False))
    return train(config, tmp_path_factory.mktemp("runs") / "run", device="cpu").path


def test_the_network_answers_in_a_stage_of_its_own(fresh, run):
    assert len(list(fresh.draw(fresh.values))) == 2
    fresh.set(run=str(run))
    assert not fresh.message.value and len(list(fresh.draw(fresh.values))) == 3
    trained = Trained.open(run, "cpu")
    e = apps.electron(fresh.setup, 18_600.0, 89.0, 3e-3)
    record = apps.simulated(fresh.setup, e, 2048)
    p = trained.calibrated(reconstruct(trained.pipeline, Events(record.ts.numpy(), {}), "none"))
    answer = apps.network_answer(trained, fresh.setup, record)
    assert np.allclose(answer.mean, p.mean[0]) and np.allclose(answer.sigma, p.sigma[0]) and len(answer.modes) > 1
    assert fresh.numbers["network"].startswith(apps.estimate(p.mean[0], p.sigma[0]))
    fresh.set(samples=4096)
    assert "of the first 2,048 samples" in fresh.numbers["network"] and "range" not in fresh.numbers["network"]
    fresh.set(pitch_angle_deg=87.95, radius_mm=6.0)
    assert "outside of the range of its training" in fresh.numbers["network"]


def test_the_ellipse_of_a_mode_lies_along_its_cells():
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)
    n = torch.zeros(41, dtype=torch.int64)
    cells = (n, torch.ones(41) / 41, 18_600 + x, 89 - 0.1 * x, 0 * x, torch.zeros(1))
    for width in (0.0, 2.0):
        p = Posterior(*cells, width_eV=torch.full((41,), width), width_deg=torch.full((41,), width / 10))
        mean, covariance = apps.spread(p, modes(p))
        sigma = np.sqrt(np.diag(covariance))
        assert np.allclose(mean, (18_600, 89)) and covariance[0, 1] / sigma.prod() < -0.99
        assert math.isclose(sigma[0], float(p.sigma()), rel_tol=0.02)


def test_a_network_that_does_not_fit_is_said(fresh, setup, run, tmp_path):
    fresh.set(run=str(tmp_path / "nothing"))
    assert "expected a run folder" in fresh.message.value and "limit" in fresh.numbers
    longer = apps.cres_explorer(run, config=SimulateConfig(receiver=ReceiverConfig(samples=1024)))
    assert "none: expected at least 2048 samples" in longer.numbers["network"] and not longer.message.value
    longer.close()
    record = apps.simulated(setup, apps.electron(setup, 18_600.0, 89.0, 3e-3), 2048)
    other = SimpleNamespace(config=SimpleNamespace(trap=None, cavity=setup.config.cavity))
    answers = [apps.network_answer(Trained.open(run, "cpu"), s, record) for s in (setup, other)]
    assert ["another trap" in a.doubt for a in answers] == [False, True]


def test_a_run_of_the_other_half_is_said_and_a_run_object_taken(fresh, run, tmp_path):
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead" / "config.yaml").write_text("pairs: {}")
    fresh.set(run=str(tmp_path / "dead"))
    assert "expected a run of the CRES half, found a run of the dead-layer half" in fresh.message.value
    assert "limit" in fresh.numbers
    x = apps.cres_explorer(Run(run), config=SHORT)
    assert not x.message.value and "network" in x.numbers
    x.close()


# --- the page ---


def test_runs_and_files_are_found(run, events, tmp_path):
    write_store(events, tmp_path / "a" / "store", shard_events=2)
    write_store(events, tmp_path / "events.h5")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.egg").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "other").mkdir()
    for name in ("config.yaml", "model.safetensors"):
        (tmp_path / "other" / name).write_text("pairs: 3")
    (tmp_path / "mine").symlink_to(run.parent)
    assert apps.found_below(tmp_path) == ([], ["events.h5", "a/store"])
    assert apps.found_below(run.parent) == (["run"], [])
    assert apps.found_below(tmp_path, depth=0) == ([], ["events.h5"])
    (run.parent / "unreadable").mkdir()
    (run.parent / "unreadable" / "model.safetensors").touch()
    (run.parent / "unreadable" / "config.yaml").symlink_to("nowhere")
    assert apps.found_below(run.parent) == (["run"], []), "what cannot be read is left out"


def test_closed_it_lets_go_of_its_file(events, tmp_path):
    write_store(events, tmp_path / "events.h5")
    x = apps.cres_explorer(file=tmp_path / "events.h5", config=SHORT)
    assert x in Explorer._open and x._file is not None
    x.close()
    assert x not in Explorer._open and x._file is None


def test_an_unknown_control_is_refused():
    with pytest.raises(ConfigError, match="pitch_angle_deg"):
        apps.cres_explorer(config=SHORT, pitch=89.0)


@pytest.mark.parametrize(("wrong", "words"), [
    ({"energy_eV": 20_000.0}, r"energy_eV: expected a number from [\d.]+ to [\d.]+, found 20000"),
    ({"samples": 3000}, "samples: .*3000"), ({"run": 5}, "run: expected a run folder"),
    ({"file": np.zeros(3)}, "file: .*ndarray"), ({"config": {}}, "config: expected a SimulateConfig, found dict")])
def test_arguments_of_another_type_or_range_are_refused(wrong, words):
    shown = list(Explorer._open)
    with pytest.raises(ConfigError, match=words):
        apps.cres_explorer(**{"config": SHORT} | wrong)
    assert Explorer._open == shown


def test_text_of_estimates():
    assert apps.estimate((18_600.1234, 89.00012), (0.0421, 0.00131)) == "18,600.123 ± 0.042 eV, 89.0001 ± 0.0013°"
    assert apps.estimate((18_600.0, math.nan), (12.3, math.nan)) == "18,600 ± 12 eV"
    assert apps.estimate((18_600.0, 89.0), (math.nan, 0.5)) == "18,600.00 eV, 89.00 ± 0.50°"


def test_a_network_of_the_energy_alone_is_a_level_bar(fresh):
    plane = fresh.panels.plane
    plane.show(network=apps.Answer(np.array([18_580.0, math.nan]), np.array([4.0, math.nan]), np.empty((0, 2)),
                                   np.empty(0), ""))
    assert plane.bars[0].get_xdata() == [18_576.0, 18_584.0] and np.isfinite(plane.bars[0].get_ydata()).all()
    assert plane.bars[1].get_ydata()[0] == plane.bars[1].get_ydata()[1]
    assert [apps.nice(x) for x in (1, 1.01, 4.9, 5.1, 0.0021)] == [1, 2, 5, 10, 0.005]
    assert [apps.volts(x)[1] for x in (0.1, 1e-5, 1e-7, 1e-9)] == ["mV", "µV", "µV", "nV"]
