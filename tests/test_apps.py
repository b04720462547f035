"""The explorers without a browser: values, figures, errors as a line, and nothing left behind."""
import csv
import gc
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

widgets = pytest.importorskip("ipywidgets")

from deadlayer_cres import apps, apps_deadlayer  # noqa: E402
from deadlayer_cres.apps import Brush, Explorer, RunBrowser, find_files, find_runs, run_browser, still  # noqa: E402
from deadlayer_cres.apps_deadlayer import spectrum_explorer  # noqa: E402
from deadlayer_cres.core import ConfigError, DataError  # noqa: E402
from deadlayer_cres.cres.evaluate import Predictions, read_columns, write_table  # noqa: E402
from deadlayer_cres.deadlayer.data import read_store, write_store  # noqa: E402
from deadlayer_cres.deadlayer.simulate import simulate_hits, spectra_of_hits  # noqa: E402
from deadlayer_cres.deadlayer.train import (  # noqa: E402
    Config,
    DataConfig,
    PairConfig,
    PairNetConfig,
    TrainConfig,
    train,
)
from deadlayer_cres.plots import figure  # noqa: E402
from deadlayer_cres.train import Run  # noqa: E402


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "An empty working folder, and explorers that are closed in the end."
    monkeypatch.chdir(tmp_path)
    yield
    for explorer in list(Explorer._open):
        explorer.close()


class Line(Explorer):
    "A straight line, which cannot rise by three."

    name = "line"

    def make_controls(self):
        with figure(width=3, height=2) as (self.fig, ax):
            self.moving = self.line, = ax.plot([0, 1], [0, 1])
            ax.set(ylim=(-9, 9))
        return {"rise": widgets.FloatSlider(value=1, min=-9, max=9), "press": widgets.Button(description="nothing")}

    def draw(self, values):
        if values["rise"] == 3:
            raise DataError("another rise", "3\nand <more>")
        if values["rise"] == 4:
            raise ZeroDivisionError("four")
        self.line.set_ydata([0, values["rise"]])
        yield self.fig, {"rise": values["rise"]}
        if values["rise"] == 5:
            yield self.fig, {"rise": 5.0, "stage": 2}

    def columns(self):
        return {"y": np.array([0.0, self.numbers["rise"]])}


# --- the frame ---


def test_a_control_redraws_figure_and_numbers_once():
    line = Line()
    first, seen = line.image.value, []
    line.image.observe(lambda _: seen.append(1), "value")
    line.controls["rise"].value = 2
    assert line.image.value != first and line.numbers == {"rise": 2.0} and "2" in line.numbers_table.value
    assert len(seen) == 1 and len(line.seconds) == 1 and line.seconds[0] > 0 and line.message.value == ""
    assert line.values == {"rise": 2.0}, "a button has no value"
    line.set(rise=5)
    assert line.numbers["stage"] == 2, "the last stage is what stays"


def test_first_values_and_unknown_controls():
    assert Line(rise=-2).numbers == {"rise": -2.0}
    line = Line()
    with pytest.raises(ConfigError, match="one of rise"):
        line.set(fall=1)
    assert line.values == {"rise": 1.0} and not line._quiet


@pytest.mark.parametrize(("rise", "words"), [(9.5, "rise: expected a number from -9 to 9, found 9.5"),
                                             (float("nan"), "from -9 to 9"), ("up", "found 'up'"),
                                             (None, "found None")])
def test_values_that_a_control_cannot_have_are_refused(rise, words):
    line, shown = Line(rise=2), list(Explorer._open)
    with pytest.raises(ConfigError, match=words):
        line.set(rise=rise)
    with pytest.raises(ConfigError, match=words):
        Line(rise=rise)
    assert line.values == {"rise": 2.0} and Explorer._open == shown, "the one that was not made is closed"


@pytest.mark.parametrize(("rise", "words"), [(3, "expected another rise, found 3 and &lt;more&gt;"),
                                             (4, "ZeroDivisionError: four")])
def test_an_error_is_a_line_and_the_last_good_figure_stays(rise, words, tmp_path):
    line = Line(rise=2)
    before = line.image.value
    line.set(rise=rise)
    assert words in line.message.value and line.message.value.count("<div") == 1 and "\n" not in line.message.value
    assert line.image.value == before and line.numbers == {"rise": 2.0}
    path = line.save(tmp_path)
    assert json.loads(path.with_suffix(".json").read_text())["values"] == {"rise": 2.0}, "what the figure shows"
    line.set(rise=1)
    assert line.message.value == ""


