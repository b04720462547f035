"""Evaluation of reconstructors whose errors are known."""
import io
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.optimize import curve_fit
from scipy.special import ndtri

from deadlayer_cres.core import ConfigError, DataError, RunError
from deadlayer_cres.cres import evaluate as ev
from deadlayer_cres.cres.data import Events, EventStore, write_store
from deadlayer_cres.cres.model import EncoderConfig, ModelConfig, Reconstructor
from deadlayer_cres.cres.prep import PrepConfig, build_prep
from deadlayer_cres.cres.simulate import ReceiverConfig, SimulateConfig, simulate_events
from deadlayer_cres.cres.train import Config, DataConfig, StreamSource, build_pipeline, fit_statistics
from deadlayer_cres.cres.trap import energy_from_frequency
from deadlayer_cres.train import Pipeline

ONES = np.ones


def electrons(n, seed=0):
    "Labels of n electrons."
    rng = np.random.default_rng(seed)
    return {"energy_eV": rng.uniform(18_500, 18_700, n), "pitch_angle_deg": rng.uniform(88, 90, n),
            "radius_m": rng.uniform(0, 6.5e-3, n), "avg_carrier_frequency_Hz": rng.uniform(25.90e9, 25.92e9, n),
            "avg_axial_frequency_Hz": rng.uniform(1e6, 9e6, n)}


def predicted(n=4000, claimed=1.0, tails=0.0, seed=0, quantiles=False):
    "A reconstructor with Gaussian errors of 0.5 to 2 eV that claims `claimed` times these; a part has one of 20 eV."
    truth, rng = electrons(n, seed), np.random.default_rng(seed + 1)
    sigma = np.stack([rng.uniform(0.5, 2, n), rng.uniform(0.005, 0.02, n)], 1)
    error = sigma * rng.normal(size=(n, 2))
    error[:int(tails * n)] = np.array([20.0, 0.2]) * rng.normal(size=(int(tails * n), 2))
    mean = np.stack([truth["energy_eV"], truth["pitch_angle_deg"]], 1) + error
    q = mean[:, :, None] + claimed * sigma[:, :, None] * ndtri(np.array(ev.QUANTILES)) if quantiles else None
    seen = {"total_power": rng.uniform(10, 900, n), "max_power": rng.uniform(5, 400, n),
            "peak_frequency_Hz": truth["avg_carrier_frequency_Hz"]}
    return ev.Predictions(("energy_eV", "pitch_angle_deg"), mean, claimed * sigma, truth, seen, q)


# --- predictions and tables ---


def test_predictions_are_selected_and_joined():
    p = predicted(50, quantiles=True)
    part = p[p.truth["energy_eV"] > 18_600]
    assert (part.truth["energy_eV"] > 18_600).all() and part.quantiles.shape == (len(part), 2, 5)
    both = ev.join([p[:20], p[20:]])
    assert np.array_equal(both.mean, p.mean)
    assert np.array_equal(both.observables["max_power"], p.observables["max_power"])


@pytest.mark.parametrize(("change", "word"), [
    ({"sigma": np.zeros((3, 1))}, "sigma"), ({"truth": {"energy_eV": np.zeros(9)}}, "energy_eV"),
    ({"quantiles": np.zeros((50, 2, 3))}, "quantiles"), ({"modes": np.zeros((50, 1, 2))}, "modes")])
def test_predictions_that_do_not_fit_are_refused(change, word):
    with pytest.raises(DataError, match=word):
        replace(predicted(50), **change)


def test_residuals_name_the_event_that_diverged():
    p = predicted(50)
    p.mean[7, 0] = np.nan
    with pytest.raises(DataError, match="row 7"):
        ev.residual(p)
    with pytest.raises(DataError, match="radius_m"):
        ev.residual(p, "radius_m")


def mixture(n=30):
    rng, p = np.random.default_rng(0), predicted(n, quantiles=True)
    modes, widths = rng.normal(size=(n, 3, 2)), rng.random((n, 3, 2))
    return replace(p, weight=rng.dirichlet([1, 1, 1], n), modes=modes, widths=widths)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("make", [lambda: predicted(30), lambda: predicted(30, quantiles=True), mixture,
                                  lambda: replace(predicted(30), sigma=None, truth={}, observables={})])
