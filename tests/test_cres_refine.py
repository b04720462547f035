"""The likelihood fit of the comb: its model and derivatives, its maxima, covariances, goodness and long records."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from deadlayer_cres.core import ConfigError, DataError, torch_rng
from deadlayer_cres.cres.evaluate import Predictions, read_table, residual, write_table
from deadlayer_cres.cres.fit import Modes, Posterior, Ridge, fisher
from deadlayer_cres.cres.refine import (
    FLAGS,
    NAMES,
    Fitter,
    Refiner,
    comb_table,
    compare_posteriors,
    mixture_cdf,
    mode_table,
    plot_comparison,
    see,
)
from deadlayer_cres.cres.simulate import TEST_SETS, ReceiverConfig, Simulator, TrackConfig
from deadlayer_cres.cres.trap import comb

BASE = TEST_SETS["cca-8k"]


@pytest.fixture(scope="module")
def table():
    return comb_table(Simulator(BASE, device="cpu"), angles=129, radii=12)


def fitter_of(table, config=BASE, **options):
    return Fitter(Simulator(config, device="cpu"), table, **options)


@pytest.fixture(scope="module")
def fitter(table):
    return fitter_of(table, replace(BASE, receiver=ReceiverConfig(amplitude_V=0.03)))


@pytest.fixture(scope="module")
def events(fitter):
    return fitter.simulator.events(96)


def truth_of(events):
    return torch.stack([torch.as_tensor(events.columns[k]) for k in NAMES[:5]], 1)


def z_of(ts):
    return torch.complex(*torch.from_numpy(ts).unbind(1))


def half_bins_off(fitter, true, samples):
    "Starts off by half a bin or none in carrier and axial frequency, at random."
    grid = fitter.offsets(true[:, :3], samples / fitter.receiver.sampling_rate_Hz, 1).flatten(1, 2)
    return grid[torch.arange(len(true)), torch.randint(0, 9, (len(true),), generator=torch_rng(1, "starts"))][:, None]


@pytest.fixture(scope="module")
def found(fitter, events):
    return fitter(events.ts, half_bins_off(fitter, truth_of(events), 8192))


def test_table_is_the_comb(table):
    s = Simulator(BASE, device="cpu")
    d = s.draw(64, 1000)
    E, p, r = (d[k] for k in NAMES[:3])
    exact = comb(s.trap, s.config.cavity, E, p, r, orders=table.order.tolist())
    near = fitter_of(table).lines(torch.stack([E, p, r], 1))
    assert (near.frequency_Hz - exact.frequency_Hz).abs().max() < 300  # of 49,000 Hz per bin
    assert (near.amplitude - exact.amplitude).abs().max() < 1e-3
    assert ((near.slope_Hz_per_s[:, 3] / exact.slope_Hz_per_s) - 1).abs().max() < 0.03
    weight = s.law.pdf_per_deg
    inside = torch.argsort((s.law.pitch_deg - 89.0).abs())[0]
    ours = fitter_of(table).lines(torch.tensor([[18_600.0, float(s.law.pitch_deg[inside]), 6.5e-3]]).double()).density
    assert abs(float(ours) / float(weight[-1, inside]) - 1) < 0.02


@pytest.mark.parametrize("free_scale", [False, True])
def test_derivatives_are_those_of_finite_differences(table, events, free_scale):
    f = fitter_of(table, replace(BASE, receiver=ReceiverConfig(amplitude_V=0.03)), free_scale=free_scale)
    x = truth_of(events)[:32]
    x[:, 0] += 0.3
    x[:, 1] = (x[:, 1] - 2e-3).clamp(88.01, 89.99)
    x[:, 3] += 0.2
    x = torch.cat([x, torch.full((32, 1), 0.1)], 1) if free_scale else x
    T, event = f.simulator.duration_s, torch.arange(32)
    seen = f.seen(z_of(events.ts[:32]), event, truth_of(events)[:32])
    s = f.score(x, seen, T)
    scale = s.information.diagonal(dim1=1, dim2=2).rsqrt()
    for k, h in enumerate((3e-3, 3e-6, 3e-7, 1e-4, 1e-4, 1e-4)[:x.shape[1]]):
        up, down = x.clone(), x.clone()
        up[:, k] += h
        down[:, k] -= h
        slope = (f.score(up, seen, T).value - f.score(down, seen, T).value) / (2 * h)
        off = ((slope - s.gradient[:, k]) * scale[:, k]).abs()
        assert off.max() < 0.03, NAMES[k]  # standard deviations; single precision of the phases
        assert (s.gradient[:, k] * scale[:, k]).abs().max() > 1


def test_information_is_that_of_the_comb(fitter, events):
    true = truth_of(events)
    seen = fitter.seen(z_of(events.ts), torch.arange(96), true)
    ours = fitter.score(true, seen, fitter.simulator.duration_s).information
    exact = fisher(fitter.simulator, *true.T, orders=fitter.table.order.tolist()).information
    scale = exact.diagonal(dim1=1, dim2=2).rsqrt()
    assert ((ours - exact) * scale[:, :, None] * scale[:, None]).abs().max() < 0.02


def test_value_is_the_likelihood_of_the_record(fitter, events):
    true, s = truth_of(events)[:16], fitter.simulator
    clean, over = torch.from_numpy(s.events(16, noise="none").ts).double(), 1 / s.noise.sigma_V**2
    ts = torch.from_numpy(events.ts[:16]).double()
    exact = over * ((clean * ts).sum((1, 2)) - (clean**2).sum((1, 2)) / 2)
    value = fitter.score(true, fitter.seen(z_of(events.ts[:16]), torch.arange(16), true), s.duration_s).value
    assert (value - exact).abs().max() < 0.5 and exact.abs().max() > 100  # lines of order 6 and above are left out


def test_the_maximum_is_found_and_never_below_the_truth(fitter, events, found):
    true = truth_of(events)
    at = fitter.score(true, fitter.seen(z_of(events.ts), torch.arange(96), true), fitter.simulator.duration_s).value
    gain = found.log_likelihood.nan_to_num(-torch.inf).amax(1) - at
    assert gain.min() > -0.1
    assert abs(float(gain.mean()) - 2.5) < 4 * math.sqrt(2.5 / 96)  # half of chi^2 with 5 degrees of freedom
    assert found.converged[:, 0].double().mean() > 0.85


def test_pulls_and_fisher_bound(fitter, events, found):
    true = truth_of(events)
    clear = (found.weight[:, 0] > 0.99) & (found.sigma()[:, 0] < 0.3) & found.converged[:, 0]
    assert clear.sum() > 40
    pull = ((found.column()[:, 0] - true[:, 0]) / found.sigma()[:, 0])[clear]
    assert abs(float(pull.square().mean().sqrt()) - 1) < 4 / math.sqrt(2 * len(pull))
    exact = fisher(fitter.simulator, *found.values[clear][:, 0, :5].T, orders=fitter.table.order.tolist())
    widths = {"energy_eV": 200 / 12**0.5, "pitch_angle_deg": 2 / 12**0.5, "radius_m": 6.5e-3 / 18**0.5}
    bound = exact.bound(prior=widths)
    assert (found.sigma()[clear, 0] / bound["energy_eV"] - 1).abs().median() < 0.01


def test_modes_are_distinct_sorted_and_weigh_one(fitter, events):
    true = truth_of(events)[:8]
    same = true[:, None, :3].repeat(1, 4, 1)
    other = same[:, :1].clone()
    other[..., 0] = 18_600
    f = fitter(events.ts[:8], torch.cat([same, other], 1))
    assert torch.allclose(f.weight.sum(1), torch.ones(8).double())
    assert (f.log_evidence[:, :-1] >= f.log_evidence[:, 1:]).all()
    place = fitter.lines(f.values[:, :, :3].flatten(0, 1).nan_to_num(1.0)).frequency_Hz[:, 2:4]
    place = (place * fitter.simulator.duration_s).view(8, -1, 2)
    for a in range(place.shape[1]):
        for b in range(a):
            both = f.weight.gt(0)[:, a] & f.weight.gt(0)[:, b]
            apart = ((place[:, a] - place[:, b]).abs().amax(1) >= 0.25)
            apart |= (f.values[:, a, 1:3] - f.values[:, b, 1:3]).abs().ge(torch.tensor([0.1, 1e-3])).any(1)
            assert apart[both].all()


def test_results_with_the_same_lines_are_merged_and_no_others(fitter):
    x = torch.tensor([[18_600.0, 89.0, 3e-3, 0, 0]] * 4, dtype=torch.float64)
    x[1, 0] += 0.1  # eV, a tenth of a bin
    x[2, 0] += 1.5
    x[3, 2] += 2e-3
    x[3, 0] += float((fitter.lines(x[3:]).frequency_Hz - fitter.lines(x[:1]).frequency_Hz)[0, fitter.zero]) / 48.9e3
    kept = fitter._merge(x[None], torch.tensor([[3.0, 4.0, 1.0, 2.0]]).double(), 8192 / 403e6)
    assert kept.tolist() == [[False, True, True, True]]


def test_free_scale_and_noise_are_found(table):
    other = replace(BASE, receiver=ReceiverConfig(amplitude_V=0.036, noise_sigma_V=0.06))
    events = Simulator(other, device="cpu").events(24)
    f = fitter_of(table, replace(BASE, receiver=ReceiverConfig(amplitude_V=0.03)), free_scale=True, free_noise=True)
    found = f(events.ts, truth_of(events)[:, None, :3])
    assert (found.noise_V / 0.06 - 1).abs().max() < 0.04  # 0.8 % each
    noisier = ReceiverConfig(amplitude_V=0.03, noise_sigma_V=0.06)
    known = fitter_of(table, replace(BASE, receiver=noisier), free_scale=True)
    same = known(events.ts, truth_of(events)[:, None, :3])
    assert (found.sigma("log_scale")[:, 0] / same.sigma("log_scale")[:, 0] - 1).abs().median() < 0.02
    assert (found.log_likelihood[:, 0] / same.log_likelihood[:, 0] - 1).abs().median() < 0.04
    pull = (found.column("log_scale") - math.log(1.2))[:, 0] / found.sigma("log_scale")[:, 0]
    assert pull.abs().median() < 1.5


def test_goodness_tells_what_is_wrong(fitter, events, found):
    fine = fitter.goodness(events.ts, found)
    assert (fine["p_value"] < 0.01).double().mean() < 0.06
    assert abs(float(fine["chi2"].mean()) - 1) < 0.05
    two = events.ts + np.roll(fitter.simulator.events(96, noise="none").ts, 1, axis=0)
    twice = fitter.goodness(two, found)
    assert (twice["p_value"] < 0.01).double().mean() > 0.7
    clean = fitter.simulator.events(96, noise="none").ts
    quiet = fitter.goodness(clean + 0.5 * (events.ts - clean), found)  # half the noise that the fit has found
    assert (quiet["p_value"] < 0.01).double().mean() > 0.9 and (quiet["chi2"] < 0.5).all()


def test_long_records_are_fitted_from_their_posterior(monkeypatch):
    simulator = Simulator(replace(TEST_SETS["cca-24k"], receiver=ReceiverConfig(samples=49_152)), device="cpu")
    events, f, ridge = simulator.events(24), Fitter(simulator), Ridge(simulator)
    true = torch.as_tensor(events.columns["energy_eV"])
    p = ridge(torch.from_numpy(events.ts))
    mean, sigma, whole = f.combined(events.ts, p)
    z, before = (mean[:, 0] - true) / sigma[:, 0], (p.mean() - true) / p.sigma()
    assert 0.6 < float(z.square().mean().sqrt()) < 1.4 and z.abs().max() < 4  # events 2 and 17 have two modes
    assert 8 < whole.sum() < 20 and torch.equal(mean[~whole, 0], p.mean()[~whole])
    assert (z - before)[~whole].abs().max() == 0 < (z - before)[whole].abs().min()
    assert (mean[:, 0] - true).square().mean().sqrt() < 1.1 * (p.mean() - true).square().mean().sqrt()
    call = Fitter.__call__
    monkeypatch.setattr(Fitter, "__call__", lambda *a: replace(r := call(*a), converged=torch.zeros_like(r.converged)))
    few = torch.from_numpy(events.ts[:6])
    assert f.combined(few, ridge(few), 8)[2].sum() == 0 < whole[:6].sum(), "a fit that did not converge does not count"


def test_starts_are_the_best_cells_of_boxes():
    e = torch.tensor([0, 0, 0, 0, 0, 1])
    p = Posterior(e, torch.tensor([0.4, 0.3, 0.1, 0.05, 0.15, 1.0]).double(),
                  torch.tensor([18_600.0, 18_600.01, 18_650.0, 18_600.0, 18_600.0, 18_550.0]).double(),
                  torch.full((6,), 89.0).double(), torch.tensor([3, 3, 3, 5, 4, 3]).double() / 1e3,
                  torch.zeros(2).double())
    f = fitter_of(comb_table(Simulator(BASE, device="cpu"), angles=17, radii=5))
    starts = f.starts(p, 8192, 4)  # of 18,600 eV the second and third place count half and a third: 0.075 and 0.017
    assert starts.shape == (2, 4, 3) and starts[0, :, 0].tolist() == [18_600.0, 18_650.0, 18_600.0, 18_600.0]
    assert starts[0, :, 2].tolist() == [3e-3, 3e-3, 4e-3, 5e-3]
    assert starts[1, 0, 0] == 18_550.0 and starts[1, 1:].isnan().all()
    assert f.starts(p, 8192, 2).shape == (2, 2, 3)


def test_series_are_projections():
    z = torch.randn(2, 1000, dtype=torch.complex64, generator=torch_rng(0, "z"))
    f = torch.tensor([[-60e6, -50.3e6], [-55e6, -52e6]], dtype=torch.float64)
    slope = torch.full((2, 2), 3e8, dtype=torch.float64)
    seen = see(z, torch.tensor([1, 0]), f, slope, 403e6)
    t = torch.arange(1000, dtype=torch.float64) / 403e6
    exact = (z[[1, 0]][:, None] * torch.exp(-2j * math.pi * (f[..., None] * t + slope[..., None] * t**2 / 2))).sum(2)
    assert (seen.series.sum(2) - exact).abs().max() < 1e-3 * exact.abs().max() + 1e-2


@pytest.mark.parametrize("change", [{"tracks": TrackConfig(start_high_s=1e-6)},
                                    {"receiver": ReceiverConfig(noise_sigma_V=0)}])
def test_what_the_model_does_not_know_is_refused(table, change):
    with pytest.raises(ConfigError):
        fitter_of(table, replace(BASE, **change))


def test_bad_shapes_are_refused(fitter, events):
    for ts, starts in ((events.ts[:2, :1], torch.ones(2, 1, 3)), (events.ts[:2], torch.ones(3, 1, 3)),
                       (events.ts[:2], torch.full((2, 1, 3), math.nan))):
        with pytest.raises(DataError):
            fitter(ts, starts)


# --- a network's answers ---


def blind(events):
    n = len(events)
    mean, sigma = np.tile([18_600.0, 89.0], (n, 1)), np.tile([57.7, 0.58], (n, 1))
    return Predictions(("energy_eV", "pitch_angle_deg"), mean, sigma, truth=events.columns)


@pytest.fixture(scope="module")
def refiner():
    return Refiner(Simulator(replace(BASE, receiver=ReceiverConfig(amplitude_V=0.024)), device="cpu"))


@pytest.fixture(scope="module")
def records(refiner):
    return refiner.simulator.events(20)


@pytest.fixture(scope="module")
def refined(refiner, records):
    return refiner(blind(records), records.ts)


def test_refined_answers_are_those_of_the_posterior(refiner, records, refined):
    p, flags = refined
    exact = refiner.ridge(torch.from_numpy(records.ts[:16]))
    assert p.targets == ("energy_eV", "pitch_angle_deg", "radius_m") and tuple(flags) == FLAGS
    for t, name in enumerate(p.targets):
        assert np.allclose(p.mean[:16, t], exact.mean(name)) and np.allclose(p.sigma[:16, t], exact.sigma(name))
        assert np.allclose(p.quantiles[:16, t], exact.quantiles(p.levels, name))
    assert not flags["outlier"].any() and not flags["not_refined"].any()
    assert (flags["single_mode"] ^ flags["ambiguous"]).all() and 2 < flags["single_mode"].sum() < 20
    assert np.allclose(p.observables["network_energy_eV"], 18_600) and (p.observables["converged"] == 1).all()
    z = (residual(p) / p.sigma[:, 0])[flags["single_mode"]]
    assert np.sqrt(np.mean(z**2)) < 2


def test_modes_make_up_the_mean(refined):
    p, flags = refined
    w = p.weight.sum(1)
    assert (w <= 1 + 1e-9).all() and (w[flags["single_mode"]] > 0.95).all()
    mean = np.nansum(p.weight[..., None] * p.modes, 1) / w[:, None]
    whole = w > 0.999
    assert whole.sum() > 3 and np.abs(mean - p.mean)[whole, 0].max() < 0.5
    assert np.isnan(p.modes[p.weight == 0]).all()


def test_refined_tables_are_read_again(tmp_path, refined):
    write_table(tmp_path / "a.csv", refined[0])
    p = read_table(tmp_path / "a.csv")
    assert p.targets == refined[0].targets and np.allclose(p.weight, refined[0].weight)
    assert np.allclose(p.observables["p_value"], refined[0].observables["p_value"])


def test_noise_is_not_refined_and_another_electron_is_an_outlier(refiner, records):
    noise = refiner.simulator.noise.counted(4, 8192, 5).numpy()
    p, flags = refiner(blind(records[:4]), noise)
    silent = flags["not_refined"]
    assert silent.sum() >= 3 and np.allclose(p.mean[silent, 0], 18_600) and np.allclose(p.sigma[silent, 0], 57.7)
    assert not (flags["single_mode"] | flags["ambiguous"])[silent].any()
    tone = 0.02 * np.exp(2j * np.pi * -30e6 / 403e6 * np.arange(8192))
    _, flags = refiner(blind(records[:4]), records.ts[:4] + np.stack([tone.real, tone.imag]).astype(np.float32))
    assert flags["outlier"].all()


def test_records_that_cannot_be_refined_are_named(refiner, records):
    with pytest.raises(DataError, match="8192"):
        refiner(blind(records[:2]), records.ts[:2, :, :4096])
    for other in (np.zeros((1, 2, 8192), np.float32), 1e3 * records.ts[17:18]):
        with pytest.raises(DataError, match="noise of about 0.0471 V") as e:
            refiner(blind(records[:18]), np.concatenate([records.ts[:17], other]))
        assert e.value.row == 17
    with pytest.raises(DataError, match="noise") as e:
        refiner.fitter(1e3 * records.ts[:1], torch.tensor([[[18_600.0, 89, 3e-3]]]))


def test_mode_table_is_that_of_its_cells():
    e = torch.tensor([0, 0, 0, 1])
    p = Posterior(e, torch.tensor([0.6, 0.2, 0.2, 1.0]).double(), torch.tensor([1e4, 1e4 + 1, 2e4, 1.5e4]).double(),
                  torch.tensor([88.0, 89, 90, 88]).double(), torch.full((4,), 1e-3).double(), torch.zeros(2).double())
    m = Modes(torch.tensor([0, 0, 1]), torch.tensor([0.8, 0.2, 1.0]).double(),
              torch.tensor([1e4 + 0.25, 2e4, 1.5e4]).double(), *torch.zeros(3, 3).double())
    weight, mean, width = mode_table(p, m, 3)
    assert weight.tolist() == [[pytest.approx(0.8), pytest.approx(0.2), 0], [1, 0, 0]]
    assert mean[0, :2, 0].tolist() == pytest.approx([1e4 + 0.25, 2e4]) and mean[0, 0, 1] == pytest.approx(88.25)
    assert mean[:, 2].isnan().all()
    assert width[0, 0, 0] == pytest.approx(math.sqrt(3) / 4)


def posterior_of(centre, sigma):
    "A Gaussian posterior of each event."
    g = torch.Generator().manual_seed(0)
    n, m = len(centre), 20_000
    event = torch.arange(n).repeat_interleave(m)
    x = torch.tensor(centre)[event] + torch.tensor(sigma)[event] * torch.randn(n * m, generator=g, dtype=torch.float64)
    flat = torch.full_like(x, 1 / m)
    return Posterior(event, flat, x, flat * 0 + 89, flat * 0 + 3e-3, torch.zeros(n).double())


def test_comparison_with_a_known_posterior():
    exact = posterior_of([18_600.0, 18_600.0], [5.0, 5.0])
    mean, sigma = np.array([[18_600.0], [18_605.0]]), np.array([[5.0], [10.0]])
    c = compare_posteriors(Predictions(("energy_eV",), mean, sigma), exact)
    assert c["crps_loss_eV"][0] < 0.01 and c["common"][0] > 0.97 and c["divergence"][0] < 0.02
    assert c["divergence"][1] == pytest.approx(math.log(2) + (25 + 25) / 200 - 0.5, abs=0.02)  # of two Gaussians
    assert c["sigma_ratio"] == pytest.approx([1, 2], abs=0.02) and c["main_mode"][0] == pytest.approx(0.954, abs=0.02)
    pairs = math.sqrt(2 * (25 + 100))  # mean distances of Gaussians: the energy distance is twice the loss
    spread = lambda d, s: s * math.sqrt(2 / math.pi) * math.exp(-d**2 / s**2 / 2) + d * math.erf(d / s / 2**0.5)  # noqa: E731
    want = spread(5, pairs / 2**0.5) - spread(0, 5 * 2**0.5) / 2 - spread(0, 10 * 2**0.5) / 2
    assert c["crps_loss_eV"][1] == pytest.approx(want, rel=0.03)
    assert len(plot_comparison(c).axes) == 4


def test_what_a_mixture_leaves_out_is_made_up_for():
    mean, sigma = np.array([[18_600.0]]), np.array([[20.0]])
    p = Predictions(("energy_eV",), mean, sigma, weight=np.array([[0.5]]), modes=np.full((1, 1, 1), 18_590.0),
                    widths=np.full((1, 1, 1), 2.0))
    edges = np.arange(18_300, 18_900, 0.25)
    g = np.diff(mixture_cdf(p, edges)[0])
    x = (edges[1:] + edges[:-1]) / 2
    assert g.sum() == pytest.approx(1) and g @ x == pytest.approx(18_600, abs=0.01)
    assert math.sqrt(g @ (x - 18_600) ** 2) == pytest.approx(20, abs=0.05)
