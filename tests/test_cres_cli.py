"The program `cres`: what it writes, and that whatever the user can mend is one line and exit code 2."
import os
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

from deadlayer_cres.cli_cres import VERBS, cres
from deadlayer_cres.core import read_json
from deadlayer_cres.cres.data import Events, read_store, shared_data, write_store
from deadlayer_cres.cres.evaluate import read_columns, read_table, reconstruct, residual, write_table
from deadlayer_cres.cres.simulate import SimulateConfig, simulate_events
from deadlayer_cres.cres.simulate import test_set as fixed_test_set
from deadlayer_cres.cres.train import load_run

SMALL = ["--receiver.samples", "256", "--events", "60", "--events_per_shard", "25"]


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capfd, argv, *words) -> None:
    before = sorted(os.listdir("."))
    with pytest.raises(SystemExit) as e:
        cres([*map(str, argv)])
    err = capfd.readouterr().err
    lines = [line for line in err.split("\n") if "error:" in line]
    assert e.value.code == 2 and len(lines) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in lines[0], lines[0]
    assert sorted(os.listdir(".")) == before, "nothing is left behind"


def test_every_verb_explains_itself(capfd):
    for verb in VERBS:
        with pytest.raises(SystemExit) as e:
            cres([verb, "--help"])
        assert not e.value.code and "Example:" in capfd.readouterr().out
    cres(["--version"])
    assert "deadlayer_cres" in capfd.readouterr().out


def test_simulate_writes_what_the_library_simulates(capfd):
    cres(["simulate", *SMALL, "--seed", "7", "--out", "events"])
    assert "60" in capfd.readouterr().out
    got = read_store("events")
    config = SimulateConfig(seed=7)
    config.receiver.samples = 256
    want = simulate_events(60, config)
    assert np.array_equal(got.columns["energy_eV"], want.columns["energy_eV"])
    assert np.allclose(got.ts, want.ts, atol=1e-7) and got.ts.std() > 1e-3
    assert len(read_json("events/index.json")["shards"]) == 3


def test_fixed_sets_are_written_and_cannot_be_changed(capfd):
    cres(["simulate", "--test_set", "cca-8k", "--events", "40", "--out", "set"])
    want = fixed_test_set("cca-8k", 40)
    assert np.array_equal(read_store("set").columns["pitch_angle_deg"], want.columns["pitch_angle_deg"])
    assert np.allclose(read_store("set").ts, want.ts, atol=1e-6)
    refused(capfd, ["simulate", "--test_set", "cca-8k", "--seed", "3", "--out", "a"], "--test_set", "events")


def test_settings_come_from_a_file_and_from_options(world, capfd):
    (world / "c.yaml").write_text("events: 30\nreceiver:\n  samples: 128\n")
    cres(["simulate", "-c", "c.yaml", "--receiver.samples", "64", "--out", "a"])
    assert read_store("a").ts.shape == (30, 2, 64)


@pytest.mark.parametrize(("options", "words"), [
    (["--out", "a", "--receiver.sample", "8"], ["receiver.sample"]),
    (["--out", "a", "--events", "many"], ["events"]),
    (["--out", "a", "--events", "0"], ["events"]),
    (["--out", "a", "--electrons.pitch_low_deg", "91"], ["pitch"]),
    (["--out", "a", "--electrons.pitch", "flat", "--electrons.pitch_low_deg", "85"], ["trap holds"]),
    (["--out", "a", "--electrons.table", "none.csv"], ["none.csv"]),
    (["--out", "a", "--trap.kind", "map"], ["trap.map"]),
    (["--out", "a", "--receiver.noise_sigma_V", "-1"], ["noise_sigma_V"]),
    ([], ["--out"]),
])
def test_simulate_refuses_bad_options(capfd, options, words):
    refused(capfd, ["simulate", *options, *([] if "--events" in options else SMALL)], *words)


def test_nothing_is_replaced_unasked(capfd):
    cres(["simulate", *SMALL, "--out", "a"])
    before = read_store("a").checksum
    refused(capfd, ["simulate", *SMALL, "--seed", "1", "--out", "a"], "a", "overwrite")
    assert read_store("a").checksum == before
    cres(["simulate", *SMALL, "--seed", "1", "--out", "a", "--overwrite"])
    assert read_store("a").checksum != before