def test_tables_come_back_as_they_went(tmp_path, ending, make):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    p = make()
    ev.write_table(tmp_path / f"p.{ending}", p)
    back = ev.read_table(tmp_path / f"p.{ending}")
    assert back.targets == p.targets and back.levels == p.levels
    for name in ("mean", "sigma", "quantiles", "weight", "modes", "widths"):
        a, b = getattr(p, name), getattr(back, name)
        assert (a is None and b is None) or np.array_equal(a, b, equal_nan=True), name
    for name in ("truth", "observables"):
        a, b = getattr(p, name), getattr(back, name)
        assert list(a) == list(b) and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_table_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), ev.table_writer(tmp_path / "p.csv") as write:
        write({"a": np.arange(3)})
        raise RuntimeError("stop")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "word"), [
    ("", "empty"), ("a,b\n1,2\n", "energy_eV"), ("energy_eV,energy_sigma_eV\n1\n", "row 0"),
    ("energy_eV,energy_sigma_eV\nx,2\n", "energy_eV")])
def test_bad_tables_are_refused(tmp_path, text, word):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(DataError, match=word):
        ev.read_table(tmp_path / "p.csv")


def test_other_endings_and_missing_files(tmp_path):
    with pytest.raises(ConfigError, match="parquet"):
        ev.write_table(tmp_path / "p.txt", predicted(5))
    with pytest.raises(DataError, match="no such file"):
        ev.read_table(tmp_path / "p.csv")
    (tmp_path / "bad.parquet").write_text("no parquet")
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="readable table"):
        ev.read_table(tmp_path / "bad.parquet")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        ev.write_table(tmp_path / "p.parquet", predicted(5))
    assert not list(tmp_path.iterdir())


# --- observables ---


def test_observables_of_a_known_line():
    n, rate, sigma = 4096, 403e6, 0.0471
    t = np.arange(n) / rate
    f = np.array([-60.0123e6, -50.7e6, -71.2345e6])
    z = 0.02 * np.exp(2j * np.pi * f[:, None] * t)
    noise = np.random.default_rng(0).normal(0, sigma, (3, 2, n))
    seen = ev.observe(torch.tensor(np.stack([z.real, z.imag], 1) + noise, dtype=torch.float32))
    expected = 0.02**2 * n / (2 * sigma**2)
    assert np.abs(seen["peak_frequency_Hz"] - 25.9702e9 - f).max() < 0.15 * rate / n
    assert np.abs(seen["total_power"] / expected - 1).max() < 0.35
    assert (seen["max_power"] < 1.3 * expected).all() and (seen["max_power"] > 0.3 * expected).all()
    strong = torch.tensor(5 * np.stack([z.real, z.imag], 1) + noise)
    assert abs(float(ev.noise_level_V(strong).mean()) / sigma - 1) < 0.03, "a line does not count as noise"


def test_observables_of_silence_and_of_another_band():
    assert all(np.isfinite(v).all() for v in ev.observe(torch.zeros(2, 2, 64)).values())
    found = ev.observe(torch.randn(2, 2, 64), sampling_rate_Hz=1e6, lo_frequency_Hz=0.0)  # another band
    assert (np.abs(found["peak_frequency_Hz"]) <= 0.6e6).all()


# --- figures of merit ---


@pytest.mark.parametrize(("tails", "width"), [(0.0, 0.0), (0.3, 30.0), (0.6, 60.0)])
def test_the_core_is_found_among_tails(tails, width):
    rng = np.random.default_rng(1)
    x = rng.normal(0.3, 0.7, 50_000)
    x[:int(tails * len(x))] = rng.normal(0, width or 1, int(tails * len(x)))
    mean, sigma, part = ev.core_fit(x)
    under = tails * 0.7 / ((1 - tails) * (width or 1))  # density of the tails over that of the core: it widens the fit
    assert abs(sigma / 0.7 - 1) < 0.015 + under and abs(mean - 0.3) < 0.02 and abs(part - (1 - tails)) < 0.03


def test_the_core_is_that_of_the_histogram_fit():
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.normal(0, 1.3, 150_000), rng.normal(2, 15, 80_000)])
    counts, edges = np.histogram(x, np.linspace(x.mean() - 5 * x.std(), x.mean() + 5 * x.std(), 2501))
    fit, _ = curve_fit(lambda x, a, m, s: a * np.exp(-(((x - m) / s) ** 2) / 2), (edges[1:] + edges[:-1]) / 2, counts,
                       p0=[counts.max(), 0, 2])
    mean, sigma, _ = ev.core_fit(x)
    assert abs(sigma / abs(fit[2]) - 1) < 0.01 and abs(mean - fit[1]) < 0.02


def test_weights_of_the_core_are_counts():
    rng = np.random.default_rng(3)
    x, w = rng.standard_t(2, 3000), rng.integers(0, 4, 3000)
    assert np.allclose(ev.core_fit(x, w.astype(float)), ev.core_fit(np.repeat(x, w)), rtol=1e-2)


