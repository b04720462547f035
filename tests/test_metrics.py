"""Metrics against closed forms and brute force; plots against what they must not do."""
import matplotlib
import numpy as np
import pytest

from deadlayer_cres.core import DataError
from deadlayer_cres.metrics import accuracy, auc_error, confusion, coverage, crossings, pinball_loss, roc
from deadlayer_cres.plots import Section, Table, coloured_spectrum, figure, html_report, plot_history, png_bytes


def test_accuracy_error_is_binomial_and_never_zero():
    a = accuracy(np.arange(10000) >= 300)
    assert a.value == 0.97 and a.n == 10000
    assert a.error == pytest.approx(np.sqrt(0.97 * 0.03 / 10000), rel=1e-2)
    assert 0.004 < accuracy(np.ones(100, bool)).error < 0.006


@pytest.mark.parametrize("bad", [[], [[True]], [0.5, np.nan]])
def test_accuracy_refuses(bad):
    with pytest.raises(DataError):
        accuracy(bad)


def test_roc_area_is_the_probability_of_order_with_ties_counted_half():
    rng = np.random.default_rng(0)
    truth, score = rng.random(300) < 0.4, rng.integers(0, 5, 300)
    pairs = score[truth][:, None] - score[~truth][None]
    r = roc(truth, score)
    assert r.auc == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    assert r.auc == pytest.approx(np.trapezoid(r.tpr, r.fpr))
    with pytest.raises(DataError):
        roc(np.ones(5, bool), np.arange(5))
    with pytest.raises(DataError):
        roc([True, False], [0.1, np.nan])


def test_auc_error_matches_the_scatter_of_repeated_trials():
    rng = np.random.default_rng(1)
    truth = np.repeat([True, False], 100)
    areas = [roc(truth, rng.normal(size=200) + truth).auc for _ in range(200)]
    assert np.std(areas) == pytest.approx(auc_error(np.mean(areas), 100, 100), rel=0.2)


def test_confusion_and_its_ratios():
    c = confusion([1, 1, 0, 0, 0], [1, 0, 1, 1, 0])
    assert (c.tp, c.fp, c.tn, c.fn) == (1, 2, 1, 1)
    assert c.precision == pytest.approx(1 / 3) and c.recall == 0.5
    assert np.isnan(confusion([1, 0], [0, 0]).precision) and np.isnan(confusion([0, 0], [1, 0]).recall)


def test_pinball_is_smallest_at_the_quantile_and_known_by_hand():
    assert pinball_loss([1.0, 0.0], [[0.0, 0.0], [1.0, 2.0]], [0.1, 0.9]) == pytest.approx((0.1 + 0.9 + 0.9 + 0.2) / 4)
    y = np.random.default_rng(0).exponential(size=20001)
    losses = [pinball_loss(y, np.full((len(y), 1), q), [0.9]) for q in np.quantile(y, (0.85, 0.9, 0.95))]
    assert losses[1] == min(losses)
    with pytest.raises(DataError):
        pinball_loss([1.0], [[0.0, 1.0]], [0.1])


def test_repeated_items_do_not_lower_the_error_of_a_coverage():
    rng = np.random.default_rng(0)
    y, edge = rng.normal(size=500), np.full(500, 1.2816)
    once = coverage(y, -edge, edge)
    often, group = (np.repeat(v, 20) for v in (y, np.arange(500)))
    again = coverage(often, np.repeat(-edge, 20), np.repeat(edge, 20), group)
    assert again.value == once.value and again.n == 10_000
    assert again.error == pytest.approx(once.error, rel=0.01)
    alone = coverage(often, np.repeat(-edge, 20), np.repeat(edge, 20))
    assert alone.error == pytest.approx(once.error / 20**0.5, rel=0.01)
    assert coverage(y, -edge, edge, np.arange(500)).error == pytest.approx(once.error, rel=0.01)
    assert np.isnan(coverage(y, -edge, edge, np.zeros(500)).error)


def test_coverage_and_crossings():
    c = coverage([0.0, 1.0, 2.0, 3.0], [0.0, 1.5, 1.0, 0.0], [1.0, 2.0, 2.0, 2.0])
    assert c.value == 0.5 and c.n == 4
    assert crossings([[0, 1, 2], [0, 2, 1], [1, 1, 1], [2, 1, 0]]) == 2
    with pytest.raises(DataError):
        coverage([1.0], [0.0], [np.nan])


def test_figures_leave_no_global_trace():
    import matplotlib.pyplot as plt

    def draw():
        with figure(1, 2) as (fig, axes):
            axes[0].plot([1, 2])
            coloured_spectrum(axes[1], np.arange(4), [3, 0, 5], [0.1, 0.2, 0.7])
        return fig, axes

    before, open_before = dict(matplotlib.rcParams), plt.get_fignums()
    (fig, axes), (again, _) = draw(), draw()
    assert dict(matplotlib.rcParams) == before and plt.get_fignums() == open_before
    assert png_bytes(fig) == png_bytes(again)
    with pytest.raises(DataError):
        coloured_spectrum(axes[1], np.arange(4), [3, 0, 5], [0.1])


def test_history_takes_rows_or_columns():
    rows = [{"epoch": k, "train_loss": 1 / (k + 1), "valid_accuracy": k / 5} for k in range(5)]
    assert len(plot_history(rows).axes) == len(plot_history({k: [r[k] for r in rows] for k in rows[0]}).axes) == 2
    with pytest.raises(DataError):
        plot_history([{"epoch": 0, "lr": 1.0}])


def test_report_is_one_escaped_file_and_whole_or_absent(tmp_path):
    with figure() as (fig, ax):
        ax.plot([1, 2])
    path = tmp_path / "report.html"
    section = Section("s", ["x & y"], ["<script>"], [Table(["", "v"], [["r", 1]])], [(fig, 'a "plot"')])
    html_report(path, "a < b", [section])
    page = path.read_text()
    assert "a &lt; b" in page and "x &amp; y" in page and "<script>" not in page and "&#34;plot&#34;" in page
    assert "data:image/png;base64," in page and "src=\"http" not in page and "prefers-color-scheme: dark" in page
    with pytest.raises(AttributeError):
        html_report(tmp_path / "half.html", "t", [Section("s", figures=[(None, "no figure")])])
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
