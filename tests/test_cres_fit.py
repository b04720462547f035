"""The exact posterior of an event, and the Fisher information."""
import copy
import math

import numpy as np
import pytest
import torch

from deadlayer_cres.core import ConfigError, DataError
from deadlayer_cres.cres.fit import (
    APPARATUS,
    PARAMETERS,
    Fisher,
    Posterior,
    Ridge,
    RidgeConfig,
    _between,
    _log_i0,
    detection_threshold,
    fisher,
    line_information,
    modes,
    noise_evidence,
    noise_level,
    single_mode,
    summaries,
    trap_table,
    unknown_start,
)
from deadlayer_cres.cres.refine import comb_table, lines
from deadlayer_cres.cres.simulate import TEST_SETS, ReceiverConfig, SimulateConfig, Simulator, TrackConfig, test_set
from deadlayer_cres.cres.trap import comb, cyclotron_frequency

torch.set_num_threads(1)
CLEAR, AMBIGUOUS, FOLD = 53, 31, 11  # events of cca-8k


@pytest.fixture(scope="module")
def simulator():
    return Simulator(TEST_SETS["cca-8k"], device="cpu")


@pytest.fixture(scope="module")
def ridge(simulator):
    return Ridge(simulator)


@pytest.fixture(scope="module")
def exact(simulator, ridge):
    return Ridge(simulator, RidgeConfig.exact(), ridge.table)


@pytest.fixture(scope="module")
def events():
    return test_set("cca-8k", 64, device="cpu")


def direct(simulator, z, energy, pitch, radius, orders=tuple(range(-8, 9, 2)), points=256):
    "Log likelihood ratios of a record with no short cuts: trap calculated, each sample, Gram matrix."
    r, sigma = simulator.config.receiver, simulator.noise.sigma_V
    made = comb(simulator.trap, simulator.config.cavity, energy, pitch, radius, orders=orders)
    t = torch.arange(r.samples, dtype=torch.float64) / r.sampling_rate_Hz
    psi = torch.arange(points, dtype=torch.float64)[:, None] * 2 * math.pi / points
    turn = torch.exp(1j * psi * torch.tensor(orders) / 2)
    out = []
    for f, a, slope in zip(made.frequency_Hz - r.lo_frequency_Hz, made.amplitude, made.slope_Hz_per_s, strict=True):
        s = r.amplitude_V / sigma * a[:, None] * torch.exp(2j * math.pi * (f[:, None] * t + slope * t**2 / 2))
        overlap = (turn.conj() @ (s.conj() @ z / sigma)).abs()
        power = ((turn.conj() @ (s.conj() @ s.T)) * turn).sum(1).real / 2
        out.append(torch.logsumexp(overlap + torch.special.i0e(overlap).log() - power, 0) - math.log(points))
    return torch.stack(out)


def record(events, row):
    return torch.from_numpy(events.ts[row:row + 1])


# --- the table ---


def test_table_is_the_trap(simulator, ridge):
    t, g, n = ridge.table, torch.Generator().manual_seed(0), 200
    row = torch.randint(1, len(t.low_Hz), (n,), generator=g)
    share, u = torch.rand(2, n, generator=g, dtype=torch.float64)
    v, energy = t.at(row, torch.lerp(t.low_Hz[row], t.high_Hz[row], share)), 18_500 + 200 * u
    made = comb(simulator.trap, simulator.config.cavity, energy, v[:, 2], row * t.radius_step_m, orders=(-4, -2, 0, 2))
    lines = (made.amplitude / simulator.config.cavity.response(made.frequency_Hz)).real
    assert (cyclotron_frequency(energy, v[:, 1]) - made.motion.carrier_frequency_Hz).abs().max() < 250
    assert (v[:, 4:] - lines).abs().max() < 1e-3
    axial = v[:, 0] * made.motion.axial_frequency_Hz.new_tensor(1.0)
    beta = (1 - (1 + energy / 510_998.95) ** -2).sqrt() / math.sqrt(1 - (1 + 18_600 / 510_998.95) ** -2)
    assert (axial * beta - made.motion.axial_frequency_Hz).abs().max() < 250