def test_moving_artists_are_drawn_as_a_whole_figure_would_be():
    line = Line()
    line.set(rise=7)
    line.set(rise=-7)
    whole = Line(rise=-7)
    assert line.image.value == whole.image.value
    line.fig.axes[0].set_ylim(-20, 20)
    line.update()
    whole.fig.axes[0].set_ylim(-20, 20)
    whole.moving = ()
    whole.fig.axes[0].lines[0].set_animated(False)
    whole.update()
    assert line.image.value == whole.image.value


def test_saving_never_replaces_and_says_where(tmp_path):
    line = Line(rise=2)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "line-1.csv").write_text("mine")
    line.folder.value = str(tmp_path / "kept")
    paths = [line.save(), line.save()]
    assert [p.name for p in paths] == ["line-2.png", "line-3.png"] and "line-3.png" in line.message.value
    assert (tmp_path / "kept" / "line-1.csv").read_text() == "mine"
    found = json.loads(paths[0].with_suffix(".json").read_text())
    assert found == {"values": {"rise": 2.0}, "numbers": {"rise": 2.0}}
    with open(paths[0].with_suffix(".csv"), newline="") as f:
        assert [row["y"] for row in csv.DictReader(f)] == ["0.0", "2.0"]
    (tmp_path / "file").write_text("")
    line.folder.value = str(tmp_path / "file" / "in it")
    assert line.save() is None and "file" in line.message.value


def test_without_a_figure_nothing_is_saved(tmp_path):
    line = Line(rise=3)
    assert line.figure is None and line.save(tmp_path) is None and not list(tmp_path.iterdir())
    assert "expected a figure" in line.message.value


def test_closing_leaves_no_observer():
    line = Line()
    rise, image = line.controls["rise"], line.image
    line.close()
    before = image.value
    rise.value = 6
    assert image.value == before and line not in Explorer._open
    assert rise.comm is None and not rise._trait_notifiers.get("value", {}).get("change")


def test_closing_leaves_no_model_behind(tmp_path):
    def models():
        return {id(w) for w in gc.get_objects() if isinstance(w, widgets.Widget) and w.comm is not None}
    before = models()
    for make in (Line, *(lambda f=f: f(tmp_path) for f in (RunBrowser, Brush, run_browser))):
        explorer = make()
        assert len(models()) > len(before) + 20
        explorer.close()
        assert models() == before, type(explorer).__name__


def test_one_that_was_made_in_part_can_be_closed():
    class Broken(Line):
        def make_controls(self):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Broken()
    Explorer.close(Broken.__new__(Broken))
    assert not Explorer._open


def test_a_cell_that_runs_again_closes_its_former_explorers(monkeypatch):
    def cell(name, run):
        monkeypatch.setattr(apps, "running_cell", lambda: (name, run))
    cell("a", "1")
    one, two = Line(), Line()
    cell("b", "2")
    other = Line()
    cell("a", "3")
    new = Line()
    assert Explorer._open == [other, new] and one.comm is None and two.comm is None and other.comm is not None
    cell(None, None)
    Line()
    assert len(Explorer._open) == 3, "where the front end tells nothing, nothing is closed"


def test_a_still_is_for_pages_without_a_kernel(monkeypatch):
    line = Line()
    assert still(line) is line.figure and "Jupyter" in line._repr_mimebundle_()["text/plain"]
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/1")
    assert still(line) is None


def test_files_are_found_below_a_folder_and_hidden_ones_not(tmp_path):
    for name in ("b.h5", "a/c.h5", "a/.d.h5", ".e/f.h5", "a/b/c/d/e/too_deep.h5", "g.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert find_files(".", (".h5",)) == ["./a/c.h5", "./b.h5"]
    assert len(find_files(".", (".h5",), most=1)) == 1
    with pytest.raises(DataError, match="a folder"):
        find_files("g.txt", (".h5",))


# --- the run browser ---


def pretend(path, epochs, lr, **more):
    "A run folder with a falling loss."
    run = Run.create(path, {"prep": {}, "train": {"lr": lr, "seed": 0}} | more)
    run.settle({"best_epoch": None, "best": None, "history": [
        {"epoch": e, "valid_loss": 1 / (1 + e), "seconds": 1.0} for e in range(epochs)]})
    return run


@pytest.fixture
def runs(tmp_path):
    import torch

    whole = pretend(tmp_path / "runs" / "a", 5, 0.1)
    whole.save_weights(torch.nn.Linear(1, 1))
    pretend(tmp_path / "runs" / "stopped", 2, 0.2, layers=[{"size": 1}, {"size": 2}])
    pretend(tmp_path / "runs" / "broken", 2, 0.2)
    (tmp_path / "runs" / "broken" / "environment.json").write_text("{")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "config.yaml").write_text("")
    return tmp_path / "runs"


