"""The likelihood fit of the comb: its model and derivatives, its maxima, covariances, goodness and long records."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from deadlayer_cres.core import ConfigError, DataError, torch_rng
from deadlayer_cres.cres.fit import Posterior, fisher
from deadlayer_cres.cres.refine import NAMES, Fitter, comb_table, see
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


def test_free_scale_and_noise_are_found(table):
    other = replace(BASE, receiver=ReceiverConfig(amplitude_V=0.036, noise_sigma_V=0.06))
    events = Simulator(other, device="cpu").events(24)
    f = fitter_of(table, replace(BASE, receiver=ReceiverConfig(amplitude_V=0.03)), free_scale=True, free_noise=True)
    found = f(events.ts, truth_of(events)[:, None, :3])
    assert (found.noise_V / 0.06 - 1).abs().max() < 0.04  # 0.8 % each
    pull = (found.column("log_scale") - math.log(1.2))[:, 0] / found.sigma("log_scale")[:, 0]
    assert pull.abs().median() < 1.5


def test_goodness_tells_what_is_wrong(fitter, events, found):
    fine = fitter.goodness(events.ts, found)
    assert (fine["p_value"] < 0.01).double().mean() < 0.06
    assert abs(float(fine["chi2"].mean()) - 1) < 0.05
    two = events.ts + np.roll(fitter.simulator.events(96, noise="none").ts, 1, axis=0)
    twice = fitter.goodness(two, found)
    assert (twice["p_value"] < 0.01).double().mean() > 0.7


def test_long_records_grow(table):
    config = replace(BASE, receiver=ReceiverConfig(samples=163_840, amplitude_V=0.03))
    f = fitter_of(table, config)
    events = f.simulator.events(6)
    true = truth_of(events)
    starts = half_bins_off(f, true, 8192)
    found, short = f.grow(events.ts, starts), f(events.ts[:, :, :8192], starts)
    error = (found.column()[:, 0] - true[:, 0]).abs()
    assert error.median() < 0.02
    assert (found.sigma()[:, 0] / short.sigma()[:, 0]).median() < 1.2 * 20**-0.5  # the radius, seen in amplitudes, decides


def test_starts_are_the_best_cells_of_boxes():
    e = torch.tensor([0, 0, 0, 1])
    p = Posterior(e, torch.tensor([0.5, 0.4, 0.1, 1.0]).double(),
                  torch.tensor([18_600.0, 18_600.01, 18_650.0, 18_550.0]).double(), torch.full((4,), 89.0).double(),
                  torch.full((4,), 3e-3).double(), torch.zeros(2).double())
    f = fitter_of(comb_table(Simulator(BASE, device="cpu"), angles=17, radii=5))
    starts = f.starts(p, 8192, 4)
    assert starts.shape == (2, 2, 3) and starts[0, :, 0].tolist() == [18_600.0, 18_650.0]
    assert starts[1, 0, 0] == 18_550.0 and starts[1, 1].isnan().all()


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