@pytest.mark.parametrize("r", [np.zeros(50), np.full(50, 2.0), np.array([0.0, 1.0]), np.array([3.0])])
def test_residuals_without_a_spread(r):
    table = ev.with_errors(ev.residual_statistic(r, 1.5), ONES(len(r)), repeats=20)
    assert all(math.isfinite(v["value"]) for v in table.values())
    assert table["rms"]["value"] == pytest.approx(np.sqrt(np.mean(r**2)))
    assert table["tail_fraction"]["value"] == np.mean(np.abs(r) > 1.5)


def test_each_figure_of_merit_of_a_known_distribution():
    rng = np.random.default_rng(4)
    r = rng.normal(0.1, 2.0, 100_000)
    v = {k: x["value"] for k, x in ev.with_errors(ev.residual_statistic(r, 3.0), ONES(len(r)), repeats=2).items()}
    assert v["core_sigma"] == pytest.approx(2, rel=0.01) and v["rms"] == pytest.approx(math.hypot(2, 0.1), rel=0.01)
    assert v["fwhm"] == pytest.approx(4.71, rel=0.01) and v["fwhm_half_maximum"] == pytest.approx(4.71, rel=0.03)
    assert v["median_abs"] == pytest.approx(1.351, rel=0.02) and v["bias"] == pytest.approx(0.1, abs=0.03)
    assert v["tail_fraction"] == pytest.approx(np.mean(np.abs(r) > 3))


def test_the_half_maximum_sees_a_core_that_is_no_gaussian():
    r = np.random.default_rng(5).uniform(-1, 1, 100_000)
    assert ev.residual_statistic(r)(ONES(len(r)))["fwhm_half_maximum"] == pytest.approx(2, rel=0.05)


def test_errors_are_those_of_repeated_experiments():
    rng = np.random.default_rng(6)
    names = ("core_sigma", "fwhm_half_maximum", "rms", "tail_fraction", "median_abs", "bias")
    tables = [ev.with_errors(ev.residual_statistic(rng.normal(0, 2, 400), 3.0), ONES(400), repeats=60)
              for _ in range(150)]
    for name in names:
        spread = np.std([t[name]["value"] for t in tables], ddof=1)
        error = np.mean([t[name]["error"] for t in tables])
        assert 0.75 < spread / error < 1.3, name


def test_errors_are_seeded():
    r = np.random.default_rng(7).normal(size=200)
    first, again, other = (ev.with_errors(ev.residual_statistic(r), ONES(200), seed, 20) for seed in (0, 0, 1))
    assert first == again and first["rms"]["error"] != other["rms"]["error"]


def test_weights_by_efficiency_leave_out_what_is_not_detected():
    p = predicted(3000, tails=0.4)
    bad = np.arange(3000) < 1200
    p.truth["radius_m"] = np.where(bad, 6e-3, 1e-3)
    m = ev.figures_of_merit(p, lambda e, t, r: torch.as_tensor((r < 5e-3) * 1.0), repeats=10)["energy_eV"]
    good = ev.figures_of_merit(p[~bad], repeats=10)["energy_eV"]["all"]
    for name in ("rms", "tail_fraction", "median_abs", "bias"):
        assert m["efficiency_weighted"][name]["value"] == pytest.approx(good[name]["value"], rel=1e-9), name
    assert m["efficiency_weighted"]["core_sigma"]["value"] == pytest.approx(good["core_sigma"]["value"], rel=0.02)
    assert m["all"]["rms"]["value"] > 3 * m["efficiency_weighted"]["rms"]["value"]
    with pytest.raises(DataError, match="radius_m"):
        del p.truth["radius_m"]
        ev.figures_of_merit(p, lambda e, t, r: e)


def test_the_best_events_are_those_with_the_smallest_sigma():
    p = predicted(8000)
    best = ev.figures_of_merit(p, repeats=10)["energy_eV"]["resolution_at_efficiency"]
    order = np.argsort(p.sigma[:, 0])[:800]
    assert best["10"]["rms"]["value"] == pytest.approx(np.sqrt(np.mean(ev.residual(p)[order] ** 2)))
    assert best["10"]["events"] == 800 and best["100"]["events"] == 8000
    assert best["10"]["rms"]["value"] < 0.8 < best["100"]["rms"]["value"]