def test_runs_are_listed_with_what_is_wrong(runs):
    b = RunBrowser(runs)
    assert set(b.runs) == {"a", "stopped", "broken"} and find_runs(".") == [f"./runs/{k}" for k in sorted(b.runs)]
    reasons = {k: r.reason for k, r in b.runs.items()}
    assert reasons["a"] == "" and "finished training" in reasons["stopped"] and "environment.json" in reasons["broken"]
    assert all(reasons[k] == "" or reasons[k].split(";")[0] in b.tables.value.replace("&#x27;", "'") for k in reasons)
    assert b.numbers["runs"] == "3, of which 1 finished" and b.numbers["a, last valid_loss"] == 0.2
    assert b.values["quantity"] == "valid_loss"


def test_settings_differ_where_they_do(runs):
    b = RunBrowser(runs)
    b.set(runs=("a", "stopped"))
    keys = [row[0] for row, _ in apps.config_rows({k: b.runs[k] for k in ("a", "stopped")})]
    assert keys == ["train.lr", "layers.0.size", "layers.1.size"]
    assert "train.seed" not in b.tables.value
    b.set(differences=False)
    assert "train.seed" in b.tables.value and b.tables.value.count("#E69F0033") == 2 + 3, "two bad runs, three settings"


def test_quantities_and_choice_redraw(runs):
    b = RunBrowser(runs)
    first = b.image.value
    b.set(quantity="seconds")
    assert b.image.value != first and "a, last seconds" in b.numbers
    b.set(runs=())
    assert b.message.value == "" and list(b.numbers) == ["runs"]


def test_another_folder_and_a_wrong_one(runs, tmp_path):
    b = RunBrowser(tmp_path / "nowhere")
    assert "nowhere" in b.message.value and b.figure is None
    b.set(below=str(runs))
    assert b.message.value == "" and len(b.runs) == 3
    b.set(below=str(tmp_path / "configs"))
    assert "expected runs, found none" in b.message.value
    b.set(below=str(runs))
    pretend(runs / "new", 3, 0.3)
    b.look_again()
    assert "new" in b.runs


def test_metrics_of_both_halves_stand_side_by_side(runs):
    dead = {"poisson": {"0.05": {"accuracy": 0.9, "error": 0.01, "n": 100}}, "dlf": {"coverage": 0.8},
            "published": {"restricted": {"none": {}}}}
    merit = {k: {"value": 1.0, "error": 0.1} for k in ("rms", "core_sigma", "bias", "median_abs", "tail_fraction")}
    cres = {"energy_eV": {"all": merit}, "events": 5, "baselines": {}}
    for name, metrics, config in (("d", dead, {"pairs": {}}), ("c", cres, {})):
        pretend(runs / name, 2, 0.2, **config).write_metrics(metrics)
    found = apps.read_runs(runs)
    assert found["d"].wing == "dead layer" and found["c"].wing == "CRES"
    titles = [title for title, *_ in apps.metrics_rows(found)]
    assert len(titles) == 2 and "Pairs" in titles[0] and "Energy" in titles[1]


def test_metrics_of_another_form_are_left_out_with_the_reason(runs):
    merit = {k: {"value": 1.0, "error": 0.1} for k in ("rms", "core_sigma", "bias", "median_abs", "tail_fraction")}
    for name, metrics in (("a", {"energy_eV": {}}), ("stopped", {"energy_eV": {"all": merit}}), ("broken", [1])):
        (runs / name / "metrics.json").write_text(json.dumps(metrics))
    b = RunBrowser(runs)
    b.set(runs=tuple(b.runs))
    assert b.message.value == ""
    (title, _, rows), (left, _, odd) = apps.metrics_rows({k: b.runs[k] for k in ("a", "stopped")})
    assert title == "Energy" and [r[0] for r in rows] == ["stopped"]
    assert left.startswith("Left out") and odd == [["a", "KeyError: 'all'"]] and left in b.tables.value


# --- the brush ---


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 10, 6000)
    mean, sigma = truth + rng.normal(size=6000) * np.where(truth > 5, 1, 3), np.where(truth > 5, 1.0, 3.0)
    write_table(tmp_path / "p.csv", Predictions(("energy_eV",), mean[:, None], sigma[:, None], {"energy_eV": truth}))
    return truth, mean


