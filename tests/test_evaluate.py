"""Evaluation of pair networks with predictors whose answers are known."""
import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from deadlayer_cres.core import DataError, RunError
from deadlayer_cres.deadlayer import evaluate as ev
from deadlayer_cres.deadlayer.data import Spectra
from deadlayer_cres.deadlayer.prep import PairSource


def make(n, seed=0, dlf=None):
    "Spectra whose first bin holds FCCD x 1e6 counts, the second DLF x 1e6, at exposure 2."
    rng = np.random.default_rng(seed)
    f, d = np.round(rng.uniform(0.01, 2, n), 4), np.round(rng.uniform(0, 1, n), 4) if dlf is None else np.full(n, dlf)
    counts = np.full((n, 20), 1000)
    counts[:, 0], counts[:, 1] = np.round(2e6 * f), np.round(2e6 * d)
    return Spectra(counts, np.linspace(5, 450, 21), f, d, exposure=2.0)


class Oracle(nn.Module):
    "Reads FCCD and DLF off the first two bins; attends to the first segment of three bins."

    class config:
        segment = 3

    def forward(self, x, return_attention=False):
        f, d = x[:, :, 0] / 1e6, (x[:, 0, 1] / 1e6).clamp(0, 1)
        raw = torch.stack([100 * (f[:, 0] - f[:, 1]), d - 0.01, d, d + 0.01], 1)
        attention = torch.zeros(len(x), 7)
        attention[:, 0] = 1
        return (raw, attention) if return_attention else raw