def test_a_killed_simulation_goes_on(capfd):
    argv = ["simulate", "--events", "400", "--events_per_shard", "4", "--receiver.samples", "4096", "--out", "a"]
    program = [sys.executable, "-c", "import sys; from deadlayer_cres.cli_cres import cres; cres(sys.argv[1:])", *argv]
    job = subprocess.Popen(program, stderr=subprocess.DEVNULL)
    start = time.monotonic()
    while len(list(os.scandir("a.part"))) < 5 if os.path.isdir("a.part") else True:
        assert job.poll() is None and time.monotonic() - start < 120
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not os.path.exists("a")
    done = {f.name: f.stat().st_mtime_ns for f in os.scandir("a.part") if f.name.startswith("shard")}
    cres(argv)
    assert len(done) >= 3 and all(os.stat(f"a/{name}").st_mtime_ns == t for name, t in done.items())
    config = SimulateConfig()
    config.receiver.samples = 4096
    assert np.allclose(read_store("a").ts, simulate_events(400, config).ts, atol=1e-7)


def test_prepare_joins_stores_and_says_what_it_left_out(capfd):
    events = simulate_events(20, SimulateConfig())
    events.columns["pitch_angle_deg"][3] = -99.0
    write_store(events, "one.h5")
    write_store(events[:5], "two.h5")
    cres(["prepare", "one.h5", "two.h5", "--out", "all", "--samples", "100"])
    out = capfd.readouterr().out
    assert read_store("all").ts.shape == (23, 2, 100) and "20 read, 19 kept" in out and "2 " in out