def test_a_brush_selects_counts_and_averages(table, tmp_path):
    truth, mean = table
    b = Brush(".")
    assert b.values["table"] == "./p.csv" and b.values["x"] == "true_energy_eV" and b.message.value == ""
    assert b.selected.all() and b.numbers["selected"] == "6000 of 6000 events"
    first = b.image.value
    b.controls["x_range"].value = (5, b.controls["x_range"].max)
    inside = truth >= 5
    assert b.image.value != first and (b.selected == inside).all()
    r = (mean - truth)[inside]
    error = r.std(ddof=1) / len(r) ** 0.5
    assert b.numbers["mean energy_residual_eV, selected"].startswith(f"{r.mean():.4g} ± {error:.2g}")
    b.controls["y_range"].value = (-0.5, 0.5)
    both = inside & (np.abs(mean - truth) <= 0.5)
    assert (b.selected == both).all()
    kept = read_columns(b.save(tmp_path).with_suffix(".csv"))
    assert len(kept["energy_eV"]) == both.sum() and np.allclose(kept["energy_eV"], mean[both])
    assert np.allclose(kept["energy_pull"], kept["energy_residual_eV"] / kept["energy_sigma_eV"])


def test_another_column_gets_its_range_and_nothing_selected_is_no_error(table):
    b = Brush(".")
    b.set(x="energy_pull", quantity="energy_sigma_eV")
    low, high = b.values["x_range"]
    pull = b.table["energy_pull"]
    assert low < pull.min() and high > pull.max() and b.selected.all() and b.message.value == ""
    b.set(x_range=(high - 1e-9, high))
    assert b.numbers["selected"] == "0 of 6000 events" and b.message.value == ""
    assert b.numbers["mean energy_residual_eV, selected"] == "-"


@pytest.mark.parametrize("text", ["a,b\n1,x\n", "a,b\n", "", "a,b\n1,2\n3\n"])
def test_what_is_no_table_is_a_line(text, table):
    Path("bad.csv").write_text(text)
    b = Brush(".")
    b.set(table="./p.csv")
    before = b.image.value
    b.set(table="bad.csv")
    assert "bad.csv" in b.message.value and "expected" in b.message.value and b.image.value == before
    b.set(table="p.csv")
    assert b.message.value == ""


def test_columns_with_gaps_and_constants_are_drawn():
    Path("gaps.csv").write_text("a,b\n1,5\nnan,5\n3,5\n")
    b = Brush(".")
    assert b.message.value == "" and b.selected.tolist() == [True, False, True]


def test_the_browser_is_both_and_closes_both(runs, table):
    b = run_browser(".")
    assert b.runs.message.value == "" and b.events.message.value == "" and len(Explorer._open) == 2
    assert "Jupyter" in b._repr_mimebundle_()["text/plain"]
    b.close()
    assert not Explorer._open and b.comm is None


# --- spectra ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A store, a measured spectrum, and a run trained in seconds."
    at, rng = tmp_path_factory.mktemp("work"), np.random.default_rng(0)
    hits = simulate_hits(200_000, seed=1)
    labels = rng.uniform(0, 2, 200), np.where(np.arange(200) % 3, rng.uniform(0, 1, 200), 1.0)
    write_store(spectra_of_hits(hits, *labels), at / "mc.h5")
    two = spectra_of_hits(simulate_hits(200_000, seed=2), [1.0, 0.5], [0.3, 0.2])
    two = replace(two, fccd_in_mm=[np.nan] * 2, dlf=[np.nan] * 2)
    write_store(two[0], at / "measured.h5")
    write_store(two, at / "two.h5")
    write_store(two[0].select_energy(0, 200), at / "narrow.h5")
    config = Config(data=DataConfig(spectra=[str(at / "mc.h5")], low_keV=10, high_keV=400, rebin=2),
                    pairs=PairConfig(batch_size=64, batches_per_epoch=30, valid_batches=2),
                    model=PairNetConfig(embedding=16, hidden=16, head=[32]),
                    train=TrainConfig(epochs=1, lr=5e-3, progress=False))
    train(config, at / "run", device="cpu")
    return at


@pytest.fixture
def explorer(folder):
    return spectrum_explorer(read_store(folder / "mc.h5"))


