"""Nuisance parameters in training, calibrated posteriors, the guard and the loop of the dead-layer half."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import logit, ndtr
from scipy.stats import norm

from deadlayer_cres.core import ConfigError, DataError, config_from_dict, to_plain, torch_rng
from deadlayer_cres.deadlayer import posterior as ps
from deadlayer_cres.deadlayer.data import Spectra, SplitConfig
from deadlayer_cres.deadlayer.likelihood import LINES_KEV, Distortion
from deadlayer_cres.deadlayer.prep import (
    InputConfig,
    Nuisance,
    NuisanceConfig,
    PairConfig,
    PairInputs,
    PairSource,
    nuisance_directions,
    project,
    scale_to,
)
from deadlayer_cres.deadlayer.train import Config, pair_source

EDGES = np.arange(5, 450.5, 0.5)
CENTRES = (EDGES[1:] + EDGES[:-1]) / 2
SIGMA = np.sqrt(0.32168 + 0.0020672 * np.array(LINES_KEV)) / 2.3548
LINES = np.diff(ndtr((EDGES[:, None] - np.array(LINES_KEV)) / SIGMA), axis=0)


def expected(fccd, dlf):
    "A continuum and the lines of Ba-133, attenuated by a dead layer: (n, bins)."
    fccd, dlf = np.atleast_1d(fccd)[:, None], np.atleast_1d(dlf)[:, None]
    line = 6e4 * np.exp(-4 * fccd / np.sqrt(np.array(LINES_KEV))) @ LINES.T
    return 2000 * np.exp(-CENTRES / 120) * (1 + 0.3 * (1 - dlf) * fccd * np.exp(-CENTRES / 60)) + line + 20


def simulate(n=400, seed=0):
    rng = np.random.default_rng(seed)
    fccd, dlf = rng.uniform(0, 2, n), rng.uniform(0, 0.99, n)
    dlf[::3] = 1
    return Spectra(rng.poisson(3 * expected(fccd, dlf)), EDGES, fccd, dlf, 3.0)


@pytest.fixture(scope="module")
def spectra():
    return simulate()


@pytest.fixture(scope="module")
def emulator(spectra):
    return ps.emulate(spectra)


# --- nuisance parameters ---


@pytest.mark.parametrize("values", [{"shift_keV": 0.1}, {"shift_keV": -0.15, "gain": 1e-3}, {"resolution": 0.05}])
def test_a_batch_is_distorted_as_a_single_spectrum(values):
    mean = expected([0.4, 1.5], [0.2, 1.0])
    batch = Nuisance(EDGES, device="cpu")(torch.as_tensor(mean, dtype=torch.float32), values).numpy()
    single = Distortion(EDGES)
    for got, m in zip(batch, mean, strict=True):
        assert np.abs((got - single(m, **values)) / np.sqrt(m)).max() < 0.02


def test_nominal_parameters_change_nothing_and_scale_and_background_do_what_they_say():
    mean = torch.as_tensor(expected([1.0], [0.5]), dtype=torch.float32)
    n = Nuisance(EDGES, device="cpu")
    assert torch.allclose(n(mean, {}), mean, rtol=1e-4, atol=0.05)
    assert torch.allclose(n(mean, {"scale": 1.03}), 1.03 * mean, rtol=1e-4, atol=0.05)
    for name in ("flat", "exponential"):
        extra = n(mean, {name: 0.01}) - mean
        assert extra.sum() / mean.sum() == pytest.approx(0.01, rel=0.02)
    assert extra[0, 0] > 20 * extra[0, -1], "exponential"


def test_each_spectrum_has_its_own_parameters():
    n = Nuisance(EDGES, NuisanceConfig(draw=True), "cpu")
    v = n.draw(4000, torch_rng(0))
    mean = torch.as_tensor(expected([1.0], [0.5]), dtype=torch.float32).expand(3, -1)
    one = n(mean, {k: x[:3] for k, x in v.items()})
    alone = n(mean[1:2], {k: x[1:2] for k, x in v.items()})
    assert torch.allclose(one[1], alone[0]) and not torch.allclose(one[0], one[1], rtol=1e-3)
    for name, centre, width in (("shift_keV", 0, 0.15), ("gain", 0, 1e-3), ("resolution", 0, 0.05), ("scale", 1, 0.05)):
        assert float(v[name].min()) == pytest.approx(centre - width, abs=0.01 * width)
        assert float(v[name].max()) == pytest.approx(centre + width, abs=0.01 * width)
    assert 0.0045 < float((v["flat"] + v["exponential"]).max()) <= 0.005


def test_only_the_first_spectrum_is_distorted_and_noisy(spectra):
    law = NuisanceConfig(draw=True)
    source = PairSource(spectra, noise="first", device="cpu", nuisance=law)
    pairs = source.draw(64, generator=torch_rng(0))
    by_row = torch.empty_like(source.mean1)
    by_row[source.rows1] = source.mean1
    assert torch.equal(pairs.counts2, by_row[pairs.index2])
    pull = (pairs.counts1 - by_row[pairs.index1]) / by_row[pairs.index1].sqrt()
    assert pull.std() > 1.5, "more than Poisson"
    plain = PairSource(spectra, noise="first", device="cpu").draw(64, generator=torch_rng(0))
    assert torch.equal(plain.counts1, plain.counts1.round()) and 0.9 < (
        (plain.counts1 - by_row[plain.index1]) / by_row[plain.index1].sqrt()).std() < 1.1


def test_old_configs_draw_no_nuisance_parameters(spectra):
    config = config_from_dict(Config, {"pairs": {"reference": "same"}})
    assert pair_source({"random_dlf": {"train": spectra}}, "train", config.pairs, "cpu").nuisance is None
    again = config_from_dict(Config, to_plain(Config(pairs=PairConfig(nuisance=NuisanceConfig(draw=True)))))
    assert again.pairs.nuisance.draw


@pytest.mark.parametrize("make", [lambda: NuisanceConfig(shift_keV=-1), lambda: NuisanceConfig(scale=1.5),
                                  lambda: NuisanceConfig(background=float("nan")),
                                  lambda: InputConfig(components=0, nuisance_components=3)])
def test_configs_refuse_nonsense(make):
    with pytest.raises(ConfigError):
        make()


def test_taking_directions_out_needs_the_law(spectra):
    with pytest.raises(ConfigError, match=r"pairs.nuisance.draw"):
        PairInputs(890, InputConfig(nuisance_components=4)).fit(PairSource(spectra, device="cpu"))


def test_inputs_do_not_see_nuisance_parameters(spectra):
    law = NuisanceConfig(draw=True)
    source = PairSource(spectra, noise="first", device="cpu", nuisance=law)
    with_, without = (PairInputs(890, InputConfig(components=8, nuisance_components=k, unit_area=True)).fit(
        source, n=256) for k in (12, 0))
    mean = torch.as_tensor(expected([0.9], [0.4]), dtype=torch.float32)
    moved = source.nuisance(mean, {"shift_keV": 0.1, "resolution": 0.02, "scale": 1.03})
    other = torch.as_tensor(expected([0.95], [0.4]), dtype=torch.float32)

    def change(inputs, x):
        return float((2 * (inputs.clean(x, inputs._buffers).sqrt()
                           - inputs.clean(mean, inputs._buffers).sqrt())).norm())

    assert change(with_, moved) < 1.0 < 8 * change(with_, moved) < change(with_, other), "sigma"
    assert change(without, moved) > 2 * change(with_, moved)
    directions = nuisance_directions(source.mean1, source.nuisance, 12, with_.area, torch_rng(0, "nuisance"))
    assert (directions @ directions.T - torch.eye(12, dtype=torch.float64)).abs().max() < 1e-9
    assert (with_.basis.double() @ directions.T).abs().max() < 1e-5
    assert torch.allclose(project(scale_to(mean, with_.area), with_.centre, with_.basis),
                          with_.clean(mean, with_._buffers))


# --- calibration ---


class Gauss(torch.nn.Module):
    "A network that measures FCCD from the sum of a few bins, too steeply and shifted, and DLF from its true value."

    def __init__(self, steep=1.7, offset=0.6, dlf=True):
        super().__init__()
        self.p, self.steep, self.offset, self.dlf = torch.nn.Parameter(torch.zeros(1)), steep, offset, dlf

    def forward(self, a, b):
        f1, f2 = a[:, 0] / 1e5, b[:, 0] / 1e5
        z = self.steep * 1.7 * (f1 - f2) / 0.01 + self.offset
        if not self.dlf:
            return z[:, None]
        middle = torch.logit(a[:, 1] / 1e5)
        return torch.cat([z[:, None], torch.sigmoid(torch.stack([middle - 0.1, middle, middle + 0.2], 1))], 1)


def gauss_world(n, seed):
    "Counts whose first bin says the FCCD to 0.01 mm and whose second says the DLF."
    rng = np.random.default_rng(seed)
    fccd, dlf = rng.uniform(0.2, 1.8, n), rng.uniform(0.1, 0.9, n)
    counts = np.stack([1e5 * (fccd + rng.normal(0, 0.01, n)),
                       1e5 / (1 + np.exp(-logit(dlf) - rng.normal(0, 0.3, n)))], 1)
    return torch.as_tensor(counts, dtype=torch.float32), fccd, dlf


GRID = np.linspace(0, 2, 2001)
REFERENCES = Spectra(np.rint(1e5 * np.stack([GRID, 0 * GRID], 1)), np.array([0.0, 1, 2]), GRID, np.ones(2001))


@pytest.fixture(scope="module")
def gauss():
    net = Gauss()
    counts, fccd, dlf = gauss_world(1500, 0)
    scans = ps.scan_spectra(net, counts, REFERENCES, batch=100)
    return net, ps.fit_calibration(scans, ps.Experiments(counts, fccd, dlf, np.arange(1500)))


def test_the_posterior_of_a_gaussian_measurement_is_the_gaussian(gauss):
    net, calibration = gauss
    counts, fccd, dlf = gauss_world(1200, 1)
    p = ps.infer_posterior(net, counts, REFERENCES, calibration)
    median = counts[:, 0].numpy() / 1e5
    assert np.abs(p.quantile(0.5) - median).max() < 0.0015
    assert np.diff(p.interval("68"))[:, 0].mean() / 2 == pytest.approx(0.00994, rel=0.06)
    assert np.diff(p.interval("90"))[:, 0].mean() / 2 == pytest.approx(0.01645, rel=0.06)
    mean, sigma = p.moments()
    assert np.abs(mean - median).max() < 0.002 and sigma.mean() == pytest.approx(0.01, rel=0.06)
    x, density = p.density(3)
    assert np.abs(density - norm.pdf(x, median[3], 0.01)).max() < 8
    for ranks in (p.rank(fccd), p.dlf_rank(dlf)):
        r = ps.sbc(ranks, np.arange(1200))
        assert all(abs(v["coverage"] - v["nominal"]) < 0.03 for v in r["intervals"].values())
        assert r["uniform_p_value"] > 1e-3
    inside = (dlf > p.dlf(0.05)) & (dlf < p.dlf(0.95))
    assert abs(inside.mean() - 0.9) < 0.03 and (p.dlf(0.16) < p.dlf(0.84)).all()
    assert p.summary(2)["fccd_in_mm"]["68"][0] < p.summary(2)["fccd_in_mm"]["median"]


def test_sbc_sees_wrong_posteriors_and_counts_spectra():
    rng = np.random.default_rng(0)
    right, narrow = rng.uniform(size=2000), ndtr(1.3 * rng.normal(size=2000))
    good, bad = (ps.sbc(r, np.arange(2000)) for r in (right, narrow))
    assert good["uniform_p_value"] > 0.01 > 1e-4 > bad["uniform_p_value"]
    assert bad["intervals"]["68"]["coverage"] < 0.6 and sum(good["histogram"]) == 2000
    twice = ps.sbc(np.repeat(right, 4), np.repeat(np.arange(2000), 4))
    assert twice["intervals"]["68"]["error"] == pytest.approx(good["intervals"]["68"]["error"], rel=1e-6)
    assert twice["spectra"] == 2000 and twice["uniform_p_value"] == pytest.approx(good["uniform_p_value"])


def test_a_scan_widens_until_it_is_sure():
    blunt = Gauss(steep=0.2, offset=0.0, dlf=False)
    counts, fccd, _ = gauss_world(20, 2)
    scans = ps.scan_spectra(blunt, counts, REFERENCES)
    assert scans.dlf is None and (scans.logit[:, 0] > ps.SURE).all() and (scans.logit[:, -1] < -ps.SURE).all()
    assert (np.diff(scans.logit, axis=1) <= 0).all()


# --- pseudo-experiments, limit, guard ---


def test_pseudo_experiments_use_all_spectra_alike_and_repeat(spectra):
    a, b = (ps.pseudo_experiments(spectra, 500, NuisanceConfig(draw=True), seed=3) for _ in range(2))
    assert torch.equal(a.counts, b.counts) and a.fccd_in_mm.min() >= 0.1 and a.fccd_in_mm.max() <= 1.9
    times = np.bincount(a.row)
    assert set(times[times > 0]) == {1, 2}
    with pytest.raises(DataError):
        ps.pseudo_experiments(spectra, 10, fccd_range_mm=(3, 4))


def test_nuisance_parameters_cost_information(emulator):
    f, d = np.array([0.5, 1.2]), np.array([0.3, 0.7])
    known, free = ps.fisher_limit(emulator, f, d), ps.fisher_limit(emulator, f, d, NuisanceConfig(draw=True))
    scale = NuisanceConfig(shift_keV=0, gain=0, resolution=0, scale=0.05, background=0)
    assert (known < ps.fisher_limit(emulator, f, d, scale)).all() and (known < free).all() and (free < 0.1).all()


def test_the_fit_finds_nuisance_parameters(emulator):
    mean = torch.as_tensor(expected([1.1] * 8, [0.4] * 8), dtype=torch.float32)
    moved = Nuisance(EDGES, device="cpu")(mean, {"shift_keV": 0.08, "resolution": 0.03, "scale": 1.04})
    counts = torch.poisson(moved, generator=torch_rng(0))
    values, mu, _ = ps.best_description(counts, emulator, np.full(8, 1.0), np.full(8, 0.5))
    for name, truth, close in (("shift_keV", 0.08, 0.01), ("resolution", 0.03, 0.01), ("scale", 1.04, 0.02),
                               ("fccd_in_mm", 1.1, 0.03)):
        assert values[name].mean() == pytest.approx(truth, abs=close), name
    pull = (counts.numpy() - mu) / np.sqrt(mu)
    assert 0.85 < pull.std() < 1.15


def test_guard(spectra, emulator):
    guard = ps.fit_guard(emulator, simulate(200, 5), n=150)
    assert (guard.inflation >= 1).all() and 0 < guard.p_value < 0.02 and guard.law.shape == (11, 2)
    e = ps.pseudo_experiments(simulate(200, 6), 100, NuisanceConfig(draw=True), seed=9)
    fine = guard.check(e.counts, e.fccd_in_mm, e.dlf)
    assert np.mean([not v["described"] for v in fine]) < 0.08
    hump = e.counts * torch.as_tensor(np.where((CENTRES > 210) & (CENTRES < 290), 1.15, 1), dtype=torch.float32)
    flagged = guard.check(hump[:20], e.fccd_in_mm[:20], e.dlf[:20])
    assert all(not v["described"] and "210-290 keV" in v["disagree"] for v in flagged)
    assert ps.guard_warnings(fine[0] | {"described": True}) == [] and "210-290 keV" in ps.guard_warnings(flagged[0])[0]
    assert ps.guard_figure(flagged[0], hump[0].numpy(), EDGES) is not None


# --- the loop ---


class Fit(torch.nn.Module):
    "A network that reads FCCD from the 81 keV line."

    def __init__(self, emulator):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(1))
        grid = np.linspace(0.01, 1.99, 400)
        self.grid, self.area = grid, emulator.mean(grid, np.full(400, 1.0))[:, 140:160].sum(1)

    def forward(self, a, b):
        def fccd(x):
            return np.interp(-x[:, 140:160].sum(1).numpy(), -self.area, self.grid)
        return torch.as_tensor((fccd(a) - fccd(b)) / 0.01 * 1.7)[:, None].float()


@pytest.mark.parametrize("start", [0.05, 0.9, 1.0, 1.95])
def test_the_loop_ends_where_the_network_balances(emulator, start):
    net = Fit(emulator)
    one = Spectra(np.rint(emulator.mean([1.0], [1.0])), EDGES, [np.nan], [np.nan])
    gaussian = ps.Pivot(np.zeros(6), np.r_[np.log(1.7), np.zeros(5)], ps.SCORES)
    calibration = ps.Calibration(gaussian, None, 1, 1)
    loop = ps.iterate(net, one, emulator, start, calibration)
    assert loop.balanced and abs(loop.fccd_in_mm - 1.0) < 0.002 and len(loop.steps) < 20
    assert abs(loop.steps[-1]["probability"] - 0.5) < 0.02
    assert loop.steps[0]["fccd_in_mm"] == pytest.approx(start) and loop.rows()[-1][-1] == "balanced"
    assert all(s["verdict"] == ("thicker" if s["fccd_in_mm"] < 1 else "thinner") for s in loop.steps[:-1])


def test_the_loop_stops_at_the_end_of_the_range(emulator):
    net = Fit(emulator)
    net.forward = lambda a, b: torch.full((len(a), 1), 9.0)
    one = Spectra(np.rint(emulator.mean([1.0], [1.0])), EDGES, [np.nan], [np.nan])
    calibration = ps.Calibration(ps.Pivot(np.zeros(6), np.zeros(6), ps.SCORES), None, 1, 1)
    loop = ps.iterate(net, one, emulator, 1.0, calibration)
    assert not loop.balanced and loop.fccd_in_mm == pytest.approx(emulator.fccd_range_mm[1])


def test_the_guard_sees_a_small_common_excess_of_a_window(emulator):
    guard = ps.fit_guard(emulator, simulate(200, 5), n=150)
    e = ps.pseudo_experiments(simulate(200, 6), 40, NuisanceConfig(draw=True), seed=9)
    inside = torch.as_tensor((CENTRES > 210) & (CENTRES < 290), dtype=torch.float32)
    more = e.counts + torch.poisson(0.02 * e.counts * inside, generator=torch_rng(3))
    _, mu, pulls = ps.best_description(more, emulator, e.fccd_in_mm, e.dlf)
    rows = [v["windows"][6] for v in guard.check(more, e.fccd_in_mm, e.dlf)]
    assert rows[0]["low_keV"] == 210 and np.mean([r["pull"] for r in rows]) > 2 and pulls.shape == (40, 11)
    by_bins = np.mean([ps.chi2_law.sf(r["chi2"], r["bins"]) < guard.p_value for r in rows])
    assert np.mean([r["p_value"] < guard.p_value for r in rows]) > by_bins + 0.2
    _, _, right = ps.best_description(e.counts, emulator, e.fccd_in_mm, e.dlf)
    assert 0.6 < right.std() < 1.3, "pulls of described spectra are standard deviations"
    assert (guard.law[:, 0] > 0.5).all() and (guard.law[:, 0] < 2).all() and (guard.law[:, 1] <= 100).all()
    wide = replace(guard, law=guard.law * [10.0, 1.0])  # pulls that scatter ten times as much are no surprise
    less = [v["windows"][6]["p_value"] for v in wide.check(more, e.fccd_in_mm, e.dlf)]
    assert np.mean(np.array(less) < guard.p_value) < np.mean([r["p_value"] < guard.p_value for r in rows]) - 0.2


def test_blocks_stay_together_in_the_folds():
    rng = np.random.default_rng(0)
    e = ps.Experiments(torch.zeros(500, 2), rng.uniform(0, 2, 500), rng.uniform(0, 1, 500), np.arange(500))
    block, fold = ps.folds(e, SplitConfig(), 5)
    assert set(fold) == set(range(5)) and all(len(set(fold[block == b])) == 1 for b in set(block))
    assert all(np.ptp(e.fccd_in_mm[block == b]) < 0.05 and np.ptp(e.dlf[block == b]) < 0.1 for b in set(block))


def test_calibration_of_dlf_knows_that_narrow_bands_are_too_narrow():
    def world(n, seed):
        rng = np.random.default_rng(seed)
        band, dlf = 0.01 * np.exp(rng.normal(0, 0.4, n)), rng.uniform(0.2, 0.8, n)
        median = dlf + 0.01 * rng.normal(size=n)  # as far off where the band is narrow
        scans = ps.Scans(np.tile([0.9, 1.1], (n, 1)), np.tile([3.0, -3.0], (n, 1)),
                         np.stack([median - band, median, median + band], 1))
        return scans, ps.Experiments(torch.zeros(n, 2), rng.uniform(0.95, 1.05, n), dlf, np.arange(n))

    calibration = ps.fit_calibration(*world(4000, 0))
    scans, e = world(4000, 1)
    inside = np.abs(calibration.dlf_score(scans.dlf, e.dlf, scans.where())) < 1
    narrow = np.ptp(scans.dlf, axis=1) < 0.012
    before, b = world(4000, 0)
    blind = ps.fit_pivot(ps.dlf_offset(before.dlf, b.dlf), before.where())
    unaware = np.abs(blind.score(ps.dlf_offset(scans.dlf, e.dlf), scans.where())) < 1
    assert unaware[narrow].mean() < 0.5 < 0.59 < inside[narrow].mean() < 0.72
    assert abs(inside[~narrow].mean() - 0.68) < 0.04
    low, high = (calibration.dlf(scans.dlf, level, scans.where()) for level in (0.16, 0.84))
    assert abs(((low < e.dlf) & (e.dlf < high)).mean() - 0.68) < 0.03