def test_coverage_of_an_honest_and_of_a_proud_network():
    honest = ev.figures_of_merit(predicted(20_000), repeats=10)["energy_eV"]["calibration"]
    assert honest["coverage_1_sigma"]["value"] == pytest.approx(ev.ONE_SIGMA, abs=0.012)
    assert honest["coverage_2_sigma"]["value"] == pytest.approx(ev.TWO_SIGMA, abs=0.006)
    assert honest["z_rms"]["value"] == pytest.approx(1, abs=0.02)
    proud = ev.figures_of_merit(predicted(20_000, claimed=0.5), repeats=10)["energy_eV"]["calibration"]
    assert proud["coverage_1_sigma"]["value"] < 0.4 and proud["z_rms"]["value"] == pytest.approx(2, abs=0.04)


def test_networks_without_a_sigma_have_no_calibration():
    m = ev.figures_of_merit(replace(predicted(200), sigma=None), repeats=5)
    assert "calibration" not in m["energy_eV"] and "resolution_at_efficiency" not in m["energy_eV"]
    with pytest.raises(DataError, match="truth"):
        ev.figures_of_merit(replace(predicted(200), truth={}))


def test_the_ratio_to_the_limit():
    p = predicted(30_000)
    sigma = np.where(np.arange(30_000)[:, None] % 2, [[0.4, 0.004]], [[8.0, 0.1]])
    rng = np.random.default_rng(0)
    truth = np.stack([p.truth["energy_eV"], p.truth["pitch_angle_deg"]], 1)

    def guess(factor):
        return replace(p, mean=truth + factor * sigma * rng.normal(size=(30_000, 2)), sigma=sigma)
    best = guess(1)
    own = ev.ratio_to_limit(best, best, "energy_eV", repeats=20)
    assert own["rms_ratio"]["value"] == 1 and own["narrow_ratio"]["value"] == pytest.approx(1, abs=0.04)
    assert own["narrow_events"] == 15_000
    twice = ev.ratio_to_limit(guess(2), best, "energy_eV", repeats=20)
    assert twice["rms_ratio"]["value"] == pytest.approx(2, abs=0.06)
    assert twice["narrow_ratio"]["value"] == pytest.approx(2, abs=0.08)
    assert "limit" in ev.figures_of_merit(guess(2), limit=best, repeats=5)["pitch_angle_deg"]
    with pytest.raises(DataError, match="same events"):
        ev.ratio_to_limit(p, best[::-1], "energy_eV")
    with pytest.raises(DataError, match="same events"):
        ev.ratio_to_limit(p, best[:10], "energy_eV")
    split = replace(best, weight=np.full((30_000, 2), 0.5), modes=np.zeros((30_000, 2, 2)),
                    widths=np.ones((30_000, 2, 2)))
    assert ev.ratio_to_limit(best, split, "energy_eV", repeats=2)["narrow_events"] == 0


# --- baselines ---


def test_baselines():
    p = predicted(4000)
    train, test = p[:2000], p[2000:]
    mean = ev.mean_baseline(train, test)
    assert mean.targets == ("energy_eV", "pitch_angle_deg") and np.ptp(mean.mean[:, 0]) == 0
    assert ev.figures_of_merit(mean, repeats=5)["energy_eV"]["all"]["rms"]["value"] == pytest.approx(57.7, rel=0.03)
    for part in (train, test):  # all lines 130 eV too low, and one that noise has moved
        f = part.truth["energy_eV"]
        part.observables["peak_frequency_Hz"] = np.array([(25.9e9 - 48.9e3 * (e - 18_600 - 130)) for e in f])
    peak = ev.peak_baseline(train, test)
    assert np.abs(ev.residual(peak)).max() < 0.5
    start = energy_from_frequency(test.observables["peak_frequency_Hz"], 0.959)
    assert np.abs(start - test.truth["energy_eV"]).min() > 20


# --- calibration ---


def halves(**options):
    p = predicted(40_000, **options)
    odd = np.arange(40_000) % 2 == 1
    return p[odd], p[~odd]


def covered(p):
    return {t: ev.calibration_statistic(ev.residual(p, t), p.sigma[:, k])(ONES(len(p)))["coverage_1_sigma"]
            for k, t in enumerate(p.targets)}


@pytest.mark.parametrize("claimed", [0.4, 1.0, 2.5])
def test_temperature_mends_the_coverage(claimed):
    fit, held = halves(claimed=claimed, quantiles=True)
    factors = ev.fit_temperature(fit)
    assert np.allclose(factors, 1 / claimed, rtol=0.05)
    after = ev.scale_sigma(held, factors)
    assert all(abs(c - ev.ONE_SIGMA) < 0.02 for c in covered(after).values())
    assert all(abs(b["coverage"] - b["nominal"]) < 0.02 for b in ev.band_coverage(after))
    if claimed != 1:
        assert abs(covered(held)["energy_eV"] - ev.ONE_SIGMA) > 0.2


