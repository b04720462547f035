"""Comparisons of spectra, line by line."""

import numpy as np
import pytest

from deadlayer_cres.core import ConfigError, DataError
from deadlayer_cres.deadlayer.data import Spectra
from deadlayer_cres.deadlayer.simulate import Hits, simulate_hits, spectra_of_hits
from deadlayer_cres.deadlayer.validation import BANDS, LINES, RATIOS, compare, nearest, validate, weights

EDGES = np.arange(901) * 0.5


@pytest.fixture(scope="module")
def hits():
    return simulate_hits(300_000, seed=5)


def flat(level=1000, exposure=1.0, **labels):
    return Spectra(np.full((1, 900), level), EDGES, [labels.get("fccd", 1.0)], [labels.get("dlf", 1.0)], exposure)


def test_features_of_a_flat_spectrum():
    names, w = weights(EDGES)
    assert names == [*LINES, *BANDS] and w.shape == (len(names), 900)
    assert np.allclose(w[:len(LINES)].sum(1), 0)
    assert np.allclose(w[len(LINES):].sum(1) * 0.5, [b - a for a, b in BANDS.values()])
    low, _ = weights(EDGES[:500])
    assert "356" not in low and "81" in low
    with pytest.raises(ConfigError):
        weights(np.arange(3) + 500.0)


def test_a_spectrum_agrees_with_itself_and_scales(hits):
    s = spectra_of_hits(hits, [1.0], [1.0])
    twice = Spectra(2 * s.counts, s.edges_keV, s.fccd_in_mm, s.dlf, 2 * s.exposure)
    result = compare(twice, s)
    good = np.isfinite(result.ratio)
    assert np.allclose(result.ratio[good], 1) and result.scale == 0.5 and result.misses() == []
    free = Spectra(2 * s.counts, s.edges_keV, s.fccd_in_mm, s.dlf, 1.0)
    assert compare(free, s, "356")["81"][0] == pytest.approx(1)
    assert set(RATIOS) < set(result.names) and len(result.rows()) == len(result.names)


def test_a_missing_line_is_found(hits):
    s = spectra_of_hits(hits, [1.0], [1.0])
    counts = s.counts * 50
    cut = counts.copy()
    cut[0, 2 * 303 - 8: 2 * 303 + 8] = cut[0, 2 * 299]
    spoiled = compare(Spectra(cut, EDGES, [1], [1]), Spectra(counts, EDGES, [1], [1]))
    assert spoiled["303"][0] < 0.1 and "303" in spoiled.misses() and "303 / 356" in spoiled.misses()
    assert set(spoiled.misses()) == {"303", "303 / 356"}
    with pytest.raises(ConfigError):
        spoiled["304"]


def test_errors_are_those_of_poisson():
    rng, expected, pulls = np.random.default_rng(0), np.full((1, 900), 400.0), []
    for low, high in LINES.values():
        expected[0, int(2 * low) + 3: int(2 * high) - 3] += 900
    for _ in range(200):
        a, b = (Spectra(rng.poisson(expected * k), EDGES, [1], [1], k) for k in (1.0, 3.0))
        r = compare(a, b)
        pulls.append((r.ratio - 1) / r.error)
    assert np.std(pulls) == pytest.approx(1, abs=0.05) and abs(np.mean(pulls)) < 0.1


def test_points_of_the_plane(hits):
    published = spectra_of_hits(hits, [0.5, 1.01, 1.5], [1.0, 0.49, 1.0])
    found = validate(hits, published, ((0.5, 1.0), (1.0, 0.5)))
    assert list(found) == ["0.50 mm, DLF 1.00", "1.01 mm, DLF 0.49"]
    for c in found.values():
        assert np.allclose(c.ratio[np.isfinite(c.ratio)], 1)
    cut = validate(hits, published.select_energy(5, 450), ((1.5, 1.0),))
    assert np.isclose(cut["1.50 mm, DLF 1.00"]["356"][0], 1)
    assert nearest(published, 1.0, 0.5).dlf[0] == 0.49
    with pytest.raises(DataError):
        nearest(published, 3.0, 0.5)


def test_wrong_pairs_are_refused():
    with pytest.raises(DataError):
        compare(flat(), Spectra(np.ones((1, 450)), EDGES[::2], [1], [1]))
    with pytest.raises(DataError):
        compare(Spectra(np.ones((2, 900)), EDGES, [1, 1], [1, 1]), flat())
    for name in ("357", "81 / 356", "90 to 150"):
        with pytest.raises(ConfigError):
            compare(flat(), flat(), name)


def test_figures(hits):
    pytest.importorskip("matplotlib")
    from deadlayer_cres.deadlayer.validation import plot_comparisons, plot_overlay

    s = spectra_of_hits(hits, [1.0, 1.0], [1.0, 0.5])
    fig = plot_comparisons({"a": compare(s[0], s[1]), "b": compare(s[1], s[0])})
    assert fig.axes[0].get_xlabel() == "ours / theirs"
    assert len(plot_overlay(s[0], s[1]).axes) == 2
    assert Hits([], [], [], 1).events == 0
