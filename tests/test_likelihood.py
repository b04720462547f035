"""Emulator, likelihood and its intervals on a toy with a known truth, and the program `deadlayer fit`."""
import dataclasses
import json
import os

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import ndtr

from deadlayer_cres import cli
from deadlayer_cres.core import ConfigError, DataError
from deadlayer_cres.deadlayer import likelihood as lh
from deadlayer_cres.deadlayer.data import Spectra, write_store
from deadlayer_cres.deadlayer.detector import fwhm_keV
from deadlayer_cres.deadlayer.fit import fisher_information, fisher_sigma
from deadlayer_cres.deadlayer.likelihood import (
    Distortion,
    Likelihood,
    barlow_beeston,
    check_emulator,
    coverage,
    fit_emulator,
    fit_window,
    full_spectrum_fit,
    inverse_anscombe,
    load_emulator,
    minimise,
    posterior,
    profile,
    save_emulator,
    split_simulation,
    window_information,
)

EDGES = 5 + np.arange(891) * 0.5
CENTRES = (EDGES[1:] + EDGES[:-1]) / 2
LINES = {30.9: 3e5, 53.2: 1e4, 79.614: 3e4, 80.998: 4e5, 160.6: 6e3, 276.4: 5e4, 302.9: 1.2e5, 356.0: 3.6e5, 383.9: 5e4}
WHOLE = ((5.0, 450.0),)


def mean(fccd, dlf, shift=0.0, widen=0.0) -> np.ndarray:
    "Expected counts (n, 890) of a measurement; less DLF leaves more events of low energy."
    f, d = np.atleast_1d(fccd)[:, None], np.atleast_1d(dlf)[:, None]
    c = CENTRES - shift
    out = (1500 * np.exp(-c / 300) + 500 * f * (1 - d) * np.exp(-c / 60)) * np.exp(-0.05 * f)
    for e, area in LINES.items():
        lost = f * (0.05 + 0.45 * (81 / e) ** 2.5 * (0.9 + 0.1 * d))
        out = out + area * np.exp(-lost) * np.diff(ndtr((EDGES - e - shift) / (fwhm_keV(e) / 2.3548 * (1 + widen))))
    return out


def spectra(n, seed=0, exposure=3.0) -> Spectra:
    rng = np.random.default_rng(seed)
    f, d = rng.uniform(0.1, 1.9, n), rng.uniform(0, 1, n)
    return Spectra(rng.poisson(exposure * mean(f, d)), EDGES, f, d, exposure)


def drawn(counts) -> Spectra:
    return Spectra(np.atleast_2d(counts), EDGES, [np.nan], [np.nan])


@pytest.fixture(scope="module")
def emulator():
    return fit_emulator(spectra(700), (6, 4))


def test_inverse_of_anscombe_has_no_bias():
    rng = np.random.default_rng(0)
    for m in (0.2, 1, 5, 100):
        y = (2 * np.sqrt(rng.poisson(m, 300000) + 0.375)).mean()
        assert inverse_anscombe(y) == pytest.approx(m, rel=0.03)
    assert inverse_anscombe(np.array(0.0)) == pytest.approx(0, abs=1e-9)


def test_emulator_predicts_spectra_it_has_never_seen(emulator):
    check = check_emulator(emulator, spectra(200, 7))
    s = check.summary()
    assert 0.97 < s["pull_rms"] < 1.03 and 0.97 < s["poisson_rms"] < 1.03
    assert len(s["worst_bins"]) == 5 and s["worst_bins"][0]["rms"] == check.rms.max()
    f, d = np.array([0.5, 1.5]), np.array([0.2, 0.8])
    z = (emulator.mean(f, d) - mean(f, d)) / np.sqrt(mean(f, d) / 3)
    assert np.sqrt((z**2).mean()) < 0.35  # the terms over the spectra: sqrt(24 / 700) = 0.19


def test_covariance_of_the_emulator_is_its_scatter(emulator):
    others = [fit_emulator(spectra(300, seed), (6, 4)).transformed(1.1, 0.6)[0] for seed in range(20, 28)]
    claimed = fit_emulator(spectra(300, 20), (6, 4)).variance(1.1, 0.6)
    assert 0.8 < np.var(others, axis=0, ddof=1).mean() / claimed.mean() < 1.25