def test_prior_of_the_table_is_that_of_the_simulation(simulator, ridge):
    t = ridge.table
    w = t.start_Hz + t.step_Hz * torch.arange(t.values.shape[1])
    inside = (w >= t.low_Hz[:, None]) & (w <= t.high_Hz[:, None])
    density = torch.where(inside, t.values[..., 3], 0)
    mass = (density.sum(1) * t.step_Hz)[1:]  # per m of radius
    radius = torch.arange(1, len(t.low_Hz)) * t.radius_step_m
    assert (mass * 6.5e-3**2 / (2 * radius) - 1).abs().max() < 3e-3
    drawn = simulator.draw(20_000)
    radii = t.radius_step_m * torch.arange(len(t.low_Hz), dtype=torch.float64)[:, None]
    for name, value in (("pitch_angle_deg", t.values[..., 2]), ("radius_m", radii)):
        mean, x = (density * value).sum() / density.sum(), drawn[name]
        assert abs(mean - x.mean()) < 4 * x.std() / math.sqrt(len(x))


# --- the posterior ---


@pytest.mark.parametrize("row", [CLEAR, AMBIGUOUS, FOLD])
def test_likelihood_of_cells_is_that_of_the_samples(simulator, exact, events, row):
    D = exact.spectrum(record(events, row))
    cells, _ = exact.cells(D)
    value, *where = exact.log_posterior(D, cells)
    place = exact.places(cells)
    i = value.argsort(descending=True)[:100:12]
    likelihood = (value - place.log_prior - place.log_volume)[i]
    difference = likelihood - direct(simulator, torch.complex(*record(events, row)[0].double()), *(v[i] for v in where))
    assert difference.std() < 0.3 and abs(difference.mean()) < 1


def test_coverage_and_scores(ridge, events):
    s = summaries(ridge, events.ts, events.columns)
    for name in ("energy_eV", "pitch_angle_deg"):
        below, n = s[f"{name}_below"], len(events)
        for q in (0.5, 0.68, 0.9):
            assert abs(np.mean(np.abs(below - 0.5) < q / 2) - q) < 3.5 * math.sqrt(q * (1 - q) / n)
        z = (s[f"{name}_mean"] - events.columns[name]) / s[f"{name}_sigma"]
        assert 0.7 < np.sqrt(np.mean(z**2)) < 1.4
        assert (np.diff(s[f"{name}_quantiles"], axis=1) >= 0).all()
    sure = s["single_mode"]
    assert 3 <= sure.sum() <= 20 and (s["main_mode_weight"][sure] >= 0.95).all()
    assert np.abs(s["energy_eV_mean"] - events.columns["energy_eV"])[sure].max() < 2
    assert (s["main_mode_sigma_eV"][sure] <= 0.5).all() and (s["modes"] >= 1).all()


def test_clear_event_is_known_to_a_tenth_of_an_eV(ridge, events):
    p = ridge(record(events, CLEAR))
    assert 0.05 < float(p.sigma()) < 0.1 and bool(single_mode(p))
    assert abs(float(p.mean()) - events.columns["energy_eV"][CLEAR]) < 0.4
    assert abs(float(p.quantiles([0.5])) - float(p.mean())) < 0.1
    assert abs(float(p.mode()) - float(p.mean())) < 0.3
    assert float(ridge(record(events, AMBIGUOUS)).sigma()) > 5


def test_both_branches_beyond_the_fold_are_found():
    events = test_set("cca-24k", 9, device="cpu")  # event 8: 88.068 degrees, whose twin is at 88.17
    p = Ridge(Simulator(TEST_SETS["cca-24k"], device="cpu"))(record(events, 8))
    assert 0.01 < float(p.below(torch.tensor(events.columns["pitch_angle_deg"][8:9]), "pitch_angle_deg")) < 0.99


def test_radius_is_fine_near_the_fold():
    "There the side line moves with the radius; with coarser cells the true energy was 87 standard deviations away."
    s = Simulator(TEST_SETS["cca-24k"], device="cpu")
    event = s.events(1, first=1394)  # 88.011 degrees
    p = Ridge(s)(torch.from_numpy(event.ts))
    assert abs(float(p.mean()) - event.columns["energy_eV"][0]) < 3 * float(p.sigma())
    assert len(p.radius_m.unique()) > 8


