"""Peak counting and the FCCD it gives: known areas, known ratios, the published measurement, and bad input."""
import dataclasses

import numpy as np
import pytest
from scipy.special import ndtr

from deadlayer_cres.core import ConfigError, DataError
from deadlayer_cres.deadlayer import peaks
from deadlayer_cres.deadlayer.data import Spectra, concatenate, read_spectra, shared_data
from deadlayer_cres.deadlayer.peaks import (
    INTENSITIES,
    MODELS,
    REGIONS,
    BudgetRow,
    calibrate,
    count_lines,
    count_peak,
    fccd_from_peaks,
    intensity_table,
    line_rows,
    peak_integral,
    peak_ratio,
    quadrature,
    step_integral,
)

EDGES = np.arange(901) * 0.5
RATIO = 0.0262 / 0.3406


def areas(fccd, dlf=1.0) -> dict:
    "Counts in each line under a dead layer, a little more where the layer is a slow ramp."
    return {e: 6e5 * p * np.exp(-fccd * (0.05 + 0.45 * (81 / e) ** 2.5 * (0.9 + 0.1 * dlf)))
            for e, p in INTENSITIES["xraylib"].items()}


def toy(fccd, dlf=1.0, seed=0, exposure=1.0, eta=0.0) -> Spectra:
    "Spectra with lines of known area, a step under each, and a continuum."
    fccd, dlf = np.broadcast_arrays(np.atleast_1d(fccd).astype(float), dlf)
    rows = []
    for f, d in zip(fccd, dlf, strict=True):
        mean = 900 * np.exp(-EDGES[:-1] / 250)
        for e, area in areas(f, d).items():
            sigma = 0.25 + 0.0005 * e
            peak = peak_integral(EDGES, e, sigma, eta, 1.0) + 0.01 * step_integral(EDGES, e, sigma)
            mean = mean + area * np.diff(peak)
        rows.append(exposure * mean)
    return Spectra(np.random.default_rng(seed).poisson(rows), EDGES, fccd, dlf, exposure)


def measured(fccd=0.97, dlf=1.0, seed=5) -> Spectra:
    return dataclasses.replace(toy(fccd, dlf, seed), fccd_in_mm=np.array([np.nan]), dlf=np.array([np.nan]))


@pytest.fixture(scope="module")
def simulated() -> Spectra:
    rng = np.random.default_rng(3)
    return toy(np.linspace(0.2, 1.8, 48), rng.uniform(0, 1, 48), 1, 3.0)


def test_integrals_are_those_of_their_densities():
    x = np.linspace(70, 92, 44001)
    centre, h = (x[1:] + x[:-1]) / 2, x[1] - x[0]
    area = np.cumsum(ndtr(-(centre - 81) / 0.3)) * h
    assert np.allclose(area, step_integral(x[1:], 81, 0.3) - step_integral(x[0], 81, 0.3), atol=1e-6)
    rng = np.random.default_rng(0)
    draws = rng.normal(81, 0.3, 400000) - rng.exponential(0.8, 400000) * (rng.random(400000) < 0.3)
    for at in (78.5, 80, 80.8, 81, 81.5):
        assert abs((draws < at).mean() - peak_integral(np.array(at), 81, 0.3, 0.3, 0.8)) < 0.0035


@pytest.mark.parametrize("model", ["step", "tail", "sidebands"])
def test_counts_and_errors_are_right(model):
    truth = areas(0.9)
    for name, want in (("81", truth[80.998] + truth[79.614]), ("356", truth[356.013])):
        fits = [count_peak(toy(0.9, seed=s), name, model, RATIO) for s in range(25)]
        z = np.array([(f.count - want) / f.statistical for f in fits])
        assert 0.6 < z.std() < 1.5
        assert abs(z.mean()) < (0.7 if model != "sidebands" else 2.5)  # the step is no straight line


def test_goodness_of_fit_is_that_of_chance_for_the_right_model():
    p = [count_peak(toy(0.9, seed=s), "81", "step", RATIO).p_value for s in range(40)]
    assert 0.3 < np.mean(p) < 0.7 and min(p) > 1e-4


def test_tail_is_found_and_its_absence_too():
    without, with_ = (count_peak(toy(0.9, eta=e, seed=2), "81", "tail", RATIO).parameters["eta"] for e in (0, 0.1))
    assert abs(without[0]) < 4 * without[1] and abs(with_[0] - 0.1) < 4 * with_[1]
    assert count_peak(toy(0.9, eta=0.1, seed=2), "81", "step", RATIO).p_value < 1e-6


def test_error_grows_with_misfit():
    good = count_peak(toy(0.9), "356", "step")
    bad = dataclasses.replace(good, chi2=4.0 * good.ndf)
    assert bad.error == pytest.approx(2 * good.statistical) and bad.p_value < 1e-3
    assert dataclasses.replace(good, chi2=0.1).error == good.statistical


def test_all_lines_are_counted():
    fits, truth = count_lines(toy(0.6, exposure=3.0, seed=1), ratio=RATIO), areas(0.6)
    assert list(fits) == list(REGIONS)
    for name, f in fits.items():
        want = 3 * sum(truth[e] for e in (f.region.line_keV, f.region.partner_keV) if e)
        assert abs(f.count - want) < 5 * f.error, name
        assert f.pulls.std() < 2 and f.counts.shape == f.expected.shape
    rows = line_rows(fits)
    assert all(abs(r["mean_keV"] - REGIONS[r["line_keV"]].line_keV) < 0.15 for r in rows)


def test_ratio_falls_with_fccd_and_has_the_error_of_counting():
    low, high = peak_ratio(toy(0.5), ratio=RATIO), peak_ratio(toy(1.5), ratio=RATIO)
    assert low.value > 1.3 * high.value
    values = [peak_ratio(toy(0.5, seed=s), ratio=RATIO) for s in range(25)]
    assert 0.6 < np.std([v.value for v in values]) / np.mean([v.statistical for v in values]) < 1.5