def test_wrong_emulator_is_noticed():
    crude = fit_emulator(spectra(700), (1, 1))
    check = check_emulator(crude, spectra(100, 3))
    assert check.poisson_rms.max() > 1.5


def test_emulator_is_saved_without_pickle(emulator, tmp_path):
    save_emulator(emulator, tmp_path / "e.npz")
    again = load_emulator(tmp_path / "e.npz")
    assert np.array_equal(again.mean(0.7, 0.3), emulator.mean(0.7, 0.3))
    assert again.degrees == emulator.degrees and again.fccd_range_mm == emulator.fccd_range_mm
    (tmp_path / "bad.npz").write_bytes((tmp_path / "e.npz").read_bytes()[:2000])
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with np.load(tmp_path / "e.npz") as f:
        np.savez(tmp_path / "pickle.npz", **(dict(f) | {"edges_keV": f["edges_keV"].astype(object)}))
    for name in ("bad.npz", "other.npz", "pickle.npz", "missing.npz"):
        with pytest.raises(DataError, match=name):
            load_emulator(tmp_path / name)


def test_distortion_is_exact_for_lines():
    lines = Distortion(EDGES, tuple(LINES))
    plain = mean(1.0, 0.5)[0]
    assert np.allclose(lines(plain), plain)
    for shift, widen in ((0.15, 0.0), (-0.1, 0.04), (0.0, -0.03)):
        want = mean(1.0, 0.5, shift, widen)[0]
        got = lines(plain, shift, 0.0, widen)
        assert np.abs(got - want).max() < 0.01 * np.abs(want - plain).max()
    def smooth(shift):
        return 1e5 * np.exp(-(CENTRES - shift) / 40)
    got, want = Distortion(EDGES, (437.0,))(smooth(0), 0.15) - smooth(0), smooth(0.15) - smooth(0)
    assert np.allclose(got[2:780], want[2:780], rtol=0.03)
    gain = lines(plain, gain=1e-3) - plain
    high, low = gain[(CENTRES > 350) & (CENTRES < 356)].sum(), gain[(CENTRES > 75) & (CENTRES < 80.9)].sum()
    assert high < 0 < low  # about 200 keV
    assert lines(plain, 0.2).sum() == pytest.approx(plain.sum(), rel=1e-3)


def test_barlow_beeston_is_the_maximum():
    rng = np.random.default_rng(1)
    many = zip(rng.uniform(0.5, 3000, 40), rng.integers(0, 3000, 40), rng.uniform(1e-4, 0.5, 40), strict=True)
    for mu, n, tau2 in many:
        def cost(log_b, mu=mu, n=n, tau2=tau2):
            b = np.exp(log_b)
            return 2 * (b * mu - n * np.log(b * mu)) + (b - 1) ** 2 / tau2
        beta, penalty = barlow_beeston(np.array([n * 1.0]), np.array([mu]), np.array([tau2]))
        if n:
            best = minimize_scalar(cost, bounds=(-12, 8), method="bounded", options={"xatol": 1e-9})
            assert cost(np.log(beta[0])) <= best.fun + 1e-5
        else:
            assert beta[0] == pytest.approx(max(1 - mu * tau2, 0), abs=1e-9)
        assert penalty[0] == pytest.approx((beta[0] - 1) ** 2 / tau2)


def test_planted_nuisances_are_found_and_do_not_bias(emulator):
    truth = {"scale": 0.96, "shift_keV": 0.08, "gain": -2e-4, "resolution": 0.02, "background": 3.0}
    expected = truth["scale"] * Distortion(EDGES)(mean(0.9, 0.4)[0], 0.08, -2e-4, 0.02) + 1.5
    data = drawn(np.random.default_rng(4).poisson(expected))
    free = fit_window(Likelihood(data, emulator))
    assert free.valid and free.p_value > 1e-3
    low, high = free.fccd_interval_mm
    assert abs(free.fccd_in_mm - 0.9) < 2 * (high - low)
    for name, value in truth.items():
        v, e = free.parameters[name]
        assert abs(v - value) < 4.5 * e, name
    fixed = fit_window(Likelihood(data, emulator, nuisance={"scale": 0.05}))
    assert fixed.p_value < 1e-6 and not fixed.described and fixed.inflation > 1.5


