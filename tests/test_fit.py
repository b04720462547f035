"""The regression and the limit against a model whose derivatives are known exactly."""
import numpy as np
import pytest
from scipy.stats import norm

from deadlayer_cres.core import ConfigError, DataError, NotFittedError
from deadlayer_cres.deadlayer.data import Spectra
from deadlayer_cres.deadlayer.fit import (
    FisherLimit,
    PCARegression,
    anscombe,
    fisher_information,
    fisher_sigma,
    limit_accuracy,
)

EDGES = np.arange(31) * 15.0


def mean(f, d):
    f, d, e = np.asarray(f, float)[:, None], np.asarray(d, float)[:, None], EDGES[:-1] + 7
    lines = sum(a * np.exp(-0.5 * ((e - x) / 12) ** 2) for a, x in ((60000, 80), (60000, 356)))
    smooth = 5000 * np.exp(-e / 200 - 0.1 * f) * (1 + 0.2 * f * (1 - d))
    return lines * np.exp(-f * (0.6 + 0.4 * d) * np.exp(-e / 80)) + smooth


def make(n, seed=0, exposure=5.0, dlf=None):
    rng = np.random.default_rng(seed)
    f, d = rng.uniform(0, 2, n), rng.uniform(0, 1, n) if dlf is None else np.full(n, dlf)
    return Spectra(rng.poisson(exposure * mean(f, d)), EDGES, f, d, exposure=exposure)


def exact_information(f, d, h=1e-5):
    m = lambda f, d: mean([f], [d])[0]  # noqa: E731
    j = np.stack([(m(f + h, d) - m(f - h, d)) / 2 / h, (m(f, d + h) - m(f, d - h)) / 2 / h, m(f, d)])
    return (j / j[2]) @ j.T


@pytest.fixture(scope="module")
def spectra():
    return make(4000)


def test_anscombe_gives_unit_variance():
    for m in (4, 50, 5000):
        assert anscombe(np.random.default_rng(0).poisson(m, 20000)).var() == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("at", [(0.4, 0.5), (1.0, 0.2), (1.7, 0.8)])
@pytest.mark.parametrize("options", [{}, {"dlf": "known"}, {"scale": "free"}])
def test_fisher_agrees_with_exact_derivatives(spectra, at, options):
    found = fisher_sigma(fisher_information(spectra, at, width=1.3), **options)
    assert found == pytest.approx(fisher_sigma(exact_information(*at), **options), rel=0.08)


def test_noise_of_the_simulation_is_subtracted(spectra):
    at, exact = (1.0, 0.5), exact_information(1.0, 0.5)[0, 0]
    few = [make(1200, seed, exposure=0.3) for seed in range(8)]
    with_noise = np.mean([fisher_information(s, at, subtract_noise=False)[0, 0] for s in few]) / exact - 1
    without = np.mean([fisher_information(s, at)[0, 0] for s in few]) / exact - 1
    assert with_noise > 0.05 and abs(without) < 0.5 * with_noise


def test_sigma_scales_with_exposure_of_the_measurement(spectra):
    information = fisher_information(spectra, (1.0, 0.5))
    assert fisher_sigma(4 * information, "known") == pytest.approx(fisher_sigma(information, "known") / 2)
    assert fisher_sigma(information, "known") <= fisher_sigma(information) <= fisher_sigma(information, scale="free")
    with pytest.raises(ConfigError):
        fisher_sigma(information, dlf="maybe")


def test_too_few_or_degenerate_spectra_are_refused(spectra):
    with pytest.raises(DataError):
        fisher_information(spectra[:50], (1.0, 0.5))
    with pytest.raises(DataError):
        fisher_information(make(500, dlf=1.0), (1.0, 1.0))


def test_limit_interpolates_and_stays_finite_outside(spectra):
    limit = FisherLimit(spectra, nodes=(9, 5), width=1.3)
    s = limit.sigma([0.0, 1.0, 5.0], [0.5, 0.5, 1.0])
    assert np.isfinite(s).all() and s[1] == pytest.approx(fisher_sigma(exact_information(1.0, 0.5)), rel=0.1)


def test_limit_accuracy_is_that_of_two_gaussians():
    rng = np.random.default_rng(0)
    d, s1, s2 = rng.uniform(-1, 1, 200000), 0.3, 0.4
    right = np.sign(d + rng.normal(0, s1, len(d)) - rng.normal(0, s2, len(d))) == np.sign(d)
    best = limit_accuracy(np.full(len(d), s1), np.full(len(d), s2), d)
    assert right.mean() == pytest.approx(best.value, abs=0.004) and best.n == len(d)
    assert limit_accuracy([3.0], [4.0], [-5.0]).value == pytest.approx(norm.cdf(1))


def test_regression_reaches_the_limit_and_orders_pairs(spectra):
    model = PCARegression(components=6, copies=6).fit(spectra)
    test, rng = make(600, seed=9), np.random.default_rng(0)
    counts = rng.poisson(test.counts / test.exposure)
    inside = (test.fccd_in_mm > 0.2) & (test.fccd_in_mm < 1.8)
    sigma = np.array([fisher_sigma(exact_information(f, d))
                      for f, d in zip(test.fccd_in_mm[inside], test.dlf[inside], strict=True)])
    pull = (model.predict(counts)[inside, 0] - test.fccd_in_mm[inside]) / sigma
    assert 0.9 < np.sqrt((pull**2).mean()) < 1.35
    a, b = counts[:300], counts[300:]
    assert np.array_equal(model(a, b), -model(b, a)) and model(a, b).shape == (300, 1)
    far = abs(test.fccd_in_mm[:300] - test.fccd_in_mm[300:]) > 0.2
    assert ((model(a, b)[:, 0] > 0) == (test.fccd_in_mm[:300] > test.fccd_in_mm[300:]))[far].mean() > 0.99


def test_regression_is_reproducible_and_refuses(spectra):
    a, b = (PCARegression(components=4, copies=1, seed=3).fit(spectra[:500]) for _ in range(2))
    counts = spectra.counts[:5] / spectra.exposure
    assert np.array_equal(a.predict(counts), b.predict(counts))
    with pytest.raises(NotFittedError):
        PCARegression().predict(counts)
    unknown = spectra[:50]
    unknown.dlf = np.where(np.arange(50) == 7, np.nan, unknown.dlf)
    with pytest.raises(DataError, match="row 7"):
        PCARegression().fit(unknown)