def test_isotonic_mends_the_shape_too():
    fit, held = halves(claimed=0.5, tails=0.2)
    scaled = ev.scale_sigma(held, ev.fit_temperature(fit))
    shaped = ev.apply_isotonic(ev.Isotonic.fit(fit), held)
    assert abs(covered(shaped)["energy_eV"] - ev.ONE_SIGMA) < 0.02
    bands = ev.band_coverage(shaped, "pitch_angle_deg")
    assert len(bands) == 2 and all(abs(b["coverage"] - b["nominal"]) < 0.02 for b in bands)
    z = ndtri(np.array(scaled.levels))
    gauss = replace(scaled, quantiles=scaled.mean[:, :, None] + scaled.sigma[:, :, None] * z)
    assert ev.band_coverage(gauss)[0]["coverage"] < 0.87, "a temperature cannot mend the tails"


def test_isotonic_tables_survive_json_and_leave_other_targets():
    fit, held = halves(claimed=0.5)
    fitted = ev.Isotonic.fit(replace(fit, truth={"energy_eV": fit.truth["energy_eV"]}))
    table = ev.Isotonic(**json.loads(json.dumps(vars(fitted))))
    after = ev.apply_isotonic(table, held)
    assert table.targets == ["energy_eV"] and np.array_equal(after.sigma[:, 1], held.sigma[:, 1])
    assert np.array_equal(after.mean, held.mean) and not np.array_equal(after.sigma[:, 0], held.sigma[:, 0])


def test_calibration_is_judged_on_events_it_was_not_fitted_to():
    c = ev.fit_calibration(predicted(4000, claimed=0.5))
    before, after = (c["coverage"][k]["energy_eV"]["coverage_1_sigma"] for k in ("before", "temperature"))
    assert before < 0.45 and abs(after - ev.ONE_SIGMA) < 0.03
    assert c["temperature"]["energy_eV"] == pytest.approx(2, rel=0.06)
    with pytest.raises(DataError, match="100"):
        ev.fit_calibration(predicted(50))


class FakeRun:
    "Keeps what `calibrate_run` writes."

    def __init__(self, path):
        self.path, self.about = path, []

    def save_weights(self, pipeline, **about):
        self.about.append(about)


def test_a_run_is_calibrated_once_and_for_all(tmp_path, pipeline):
    run, events = FakeRun(tmp_path), simulate_events(300, SMALL)
    first, again = (ev.calibrate_run(run, pipeline, lambda: ev.reconstruct(pipeline, events)) for _ in range(2))
    assert first == again and ev.read_calibration(tmp_path)["temperature"] == first["temperature"]
    after = ev.reconstruct(pipeline, events)
    assert np.allclose(pipeline.net.sigma_scale.numpy(), list(first["temperature"].values()))
    inner = [ev.band_coverage(after, t)[-1] for t in after.targets]
    assert all(abs(b["coverage"] - b["nominal"]) < 0.005 for b in inner), "read() applies the temperature"
    table = ev.Isotonic(**first["isotonic"])
    assert all(abs(c - ev.ONE_SIGMA) < 0.02 for c in covered(ev.apply_isotonic(table, after)).values()), "and the table"
    pipeline.net.sigma_scale.fill_(1)
    assert ev.read_calibration(tmp_path / "none") is None


# --- networks ---

SMALL = SimulateConfig(receiver=ReceiverConfig(samples=256))


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    prep = build_prep(PrepConfig(scale="event"), 256)
    encoder = EncoderConfig(kind="cnn", d_model=8, layers=1)
    channels = prep.without_noise()(torch.randn(1, 2, 256)).shape[1]
    net = Reconstructor(ModelConfig(encoders=[encoder], head="quantiles", hidden=[]), [channels],
                        ("energy_eV", "pitch_angle_deg"))
    net.scale.fit(torch.tensor([[18_500.0, 88.0], [18_700.0, 90.0]]))
    return Pipeline(prep, net).eval()


def test_reconstruct_gives_the_same_whatever_the_batches(pipeline):
    events = simulate_events(40, SMALL)
    one, many = ev.reconstruct(pipeline, events), ev.reconstruct(pipeline, events, batch_size=7)
    assert np.allclose(one.mean, many.mean, atol=1e-3) and one.quantiles.shape == (40, 2, 5)
    assert np.array_equal(one.truth["energy_eV"], events.columns["energy_eV"])
    assert np.allclose(one.observables["max_power"], many.observables["max_power"])