def test_it_works_without_arguments_and_says_how_to_get_a_network(monkeypatch):
    small = apps_deadlayer.built_in_spectra(100_000)
    monkeypatch.setattr(apps_deadlayer, "built_in_spectra", lambda: small)
    e = spectrum_explorer()
    assert e.message.value == "" and "deadlayer demo" in e.numbers["network"] and "built in" in e.numbers["simulation"]


def test_sliders_move_the_spectra(explorer):
    first, numbers = explorer.image.value, explorer.numbers
    explorer.controls["fccd1"].value = 1.5
    assert explorer.message.value == "" and explorer.image.value != first and explorer.numbers != numbers
    explorer.set(fccd1=0.9, fccd2=0.9, dlf1=0.5, dlf2=0.5)
    assert explorer.numbers["expectations apart"] == "0.0 standard deviations"
    table = explorer.columns()
    assert (table["counts1"] == table["counts2"]).all() and not table["pull"].any()


def test_a_thinner_layer_has_more_counts_at_low_energies(explorer):
    explorer.set(fccd1=0.5, fccd2=1.0)
    table = explorer.columns()
    low = table["high_keV"] <= 40
    assert table["counts1"][low].sum() > 1.2 * table["counts2"][low].sum() and table["pull"][low].mean() > 0


def test_expectations_are_apart_by_standard_deviations_and_draws_have_a_chi_square(explorer):
    explorer.set(noise=False, fccd1=0.8, fccd2=0.9)
    apart = float(explorer.numbers["expectations apart"].split()[0].replace(",", ""))
    assert np.isclose(apart, (explorer.columns()["pull"] ** 2).sum() ** 0.5, atol=0.06)
    assert "χ² / bins" not in explorer.numbers
    explorer.set(noise=True)
    assert "expectations apart" not in explorer.numbers and explorer.numbers["χ² / bins"].endswith("/ 890")


@pytest.mark.parametrize(("argument", "value", "words"), [
    ("measured", np.zeros(5), "measured: expected Spectra or a path, found ndarray"), ("spectra", 5, "spectra: .*int"),
    ("run", 3.0, "run: expected a run folder or a Run, found float"), ("fccd1", 5.0, "fccd1: .* from 0 to 2, found 5"),
    ("exposure", 100.0, "exposure: .* from 0.001 to 10"), ("seed", -1, "seed: .* from 0 to")])
def test_arguments_of_another_type_or_range_are_refused(folder, argument, value, words):
    with pytest.raises(ConfigError, match=words):
        spectrum_explorer(**{"spectra": folder / "mc.h5", argument: value})
    assert not Explorer._open


def test_a_run_object_is_taken_and_a_run_of_the_other_half_is_said(folder, explorer, tmp_path):
    e = spectrum_explorer(run=Run(folder / "run"))
    assert e.message.value == "" and e.values["run"] == str(folder / "run")
    pretend(tmp_path / "cres", 1, 0.1)
    explorer.set(run=f" {tmp_path / 'cres'} ")
    assert "expected a run of the dead-layer half, found a run of the CRES half" in explorer.message.value
    explorer.set(run=f" {folder / 'run'} ", measured=f"{folder / 'measured.h5'}  ")
    assert explorer.message.value == "" and "network: thicker layer" in explorer.numbers


def test_a_measurement_that_no_dead_layer_describes_puts_the_verdict_in_doubt(folder):
    one = read_store(folder / "measured.h5")
    e = spectrum_explorer(folder / "mc.h5", folder / "run", one, fccd2=0.2)
    assert e.message.value == "" and "note on spectrum 1" not in e.numbers, "another dead layer describes it"
    counts = np.roll(one.counts, 6, axis=1)
    shifted = spectrum_explorer(folder / "mc.h5", folder / "run", replace(one, counts=counts))
    assert "holds for simulated spectra only" in shifted.numbers["note on spectrum 1"]
    two = spectrum_explorer(folder / "mc.h5", measured=read_store(folder / "two.h5"))
    assert "expected one measured spectrum, found 2" in two.message.value


def test_noise_is_that_of_its_seed(explorer):
    explorer.set(noise=True, fccd1=0.8, fccd2=0.8, dlf1=0.5, dlf2=0.5, exposure=1)
    first = explorer.columns()
    assert np.all(first["counts1"] % 1 == 0) and (first["counts1"] != first["counts2"]).any()
    assert 0.7 < np.var(first["pull"]) < 1.3, "two draws of one expectation"
    explorer.again.click()
    assert explorer.values["seed"] == 1 and (explorer.columns()["counts1"] != first["counts1"]).any()
    explorer.set(seed=0)
    assert (explorer.columns()["counts1"] == first["counts1"]).all()


