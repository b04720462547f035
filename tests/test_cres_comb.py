"""Combs without a trap: fit, regression and calibration, against known combs and against scikit-learn."""
import dataclasses
import math

import numpy as np
import pytest
import torch

from deadlayer_cres.core import ConfigError, DataError, NotFittedError
from deadlayer_cres.cres import comb as module
from deadlayer_cres.cres.comb import (
    ORDERS,
    TARGETS,
    CombConfig,
    CombFit,
    CombRegression,
    calibrate_trap,
    fit_comb,
    two_pair_trap,
)
from deadlayer_cres.cres.data import Events, read_egg, shared_data
from deadlayer_cres.cres.evaluate import Predictions, figures_of_merit, peak_baseline, read_table, write_table
from deadlayer_cres.cres.fit import line_information
from deadlayer_cres.cres.simulate import TEST_SETS, Simulator, waveforms
from deadlayer_cres.cres.trap import HarmonicTrap, default_trap

RATE, LO, SIGMA = 403e6, 25.9702e9, 0.0471
BAND = CombConfig(band_Hz=(-90e6, -30e6))
START = {"background_T": 0.959, "current_A": 32.87, "bucking_A": -2.33, "amplitude_V": 0.01}


def lines(n, amplitudes, samples=8192, carrier=-60e6, axial=5e6, slope=3e8, noise=SIGMA, seed=0):
    "Events with lines of given amplitudes {order: V} whose middle frequencies are known; the clean record too."
    k = torch.tensor(list(amplitudes), dtype=torch.float64)
    phase = torch.rand(n, len(k), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 * math.pi
    a = torch.polar(torch.tensor(list(amplitudes.values()), dtype=torch.float64).expand(n, -1).contiguous(), phase)
    f = (LO + carrier - slope * samples / RATE / 2 + k * axial).expand(n, -1)
    clean = waveforms(f, a, torch.full((n,), slope, dtype=torch.float64), samples)
    g = torch.Generator().manual_seed(seed + 1)
    return Events((clean + noise * torch.randn(clean.shape, generator=g)).numpy(), {}), clean


@pytest.fixture(scope="module")
def labelled():
    "Events of the trap of the test sets, their combs and their labels: for training, and others."
    s = Simulator(TEST_SETS["cca-8k"])
    train, test = s.reseeded("train").events(700, noise="added"), s.events(400, noise="added")
    return (fit_comb(train, BAND), train.columns), (fit_comb(test, BAND), test.columns)


@pytest.fixture(scope="module")
def regression(labelled):
    return CombRegression().fit(*labelled[0])


# --- the fit ---


def test_pulls_of_a_known_comb():
    fit = fit_comb(lines(200, {-4: 0.001, -2: 0.005, 0: 0.01, 2: 0.002})[0], BAND)
    truth = torch.tensor([LO - 60e6, 5e6, 3e8], dtype=torch.float64)
    pull = (torch.stack(fit[:3], 2)[:, 0] - truth) / fit.sigma[:, 0]
    assert (pull[:, :2].abs() < 5).all()
    z = pull[:, :2].std(0)
    assert (z > 0.87).all() and (z < 1.13).all(), z
    assert (pull[:, :2].mean(0).abs() < 4 / math.sqrt(200)).all()
    height = fit.amplitude_V[:, 0, ORDERS.index(-2)].abs()
    assert abs(height.mean() / 0.005 - 1) < 0.02
    assert float(fit.amplitude_sigma_V.mean()) == pytest.approx(SIGMA / math.sqrt(8192), rel=0.02)


def test_chirp_of_a_longer_record():
    fit = fit_comb(lines(60, {-2: 0.005, 0: 0.01}, samples=24_576)[0], BAND)
    pull = (fit.slope_Hz_per_s[:, 0] - 3e8) / fit.sigma[:, 0, 2]
    assert 0.75 < pull.std() < 1.3 and abs(pull.mean()) < 0.6


def test_amplitudes_describe_the_record():
    events, clean = lines(3, {-2: 0.004, -1: 0.001, 0: 0.01, 3: 0.0008}, noise=1e-5, axial=0.9e6)
    fit = fit_comb(events, dataclasses.replace(BAND, orders=ORDERS, visible=(0.1,) * 4 + (0.9,) + (0.1,) * 4))
    T = fit.length_s
    f, slope = fit.frequency_Hz[:, 0], fit.slope_Hz_per_s[:, 0]
    k = torch.tensor(ORDERS)
    middle = f[:, None] - LO + k * fit.axial_frequency_Hz[:, :1]
    back = torch.polar(torch.ones_like(middle), -2 * math.pi * (middle * T / 2 - slope[:, None] * (T / 2) ** 2 / 2))
    again = waveforms(middle + LO - slope[:, None] * T / 2, fit.amplitude_V[:, 0] * back, slope, events.samples)
    assert ((again - clean).square().sum() / clean.square().sum()).sqrt() < 3e-3


def test_errors_are_those_of_the_fisher_information():
    P = torch.tensor([[[0.0, 40.0, 200.0, 20.0, 0.0]]], dtype=torch.float64)
    c = dataclasses.replace(BAND, visible=(1e-9, 1 - 1e-9, 1 - 1e-9, 1 - 1e-9, 1e-9))
    found = torch.linalg.inv(module._information(c, P, 8192 / RATE))[0, 0]
    a = (2 * (P[0] - 1).clamp(min=0) * SIGMA**2 / 8192).sqrt().to(torch.complex128)  # (1, 5)
    K, k, T = 5, torch.tensor(c.orders, dtype=torch.float64), 8192 / RATE
    d_a, d_f, d_s = torch.zeros(1, 13, K, dtype=torch.complex128), torch.zeros(1, 13, K).double(), torch.zeros(1, 13)
    d_f[0, 0], d_f[0, 1], d_f[0, 2], d_s[0, 2] = 1, k, -T / 2, 1  # the chirp about the middle of the record
    for i in range(K):
        d_a[0, 3 + i, i], d_a[0, 8 + i, i] = 1, 1j
    F = line_information(a, d_a, d_f, d_s.double(), 8192, RATE, SIGMA)[0]
    use = [0, 1, 2, 4, 5, 6, 9, 10, 11]
    F = F[use][:, use]
    scale = F.diagonal().rsqrt()
    expected = (torch.linalg.inv(F * scale * scale[:, None]) * scale * scale[:, None])[:3, :3]
    assert torch.allclose(found[:2, :2], expected[:2, :2], rtol=2e-3)
    assert torch.allclose(found[2, 2], expected[2, 2], rtol=5e-3)


def test_odd_lines_of_an_asymmetric_trap():
    events, _ = lines(40, {-2: 0.004, -1: 0.006, 0: 0.01, 1: 0.004}, axial=3e6)
    visible = (0.05, 0.1, 0.3, 0.5, 0.99, 0.3, 0.1, 0.05, 0.02)
    odd = dataclasses.replace(BAND, orders=ORDERS, visible=visible)
    fit = fit_comb(events, odd)
    right = (fit.axial_frequency_Hz[:, 0] - 3e6).abs() < 2e4
    assert right.double().mean() > 0.9
    even = fit_comb(lines(40, {-2: 0.006, 0: 0.01, 2: 0.003}, axial=3e6)[0], BAND)
    assert ((even.axial_frequency_Hz[:, 0] - 3e6).abs() < 2e4).double().mean() > 0.9
    assert even.power[:, 0, 1::2].mean() < 2 < fit.power[right, 0, 3].mean()


@pytest.mark.parametrize("carrier", [0.008, 0.0008])
def test_carrier_weaker_than_its_sideband(carrier):
    "It is found even where it is hidden in the noise."
    fit = fit_comb(lines(30, {-4: 0.007, -2: 0.011, 0: carrier, 2: 0.009})[0], BAND)
    near = (fit.frequency_Hz - (LO - 60e6)).abs() < 1e5
    assert near.any(1).double().mean() > 0.9


def test_noise_alone_has_no_evidence():
    fit = fit_comb(lines(100, {0: 1e-9})[0], BAND)
    assert fit.log_evidence[:, 0].median() < 14 and (fit.table()["lines"] <= 3).all()
    assert torch.isfinite(fit.covariance).all()


def test_batches_do_not_matter():
    events, _ = lines(9, {-2: 0.005, 0: 0.01}, samples=2**17)
    whole, part = fit_comb(events, BAND), fit_comb(events[7:], BAND)
    assert torch.allclose(whole.frequency_Hz[7:, 0], part.frequency_Hz[:, 0], rtol=0, atol=1e-2)
    assert (whole.log_evidence.diff(dim=1) <= 0)[whole.log_evidence[:, 1:].isfinite()].all()


def test_full_track():
    events, _ = lines(1, {-2: 0.003, 0: 0.006}, samples=163_840)
    fit = fit_comb(events, BAND)
    truth = torch.tensor([LO - 60e6, 5e6, 3e8], dtype=torch.float64)
    pull = (torch.stack([v[0, 0] for v in fit[:3]]) - truth) / fit.sigma[0, 0]
    assert (pull.abs() < 5).all() and fit.sigma[0, 0, 0] < 50


def test_hypotheses_differ():
    fit = fit_comb(lines(30, {-2: 0.004, 0: 0.01})[0], BAND)
    for f, a, e in zip(fit.frequency_Hz, fit.axial_frequency_Hz, fit.log_evidence, strict=True):
        kept = [(x, y) for x, y, z in zip(f.tolist(), a.tolist(), e.tolist(), strict=True) if z > -math.inf]
        gaps = [max(abs(x - u), abs(y - v)) for i, (x, y) in enumerate(kept) for u, v in kept[:i]]
        assert all(g >= 1.5 / fit.length_s for g in gaps)


@pytest.mark.parametrize("setting, row", [
    ({"orders": (-2, 2), "visible": (0.5, 0.5)}, "orders"), ({"visible": (0.5,)}, "visible"),
    ({"axial_Hz": (0.0, 1e6)}, "axial_Hz"), ({"strongest": (1,)}, "strongest"), ({"band_Hz": (1.0, 0.0)}, "band_Hz"),
    ({"slope_Hz_per_s": (1.0, 1.0)}, "slope_Hz_per_s"), ({"candidates": 0}, "candidates")])
def test_bad_settings(setting, row):
    with pytest.raises(ConfigError) as e:
        CombConfig(**setting)
    assert e.value.row == row


def test_bad_events():
    with pytest.raises(DataError):
        fit_comb(Events(None, {"energy_eV": np.ones(3)}))
    with pytest.raises(DataError):
        fit_comb(Events(np.zeros((2, 2, 100)), {}))


@pytest.mark.skipif(shared_data() is None, reason="the published files are not here")
def test_locust_file():
    egg = read_egg(shared_data() / "locust_mc_testSignal.egg", require=(), lo_frequency_Hz=20.65e9)
    fit = fit_comb(egg)
    assert abs(float(fit.frequency_Hz[0, 0]) - 20.70e9) < 200
    assert float(fit.amplitude_V[0, 0, 4].abs()) == pytest.approx(3.45e-7, rel=0.03)


# --- the regression ---


def test_trees_are_those_of_scikit_learn(monkeypatch):
    from sklearn import ensemble

    kept = []
    original = ensemble.GradientBoostingClassifier.fit
    monkeypatch.setattr(ensemble.GradientBoostingClassifier, "fit",
                        lambda self, *a: kept.append(self) or original(self, *a))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 4))
    right = x[:, 0] + x[:, 1] ** 2 > rng.normal(size=600)
    trees = module._fit_trees(x, right)
    assert np.allclose(module._probability(trees, x), kept[0].predict_proba(x)[:, 1], atol=1e-9)
    assert module._probability(module._fit_trees(x, np.zeros(600, bool)), x).max() < 1e-6