def test_finer_cells_change_little(simulator, ridge, exact, events):
    rows = torch.from_numpy(events.ts[[CLEAR, FOLD, 38]])
    fine = Ridge(simulator, RidgeConfig.exact(step=0.8, fade=0.8, cut=15.0, tail=1e-4, weak=0.0, budget=2**20),
                 ridge.table)(rows)
    usual = exact(rows)
    assert ((usual.mean() - fine.mean()).abs() / fine.sigma() < 0.08).all()
    assert ((usual.sigma() / fine.sigma() - 1).abs() < 0.08).all()
    assert (usual.log_evidence - fine.log_evidence).abs().max() < 0.3


def test_events_without_a_signal_are_those_of_the_prior_weighed_by_the_likelihood(simulator, exact):
    "Brute force: electrons drawn from the prior, phases independent; of events that go beyond the budget of cells."
    ts, names = torch.from_numpy(test_set("cca-8k", 139, device="cpu").ts[[15, 138]]), ("energy_eV", "radius_m")
    p, w = exact(ts), exact.windows(exact.spectrum(ts))
    assert p.converged.all() and (p.log_evidence < 0).all()
    table, value, energy = comb_table(simulator, angles=129, radii=12), [], []
    for first in range(0, 2**18, 2**15):
        d = simulator.draw(2**15, 10**7 + first)
        c = lines(table, simulator.config.cavity, *(d[k] for k in (names[0], "pitch_angle_deg", names[1])))
        f, a = c.frequency_Hz[:, 1:5], c.amplitude[:, 1:5].abs()  # orders -4 to 2
        place = ((f - exact.start_Hz) / exact.step_Hz).flatten()
        g = (a * exact.snr) ** 2
        value.append(torch.stack([(_log_i0(2 * g.sqrt() * _between(
            w.spectrum, torch.full_like(place, k).long(), place).abs().view(g.shape)) - g).sum(1) for k in (0, 1)]))
        energy.append(d["energy_eV"])
    weight, energy = torch.cat(value, 1).exp(), torch.cat(energy)
    mean = (weight * energy).sum(1) / weight.sum(1)
    away = energy - mean[:, None]
    error = (weight * away).square().sum(1).sqrt() / weight.sum(1)
    assert error.max() < 6 and ((p.mean() - mean).abs() < 3 * error + 2).all()
    assert (p.sigma() / ((weight * away**2).sum(1) / weight.sum(1)).sqrt() - 1).abs().max() < 0.1
    assert (p.log_evidence - weight.mean(1).log()).abs().max() < 0.3


def test_the_budget_of_cells_hardly_matters_and_its_end_is_told(simulator, ridge, exact, events):
    ts = torch.from_numpy(test_set("cca-8k", 139, device="cpu").ts[[15, 31, 138]])
    less = Ridge(simulator, RidgeConfig.exact(budget=2**13), ridge.table)(ts)
    usual = exact(ts)
    assert less.converged.all() and ((less.mean() - usual.mean()).abs() < 0.1 * usual.sigma()).all()
    assert (less.sigma() / usual.sigma() - 1).abs().max() < 0.05
    tiny = summaries(Ridge(simulator, RidgeConfig.exact(budget=16), ridge.table), ts[1:2])
    assert not tiny["converged"].any() and summaries(ridge, ts[1:2])["converged"].all()


def test_wide_cells_have_the_moments_of_narrow_ones(ridge, exact, events):
    fast, slow = (r(torch.from_numpy(events.ts[:32])) for r in (ridge, exact))
    for name in ("energy_eV", "pitch_angle_deg"):
        shift = (fast.mean(name) - slow.mean(name)) / slow.sigma(name)
        assert float((shift**2).mean().sqrt()) < 0.15 and float(shift.abs().max()) < 0.8
        assert abs(float((fast.sigma(name) / slow.sigma(name)).log().median())) < 0.03
    assert float((fast.log_evidence - slow.log_evidence).abs().quantile(0.9)) < 1
    assert 5 * len(fast.weight) < len(slow.weight)


def test_an_event_does_not_depend_on_its_batch(ridge, events):
    alone, together = ridge(record(events, CLEAR)), ridge(torch.from_numpy(events.ts[CLEAR - 1:CLEAR + 2]))
    assert torch.allclose(alone.mean(), together.mean()[1:2], atol=1e-4)
    assert torch.allclose(alone.log_evidence, together.log_evidence[1:2], atol=1e-3)
    assert torch.allclose(together.select(1).mean(), alone.mean(), atol=1e-4)