def test_noise_is_added_to_clean_events_only(pipeline):
    clean, noisy = simulate_events(20, SMALL), simulate_events(20, SMALL, noise="added")
    assert ev.needs_noise(pipeline, torch.from_numpy(clean.ts))
    assert not ev.needs_noise(pipeline, torch.from_numpy(noisy.ts))
    auto, bare = ev.reconstruct(pipeline, clean), ev.reconstruct(pipeline, clean, noise="none")
    assert np.abs(auto.mean - bare.mean).max() > 1e-3
    assert np.allclose(auto.mean, ev.reconstruct(pipeline, clean, noise="add").mean)
    assert np.allclose(ev.reconstruct(pipeline, noisy).mean, ev.reconstruct(pipeline, noisy, noise="none").mean)
    later = ev.reconstruct(pipeline, clean[10:], first=10)
    assert np.allclose(later.mean, auto.mean[10:], atol=1e-3), "noise goes by the number of the event"


def test_reconstruct_from_a_store_with_recorded_noise(pipeline, tmp_path):
    events = simulate_events(12, SMALL, noise="kept")
    write_store(events, tmp_path / "a.h5")
    store = EventStore(tmp_path / "a.h5")
    want = ev.reconstruct(pipeline, replace(events, ts=events.ts + events.noise["gauss"], noise={}))
    for source in (events, store):
        assert np.allclose(ev.reconstruct(pipeline, source, noise="gauss", batch_size=5).mean, want.mean, atol=1e-3)
    with pytest.raises(ConfigError, match="gauss"):
        ev.reconstruct(pipeline, events, noise="cav")


def test_reconstruct_refuses_nothing_and_too_short(pipeline):
    with pytest.raises(DataError, match="one event"):
        ev.reconstruct(pipeline, simulate_events(2, SMALL)[:0])
    with pytest.raises(DataError, match="300 samples"):
        ev.reconstruct(pipeline, simulate_events(2, SMALL), samples=300)
    with pytest.raises(DataError, match="256"):
        ev.reconstruct(pipeline, Events(np.ones((2, 2, 200), np.float32)), noise="none")


def test_events_of_another_receiver_are_refused():
    config = SimpleNamespace(data=SimpleNamespace(samples=256, sampling_rate_Hz=403e6, lo_frequency_Hz=25.9702e9))
    events = simulate_events(2, SMALL)
    ev.check_events(config, events)
    for change, word in (({"sampling_rate_Hz": 2e8}, "sampling_rate_Hz"), ({"lo_frequency_Hz": 20e9}, "lo_freq"),
                         ({"ts": events.ts[:, :, :100]}, "256 samples")):
        with pytest.raises(DataError, match=word):
            ev.check_events(config, replace(events, **change), "here.h5")


def small_run(tmp_path, head="gaussian", task="regress", **data):
    "A run folder's stand-in, its config, and an untrained pipeline with fitted scales."
    prep = PrepConfig(representation="time", scale="amplitude")
    encoder = EncoderConfig(kind="cnn", d_model=8, layers=1)
    model = ModelConfig(encoders=[encoder], head=head, hidden=[], task=task,
                        denoiser=EncoderConfig(kind="lstm", d_model=8, layers=1))
    settings = {"simulate": SMALL, "samples": 256, "sampling_rate_Hz": 403e6, "lo_frequency_Hz": 25.9702e9} | data
    config = Config(data=DataConfig(**settings), prep=prep, model=model)
    pipeline = build_pipeline(config, 256, 403e6)
    fit_statistics(pipeline, StreamSource(DataConfig(simulate=SMALL), torch.device("cpu")))
    run = FakeRun(tmp_path)
    run.history, run.environment = [], {"data_checksum": "abc"}
    return run, config, pipeline.eval()


@pytest.mark.parametrize(("head", "task"), [("mean", "regress"), ("quantiles", "both")])
def test_evaluate_takes_every_network_that_estimates(tmp_path, head, task):
    run, config, pipeline = small_run(tmp_path, head, task)
    m = ev.evaluate(run, config, pipeline, n=120)
    figures = {f.stem for f in (tmp_path / "figures").iterdir()}
    assert ("calibration" in figures) == ("calibration" in m["energy_eV"]) == (head != "mean") == bool(run.about)
    assert ("denoising" in figures) == (task == "both")
    assert m["facts"]["data checksum"] == "abc" and len(ev.read_table(tmp_path / "predictions.csv")) == 120


