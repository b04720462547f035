"""The combination of methods: agreement, spread, verdict, and what is written."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chi2

from deadlayer_cres.core import ConfigError, DataError
from deadlayer_cres.deadlayer.answer import (
    PUBLISHED,
    Estimate,
    answer_latex,
    answer_rows,
    combine,
    consensus,
    disjoint,
    from_likelihood,
    from_loop,
    from_network,
    sentences,
    write_answer,
)
from deadlayer_cres.deadlayer.likelihood import FullFit, WindowFit


def estimate(method="peak ratio", family="peaks", fccd=1.0, error=0.05, **options):
    return Estimate(method, family, fccd, (fccd - error, fccd + error), **options)


def window(name, ranges, fccd=1.0, error=0.02, deviance=10.0, valid=True, dlf=0.5):
    nothing = np.zeros(0)
    return WindowFit(name, ranges, fccd, (fccd - error, fccd + error), dlf, (dlf - 0.1, dlf + 0.1), {}, deviance, 10,
                     0.01, float(chi2.sf(deviance, 10)), valid, nothing, nothing, nothing, nothing)


def test_consensus_of_equal_errors_is_the_mean():
    c = consensus([1.0, 1.1, 1.2], [0.2, 0.2, 0.2])
    assert c.value == pytest.approx(1.1) and c.spread == 0
    assert c.error == pytest.approx(0.2 / 3**0.5) and c.q == pytest.approx(0.5)
    assert c.p_value == pytest.approx(0.7788, abs=1e-4)


def test_consensus_of_values_far_apart_has_their_spread():
    "With negligible errors the method of Paule and Mandel gives the sample variance."
    x = [0.8, 1.0, 1.3]
    c = consensus(x, [1e-6] * 3)
    assert c.spread == pytest.approx(np.std(x, ddof=1), rel=1e-6) and c.value == pytest.approx(np.mean(x))
    assert c.error == pytest.approx(np.std(x, ddof=1) * (1 + 1 / 3) ** 0.5, rel=1e-6) and c.p_value < 1e-9


def test_condition_of_paule_and_mandel_holds():
    x, s = np.array([0.9, 1.0, 1.4, 1.1]), np.array([0.02, 0.1, 0.05, 0.2])
    c = consensus(x, s)
    w = 1 / (s**2 + c.spread**2)
    assert (w * (x - c.value) ** 2).sum() == pytest.approx(3) and c.value == pytest.approx((w * x).sum() / w.sum())


@pytest.mark.parametrize("values, errors", [([], []), ([1.0], [0.0]), ([1.0, 2.0], [0.1])])
def test_consensus_refuses(values, errors):
    with pytest.raises(DataError, match="positive error"):
        consensus(values, errors)


def test_estimates_are_whole():
    with pytest.raises(ConfigError, match="dlf with its interval"):
        estimate(dlf=0.5)
    with pytest.raises(ConfigError, match="rising interval"):
        Estimate("x", "peaks", 1.0, (1.1, 0.9))
    with pytest.raises(ConfigError, match="finite fccd"):
        estimate(fccd=float("nan"))


def test_windows_that_count_share_no_energy():
    fits = [window("whole", ((5, 450),)), window("81 and 356", ((77, 84), (352, 359.5))), window("79-83", ((79, 83),)),
            window("40-70", ((40, 70),)), window("20-40", ((20, 40),)), window("340-370", ((340, 370),), valid=False)]
    assert [f.name for f in disjoint(fits)] == ["79-83", "40-70", "20-40"]
    assert [e.counts for e in from_likelihood(FullFit(fits, {}, 1.0))] == [False, False, True, True, True, False]


def test_errors_of_windows_grow_with_the_misfit():
    fits = [window("a", ((5, 10),)), window("b", ((10, 20),), deviance=90.0, dlf=0.9)]
    good, bad = from_likelihood(FullFit(fits, {}, 1.0))
    assert good.fccd_interval_mm == pytest.approx((0.98, 1.02)) and good.described
    assert bad.fccd_interval_mm == pytest.approx((0.94, 1.06)) and not bad.described
    assert bad.dlf_interval == pytest.approx((0.6, 1.0)) and "errors x 3.0" in bad.note  # cut at 1


def test_methods_that_agree():
    a = combine([estimate(), estimate("network", "network", 1.03, 0.02, dlf=0.4, dlf_interval=(0.3, 0.5))], PUBLISHED)
    assert a.verdict == "agree" and a.fccd.spread == 0 and a.fccd.value == pytest.approx(1.0259, abs=1e-3)
    assert a.dlf.value == 0.4 and a.dlf.n == 1
    assert any("agree" in s for s in sentences(a)) and sum("Published" in s for s in sentences(a)) == 2


@pytest.mark.parametrize("fccd, verdict", [(1.05, "agree"), (1.13, "in tension"), (1.4, "disagree")])
def test_verdict_follows_the_distance(fccd, verdict):
    assert combine([estimate(error=0.03), estimate("network", "network", fccd, 0.03)]).verdict == verdict


def test_disagreement_within_a_family_shows():
    rows = [estimate(f"w{k}", "likelihood", f, 0.01) for k, f in enumerate((0.9, 1.0, 1.1))]
    a = combine([estimate(), *rows])
    assert a.verdict == "disagree" and a.fccd.p_value > 0.5
    assert a.families["fccd_in_mm"]["likelihood"].spread == pytest.approx(0.1, rel=0.05)
    assert "families the methods agree" in sentences(a)[1]
    assert "those of the likelihood among themselves disagree" in sentences(a)[1]
    assert combine([estimate(), *(replace(r, counts=False) for r in rows)]).verdict == "agree"


def test_network_takes_on_the_spread_where_nothing_describes_the_data():
    rows = [estimate(f"w{k}", "likelihood", f, 0.01) for k, f in enumerate((0.9, 1.0, 1.1))]
    network = estimate("network", "network", 1.0, 0.003, described=False)
    a = combine([*rows, network])
    spread = a.families["fccd_in_mm"]["likelihood"].spread
    assert a.families["fccd_in_mm"]["network"].error == pytest.approx(np.hypot(0.003, spread))
    described = combine([*rows, replace(network, described=True)])
    assert described.families["fccd_in_mm"]["network"].error == pytest.approx(0.003)
    assert any("with the spread of the windows" in row[0] for row in answer_rows(a))


def test_nothing_that_counts_is_refused():
    with pytest.raises(DataError, match="at least one estimate that counts"):
        combine([estimate(counts=False)])


def test_table_and_latex():
    network = estimate("network", "network", 1.03, 0.02, dlf=0.4, dlf_interval=(0.3, 0.5))
    a = combine([estimate(note="50 % & more_"), network])
    rows = answer_rows(a)
    assert rows[0][:3] == ["peak ratio", "1.000 +0.050 -0.050", "-"] and rows[-1][0] == "together"
    source = answer_latex(a)
    assert r"$1.000^{+0.050}_{-0.050}$ & --" in source and source.count(r"\\") == 1 + len(rows)
    assert source.startswith(r"\begin{tabular}{lccc}")


def test_answer_is_written_whole(tmp_path):
    a = combine([estimate(), estimate("network", "network", 1.4, 0.02)], PUBLISHED, ["look here"])
    report = write_answer(a, tmp_path / "out", facts={"spectrum": "x.h5"})
    page = report.read_text()
    assert "look here" in page and "disagree" in page and "x.h5" in page
    found = json.loads((tmp_path / "out/answer.json").read_text())
    assert found["verdict"] == "disagree" and found["fccd_in_mm"]["value"] == pytest.approx(a.fccd.value)
    assert len(found["estimates"]) == 4 and found["facts"] == {"spectrum": "x.h5"}
    assert (tmp_path / "out/figures/answer.png").stat().st_size > 5000


SUMMARY = {"fccd_in_mm": {"median": 1.0, "mean": 1.001, "sigma": 0.01, "68": [0.99, 1.02], "90": [0.98, 1.03]},
           "dlf": {"median": 0.05, "68": [0.03, 0.08], "90": [0.02, 0.1]}}


def test_network_and_loop_are_one_estimate():
    network = from_network(SUMMARY, described=False)
    assert (network.fccd_in_mm, network.fccd_interval_mm, network.dlf) == (1.0, (0.99, 1.02), 0.05)
    ended = type("Loop", (), {"fccd_in_mm": 1.1, "dlf": 0.01, "balanced": False})()
    loop = from_loop(ended, SUMMARY)
    assert loop.fccd_interval_mm == pytest.approx((1.09, 1.12)) and loop.dlf_interval == pytest.approx((0.0, 0.04))
    assert not loop.counts and "without balance" in loop.note
    assert combine([network, loop]).fccd.value == 1.0
    alone = from_loop(ended, {"fccd_in_mm": SUMMARY["fccd_in_mm"]})
    assert alone.dlf is None and from_network({"fccd_in_mm": SUMMARY["fccd_in_mm"]}).dlf is None
