"""The searches for electrons: false alarms, what they find, and how they fail."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from deadlayer_cres.core import ConfigError, DataError, NotFittedError
from deadlayer_cres.cres.data import SAMPLING_RATE_HZ, EfficiencyGrid
from deadlayer_cres.cres.detect import (
    BrightestBin,
    ClusterConfig,
    FalseAlarm,
    Lines,
    LineTracks,
    MatchedFilter,
    Spectrogram,
    bank_cells,
    bank_mean,
    bin_false_alarm,
    bin_threshold,
    detected,
    efficiency_map,
    electrons,
    find_clusters,
    fit_false_alarm,
    fit_lines,
    plot_efficiency,
    remove_chirp,
    spectrogram,
    templates,
    wilson,
)
from deadlayer_cres.cres.evaluate import figures_of_merit
from deadlayer_cres.cres.simulate import TEST_SETS, Simulator
from deadlayer_cres.cres.trap import comb

torch.set_num_threads(1)
SIGMA = 0.0471


@pytest.fixture(scope="module")
def simulator():
    return Simulator(TEST_SETS["cca-8k"], device="cpu")


@pytest.fixture(scope="module")
def bank(simulator):
    return MatchedFilter(simulator, 0.85)


@pytest.fixture(scope="module")
def train(simulator):
    return simulator.reseeded("train").events(512, noise="added")


def tone(frequency_Hz, slope=0.0, samples=8192, amplitude=0.012, noise=SIGMA, seed=0, n=1):
    "Chirped tones (n, 2, samples) in noise."
    t = torch.arange(samples, dtype=torch.float64) / SAMPLING_RATE_HZ
    phase = 2 * math.pi * (torch.as_tensor(frequency_Hz, dtype=torch.float64).reshape(-1, 1) * t + slope * t**2 / 2)
    w = amplitude * torch.stack([phase.cos(), phase.sin()], 1).float().expand(n, 2, samples)
    return w + noise * torch.randn(w.shape, generator=torch.Generator().manual_seed(seed))


# --- false alarms ---


@pytest.mark.parametrize("bins", [1, 100, 3845])
@pytest.mark.parametrize("probability", [0.3, 1e-3, 1e-9])
def test_threshold_of_a_bin_is_the_inverse_of_its_probability(bins, probability):
    assert bin_false_alarm(bin_threshold(probability, bins), bins) == pytest.approx(probability, rel=1e-6)


def test_probability_of_bins_is_that_of_the_largest_exponential():
    draws = np.random.default_rng(0).exponential(size=(20_000, 50)).max(1)
    for x in (2.0, 4.0, 7.0):
        p = float(bin_false_alarm(x, 50))
        assert (draws > x).mean() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 20_000))


def test_gumbel_law_is_found_with_its_errors():
    pulls = []
    for seed in range(40):
        x = np.random.default_rng(seed).gumbel(7.0, 3.0, 400)
        x[x < 6.0] = 0.0  # what lies below the median must not matter
        law = fit_false_alarm(x)
        error, (value, of_value) = np.sqrt(np.diag(law.covariance)), law.threshold(1e-3)
        pulls.append([(law.location - 7.0) / error[0], (law.scale - 3.0) / error[1],
                      (value - 7 + 3.0 * math.log(-math.log1p(-1e-3))) / of_value])
    assert np.abs(np.mean(pulls, 0)).max() < 0.5 and np.all(np.abs(np.std(pulls, 0) - 1) < 0.35)


def test_scores_that_jump_from_zero_keep_their_tail():
    "As those of clusters do: nothing, or more than a few times the threshold."
    x = np.random.default_rng(1).gumbel(7.0, 1.5, 8000)
    x[x < 10.0] = 0.0
    value, error = fit_false_alarm(x).threshold(1e-3)
    assert abs(value - (7 - 1.5 * math.log(-math.log1p(-1e-3)))) < 4 * error and error < 0.5


def test_threshold_and_probability_of_a_law_are_inverse():
    law = FalseAlarm(5.0, 2.0, np.eye(2), 100)
    for p in (0.5, 1e-2, 1e-6):
        assert law.probability(law.threshold(p)[0]) == pytest.approx(p, rel=1e-9)


@pytest.mark.parametrize("scores", [[], np.zeros(100), np.append(np.arange(99.0), np.nan), np.arange(10.0)])
def test_scores_without_a_tail_are_refused(scores):
    with pytest.raises(DataError, match="tail"):
        fit_false_alarm(scores)


def test_brightest_bin_keeps_its_closed_form_on_noise(simulator):
    d = BrightestBin().listen(simulator, 600)
    exact = bin_threshold(1e-2, 569)
    value, error = d.false_alarm.threshold(1e-2)
    assert abs(value - exact) < 4 * error and error < 0.3


# --- what all searches share ---


def test_a_search_that_does_not_know_its_false_alarms_says_so(train):
    with pytest.raises(NotFittedError, match="listen"):
        BrightestBin().learn(train)(train)


@pytest.mark.parametrize("make", [BrightestBin, LineTracks])
def test_a_search_without_calibration_says_so(make, train, simulator):
    with pytest.raises(NotFittedError, match="learn"):
        make().listen(simulator, 1200)(train[:4])


@pytest.mark.parametrize("change", [{"sampling_rate_Hz": 200e6}, {"lo_frequency_Hz": 20.65e9}, {"ts": None}])
def test_events_of_another_receiver_are_refused(change, train):
    with pytest.raises(DataError):
        BrightestBin().found(replace(train[:4], **change))


def test_detected_is_the_threshold(train, simulator):
    d = BrightestBin().learn(train).listen(simulator, 400)
    p = d(train[:128])
    for q in (1e-1, 1e-3):
        assert (detected(p, q) == (p.observables["score"] >= d.false_alarm.threshold(q)[0])).all()
    assert 0.8 < detected(p, 1e-2).mean() < 1
    assert figures_of_merit(p, repeats=2)["energy_eV"]["all"]["rms"]["value"] < 57  # of a flat range of 200 eV


# --- brightest bin ---


def test_chirp_is_removed():
    flat = remove_chirp(tone([-6e7], slope=3e10, noise=0.0), 3e10)
    assert torch.allclose(flat, tone([-6e7], noise=0.0), atol=2e-4)


def test_chirp_costs_what_fresnel_says():
    "A tone in the middle of a bin that drifts over 1.2 bins."
    samples, slope = 24_576, 3.3e8
    ts = tone([-3660 * SAMPLING_RATE_HZ / samples], slope, samples, noise=0.02, n=16)  # skirts below the noise
    with_, without = (BrightestBin(slope_Hz_per_s=s).search(ts)["score"].mean() for s in (slope, 0.0))
    u, bins = (np.arange(20_000) + 0.5) / 20_000, slope * (samples / SAMPLING_RATE_HZ) ** 2
    left = [abs(np.exp(1j * np.pi * (bins * u**2 - 2 * b * u)).mean()) ** 2 for b in range(3)]
    assert float(without / with_) == pytest.approx(max(left), rel=0.01) and max(left) < 0.9


# --- clusters and lines ---


def grid(power, step=1e-5, width=1e5):
    power = torch.as_tensor(power, dtype=torch.float32)
    t = (torch.arange(power.shape[1]) + 0.5).double() * step
    return Spectrogram(power, t, torch.arange(power.shape[2]).double() * width)


def test_noise_of_a_spectrogram_is_exponential():
    s = spectrogram(tone([-6e7], amplitude=0.0, n=8), 1024)
    power = s.power.flatten().numpy()
    assert power.mean() == pytest.approx(1, abs=0.03)
    assert (power > 3).mean() == pytest.approx(math.exp(-3), abs=0.006)


def test_spectrogram_puts_a_tone_where_it_is():
    s = spectrogram(tone([-150 * SAMPLING_RATE_HZ / 1024], noise=1e-3), 1024)
    assert s.power.shape[:2] == (1, 8)
    assert s.frequency_Hz[s.power[0].argmax(1)].numpy() == pytest.approx(-150 * SAMPLING_RATE_HZ / 1024)


def test_records_shorter_than_a_slice_are_refused():
    with pytest.raises(DataError, match="slice_samples"):
        spectrogram(tone([0.0], samples=512), 1024)


def test_clusters_of_different_records_stay_apart():
    power = np.zeros((5, 4, 30))
    power[:, :, 7] = 10.0
    power[2, :, 20] = 10.0
    p = find_clusters(grid(power), ClusterConfig(min_points=3))
    assert len(set(p.cluster)) == 6 and (p.cluster >= 0).all()
    for label in set(p.cluster):
        assert len(set(p.event[p.cluster == label])) == 1


def test_lone_points_are_no_cluster():
    power = np.zeros((1, 4, 30))
    power[0, [0, 1, 3], [3, 15, 27]] = 10.0
    p = find_clusters(grid(power))
    assert (p.cluster == -1).all() and len(p.cluster) == 3
    assert len(fit_lines(grid(power), p).event) == 0
    assert not len(find_clusters(grid(np.zeros((1, 4, 30)))).event)


def test_a_line_is_the_weighted_least_squares_line():
    rng = np.random.default_rng(2)
    power = np.zeros((1, 12, 60))
    for k in range(12):
        power[0, k, 20 + k] = 5 + 10 * rng.random()
        power[0, k, 21 + k] = 5 + 3 * rng.random()
    s = grid(power)
    p = find_clusters(s)
    lines = fit_lines(s, p, (0.0, 1e15))
    t, f = s.time_s.numpy()[p.slice], s.frequency_Hz.numpy()[p.bin]
    slope, at0 = np.polyfit(t, f, 1, w=np.sqrt(p.power))
    assert lines.slope_Hz_per_s == pytest.approx([slope]) and lines.start_frequency_Hz == pytest.approx([at0])
    assert lines.points == [24] and lines.power == pytest.approx([power.sum()])
    assert lines.start_time_s == pytest.approx([0.0], abs=1e-12) and lines.length_s == pytest.approx([12e-5])
    A = np.stack([np.ones_like(t), t], 1)
    H = np.linalg.solve(A.T @ (A * p.power[:, None]), A.T * p.power)
    assert lines.slope_sigma_Hz_per_s == pytest.approx(1e5 / math.sqrt(12) * np.sqrt((H**2).sum(1))[1:], rel=1e-6)


def test_known_slopes_decide_in_short_tracks_only():
    power = np.zeros((1, 12, 60))
    power[0, np.arange(12), 20 + np.arange(12)] = 10.0
    s = grid(power)
    p = find_clusters(s)
    free, tied = (fit_lines(s, p, (0.0, sd)).slope_Hz_per_s[0] for sd in (1e15, 1.0))
    assert free == pytest.approx(1e10, rel=0.01) and abs(tied) < 1e3


def test_errors_of_chirped_tracks_are_honest():
    slope, f = 3.3e8, -60e6 + np.arange(40) * 3.7e3
    ts = tone(f, slope=slope, samples=163_840, noise=0.03, n=40)
    s = spectrogram(ts, 4096)
    lines = fit_lines(s, find_clusters(s, ClusterConfig(4096, 6.0)), (0.0, 1e12))
    found = electrons(lines, 40, SAMPLING_RATE_HZ / 4096)
    pull = (found["start_frequency_Hz"] - f) / found["start_frequency_sigma_Hz"]
    assert np.isfinite(pull).all() and 0.3 < np.sqrt((pull**2).mean()) < 2
    assert np.abs(found["slope_Hz_per_s"].mean() / slope - 1) < 0.05


def lines_of(rows):
    "Lines from rows (event, power, start time, length, frequency, slope), with small errors."
    e, power, start, length, f, slope = np.array(rows, float).T
    small = np.full(len(e), 1.0)
    return Lines(e.astype(int), 5 * small, power, start, length, f, 1e4 * small, slope, 1e6 * small)


def test_lines_of_one_electron_are_recognised():
    found = electrons(lines_of([
        (0, 50, 0, 1e-3, 1e6, 3e8), (0, 20, 0, 1e-3, -14e6, 3e8), (0, 10, 0, 1e-3, 16e6, 3e8),  # evenly spaced
        (0, 9, 0, 1e-3, 9e6, 3e8),  # at no multiple of it
        (2, 50, 0, 1e-3, 1e6, 3e8), (2, 40, 0, 1e-3, 7e6, 9e8),  # another slope
        (3, 50, 0, 1e-3, 1e6, 3e8), (3, 40, 8e-4, 1e-3, 7e6, 3e8),  # later
        (4, 50, 0, 1e-3, 1e6, 3e8), (4, 40, 0, 1e-3, 30e6, 3e8)]), 5, 1e5)  # too far away
    assert found["lines"].tolist() == [3, 0, 1, 1, 1]
    assert found["score"].tolist() == [50, 0, 50, 50, 50]
    assert found["spacing_Hz"][0] == pytest.approx(15e6) and np.isnan(found["spacing_Hz"][1:]).all()
    assert np.isnan(found["start_frequency_Hz"][1]) and found["start_frequency_Hz"][0] == 1e6


def test_no_lines_at_all():
    empty = Lines(*(np.zeros(0, int if k == 0 else float) for k in range(9)))
    found = electrons(empty, 3, 1e5)
    assert found["score"].tolist() == [0, 0, 0] and np.isnan(found["start_frequency_Hz"]).all()


def test_spacing_of_sidebands_sharpens_the_energy(train):
    d = LineTracks().learn(train)
    found = d.found(train)
    mean, sigma = d.estimate(found)
    r = mean[:, 0] - train.columns["energy_eV"]
    paired, seen = np.isfinite(found["spacing_Hz"]), np.isfinite(found["start_frequency_Hz"])
    assert np.sqrt((r[paired] ** 2).mean()) < 0.9 * np.sqrt((r[seen & ~paired] ** 2).mean())
    assert (mean[~seen] == mean[~seen][0]).all() and np.isfinite(mean).all() and (sigma > 0).all()


def test_too_few_labelled_events_are_refused(train):
    with pytest.raises(DataError, match="with a sideband"):
        LineTracks().learn(train[:32])


@pytest.mark.parametrize("setting", [{"slice_samples": 0}, {"threshold": -1.0}, {"min_points": 0},
                                     {"slope_Hz_per_s": (0.0, 0.0)}])
def test_senseless_settings_of_clusters_are_refused(setting):
    with pytest.raises(ConfigError):
        ClusterConfig(**setting)


# --- matched filter ---


def test_matched_filter_is_the_likelihood_ratio_of_the_trap(bank, simulator):
    "ln(Lambda) at a template against the comb of the trap, multiplied sample by sample, phases maximised over."
    ts = simulator.events(4, noise="added").ts
    A = bank.amplitudes(torch.from_numpy(ts))
    k = torch.arange(100, len(bank.first), 1500)
    x = bank.first[k, None] + 200
    side, a, b, less, energy = bank.place(bank.bank, k, x)
    value = A[:, x[:, 0]] * a[:, 0] + A[:, side[:, 0]] * b[:, 0] - less[:, 0]
    pitch, radius = bank.bank.pitch_angle_deg[k], bank.bank.radius_m[k]
    made = comb(simulator.trap, simulator.config.cavity, energy[:, 0], pitch, radius, orders=(-2, 0))
    t = torch.arange(8192, dtype=torch.float64) / SAMPLING_RATE_HZ
    lo, slope = simulator.config.receiver.lo_frequency_Hz, 3.295e8
    h = 0.012 * made.amplitude[..., None] * torch.exp(
        2j * math.pi * ((made.frequency_Hz - lo)[..., None] * t + slope * t**2 / 2))
    z = torch.complex(*torch.from_numpy(ts).double().unbind(1))
    overlap = torch.einsum("kls,ns->nkl", h.conj(), z).abs().sum(2) / SIGMA**2
    direct = overlap - (h.abs() ** 2).sum((1, 2)) / (2 * SIGMA**2)
    assert (value - direct).abs().max() < 0.25 + 0.03 * direct.abs().max()  # points are an eighth of a bin apart


def test_bank_recovers_its_minimal_match(bank, simulator):
    clean = simulator.reseeded("match").events(48, noise="none")
    part = bank.score(torch.from_numpy(clean.ts)).numpy() / clean.columns["snr"] ** 2
    loud = clean.columns["snr"] > 3
    assert part[loud].min() > 0.85 * 0.98 and part[loud].mean() > 0.95 and part.max() < 1.001


def test_a_higher_match_needs_more_templates(bank):
    many, few = (len(bank_cells(bank.ridge, m)) for m in (0.93, 0.7))
    assert many > len(bank.first) > few
    for bad in (0.0, 0.97, 1.0):
        with pytest.raises(ConfigError, match="minimal_match"):
            bank_cells(bank.ridge, bad)


def test_parts_of_cells_share_their_prior(bank):
    cells = bank_cells(bank.ridge, 0.7)
    whole, parts = (templates(bank.ridge, cells, k).log_prior.exp() for k in (1, 8))
    assert float(parts.sum()) == pytest.approx(1, abs=0.12)  # the rest is within the axis, where there is no signal
    assert float(whole.sum()) == pytest.approx(float(parts.sum()), rel=0.1)


def test_clear_events_are_measured(bank, simulator):
    "Loud events away from the fold: pitch angle and energy within the reported errors, far better than the prior."
    table = {"energy_eV": [18_560.0, 18_610.0, 18_655.0], "pitch_angle_deg": [88.45, 88.5, 88.6]}
    e = Simulator(TEST_SETS["cca-8k"], table=table | {"radius_m": [3.2e-3] * 3}, device="cpu").events(3, noise="added")
    bank.false_alarm = FalseAlarm(14.0, 1.0, np.eye(2), 100)
    p = bank(e)
    assert p.targets == ("energy_eV", "pitch_angle_deg") and detected(p, 1e-6).all()
    for q in (p, bank_mean(p)):
        off = q.mean - np.stack([e.columns[k] for k in q.targets], 1)
        assert (np.abs(off) < 5 * q.sigma + [2.0, 0.01]).all(), off
    m = bank_mean(p)
    assert p.sigma**2 == pytest.approx(m.sigma**2 + (p.mean - m.mean) ** 2, rel=1e-6, abs=1e-8)  # about another centre
    assert "energy_eV" not in p.observables and {"radius_m", "score"} <= set(p.observables)


def test_score_does_not_depend_on_the_batch(bank, simulator):
    ts = torch.from_numpy(simulator.events(6, noise="added").ts)
    whole, parts = bank.search(ts), [bank.search(t) for t in ts.split(2)]
    for k, v in whole.items():
        assert torch.allclose(v, torch.cat([p[k] for p in parts]), rtol=1e-6), k
    assert torch.equal(whole["score"], bank.score(ts))


def test_matched_filter_is_the_most_efficient(bank, simulator, train):
    "At equal false-alarm probability."
    d = [BrightestBin(), LineTracks(), bank]
    events = train[:128]
    found = []
    for each in d:
        law = each.listen(simulator, 256 if each is bank else 1200).false_alarm
        found.append((law.probability(each.score(torch.from_numpy(events.ts)).numpy()) <= 1e-2).mean())
    assert found[2] >= found[0] - 0.02 > found[1] - 0.02, found


# --- efficiency ---


def test_wilson_interval_solves_its_equation():
    k, n, z = np.array([0, 3, 10]), np.array([10, 10, 10]), 1.7
    for end in wilson(k, n, z):
        assert np.abs((k / n - end) ** 2 - z**2 * end * (1 - end) / n) == pytest.approx(0, abs=1e-12)
    low, high = wilson([0], [0])
    assert low[0] == 0 and high[0] == 1


def test_efficiency_map_counts():
    pitch, radius = np.array([88.1, 88.1, 88.6, 95.0]), np.array([1e-3, 1e-3, 1e-3, 1e-3])
    m = efficiency_map(np.array([True, False, True, True]), pitch, radius, (88.0, 88.5, 89.0), (0, 2e-3, 4e-3))
    assert m.events.tolist() == [[2, 0], [1, 0]]
    assert m.efficiency[0, 0] == 0.5 and m.efficiency[1, 0] == 1 and np.isnan(m.efficiency[:, 1]).all()
    assert (m.low[:, 0] < m.efficiency[:, 0]).all() and m.high[1, 0] == 1


def test_efficiency_map_takes_probabilities_and_draws():
    e = EfficiencyGrid([18500, 18700], [88, 90], [0, 6.5e-3], np.full((2, 2, 2), 0.25))
    rng = np.random.default_rng(0)
    pitch, radius = rng.uniform(88, 90, 500), rng.uniform(0, 6.5e-3, 500)
    m = efficiency_map(e(np.full(500, 18600.0), pitch, radius), pitch, radius)
    assert np.nanmin(m.efficiency) == pytest.approx(0.25) == np.nanmax(m.efficiency)
    assert len(plot_efficiency({"one": m, "other": m, "third": m}).axes) == 6


@pytest.mark.parametrize("change", [{"radius_m": np.zeros(3)}, {"pitch_edges_deg": (89.0, 88.0)},
                                    {"radius_edges_m": (0.0,)}])
def test_efficiency_map_refuses_what_does_not_fit(change):
    given = {"found": np.ones(4, bool), "pitch_angle_deg": np.full(4, 89.0), "radius_m": np.full(4, 1e-3)} | change
    with pytest.raises((DataError, ConfigError)):
        efficiency_map(**given)