def test_error_is_near_the_limit(emulator):
    data = drawn(np.random.default_rng(2).poisson(mean(1.0, 0.5)[0]))
    fit = fit_window(Likelihood(data, emulator, WHOLE, {"scale": np.inf}, mc_statistics=0))
    half = np.diff(fit.fccd_interval_mm)[0] / 2
    assert half == pytest.approx(fit.fisher_mm, rel=0.1)
    other = fisher_sigma(fisher_information(spectra(700), (1.0, 0.5)), "free", "free")
    mine = fisher_sigma(window_information(emulator, (1.0, 0.5), np.ones(890, bool)), "free", "free")
    assert mine == pytest.approx(other, rel=0.15)
    more = fit_window(Likelihood(data, emulator, WHOLE, {"scale": np.inf}, mc_statistics=1))
    assert np.diff(more.fccd_interval_mm)[0] / 2 / half == pytest.approx((4 / 3) ** 0.5, rel=0.05)


def test_profile_and_posterior_agree_with_the_fit(emulator):
    like = Likelihood(drawn(np.random.default_rng(3).poisson(mean(0.8, 0.6)[0])), emulator, WHOLE, {"scale": 0.05})
    fit = fit_window(like)
    sigma = np.diff(fit.fccd_interval_mm)[0] / 2
    x, rise = profile(like, points=7)
    assert abs(x[rise.argmin()] - fit.fccd_in_mm) < sigma and np.interp(fit.fccd_in_mm + 2 * sigma, x, rise) > 3
    draws = posterior(like, 2500)
    assert abs(draws[:, 0].mean() - fit.fccd_in_mm) < sigma and draws[:, 0].std() == pytest.approx(sigma, rel=0.35)
    assert (draws[:, 1] >= 0).all() and (draws[:, 1] <= 1).all()


def test_dlf_at_its_limit_has_an_interval_that_ends_there(emulator):
    data = drawn(np.random.default_rng(6).poisson(mean(1.0, 1.0)[0] * 0.999))
    fit = fit_window(Likelihood(data, emulator, WHOLE, {"scale": 0.05}))
    assert fit.dlf_interval[1] <= 1 and fit.dlf > 0.9 and fit.dlf_interval[0] < fit.dlf


def test_intervals_cover_the_truth(emulator):
    done = coverage(emulator, spectra(60, 9), 60, nuisance={"scale": 0.05}, seed=1)
    for name in ("FCCD", "DLF"):
        for level, error in done[name]["binomial_error"].items():
            assert abs(done[name]["coverage"][level] - float(level) / 100) < 3.3 * error
        assert 0.7 < done[name]["pull_rms"] < 1.35
    assert 0.35 < done["mean_p_value"] < 0.65 and done["not_converged"] == 0
    assert done["uniform_p_value"] > 0.01 and done["share_p_below_0.05"] < 0.15
    again = coverage(emulator, spectra(60, 9), 3, nuisance={"scale": 0.05}, seed=1)
    assert again == coverage(emulator, spectra(60, 9), 3, nuisance={"scale": 0.05}, seed=1)


def test_windows_are_fitted_and_written(emulator, tmp_path):
    data = drawn(np.random.default_rng(8).poisson(mean(1.0, 0.5)[0]))
    windows = {"whole": WHOLE, "two peaks": ((77.0, 84.0), (352.0, 359.5))}
    full = full_spectrum_fit(data, emulator, windows, {"scale": 0.05})
    assert [r["window"] for r in full.rows()] == list(windows) and all(r["described"] for r in full.rows())
    assert full["two peaks"].bins.sum() == 14 + 15
    assert full["two peaks"].row()["fccd_up"] > full["whole"].row()["fccd_up"]
    full.write(tmp_path / "fit.json")
    stored = json.loads((tmp_path / "fit.json").read_text())
    assert stored["windows"]["whole"]["fccd_in_mm"] == full["whole"].fccd_in_mm
    for fig in (lh.windows_figure(full), lh.fit_figure(full["whole"]), lh.emulator_figure(check_emulator(
            emulator, spectra(20, 1))), lh.profile_figure({"dlf": (np.arange(3.0), np.ones(3))})):
        assert any(a.get_xlabel() for a in fig.axes)