def test_left_out_residuals():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 6, (40, 1))
    y, alpha = np.sin(x[:, 0]) + 0.1 * rng.normal(size=40), rng.uniform(0.005, 0.02, 40)
    g = module._process(x, y, alpha, False)
    r, variance = module._left_out(g)
    i = np.arange(40) != 7
    without = module._process(x[i], y[i], alpha[i], False, g.kernel_.theta)
    mean, sigma = without.predict(x[[7]], return_std=True)
    assert r[7] == pytest.approx(y[7] - mean[0], rel=1e-4)
    assert variance[7] == pytest.approx(sigma[0] ** 2 + alpha[7], rel=1e-4)


def test_regression_beats_the_strongest_line(labelled, regression):
    (train, learnt), (combs, truth) = labelled
    p = regression.predict(combs, truth)
    merit = figures_of_merit(p)["energy_eV"]
    lines_of = [Predictions(TARGETS, np.zeros((len(t["energy_eV"]), 3)), truth=t,
                            observables={"peak_frequency_Hz": 1e6 * module._strongest(c)[:, 0]})
                for c, t in ((train, learnt), (combs, truth))]
    peak = figures_of_merit(peak_baseline(*lines_of))["energy_eV"]
    assert merit["all"]["rms"]["value"] < 0.7 * peak["all"]["rms"]["value"]
    assert merit["resolution_at_efficiency"]["25"]["median_abs"]["value"] < 3
    assert 0.6 < merit["calibration"]["coverage_1_sigma"]["value"] < 0.85
    assert merit["calibration"]["coverage_2_sigma"]["value"] > 0.9
    faint = p.observables["none_right"] > 0.9
    clear = p.observables["none_right"] < 0.1
    assert np.median(p.sigma[faint, 0]) > 3 * np.median(p.sigma[clear, 0])
    assert ((p.mean[:, 0] > 18_500) & (p.mean[:, 0] < 18_700)).all()