def test_noise_alone_has_no_evidence(simulator, ridge):
    noise = simulator.noise.counted(2, 8192, seed=5, first=10**6)
    assert (ridge(noise).log_evidence < 4).all()


def test_electrons_at_the_edge_of_the_energy_range_are_found():
    s = Simulator(TEST_SETS["cca-24k"], device="cpu")
    rows = [79, 589, 765]  # 18,550.0 to 18,552.1 eV, of a range from 18,550 eV on
    parts = [s.events(1, first=k) for k in rows]
    energy = np.concatenate([p.columns["energy_eV"] for p in parts])
    p = Ridge(s)(torch.from_numpy(np.concatenate([p.ts for p in parts])))
    assert (np.abs(p.mean().numpy() - energy) < 4 * p.sigma().numpy()).all()


def test_wide_cells_do_not_split_a_mode(ridge, events):
    p = ridge(record(events, AMBIGUOUS))
    assert float(p.width_eV.max()) > 1 and len(modes(p).event) <= 2


def test_known_start_and_end():
    T = 8192 / 403e6
    config = SimulateConfig(seed=3, noise="added", tracks=TrackConfig(start_low_s=0.0, start_high_s=0.5 * T))
    s = Simulator(config, device="cpu")
    drawn = s.events(48)
    start = drawn.columns["start_time_s"]
    p = summaries(Ridge(s), drawn.ts, drawn.columns, start, start + drawn.columns["track_length_s"])
    z = (p["energy_eV_mean"] - drawn.columns["energy_eV"]) / p["energy_eV_sigma"]
    assert 0.7 < np.sqrt(np.mean(z**2)) < 1.4
    assert abs(np.mean(np.abs(p["energy_eV_below"] - 0.5) < 0.34) - 0.68) < 3.5 * math.sqrt(0.68 * 0.32 / 48)


def test_a_known_track_is_a_shorter_record(simulator, ridge):
    "The first half of a record: as a record of half the length, and as a track that ends there."
    like = {k: np.array([v]) for k, v in {"energy_eV": 18_610.0, "pitch_angle_deg": 88.8, "radius_m": 3e-3}.items()}
    ts = torch.from_numpy(Simulator(TEST_SETS["cca-8k"], table=like, device="cpu").events(1).ts)
    half = Ridge(SimulateConfig(receiver=ReceiverConfig(samples=4096)))
    ended, cut = ridge(ts, 0.0, 4096 / 403e6), half(ts[..., :4096].contiguous())
    assert abs(float(ended.mean() - cut.mean())) < 0.2 * float(cut.sigma())
    assert float(ended.sigma() / cut.sigma()) == pytest.approx(1, abs=0.15)
    assert float(ended.log_evidence - cut.log_evidence) == pytest.approx(0, abs=0.7)
    with pytest.raises(DataError, match="an eighth"):
        ridge(ts, 2e-5, 2.03e-5)
    with pytest.raises(DataError, match="8192"):
        ridge(ts[..., :4096], 0.0, 1e-5)


def test_unknown_start():
    T = 8192 / 403e6
    s = Simulator(SimulateConfig(seed=3, noise="added", tracks=TrackConfig(start_low_s=0.0, start_high_s=0.5 * T)),
                  device="cpu")
    drawn, ridge, grid = s.events(14), Ridge(s), np.linspace(0, 0.5 * T, 13)
    ts, start = torch.from_numpy(drawn.ts), drawn.columns["start_time_s"]
    mixed, probable = unknown_start(ridge, ts, grid, T)
    assert torch.allclose(probable.sum(1), torch.ones(14, dtype=torch.float64))
    assert torch.allclose(_sum(mixed.weight, mixed.event), torch.ones(14, dtype=torch.float64))
    assert (mixed.event.diff() >= 0).all() and mixed.width_eV.shape == mixed.weight.shape
    known = ridge(ts, start, T)
    seen = (known.log_evidence > 30).numpy()
    away = np.abs((probable @ torch.from_numpy(grid)).numpy() - start)
    assert seen.sum() >= 4 and np.median(away[seen]) < 1.5 * grid[1]
    assert ((mixed.mean() - known.mean()).abs() / known.sigma())[seen].median() < 0.3
    k, two = int(seen.argmax()), start[int(seen.argmax())] + np.array([-0.1, 0.1]) * 1e-6  # by their evidence
    parts = [ridge(ts[k:k + 1], t, T) for t in two]
    mixed, probable = unknown_start(ridge, ts[k:k + 1], two, T)
    odds = (parts[0].log_evidence - parts[1].log_evidence).exp()
    assert torch.allclose(probable[:, 0] / probable[:, 1], odds) and abs(float(odds.log())) > 0.02
    assert torch.allclose(mixed.mean(), (probable * torch.stack([p.mean() for p in parts], 1)).sum(1))
    assert torch.allclose(mixed.log_evidence, torch.stack([p.log_evidence for p in parts]).exp().mean(0).log())