def test_bad_input_is_named(emulator):
    data = drawn(np.random.default_rng(8).poisson(mean(1.0, 0.5)[0]))
    with pytest.raises(DataError, match="the emulator's 890 bins"):
        Likelihood(data.rebin(2), emulator)
    with pytest.raises(DataError, match="one measured spectrum"):
        Likelihood(spectra(2), emulator)
    with pytest.raises(ConfigError, match="nuisance parameters among"):
        Likelihood(data, emulator, nuisance={"gian": 1.0})
    with pytest.raises(ConfigError, match="positive prior widths"):
        Likelihood(data, emulator, nuisance={"gain": 0.0})
    with pytest.raises(DataError, match="a window with more than"):
        Likelihood(data, emulator, ((80.0, 81.0),))
    with pytest.raises(DataError, match="lower degrees"):
        fit_emulator(spectra(30), (6, 4))
    flat = spectra(60)
    with pytest.raises(DataError, match="different FCCD and DLF"):
        fit_emulator(dataclasses.replace(flat, dlf=np.ones(60)), (2, 1))
    with pytest.raises(DataError, match="known FCCD"):
        fit_emulator(data, (2, 1))
    with pytest.raises(ConfigError, match="degrees"):
        fit_emulator(flat, (0, 1))
    with pytest.raises(ConfigError, match="fccd_in_mm or dlf"):
        profile(Likelihood(data, emulator), "scale")


# ---- the program ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    home = tmp_path_factory.mktemp("stores")
    write_store(spectra(400), home / "mc.h5")
    write_store(drawn(np.random.default_rng(8).poisson(mean(1.0, 0.5)[0])), home / "measured.h5")
    write_store(drawn(np.zeros(890, int)), home / "zero.h5")
    write_store(spectra(8), home / "few.h5")
    return home