def damaged(name: str) -> str:
    "A file of events that cannot be used, of the kind that `name` says."
    events = simulate_events(4, SimulateConfig())
    write_store(events, "bad.h5")
    if name == "truncated":
        os.truncate("bad.h5", os.path.getsize("bad.h5") // 2)
    if name == "text":
        os.remove("bad.h5")
        with open("bad.h5", "w") as f:
            f.write("no HDF5")
    if name == "empty folder":
        os.makedirs("bad")
        return "bad"
    with (h5py.File("bad.h5", "r+") if name in ("nan", "label", "length", "none") else open(os.devnull)) as f:
        if name == "nan":
            f["output_ts_I"][2, 7] = np.nan
        if name in ("label", "length"):
            values = f["energy_eV"][:]
            del f["energy_eV"]
            if name == "length":
                f["energy_eV"] = values[:3]
    return "bad.h5"


@pytest.mark.parametrize(("name", "word"), [
    ("truncated", "truncated"), ("text", "HDF5"), ("empty folder", "files"), ("nan", "row 2"), ("label", "energy_eV"),
    ("length", "energy_eV")])
def test_prepare_refuses_bad_files(capfd, name, word):
    path = damaged(name)
    refused(capfd, ["prepare", path, "--out", "out"], "bad", word)


def test_prepare_refuses_another_sampling_rate_and_no_input(capfd):
    write_store(simulate_events(4, SimulateConfig()), "a.h5")
    refused(capfd, ["prepare", "a.h5", "--out", "out", "--sampling_rate_Hz", "2e8"], "a.h5", "200000000")
    refused(capfd, ["prepare", "nowhere", "--out", "out"], "nowhere")
    refused(capfd, ["prepare", "a.h5", "--out", "a.h5"], "a.h5")


def test_the_real_egg(capfd):
    folder = shared_data()
    if folder is None:
        pytest.skip("the real files are not here: set DEADLAYER_CRES_DATA")
    egg = folder / "locust_mc_testSignal.egg"
    refused(capfd, ["prepare", egg, "--out", "out"], "truth", "LocustEventProperties")
    rate = ["--sampling_rate_Hz", "403e6"]
    refused(capfd, ["prepare", egg, "--out", "out", "--require", "[]", *rate], egg.name, "403000000")
    cres(["prepare", str(egg), "--out", "out", "--require", "[]"])
    e = read_store("out")
    z = (e.ts[0, 0] + 1j * e.ts[0, 1]).astype(complex)
    peak = np.abs(np.fft.fft(z)).argmax() / len(z) * e.sampling_rate_Hz
    assert isinstance(e, Events) and abs(peak - 50e6) < 1e5
    shutil.copy(egg, "short.egg")
    os.truncate("short.egg", 9000)
    refused(capfd, ["prepare", "short.egg", "--out", "two", "--require", "[]"], "short.egg")


# --- train, evaluate, infer, compare ---

TINY = ["--data.simulate.receiver.samples", "256", "--data.batches_per_epoch", "4", "--data.valid_batches", "2",
        "--data.batch_size", "32", "--model.encoders", "[{kind: cnn, d_model: 8, layers: 1}]", "--model.head",
        "gaussian", "--model.hidden", "[]", "--prep.representation", "time", "--train.epochs", "1"]


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    "A run made by the program itself."
    path = tmp_path_factory.mktemp("runs") / "run"
    cres(["train", *TINY, "--run", str(path)])
    return path


@pytest.fixture
def run(trained_run, world):
    shutil.copytree(trained_run, world / "run")
    return "run"


def stored(name="a", n=40, samples=256, noise="added", **options):
    config = SimulateConfig(**options)
    config.receiver.samples = samples
    events = simulate_events(n, config, noise=noise)
    write_store(events, name)
    return events


def test_train_leaves_a_run_and_heeds_its_settings(trained_run):
    assert {"config.yaml", "model.safetensors", "history.csv"} <= set(os.listdir(trained_run))
    assert "d_model: 8" in (trained_run / "config.yaml").read_text()
    assert len((trained_run / "history.csv").read_text().splitlines()) == 2


def test_train_resumes_and_replaces_only_when_told(capfd, run):
    refused(capfd, ["train", *TINY, "--run", run], run)
    cres(["train", *TINY, "--run", run, "--resume"])
    assert "nothing to do" in capfd.readouterr().err
    refused(capfd, ["train", *TINY, "--train.lr", "1e-4", "--run", run, "--resume"], "lr")


@pytest.mark.parametrize(("options", "words"), [
    ([], ["--run"]), (["--run", "x", "--model.head", "none"], ["head"]),
    (["--run", "x", "--model.d", "4"], ["model.d"]),
    (["--run", "x", "--data.targets", "[colour]"], ["colour"]),
    (["--run", "x", "--data.source", "files"], ["data.files"]),
    (["--run", "x", "--data.source", "files", "--data.files", "[none.h5]"], ["none.h5"]),
    (["-c", "none.yaml", "--run", "x"], ["none.yaml"])])
def test_train_refuses_bad_settings(capfd, options, words):
    refused(capfd, ["train", *TINY, *options], *words)


def test_evaluate_writes_what_it_says(capfd, run):
    weights = open("run/model.safetensors", "rb").read()
    cres(["evaluate", run, "--events", "150"])
    out = capfd.readouterr().out
    assert "core σ" in out and "peak frequency" in out and "report.html" in out
    assert {"metrics.json", "report.html", "calibration.json", "predictions.csv"} <= set(os.listdir("run"))
    m, c = read_json("run/metrics.json"), read_json("run/calibration.json")
    assert m["events"] == 150 and set(m["baselines"]) == {"mean", "peak frequency"}
    assert abs(c["coverage"]["temperature"]["energy_eV"]["coverage_1_sigma"] - 0.683) < 0.12
    assert open("run/model.safetensors", "rb").read() != weights, "the temperature is part of the weights"
    p = read_table("run/predictions.csv")
    assert abs(np.sqrt(np.mean(residual(p) ** 2)) - m["energy_eV"]["all"]["rms"]["value"]) < 1e-6
    cres(["compare", run])
    assert "mean" in capfd.readouterr().out


def test_evaluate_on_given_events(capfd, run):
    events = stored(n=120)
    _, _, pipeline = load_run(run, "cpu")
    write_table("posterior.csv", reconstruct(pipeline, events))
    folder = shared_data()
    grid = [] if folder is None else ["--efficiency", str(folder / "epsilon_grid.npz")]
    cres(["evaluate", run, "--data", "a", "--events", "100", "--out", "there", "--calibrate", "isotonic", "--limit",
          "posterior.csv", *grid])
    assert os.path.exists("there/report.html") and not os.path.exists("run/metrics.json")
    p, m = read_table("there/predictions.csv"), read_json("there/metrics.json")["energy_eV"]
    assert np.array_equal(p.truth["energy_eV"], events.columns["energy_eV"]) and p.quantiles.shape == (120, 2, 5)
    assert m["limit"]["rms_ratio"]["value"] == pytest.approx(1, abs=1e-6)
    assert folder is None or "efficiency_weighted" in m


def test_evaluate_on_a_fixed_set(capfd, run):
    cres(["evaluate", run, "--test_set", "cca-8k", "--events", "110", "--out", "there", "--calibrate", "none"])
    assert read_json("there/metrics.json")["events"] == 110


@pytest.mark.parametrize(("options", "words"), [
    (["nowhere"], ["nowhere"]), (["run", "--data", "b.h5"], ["b.h5"]),
    (["run", "--data", "a", "--test_set", "cca-8k"], ["both"]),
    (["run", "--events", "3"], ["--events"]), (["run", "--efficiency", "none.npz"], ["none.npz"]),
    (["run", "--limit", "none.csv"], ["none.csv"]), (["run", "--data", "short"], ["256 samples"]),
    (["run", "--data", "a", "--noise", "cav"], ["cav"]), (["run", "--test_set", "cca"], ["cca-8k"])])
def test_evaluate_refuses_bad_input(capfd, run, options, words):
    stored()
    stored("short", samples=100)
    capfd.readouterr()
    refused(capfd, ["evaluate", *options], *words)


def test_infer_is_what_reconstruct_gives(capfd, run):
    events = stored()
    cres(["infer", run, "a", "--out", "a.csv"])
    assert "40 from 1 file" in capfd.readouterr().out
    _, _, pipeline = load_run(run, "cpu")
    assert np.allclose(read_table("a.csv").mean, reconstruct(pipeline, events).mean, atol=1e-2)
    refused(capfd, ["infer", run, "a", "--out", "a.csv"], "a.csv", "overwrite")
    cres(["infer", run, "a", "--out", "a.csv", "--overwrite"])


def test_infer_tracks(capfd, run):
    stored(n=4, samples=1024)
    cres(["infer", run, "a", "--out", "t.csv", "--track", "--stride", "128"])
    assert "4 from 1 file" in capfd.readouterr().out and os.path.getsize("t.png") > 5000
    assert len(read_columns("t_windows.csv")["event"]) == 4 * 7 and len(read_columns("t.csv")["event"]) == 4


@pytest.mark.parametrize(("options", "words"), [
    (["nowhere", "a", "--out", "x.csv"], ["nowhere"]), (["run", "b*.h5", "--out", "x.csv"], ["b*.h5"]),
    (["run", "a", "--out", "x.txt"], ["parquet"]), (["run", "a"], ["out"]),
    (["run", "short", "--out", "x.csv"], ["short"]),
    (["run", "a", "--out", "x.csv", "--stride", "5"], ["--track"]),
    (["run", "a", "--out", "x.csv", "--batch_size", "0"], ["--batch_size"]),
    (["run", "a", "--out", "x.csv", "--track", "--loss", "some"], ["--loss"]),
    (["run", "a", "--out", "x.csv", "--track", "--window", "5000"], ["5000"]),
    (["run", "a", "--out", "x.csv", "--simulation", "s.yaml"], ["--refine"]),
    (["run", "a", "--out", "x.csv", "--track", "--simulation", "s.yaml"], ["--refine"]),
    (["run", "a", "--out", "x.csv", "--refine", "--simulation", "s.yaml"], ["s.yaml"]),
    (["run", "a", "--out", "x.csv", "--noise", "cav"], ["cav"])])
def test_infer_refuses_bad_input(capfd, run, options, words):
    stored()
    stored("short", samples=100)
    capfd.readouterr()
    refused(capfd, ["infer", *options], *words)


def test_compare_refuses_what_was_not_evaluated(capfd, run):
    refused(capfd, ["compare", run], "evaluate")
    refused(capfd, ["compare", "nowhere"], "nowhere")