def test_mixture_is_normalised_and_probabilities_are_honest(labelled, regression):
    p = regression.predict(*labelled[1])
    assert np.allclose(p.weight.sum(1), 1) and np.isfinite(p.modes).all() and (p.widths > 0).all()
    right = module._right(*labelled[1])
    expected, found = p.weight[:, :-1].sum(), right.sum()
    assert abs(expected - found) < 5 * math.sqrt(found)


def test_table_of_predictions(labelled, regression, tmp_path):
    p = regression.predict(*labelled[1])
    write_table(tmp_path / "p.csv", p)
    q = read_table(tmp_path / "p.csv")
    assert q.targets == p.targets and np.allclose(q.modes, p.modes) and np.allclose(q.sigma, p.sigma)


def test_save_and_load(labelled, regression, tmp_path):
    path = tmp_path / "regression.npz"
    regression.save(path)
    again = CombRegression.load(path)
    a, b = regression.predict(labelled[1][0]), again.predict(labelled[1][0])
    assert np.allclose(a.mean, b.mean, rtol=1e-9, atol=1e-9) and np.allclose(a.sigma, b.sigma, rtol=1e-6)
    with np.load(path, allow_pickle=False) as f:
        assert all(f[k].dtype.kind in "fiu" for k in f.files)


def test_load_refuses_other_files(tmp_path):
    path = tmp_path / "other.npz"
    with pytest.raises(DataError):
        CombRegression.load(path)
    np.savez(path, x=np.ones(3))
    with pytest.raises(DataError):
        CombRegression.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(DataError):
        CombRegression.load(path)