def test_fit_from_the_shell(stores, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lh, "WINDOWS_KEV", {"81 and 356": ((77.0, 84.0), (352.0, 359.5)), "out": ((400.0, 500.0),)})
    monkeypatch.chdir(tmp_path)
    argv = ["fit", str(stores / "measured.h5"), "--data", str(stores / "mc.h5"), "--out", "a", "--degrees", "4", "3"]
    for _ in range(2):  # an earlier answer is replaced
        cli.deadlayer(argv)
    text = capsys.readouterr().out
    assert "peak ratio" in text and "FCCD" in text and "81 and 356" in text and "out" not in json.loads(
        (tmp_path / "a/fit.json").read_text())["likelihood"]["windows"]
    stored = json.loads((tmp_path / "a/fit.json").read_text())
    assert abs(stored["likelihood"]["windows"]["whole"]["fccd_in_mm"] - 1.0) < 0.05
    assert abs(stored["peak_ratio"]["fccd_in_mm"] - 1.0) < 0.1 and stored["emulator"]["pull_rms"] < 1.2
    assert {p.name for p in (tmp_path / "a/figures").iterdir()} == {
        f"{n}.png" for n in ("peaks", "calibration", "budget", "emulator", "windows", "spectrum")}
    assert load_emulator(tmp_path / "a/emulator.npz").degrees == (4, 3)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(("change", "words"), [
    ({"measured.h5": "missing.h5"}, ["missing.h5", "no such file"]), ({"mc.h5": "missing.h5"}, ["missing.h5"]),
    ({"measured.h5": "zero.h5"}, ["zero.h5", "counts"]), ({"mc.h5": "few.h5"}, ["few.h5", "at least 13"]),
    ({"measured.h5": "few.h5"}, ["few.h5", "--row"]), ({"step": "gauss"}, ["model", "gauss"]),
    ({"1.0": "7"}, ["DLF", "7"]), ({"4 3": "60 30"}, ["mc.h5", "lower degrees"]),
    ({"OUT": "measured.h5"}, ["measured.h5"]),
], ids=str)
def test_fit_refuses_bad_input_in_one_line(stores, tmp_path, capsys, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    line = "fit measured.h5 --data mc.h5 --model step --dlf 1.0 --degrees 4 3 --out OUT"
    for a, b in change.items():
        line = line.replace(a, b)
    argv = [str(stores / a) if a.endswith(".h5") else a for a in line.split()]
    with pytest.raises(SystemExit) as e:
        cli.deadlayer(argv)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and "Traceback" not in err and err.startswith("deadlayer fit: error: ")
    assert err.count("\n") == 1 and not [w for w in words if w not in err], err
    assert not list(tmp_path.iterdir())


def test_split_keeps_blocks_together():
    mc = spectra(600)
    train, test = split_simulation(mc)
    assert 300 < len(train) < 500 and 60 < len(test) < 200
    cells = [set(zip((s.fccd_in_mm / 0.05).astype(int), (s.dlf / 0.1).astype(int), strict=True)) for s in (train, test)]
    assert not cells[0] & cells[1]
    assert minimise(Likelihood(drawn(mc.counts[0] // 3), fit_emulator(train, (4, 3)), WHOLE, {"scale": 0.05})).valid


@pytest.mark.parametrize("ratio", [0.0, 0.35])
def test_moments_of_the_deviance_hold_for_few_counts(ratio):
    rng, mu = np.random.default_rng(0), np.array([0.05, 0.5, 3.0, 12.0, 200.0])
    shape = mu / ratio if ratio else np.inf
    n = rng.poisson(rng.gamma(shape, mu / shape, (200_000, 5)) if ratio else np.tile(mu, (200_000, 1)))
    beta, penalty = barlow_beeston(n, mu, max(ratio, 1e-9) / mu + 0 * n)
    m = np.maximum(beta * mu, 1e-300)
    d = 2 * (m - n + lh.xlogy(n, n / m)) + (penalty if ratio else 0)
    mean_, variance = lh.deviance_moments(mu, ratio / mu)
    assert d.mean(0) == pytest.approx(mean_, rel=0.03) and d.var(0) == pytest.approx(variance, rel=0.08)


def test_structures_that_move_get_splines_and_an_honest_noise():
    def moving(n, seed):
        rng = np.random.default_rng(seed)
        f, d, c = rng.uniform(0, 2, n), rng.uniform(0, 1, n), np.arange(20) + 0.5
        at = (4 + 10 * f * d)[:, None]
        means = 900 + 250 * np.exp(-((c - at) ** 2) / 2) * (c < 19)
        means[:, 14:] = 900
        return Spectra(rng.poisson(3 * means), np.arange(5, 26.0), f, d, 3.0)

    emulator = fit_emulator(moving(2500, 0), (6, 4))
    assert emulator.splined[:14].mean() > 0.7 and not emulator.splined[16:].any()
    test = moving(800, 1)
    inside = (test.fccd_in_mm > 0.2) & (test.fccd_in_mm < 1.8) & (test.dlf > 0.1) & (test.dlf < 0.9)
    z = emulator.pulls(test)[inside]
    assert np.abs(z[:, 16:].std() - 1) < 0.05 and 0.7 < z[:, :14].std() < 1.35
    plain = dataclasses.replace(emulator, splined=np.zeros(20, bool))
    assert (plain.residuals(test)[inside, :14] ** 2).mean() > 1.3 * (emulator.residuals(test)[inside, :14] ** 2).mean()


def test_a_fit_that_is_not_valid_is_marked(emulator):
    data = drawn(np.random.default_rng(6).poisson(mean(1.0, 0.5)[0]))
    fit = fit_window(Likelihood(data, emulator, WHOLE, {"scale": 0.05}))
    full = lh.FullFit([fit, dataclasses.replace(fit, name="other", valid=False)], {}, 1.0)
    assert full.summary()["not_valid"] == ["other"] and full.summary()["described"] == ["whole"]
    labels = [t.get_text() for t in lh.windows_figure(full).axes[0].get_yticklabels()]
    assert "not valid" in labels[1] and "not valid" not in labels[0]

    class Peaks:
        ratio, dlf, fccd_in_mm, up_in_mm, down_in_mm = type("R", (), {"value": 0.7, "error": 0.01}), 1.0, 1.0, 0.1, 0.1

    rows = cli.fit_rows(Peaks, full, check_emulator(emulator, spectra(40, 7)))
    assert "not valid" in rows["other"] and "not valid" not in rows["whole"]