@pytest.mark.parametrize("model", MODELS)
def test_known_fccd_comes_back(simulated, model):
    curve = calibrate(simulated, model, RATIO, sample=24)
    for fccd, dlf in ((0.6, 1.0), (1.2, 0.3)):
        o = peak_ratio(measured(fccd, dlf), model, RATIO)
        sigma = o.statistical / o.value / 0.4
        assert abs(curve.invert(o.value, dlf) - fccd) < 4 * sigma
    assert abs(curve.invert(float(curve(1.1, 0.4)), 0.4) - 1.1) < 1e-5


def test_curve_has_the_errors_it_claims(simulated):
    curves = [calibrate(toy(simulated.fccd_in_mm, simulated.dlf, seed, 3.0), ratio=RATIO, sample=24)
              for seed in range(5)]
    values = np.log([float(c(0.97)) for c in curves])
    claimed = np.mean([c.relative_sigma(0.97) for c in curves])
    assert 0.4 < values.std(ddof=1) / claimed < 2.2


@pytest.fixture(scope="module")
def answer(simulated):
    return fccd_from_peaks(measured(), simulated, sample=14)


def test_budget_adds_up(answer):
    rows = answer.rows()
    up = np.sqrt(sum(r["up_in_mm"] ** 2 for r in rows if r["kind"] in ("statistical", "systematic")))
    assert rows[-1]["up_in_mm"] == pytest.approx(up) == pytest.approx(answer.up_in_mm)
    names = {r["name"] for r in rows}
    assert {"counting statistics", "peak model", "fit range", "simulated events", "Geant4 physics"} <= names
    assert all(r["up_in_mm"] >= 0 and r["down_in_mm"] >= 0 for r in rows)
    assert abs(answer.fccd_in_mm - 0.97) < 0.05 and set(answer.by_model) == set(MODELS)
    assert quadrature([BudgetRow("a", "choice", 9, 9), BudgetRow("b", "systematic", 3, 1),
                       BudgetRow("c", "statistical", 4, 0)]) == (5, 1)
    for draw in (peaks.calibration_figure(answer), peaks.budget_figure(answer),
                 peaks.peaks_figure({k: count_peak(measured(), k) for k in ("81", "356")})):
        assert {a.get_xlabel() for a in draw.axes} & {"FCCD [mm]", "shift of FCCD [mm]", "energy [keV]"}


def test_table_of_intensities_moves_fccd_the_right_way(simulated, answer):
    a, b = answer, fccd_from_peaks(measured(), simulated, sample=14, intensities="xraylib")
    assert b.fccd_in_mm > a.fccd_in_mm + 0.02  # more photons of 81 keV must be absorbed
    shift = next(r for r in a.budget if r.name == "intensities: xraylib")
    assert shift.kind == "choice" and abs(b.fccd_in_mm - a.fccd_in_mm - shift.up_in_mm) < 0.02


def test_intensities_are_those_of_xraylib():
    import xraylib

    source = xraylib.GetRadioNuclideDataByName("133Ba")
    for e, p in zip(source["GammaEnergies"], source["GammaIntensities"], strict=True):
        near = min(INTENSITIES["xraylib"], key=lambda k: abs(k - e))
        assert abs(near - e) < 0.01 and INTENSITIES["xraylib"][near] == pytest.approx(p, rel=2e-3)
    assert intensity_table("xraylib")[1] / intensity_table("HADES")[1] == pytest.approx(1.032, abs=0.001)


def test_bad_input_is_named(simulated):
    with pytest.raises(ConfigError, match="peak model among step"):
        count_peak(measured(), "81", "gauss")
    with pytest.raises(ConfigError, match="a table among HADES"):
        fccd_from_peaks(measured(), simulated, intensities="mine")
    with pytest.raises(ConfigError, match="DLF"):
        fccd_from_peaks(measured(), simulated, dlf=1.5)
    with pytest.raises(DataError, match="one spectrum"):
        count_peak(simulated[:2], "81")
    with pytest.raises(DataError, match="cover the window"):
        count_peak(measured().rebin(3), "81")
    with pytest.raises(DataError, match="cover the window"):
        count_peak(measured().select_energy(80, 400), "81")
    empty = dataclasses.replace(measured(), counts=np.zeros((1, 900), int))
    with pytest.raises(DataError, match="at least 100 counts"):
        count_peak(empty, "81")
    with pytest.raises(DataError, match="at least 13 simulated"):
        calibrate(simulated[:12])
    with pytest.raises(DataError, match="several FCCDs"):
        calibrate(simulated[np.zeros(30, int)])
    with pytest.raises(DataError, match="between .* for FCCD 0.2"):
        calibrate(simulated, sample=20).invert(2.0)


def test_published_measurement():
    if (folder := shared_data()) is None or not (folder / "V05268A").is_dir():
        pytest.skip("the published spectra are not here")
    folder = folder / "V05268A"
    data = read_spectra(folder / "experimental_data_V05268A.h5")
    files = sorted((folder / "training_data_V05268A_5000randomFCCDs_randomDLFs").iterdir())[::250]
    dlf1 = sorted((folder / "training_data_V05268A_5000randomFCCDs_DLF1").iterdir())[::250]
    mc = concatenate([read_spectra(p) for p in (*files, *dlf1)])
    o = peak_ratio(data, "published")
    assert abs(o.value - 0.718) < 0.002 and 0.007 < o.error < 0.011
    for model in ("step", "published", "sidebands"):
        assert 0.955 < calibrate(mc, model, sample=40).invert(peak_ratio(data, model).value) < 1.005