def test_exposure_scales_counts_and_limits_stay_while_layers_change(explorer):
    explorer.set(exposure=1)
    one, limits = explorer.columns()["counts1"].sum(), [ax.get_ylim() for ax in explorer.axes]
    for fccd in (0.0, 0.3, 1.0, 2.0):
        explorer.set(fccd1=fccd)
        assert [ax.get_ylim() for ax in explorer.axes] == limits
    explorer.set(fccd1=0.8, exposure=0.1)
    assert np.isclose(explorer.columns()["counts1"].sum(), 0.1 * one)
    explorer.set(exposure=1e-3)
    assert explorer.axes[0].get_ylim() != limits[0] and explorer.message.value == ""


def test_a_network_says_which_is_thicker(folder):
    e = spectrum_explorer(run=folder / "run")
    assert e.message.value == "" and e.numbers["simulation"] == "that of the training"
    e.set(fccd1=0.3, fccd2=1.8)
    p = e.numbers["network: P(FCCD 1 > FCCD 2)"]
    e.set(fccd1=1.8, fccd2=0.3)
    assert p < 0.25 and e.numbers["network: P(FCCD 1 > FCCD 2)"] > 0.75  # of a training of seconds
    assert e.numbers["network: thicker layer"] == "spectrum 1"
    assert "10 to 90 %" in e.numbers["network: DLF of spectrum 1"]
    table = e.columns()
    assert np.isclose(table["attention"].sum(), 1) and np.allclose(table["high_keV"] - table["low_keV"], 1)
    assert e.shade in e.moving and e.bar_axes.get_visible()
    e.set(run="")
    assert e.shade is None and not e.bar_axes.get_visible() and "attention" not in e.columns()


def test_a_network_without_its_spectra_gets_those_at_hand(folder, explorer, monkeypatch):
    explorer.set(run=str(folder / "run"))
    assert explorer.message.value == "" and explorer.numbers["simulation"] == "as given"
    explorer.set(simulation=str(folder / "mc.h5"))
    assert explorer.message.value == "" and len(explorer.columns()["pull"]) == 390
    explorer.set(run=str(folder / "nowhere"))
    assert "nowhere" in explorer.message.value


def test_a_measured_spectrum_takes_the_first_place(folder, explorer):
    explorer.set(measured=str(folder / "measured.h5"), fccd2=1.0, dlf2=0.3)
    assert explorer.message.value == "" and all(explorer.controls[k].disabled for k in ("fccd1", "dlf1", "exposure"))
    table = explorer.columns()
    assert table["counts1"].sum() == read_store(folder / "measured.h5").select_energy(5, 450).counts.sum()
    assert 0.7 < np.mean(table["pull"] ** 2) < 1.2, "the truth describes it"
    explorer.set(run=str(folder / "run"))
    assert explorer.message.value == "" and "network: thicker layer" in explorer.numbers
    explorer.set(measured=f"{folder / 'two.h5'}#1", run="")
    assert explorer.message.value == "" and "two.h5#1" in explorer.legend.get_texts()[0].get_text()
    explorer.set(measured="")
    assert not explorer.controls["fccd1"].disabled
    given = spectrum_explorer(read_store(folder / "mc.h5"), measured=read_store(folder / "measured.h5"))
    assert given.message.value == "" and given.columns()["counts1"].sum() == table["counts1"].sum()


@pytest.mark.parametrize(("control", "name", "words"), [
    ("measured", "nowhere.h5", "no such file"), ("measured", "two.h5", "#0"), ("measured", "two.h5#7", "from 0 to 1"),
    ("measured", "narrow.h5", "890 bins"), ("measured", "text.h5", "HDF5"), ("simulation", "measured.h5", "FCCD"),
    ("simulation", "nowhere", "nowhere"), ("run", "mc.h5", "run folder")])
def test_wrong_files_are_a_line(folder, explorer, control, name, words):
    (folder / "text.h5").write_text("no HDF5")
    before = explorer.image.value
    explorer.set(**{control: str(folder / name)})
    assert words in explorer.message.value and name.split("#")[0] in explorer.message.value
    assert explorer.image.value == before
    explorer.set(**{control: ""})
    assert explorer.message.value == ""


def test_files_and_runs_below_are_offered(folder, monkeypatch):
    monkeypatch.chdir(folder)
    e = spectrum_explorer(read_store("mc.h5"))
    assert "./measured.h5" in e.controls["measured"].options and "./run" in e.controls["run"].options