def _sum(weight, event):
    return torch.zeros(int(event.max()) + 1, dtype=weight.dtype).index_add_(0, event, weight)


def test_threshold_of_false_alarms(ridge):
    g = torch.Generator().manual_seed(0)
    x = -torch.rand(4000, generator=g, dtype=torch.float64).log() * 2 - 3  # exponential
    for p in (0.1, 1e-2, 1e-4):  # the last one beyond the sample
        t = detection_threshold(p, x)
        assert abs(t.log_evidence - (-2 * math.log(p) - 3)) < 4 * t.error and t.error < 1.5
    with pytest.raises(ConfigError, match="false alarm"):
        detection_threshold(0.0, x)
    with pytest.raises(ConfigError, match="more noise"):
        detection_threshold(0.1, x[:50])
    noise = noise_evidence(ridge, 32)
    assert (noise.diff() >= 0).all() and float(noise.exp().mean()) < 20


def test_modes_and_quantiles_of_a_known_posterior():
    t = lambda *v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    p = Posterior(torch.tensor([0, 0, 0, 1, 1]), t(0.2, 0.2, 0.6, 0.5, 0.5), t(1.0, 1.4, 30.0, 5.0, 5.2),
                  t(89, 89, 88, 89, 89), t(1, 1, 2, 1, 1) * 1e-3, t(10, 20))
    m = modes(p)
    assert m.event.tolist() == [0, 0, 1] and torch.allclose(m.weight, t(0.6, 0.4, 1.0))
    assert torch.allclose(m.energy_eV, t(30, 1.2, 5.1)) and torch.allclose(m.pitch_angle_deg, t(88, 89, 89))
    assert single_mode(p).tolist() == [False, True]
    assert torch.allclose(p.mean(), t(18.48, 5.1)) and torch.allclose(p.below(t(2.0, 5.1)), t(0.4, 0.5))
    q = p.quantiles((0.0, 0.1, 0.7, 1.0))
    assert torch.allclose(q[0], t(1.0, 1.0, 30.0, 30.0)) and torch.allclose(q[1], t(5, 5, 5.18, 5.2))


def test_electrons_may_be_anywhere_in_wide_cells():
    t = lambda *v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    p = Posterior(torch.tensor([0, 1, 1]), t(1.0, 0.5, 0.5), t(10, 0, 4), t(89, 88, 88.4), t(1, 1, 1) * 1e-3, t(1, 1),
                  t(6, 0, 2), t(0.6, 0, 0))
    assert torch.allclose(p.sigma() ** 2, t(36 / 12, 4 + 0.5 * 4 / 12)) and torch.allclose(p.mean(), t(10, 2))
    assert torch.allclose(p.sigma("pitch_angle_deg") ** 2, t(0.36 / 12, 0.04))
    assert torch.allclose(p.below(t(8.5, 3.5)), t(0.25, 0.5 + 0.125))
    assert torch.allclose(p.below(t(89.15, 88.2), "pitch_angle_deg"), t(0.75, 0.5))
    m = modes(p, gap_eV=1.0)
    assert torch.allclose(m.energy_sigma_eV[0], t(3).sqrt()) and len(m.event) == 3
    assert torch.allclose(p.select(1).sigma(), p.sigma()[1:])