def test_regression_refuses(labelled, regression, tmp_path):
    combs, truth = labelled[1]
    with pytest.raises(NotFittedError):
        CombRegression().predict(combs)
    with pytest.raises(NotFittedError):
        CombRegression().save(tmp_path / "x.npz")
    with pytest.raises(DataError):
        regression.predict(combs._replace(length_s=1.0))
    with pytest.raises(DataError) as e:
        CombRegression().fit(combs, {k: v for k, v in truth.items() if k != "avg_axial_frequency_Hz"})
    assert e.value.row == "avg_axial_frequency_Hz"


def test_trap_without_sidebands():
    "Only the frequency tells: nothing better than it is claimed."
    s = Simulator(TEST_SETS["cca-8k"], trap=HarmonicTrap(0.959, 0.2))
    train, test = s.reseeded("train").events(200, noise="added"), s.events(150, noise="added")
    p = CombRegression().fit(fit_comb(train, BAND), train.columns).predict(fit_comb(test, BAND), test.columns)
    z = (p.mean[:, 0] - test.columns["energy_eV"]) / p.sigma[:, 0]
    assert 0.6 < np.sqrt(np.mean(z**2)) < 1.6
    assert p.observables["none_right"].mean() > 0.9


# --- the calibration ---


@pytest.fixture(scope="module")
def planted():
    values = np.array([0.9591, 1.02 * 32.87, -1.02 * 2.33, 0.012])
    events = Simulator(TEST_SETS["cca-8k"], trap=two_pair_trap(*values[:3])).events(400, noise="added")
    return values, fit_comb(events, BAND), events.columns