def test_a_network_that_only_denoises_is_judged_by_the_noise_it_removes(tmp_path):
    run, config, pipeline = small_run(tmp_path, task="denoise")
    m = ev.evaluate(run, config, pipeline)["denoising"]
    noisy, clean, denoised, *_ = ev.denoise_events(pipeline, ev.part_events(config, "test", 256)[0])
    before, after = (np.mean((x - clean) ** 2, dtype=np.float64) for x in (noisy, denoised))
    assert m["removed_dB"]["value"] == pytest.approx(10 * np.log10(before / after), abs=0.01)
    assert (tmp_path / "report.html").exists() and (tmp_path / "figures" / "denoising.png").exists()
    with pytest.raises(DataError, match="clean events"):
        ev.evaluate(run, config, pipeline, simulate_events(8, SMALL, noise="added"))


def test_bands_of_mixtures_are_what_the_temperature_is_fitted_to():
    "A posterior of two narrow modes holds all truths within one standard deviation, and is right."
    rng, n = np.random.default_rng(5), 4000
    truth = np.where(rng.random(n) < 0.5, -10.0, 10.0) + rng.normal(0, 2.0, n)
    quantiles = np.tile(np.quantile(truth, ev.QUANTILES), (n, 1, 1))
    p = ev.Predictions(("energy_eV",), np.zeros((n, 1)), np.full((n, 1), 10.2), {"energy_eV": truth}, {}, quantiles)
    assert abs(ev.fit_temperature(p)[0] - 1) < 0.02 and np.mean(np.abs(truth) < 10.2) < 0.6
    narrow = replace(p, quantiles=quantiles * 0.5)
    fixed = ev.scale_sigma(narrow, ev.fit_temperature(narrow))
    assert ev.band_coverage(fixed)[-1]["coverage"] == pytest.approx(ev.ONE_SIGMA, abs=0.01)
    assert not ev.doubts(ev.figures_of_merit(p, repeats=20)) and ev.doubts(ev.figures_of_merit(narrow, repeats=20))


@pytest.mark.parametrize("use", ["temperature", "isotonic", "none"])
def test_a_run_uses_the_calibration_that_was_asked_for(tmp_path, use):
    run, config, pipeline = small_run(tmp_path, "gaussian")
    ev.evaluate(run, config, pipeline, calibrate="temperature", n=150)
    ev.evaluate(run, config, pipeline, calibrate=use, n=150)
    table = ev.read_calibration(tmp_path)
    assert table["use"] == use and (use == "none") == bool((pipeline.net.sigma_scale == 1).all())
    p = ev.reconstruct(pipeline, ev.part_events(config, "test", 150)[0], "auto", first=1_000_000_000)
    saved = ev.read_table(tmp_path / "predictions.csv")
    assert np.allclose(ev.isotonic_of(table)(p).sigma, saved.sigma, rtol=1e-4)
    assert (use == "isotonic") != np.allclose(p.sigma, saved.sigma, rtol=1e-4)


def test_denoised_signals_come_back_in_volts(tmp_path):
    _, _, pipeline = small_run(tmp_path, "gaussian", "both")
    clean = simulate_events(8, SMALL)
    noisy, back, denoised, rate, _ = ev.denoise_events(pipeline, clean)
    assert np.abs(back).max() == pytest.approx(np.abs(clean.ts).max(), rel=0.3) and 50e6 < rate < 80e6
    inside = rate / 403e6  # of the noise power
    assert noisy.std() == pytest.approx(0.0471 * inside**0.5, rel=0.1) and denoised.shape == back.shape
    assert ev.denoise_events(pipeline, replace(clean, ts=clean.ts + noisy.std() * 5)) is not None
    assert ev.denoise_events(pipeline, simulate_events(8, SMALL, noise="added")) is None