def test_narrow_cells_have_no_width(exact, ridge, events):
    "Its weight is the likelihood at its centre: a sum of such points has the variance of the integral."
    assert float(exact(record(events, CLEAR)).width_eV.max()) == 0
    x = torch.arange(-20.0, 20.0, 1.5).double()  # steps of 1.5 standard deviations, as those of the finest cells
    weight = (-(x**2) / 2).exp()
    p = Posterior(torch.zeros(len(x)).long(), weight / weight.sum(), x, x, x, torch.zeros(1))
    assert float(p.sigma()) == pytest.approx(1, abs=2e-3)
    wide = ridge(record(events, AMBIGUOUS))
    assert float(wide.width_eV.max()) > 1 and float(wide.width_deg.max()) > 0


def test_minor_cells_may_be_wider(ridge, events):
    "Event 29 has a narrow mode and wings: most of its cells must not lie in the wings."
    p = ridge(record(events, 29))
    assert len(p.weight) < 5000 and int((p.weight.sort(descending=True).values.cumsum(0) < 0.9).sum()) > 20


# --- what cannot be used ---


def test_wrong_records(ridge):
    with pytest.raises(DataError, match="8192"):
        ridge(torch.zeros(1, 2, 4096))
    with pytest.raises(DataError, match="noise"):
        ridge(torch.zeros(1, 2, 8192))
    with pytest.raises(DataError, match="one record"):
        ridge(torch.zeros(0, 2, 8192))


@pytest.mark.parametrize("scale", [1e3, 1e-3, 2.5, 0.4])
def test_noise_of_another_level_is_named_with_its_row(ridge, events, scale):
    ts = torch.from_numpy(events.ts[:40].copy())
    ts[37] *= scale
    with pytest.raises(DataError, match="0.0471 V") as e:
        ridge(ts)
    assert e.value.row == 37 and "noise_sigma_V" in e.value.remedy
    level = float(noise_level(ts[37:38]))
    assert abs(level / (0.0471 * scale) - 1) < 0.15 and f"{level:.3g}" in e.value.found


@pytest.mark.parametrize(("settings", "match"), [
    ({"power": "purcell"}, "larmor"),
    ({"receiver": ReceiverConfig(noise_sigma_V=0.0)}, "white noise"),
    ({"tracks": TrackConfig(mean_length_s=1e-5, max_tracks=2)}, "single tracks"),
])
def test_settings_that_it_does_not_know(settings, match):
    with pytest.raises(ConfigError, match=match):
        Ridge(SimulateConfig(**settings))


def test_orders_that_it_does_not_know(simulator):
    with pytest.raises(ConfigError, match="orders"):
        Ridge(simulator, RidgeConfig(orders=(-2, -1, 0)))


def test_untrapped_electrons_are_refused():
    config = SimulateConfig()
    config.electrons.pitch_low_deg = 87.5
    with pytest.raises(ConfigError, match="holds"):
        trap_table(Simulator(config, table={"pitch_angle_deg": [89.0]}, device="cpu"))


# --- Fisher information ---


def test_single_tone_has_the_bound_of_rife_and_boorstyn():
    N, A, sigma, rate = 3000, 0.02, 0.05, 1e6
    a = torch.tensor([[A * np.exp(0.7j)]])
    d_a, d_f = torch.zeros(1, 3, 1, dtype=torch.complex128), torch.zeros(1, 3, 1, dtype=torch.float64)
    d_a[0, 0], d_a[0, 1], d_f[0, 2] = a / A, 1j * a, 1
    F = Fisher(line_information(a, d_a, d_f, torch.zeros(1, 3, dtype=torch.float64), N, rate, sigma), ("A", "phi", "f"))
    eta = A**2 / (2 * sigma**2)
    expected = math.sqrt(6 / (eta * N * (N**2 - 1))) * rate / (2 * math.pi)
    assert float(F.bound()["f"]) == pytest.approx(expected, rel=1e-9)
    assert float(F.bound()["A"]) == pytest.approx(sigma / math.sqrt(N), rel=1e-9)