def test_planted_trap_is_found(planted):
    values, combs, truth = planted
    c = calibrate_trap(combs, truth, START)
    off = c.values - values
    assert off @ np.linalg.solve(c.covariance, off) < 18.5  # 99.9 % of four degrees of freedom
    assert abs(c.chi2 / c.degrees - 1) < 5 * math.sqrt(2 / c.degrees)
    assert c.sigma[0] / 0.959 < 1e-6 and c.sigma[1] / 33 < 1e-3
    assert np.nanstd(c.pulls[:, 0]) < 1.3 < 30 < np.nanstd(c.start_pulls[:, 0])
    assert c.kept.mean() > 0.8
    again = Simulator(TEST_SETS["cca-8k"], trap=c.trap).events(2, noise="none")
    assert np.allclose(again.columns["energy_eV"], truth["energy_eV"][:2])
    assert np.abs(again.columns["avg_carrier_frequency_Hz"] - truth["avg_carrier_frequency_Hz"][:2]).max() < 500


def test_wrong_combs_do_not_matter(planted):
    values, combs, truth = planted
    frequency = combs.frequency_Hz.clone()
    frequency[::5] += 2 * combs.axial_frequency_Hz[::5]
    c = calibrate_trap(combs._replace(frequency_Hz=frequency), truth, START)
    off = c.values - values
    assert off @ np.linalg.solve(c.covariance, off) < 18.5
    assert not c.kept[c.event % 5 == 0].any() and c.kept[c.event % 5 != 0].mean() > 0.8


def test_derivatives_are_exact(planted):
    _, combs, truth = planted
    m, _ = module._measured(combs, truth)
    m = m._replace(electrons=[v[:4] for v in m.electrons])
    p = torch.tensor(list(START.values()), dtype=torch.float64, requires_grad=True)
    model = lambda q: module._model(m, q, two_pair_trap, module.Cavity())[:, [0, 1, 3, 4]].flatten()  # noqa: E731
    J = module._jacobian(model(p), p)
    with torch.no_grad():
        for j, h in enumerate((1e-6, 1e-3, 1e-3, 1e-5)):
            step = h * torch.eye(4, dtype=torch.float64)[j]
            assert torch.allclose(J[:, j], (model(p + step) - model(p - step)) / (2 * h), rtol=1e-4, atol=1e-9)


def test_calibration_of_another_kind_of_trap():
    class Scaled(HarmonicTrap):
        pass

    build = lambda background, length: Scaled(background, length)  # noqa: E731
    f = CombFit(*[torch.zeros(20, 1, dtype=torch.float64)] * 3, torch.eye(3).double().expand(20, 1, 3, 3),
                torch.zeros(20, 1, 9, dtype=torch.complex128), torch.full((20,), 1e-4, dtype=torch.float64),
                torch.zeros(20, 1), 2e-5)
    electrons = {"energy_eV": np.linspace(18_500, 18_700, 20), "pitch_angle_deg": np.linspace(88, 89.9, 20),
                 "radius_m": np.full(20, 3e-3)}
    f.amplitude_V[:, 0, [2, 4]] = torch.tensor([0.005, 0.01], dtype=torch.complex128)
    m, _ = module._measured(f, electrons)
    true = torch.tensor([0.9592, 0.21, 0.012], dtype=torch.float64)
    x = module._model(m, true, build, module.Cavity())
    f = f._replace(frequency_Hz=x[:, :1], axial_frequency_Hz=x[:, 1:2], covariance=1e4 * f.covariance)
    f.amplitude_V[:, 0, 4] = x[:, 4]
    f.amplitude_V[:, 0, 2] = 0.001
    c = calibrate_trap(f, electrons, {"background_T": 0.959, "length_m": 0.2, "amplitude_V": 0.01}, build)
    assert c.values[:2] == pytest.approx(true[:2].numpy(), rel=1e-7) and isinstance(c.trap, Scaled)


def test_calibration_refuses(planted):
    _, combs, truth = planted
    with pytest.raises(ConfigError):
        calibrate_trap(combs, truth, {"background_T": 0.959})
    with pytest.raises(DataError) as e:
        calibrate_trap(combs, {k: v for k, v in truth.items() if k != "radius_m"}, START)
    assert e.value.row == "radius_m"
    few = CombFit(*(v[:3] for v in combs[:-1]), combs.length_s)
    with pytest.raises(DataError):
        calibrate_trap(few, {k: v[:3] for k, v in truth.items()}, START)


def test_two_pairs_are_the_default_trap():
    z = torch.linspace(-0.07, 0.07, 9, dtype=torch.float64)
    same = two_pair_trap(0.959, 32.87, -2.33)
    assert torch.allclose(same.field(0.003, z), default_trap().field(0.003, z), rtol=1e-14)