class OraclePipeline(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Oracle()

    def prep(self, a, b):
        return torch.stack([a, b], 1)

    def forward(self, a, b):
        return self.net(self.prep(a, b))


@pytest.fixture(scope="module")
def test_set():
    return make(300)


def sign_of(scale):
    return lambda a, b: scale * (a[:, :1] - b[:, :1])


def test_oracle_is_right_and_its_opposite_is_wrong(test_set):
    source = PairSource(test_set, noise="none", device="cpu")
    tables, kept = ev.evaluate_pairs({"network": sign_of(1.0), "fool": sign_of(-1.0)}, source, (None, 0.05), 500)
    for window in ("none", "0.05"):
        assert tables["network"][window]["accuracy"] == tables["network"][window]["auc"] == 1
        assert tables["fool"][window]["accuracy"] == tables["fool"][window]["auc"] == 0
        assert np.isnan(tables["network"][window]["rmse_misclassified_in_mm"])
    assert abs(kept["0.05"].dfccd_in_mm).max() <= 0.05 + 1e-9
    wrong = kept["0.05"].wrong("fool")
    assert tables["fool"]["0.05"]["rmse_misclassified_in_mm"] == pytest.approx(
        np.sqrt((kept["0.05"].dfccd_in_mm[wrong] ** 2).mean()))


def test_pairs_do_not_depend_on_who_is_scored_and_labels_belong_to_the_spectra(test_set):
    source = PairSource(test_set, device="cpu")
    a = ev.score_pairs({"network": sign_of(1.0)}, source, 300, 0.5, seed=4, batch=100)
    b = ev.score_pairs({"other": sign_of(2.0), "network": sign_of(1.0)}, source, 300, 0.5, seed=4, batch=100)
    c = ev.score_pairs({"network": sign_of(1.0)}, source, 300, 0.5, seed=5, batch=100)
    assert np.array_equal(a.raw["network"], b.raw["network"]) and not np.array_equal(a.index, c.index)
    assert np.allclose(a.labels[:, 0], test_set.fccd_in_mm[a.index[:, 0]])
    assert np.allclose(a.labels[:, 3], test_set.dlf[a.index[:, 1]])


def test_shared_pairs_are_counted_once(test_set):
    few = test_set[:10]
    assert len(ev.score_pairs({"network": sign_of(1.0)}, PairSource(few, noise="none", device="cpu"), 2000)) == 90
    assert len(ev.score_pairs({"network": sign_of(1.0)}, PairSource(few, device="cpu"), 2000)) == 2000


def test_diverged_or_misshapen_outputs_are_refused(test_set):
    source = PairSource(test_set, device="cpu")
    for bad in (lambda a, b: a[:, :1] * float("nan"), lambda a, b: a[:3, :1]):
        with pytest.raises(DataError):
            ev.score_pairs({"network": bad}, source, 10)


def test_dlf_metrics_by_mode():
    rng = np.random.default_rng(0)
    labels = rng.random((4000, 4))
    d1, d2 = labels[:, 2:].T
    centre = d1 + rng.normal(0, 0.1, 4000)
    q = np.stack([centre - 0.12816, centre, centre + 0.12816], 1)
    z = np.zeros((4000, 1))
    scored = ev.ScoredPairs({"q": np.hstack([z, q]), "crossed": np.hstack([z, q[:, ::-1]]),
                             "s": np.hstack([z, (d1 - d2)[:, None]]), "f": z}, labels, np.arange(8000).reshape(4000, 2))
    m = ev.dlf_metrics(scored, "q")
    assert m["coverage"] == pytest.approx(0.8, abs=4 * m["error"]) and m["crossings"] == 0 and m["nominal"] == 0.8
    assert ev.dlf_metrics(scored, "crossed")["crossings"] == 4000
    assert ev.dlf_metrics(scored, "s")["accuracy"] == 1 and ev.dlf_metrics(scored, "f") == {}
    labels[:, 3] = 1.0  # a reference without transition layer: the answer is always the same
    m = ev.dlf_metrics(scored, "s")
    assert 0 < m["accuracy"] < 1 and np.isnan(m["auc"])
    labels[:, 2] = 1.0
    assert ev.dlf_metrics(scored, "s") == {}


def test_attention_per_bin_and_average():
    w = ev.attention_per_bin(np.array([[1.0, 0, 0], [0, 0, 1.0]]), 2, 5)
    assert np.allclose(w, [[0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 1]])
    a = ev.average_attention(w, np.array([0, 1, 2, 3, 4, 6.0]))
    assert np.allclose(a["mean"], [0.25, 0.25, 0, 0, 0.25]) and a["n"] == 2
    assert a["error"][0] == pytest.approx(np.std([0.5, 0], ddof=1) / np.sqrt(2))
    with pytest.raises(DataError):
        ev.attention_per_bin(np.ones((1, 4)), 2, 5)


def test_evaluate_writes_everything_and_compare_reads_it(test_set, tmp_path):
    history = [{"epoch": k, "train_loss": 1.0 / (k + 1), "accuracy": 0.5} for k in range(3)]
    metrics = ev.evaluate(tmp_path / "run", OraclePipeline(), test_set, make(200, 1, 1.0), history=history,
                          facts={"seed": 0}, n=200, windows=(None, 0.1), device="cpu")
    found = {p.name for p in (tmp_path / "run").rglob("*") if p.is_file()}
    figures = {f"{n}.png" for n in ("accuracy", "roc", "outputs", "misclassified", "labels", "dlf", "history",
                                    "attention", "attention_pairs")}
    assert found == {"metrics.json", "attention.json", "report.html"} | figures
    saved, attention = ev.read_evaluation(tmp_path / "run")
    assert saved == json.loads(json.dumps(saved, allow_nan=False)) and saved["poisson"]["none"]["n"] == 200
    assert set(saved["dlf1"]) == {"poisson", "shared", "dlf"} and metrics["shared"]["none"]["accuracy"] == 1
    widths = np.diff(attention["edges_keV"])
    assert (np.array(attention["mean"]) * widths).sum() == pytest.approx(1) and attention["mean"][5] == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<img ") == len(figures) and "Attention" in page
    table, latex = ev.comparison_table({"a_b": saved, "c": metrics})
    assert table.row_count == 3 and r"a\_b" in latex and latex.count(r"\\") == 4
    assert ev.attention_stack_figure({"a": attention, "b": attention}).axes
    with pytest.raises(RunError):
        ev.read_evaluation(tmp_path)


def test_table_prints_and_doubts_are_raised(test_set):
    sources = ev.pair_sources(test_set, device="cpu")
    metrics, _ = ev.collect_metrics(OraclePipeline(), sources, windows=(None,), n=100)
    out = io.StringIO()
    ev.print_table(metrics, Console(file=out, width=140))
    assert all(text in out.getvalue() for text in ("Pair accuracy", "0.9947 ± 0.0013", "[mm]", "DLF"))
    assert any("too wide" in d for d in ev.doubts(metrics))
    row = {"accuracy": 0.7, "error": 0.01}
    assert any("above the limit" in d for d in ev.doubts(metrics | {"limit": {"poisson": {"none": row}}}))
    lucky = metrics | {"baseline": {"poisson": {"none": {"accuracy": 1.0, "error": 0.001}}},
                       "poisson": {"none": metrics["poisson"]["none"] | row}}
    assert any("does better than the network" in d for d in ev.doubts(lucky))


def test_published_numbers():
    assert [r["accuracy"] for r in ev.PUBLISHED["restricted"].values()] == [.9947, .988, .986, .9393, .939, .611]
    assert ev.PUBLISHED["full"]["0.1"] == {"accuracy": .7153, "auc": .653, "coverage": .890, "error": .0082, "n": 3000}


@pytest.mark.parametrize("content", ["{}", "[1]", '{"poisson": {}}'])
def test_metrics_of_another_kind_are_refused(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(RunError, match="metrics"):
        ev.read_evaluation(tmp_path)