def test_information_is_that_of_the_samples(simulator):
    "Derivatives by central differences of the whole waveform, and the sum over its samples."
    at = dict(zip(PARAMETERS, (18_590.0, 88.6, 2.5e-3, 0.4, 1.0), strict=False))
    steps = dict(zip(PARAMETERS, (1e-2, 1e-5, 1e-7, 1e-4, 1e-4), strict=False))
    r = simulator.config.receiver
    t = torch.arange(r.samples, dtype=torch.float64) / r.sampling_rate_Hz

    def wave(p):
        c = comb(simulator.trap, simulator.config.cavity, *(torch.tensor([v], dtype=torch.float64) for v in p.values()))
        f = c.frequency_Hz[0] - r.lo_frequency_Hz
        turn = torch.exp(2j * math.pi * (f[:, None] * t + c.slope_Hz_per_s * t**2 / 2))
        return r.amplitude_V * c.amplitude[0] @ turn

    d = torch.stack([(wave(at | {k: at[k] + h}) - wave(at | {k: at[k] - h})) / (2 * h) for k, h in steps.items()])
    sampled = (d.conj() @ d.T).real / simulator.noise.sigma_V**2
    exact = fisher(simulator, *at.values()).information[0]
    scale = sampled.diagonal().sqrt()
    assert ((sampled - exact).abs() / scale / scale[:, None]).max() < 5e-3


def test_bound_scales_with_length_and_noise():
    def sigma(samples=8192, noise=0.0471, known=("pitch_angle_deg", "radius_m")):
        config = SimulateConfig(receiver=ReceiverConfig(samples=samples, noise_sigma_V=noise))
        s = Simulator(config, table={"pitch_angle_deg": [89.0]}, device="cpu")
        return float(fisher(s, 18_600.0, 89.0, 3.4e-3).bound(known)["energy_eV"])

    assert sigma(16_384) / sigma() == pytest.approx(2**-1.5, rel=0.01)
    assert sigma(noise=0.0942) / sigma() == pytest.approx(2, rel=1e-6)
    assert sigma(known=()) > sigma(known=("radius_m",)) > sigma()


def test_prior_and_start_time(simulator):
    F = fisher(simulator, 18_600.0, [88.6, 89.2], 3.0e-3, start_time=True)
    assert F.names == PARAMETERS and F.information.shape == (2, 6, 6)
    prior = {"start_time_s": 1e-6}
    free, with_start = fisher(simulator, 18_600.0, [88.6, 89.2], 3.0e-3).bound(), F.bound(prior=prior)
    assert (with_start["energy_eV"] > free["energy_eV"]).all()
    assert (F.bound(prior=prior | {"radius_m": 1e-3})["energy_eV"] < with_start["energy_eV"]).all()
    assert torch.allclose(F.bound(known=("start_time_s",))["energy_eV"], free["energy_eV"])


def test_information_on_the_apparatus_is_that_of_autograd(simulator):
    at, r = (18_590.0, 88.6, 2.5e-3, 0.4, 1.0), simulator.config.receiver
    F = fisher(simulator, *at, apparatus=APPARATUS)
    assert F.names == (*PARAMETERS[:5], *APPARATUS) and F.information.shape == (1, 8, 8)
    scale = torch.ones(2, dtype=torch.float64, requires_grad=True)
    trap = copy.copy(simulator.trap)
    trap.background_T, trap.current_A = trap.background_T * scale[0], trap.current_A * scale[1]
    c = comb(trap, simulator.config.cavity, *at)
    rate = lambda v: torch.autograd.grad(v, scale, retain_graph=True)[0]  # noqa: E731
    a = r.amplitude_V * c.amplitude[0]
    d_a = torch.stack([torch.complex(rate(v.real), rate(v.imag)) for v in a], 1)
    d_f, d_s = torch.stack([rate(v) for v in c.frequency_Hz[0]], 1), rate(c.slope_Hz_per_s[0])
    exact = line_information(a.detach()[None], d_a[None], d_f[None], d_s[None], r.samples, r.sampling_rate_Hz,
                             simulator.noise.sigma_V)[0]
    assert (F.information[0, 5:7, 5:7] / exact - 1).abs().max() < 1e-3
    free = F.bound(known=APPARATUS)["energy_eV"]
    assert (F.bound(prior={"field_scale": 1e-6})["energy_eV"] >= torch.hypot(free, torch.tensor(0.5))).all()
    with pytest.raises(ConfigError, match="field_scale"):
        fisher(simulator, *at, apparatus=("tilt",))