def test_parts_of_a_run_are_those_it_was_not_trained_on(tmp_path):
    _, config, _ = small_run(tmp_path)
    stream = [ev.part_events(config, part, 40)[0].columns["energy_eV"] for part in ("valid", "test")]
    train = next(iter(StreamSource(config.data, torch.device("cpu")).batches("train", ["energy_eV"])))[1]
    assert not set(stream[0]) & set(stream[1]) and not set(stream[1]) & set(train[:, 0].tolist())
    events = simulate_events(300, SMALL, noise="kept")
    write_store(events, tmp_path / "a.h5")
    files = {"source": "files", "files": [str(tmp_path / "a.h5")]}
    _, config, pipeline = small_run(tmp_path, **files)
    parts = config.data.split.split(events)
    for part, rows in zip(("valid", "test"), parts[1:], strict=True):
        got, noise = ev.part_events(config, part)
        assert np.array_equal(got.columns["energy_eV"], events.columns["energy_eV"][rows]) and noise == "auto"
    few = ev.part_events(config, "test", 5)[0]
    assert len(few) == 5
    config = replace(config, data=replace(config.data, noise="gauss"), prep=replace(config.prep, noise="none"))
    got, noise = ev.part_events(config, "test")
    assert noise == "gauss" and np.allclose(got.noise["gauss"], events.noise["gauss"][parts[2]])
    assert len(ev.reconstruct(pipeline, got, noise)) == len(parts[2])


# --- figures and report ---

FIGURES = {"truth", "residuals", "reconstructed", "energy_against", "width_against_count", "all_against_all",
           "frequencies", "power", "length", "calibration", "sigma_against", "efficiency_curve", "distributions",
           "denoising", "history"}


def test_the_report_is_whole(tmp_path):
    p = predicted(400, quantiles=True)
    p.truth["track_length_s"] = np.random.default_rng(0).uniform(1e-5, 6e-5, 400)
    wave = np.random.default_rng(0).normal(size=(3, 2, 128))
    history = [{"epoch": k, "train_loss": 1.0 / (k + 1), "valid_loss": 1.1 / (k + 1)} for k in range(3)]
    m = ev.report(tmp_path / "run", p, lambda e, t, r: torch.ones(len(e)), p, {"mean": ev.mean_baseline(p, p)},
                  ev.fit_calibration(p), (wave, 0.5 * wave, 0.4 * wave, 1e8), history, {"epochs": 3})
    assert {f.stem for f in (tmp_path / "run/figures").iterdir()} == FIGURES
    assert json.loads((tmp_path / "run/metrics.json").read_text())["energy_eV"]["all"] == m["energy_eV"]["all"]
    page = (tmp_path / "run/report.html").read_text()
    assert page.count("<img") == len(FIGURES) and "posterior" in page and "weighted by efficiency" in page
    assert ev.read_metrics(tmp_path / "run")["events"] == 400
    out = io.StringIO()
    ev.print_table(m, Console(file=out, width=140))
    assert "core σ" in out.getvalue() and "times that of the posterior" in out.getvalue()


def test_a_report_of_the_least_that_is_known(tmp_path):
    p = predicted(60)
    p = ev.Predictions(("energy_eV",), p.mean[:, :1], truth={"energy_eV": p.truth["energy_eV"]})
    ev.report(tmp_path, p)
    assert {f.stem for f in (tmp_path / "figures").iterdir()} >= {"truth", "residuals"}
    with pytest.raises(RunError, match="evaluate"):
        ev.read_metrics(tmp_path / "figures")


def test_doubts_are_raised_and_only_then():
    p = predicted(3000)
    baselines = {"mean": ev.figures_of_merit(ev.mean_baseline(p, p), repeats=20)}
    m = ev.figures_of_merit(p, limit=p, repeats=20) | {"baselines": baselines}
    assert ev.doubts(m) == []
    bad = ev.mean_baseline(p, p)
    bad = replace(bad, sigma=bad.sigma / 10)
    said = ev.doubts(ev.figures_of_merit(bad, repeats=20) | {"baselines": m["baselines"]})
    assert any("not below" in s for s in said) and any("too small" in s for s in said)
    better = replace(p, mean=p.mean + 3 * (p.mean - np.stack([p.truth[t] for t in p.targets], 1)))
    assert any("posterior" in s for s in ev.doubts(ev.figures_of_merit(p, limit=better, repeats=20)))


def test_runs_side_by_side():
    one = ev.figures_of_merit(predicted(300), repeats=5)
    m = one | {"baselines": {"mean": one}}
    header, rows = ev.comparison_rows({"a": m, "b": m})
    assert [r[0] for r in rows] == ["a", "b", "mean"] and all(len(r) == len(header) for r in rows)
    with pytest.raises(RunError, match="radius_m"):
        ev.comparison_rows({"a": m}, "radius_m")


def test_cells_show_the_digits_that_the_error_deserves():
    assert ev._cell({"value": 1.23456, "error": 0.012}) == "1.235 ± 0.012"
    assert ev._cell({"value": 123.456, "error": 12.0}) == "123 ± 12" and ev._cell(None) == "-"
    assert ev._cell({"value": 2.0, "error": 0.0}) == "2" and ev._cell({"value": None, "error": None}) == "-"
