"""The crystal, the cross sections, the activeness and the decay scheme against known numbers."""

import numpy as np
import pytest
import torch

from deadlayer_cres.core import ConfigError
from deadlayer_cres.deadlayer.detector import (
    CAPTURE,
    LEVELS_KEV,
    MATERIALS,
    TRANSITIONS,
    Crystal,
    Setup,
    active_volume_cm3,
    cross_sections,
    distance_to_nplus_mm,
    exponential_linear_activeness,
    fwhm_keV,
    line_intensities,
    linear_activeness,
    mass_g,
    scattering_functions,
    volume_cm3,
)


def test_crystal_meets_the_published_numbers():
    c = Crystal()
    assert volume_cm3(c) == pytest.approx(415.03, rel=0.004)
    assert mass_g(c) == pytest.approx(2298, rel=0.004)
    assert active_volume_cm3(c, 0.0) == pytest.approx(volume_cm3(c))
    assert active_volume_cm3(c, 0.971) == pytest.approx(388.07, rel=0.005)
    slope = (active_volume_cm3(c, 1.045) - active_volume_cm3(c, 0.971)) / 0.074
    assert slope == pytest.approx(-28.9, rel=0.05)


@pytest.mark.parametrize("crystal", [Crystal(), Crystal(nplus_free_radius_mm=8, borehole_fccd_fraction=1.0),
                                     Crystal(borehole_depth_mm=0),
                                     Crystal(radius_mm=22, height_mm=25, borehole_depth_mm=9)])
def test_active_volume_agrees_with_counted_points(crystal):
    rng = np.random.default_rng(1)
    size = [crystal.radius_mm, crystal.radius_mm, crystal.height_mm]
    points = rng.uniform([-size[0], -size[1], 0], size, (400_000, 3)).T
    depth, _ = distance_to_nplus_mm(*points, crystal)
    box = 4 * size[0] ** 2 * size[2] * 1e-3
    assert box * np.isfinite(depth).mean() == pytest.approx(volume_cm3(crystal), rel=0.006)
    assert box * (depth > 1.5).mean() == pytest.approx(active_volume_cm3(crystal, 1.5), rel=0.006)


def test_depth_counts_lithium_only_and_stretches_the_borehole():
    c = Crystal(radius_mm=40, height_mm=80, borehole_radius_mm=5, borehole_depth_mm=50, nplus_free_radius_mm=20)
    x = np.array([10.0, 39.0, 6.0, 0.0, 0.0, 30.0, 41.0, 0.0])
    z = np.array([79.5, 40.0, 50.0, 1.0, 28.0, 2.0, 40.0, 60.0])
    depth, bore = distance_to_nplus_mm(x, 0.0, z, c)
    assert np.allclose(depth, [0.5, 1.0, 2.0, np.hypot(1, 20), 4.0, 2.0, np.nan, np.nan], equal_nan=True)
    assert bore[:6].tolist() == [False, False, True, False, True, False]
    same, _ = distance_to_nplus_mm(0.0, x, z, c)
    assert np.array_equal(depth, same, equal_nan=True)
    assert distance_to_nplus_mm(6.0, 0, 50.0, Crystal(borehole_fccd_fraction=1.0))[0] == pytest.approx(1.0)


@pytest.mark.parametrize("kwargs", [{"radius_mm": -1}, {"borehole_radius_mm": 50}, {"borehole_depth_mm": 90},
                                    {"nplus_free_radius_mm": 41}, {"borehole_fccd_fraction": 0}, {"height_mm": np.nan}])
def test_impossible_crystals_are_refused(kwargs):
    with pytest.raises(ConfigError):
        Crystal(**kwargs)


@pytest.mark.parametrize("kwargs", [{"endcap_material": "cheese"}, {"source_to_endcap_mm": 0}, {"wrap_thickness_mm": 7},
                                    {"source_foil_mm": -1}])
def test_impossible_setups_are_refused(kwargs):
    with pytest.raises(ConfigError):
        Setup(**kwargs)


def test_germanium_against_the_reference_table():
    energy = np.array([31, 53, 81, 161, 276, 356, 384])
    photo, compton, rayleigh = cross_sections("Ge")(energy)
    total = photo + compton + rayleigh
    assert np.allclose(1 / total, [0.15, 0.67, 2.04, 8.4, 15.6, 18.7, 19.6], rtol=0.02)
    assert np.allclose(photo / total, [0.96, 0.90, 0.79, 0.41, 0.15, 0.088, 0.075], atol=0.006)
    through = [0.001, 0.22, 0.612, 0.89, 0.94, 0.948, 0.95]
    assert np.allclose(cross_sections("Ge").transmission(energy, 1.0), through, atol=0.003)
    mu = np.array(cross_sections("Ge")(356.01)) / 0.5323
    assert np.allclose(mu, [0.008849, 0.086901, 0.004614], rtol=1e-3)  # cm²/g


def test_aluminium_and_the_edge_of_germanium():
    through = cross_sections("Al").transmission([31, 53, 81, 356], 1.5)
    assert np.allclose(through, [0.64, 0.868, 0.918, 0.959], atol=0.004)
    below, above = cross_sections("Ge")(11.10)[0], cross_sections("Ge")(11.107)[0]
    assert above / below == pytest.approx(7.39, rel=0.02)
    for name, (_, fractions) in MATERIALS.items():
        assert sum(fractions.values()) == pytest.approx(1), name
        assert (np.diff(cross_sections(name).energy_keV) > 0).all()
    assert cross_sections("Ge") is cross_sections("Ge")
    with pytest.raises(ConfigError, match="Ge, Al"):
        cross_sections("cheese")


def test_scattering_functions_have_their_limits():
    q, s, f = scattering_functions(32)
    assert s[0] < 1e-3 and s[-1] == pytest.approx(1, abs=0.01) and f[0] == pytest.approx(32, rel=1e-3) and f[-1] < 0.1
    assert (np.diff(q) > 0).all() and (np.diff(f) < 1e-3).all()


REBOOST = [  # depth, fccd, dlf, activeness by the definition of reboost's piecewise_linear_activeness
    (0.0, 1.0, 0.0, 0.0), (0.0, 1.0, 0.5, 0.0), (0.5, 1.0, 0.5, 0.0), (0.75, 1.0, 0.5, 0.5), (1.0, 1.0, 0.5, 1.0),
    (1.5, 1.0, 0.5, 1.0), (0.3, 1.0, 0.0, 0.3), (0.9, 1.2, 0.25, 2 / 3), (1.0, 1.0, 1.0, 0.0),
    (1.0 + 1e-9, 1.0, 1.0, 1.0),
    (0.0, 0.0, 0.5, 0.0), (1e-9, 0.0, 0.5, 1.0), (np.nan, 1.0, 1.0, 1.0), (np.nan, 0.0, 0.0, 1.0),
]


@pytest.mark.parametrize("depth, fccd, dlf, expected", REBOOST)
def test_linear_activeness_follows_the_definition(depth, fccd, dlf, expected):
    assert linear_activeness(np.array([depth]), fccd, dlf)[0] == pytest.approx(expected)
    assert linear_activeness(torch.tensor([depth], dtype=torch.float64), fccd, dlf)[0].item() == pytest.approx(expected)


def test_linear_activeness_agrees_with_reboost():
    math = pytest.importorskip("reboost.math")
    depth = np.random.default_rng(0).uniform(0, 2, 1000)
    depth[:3] = np.nan, 0.5, 1.0
    for fccd, dlf in ((1.0, 0.5), (0.7, 1.0), (1.5, 0.0)):
        theirs = np.asarray(math.piecewise_linear_activeness(depth, fccd, dlf))
        assert np.allclose(linear_activeness(depth, fccd, dlf), theirs)


def test_linear_activeness_broadcasts_and_keeps_dtype_and_gradient():
    depth = torch.linspace(0, 2, 50)
    fccd = torch.tensor([[0.5], [1.0]], requires_grad=True)
    a = linear_activeness(depth, fccd, 0.5)
    assert a.shape == (2, 50) and a.dtype == torch.float32
    a.sum().backward()
    assert torch.isfinite(fccd.grad).all() and (fccd.grad < 0).all()
    n = linear_activeness(depth.numpy(), fccd.detach().numpy(), 0.5)
    assert n.shape == (2, 50) and np.allclose(n, a.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("fccd, dlf", [(-0.1, 0.5), (1, 1.1), (1, -0.1), (np.nan, 0.5), (1, np.nan), (np.inf, 0.5)])
def test_linear_activeness_refuses_nonsense(fccd, dlf):
    with pytest.raises(ConfigError):
        linear_activeness(np.array([1.0]), fccd, dlf)


@pytest.mark.parametrize("fccd, alpha, beta", [(1.0, 0.8, 0.3), (1.0, 1.0, 5.0), (1.3, 0.4, 0.4), (0.8, 0.3, 0.05)])
def test_exponential_linear_is_smooth_and_solves_its_equations(fccd, alpha, beta):
    d = np.linspace(0, fccd * 1.1, 5001)
    a = exponential_linear_activeness(d, fccd, alpha, beta)
    slope = np.diff(a[d < fccd]) / (d[1] - d[0])
    assert a[0] == pytest.approx(0, abs=1e-12) and (slope > -1e-9).all() and (a[d > fccd] == 1).all()
    assert np.abs(np.diff(slope)).max() < 3 * (d[1] - d[0]) / alpha / beta  # no kink before the FCCD
    assert slope[-1] == pytest.approx(1 / alpha, rel=1e-6)
    t = exponential_linear_activeness(torch.tensor(d), fccd, alpha, beta)
    assert np.allclose(t.numpy(), a)


def test_exponential_linear_limits():
    d = np.linspace(0, 1.5, 301)
    assert np.allclose(exponential_linear_activeness(d, 1.0, 0.4, 0.0), linear_activeness(d, 1.0, 0.6))
    assert np.allclose(exponential_linear_activeness(d, 1.0, 0.4, 1e-7), linear_activeness(d, 1.0, 0.6), atol=1e-6)
    assert np.allclose(exponential_linear_activeness(d, 1.0, 0.0, 0.0), linear_activeness(d, 1.0, 1.0))
    assert exponential_linear_activeness(np.array([np.nan, 0.1]), 0.0, 0.0, 0.0).tolist() == [1, 1]
    for bad in ((1.0, 1.2, 0.1), (1.0, 0.2, 0.5), (-1.0, 0.1, 0.1), (1.0, 0.5, -0.1)):
        with pytest.raises(ConfigError):
            exponential_linear_activeness(d, *bad)


def test_resolution():
    assert fwhm_keV(0.0) == pytest.approx(np.sqrt(0.32168))
    assert np.allclose(fwhm_keV(np.array([53, 161, 276, 356, 384])), [0.66, 0.82, 0.94, 1.031, 1.055], atol=0.015)


def test_decay_scheme_balances():
    lines = line_intensities()
    table = {53.162: 0.02199, 79.614: 0.0262, 80.998: 0.3406, 276.399: 0.07164, 302.851: 0.1833, 356.013: 0.6205,
             383.849: 0.0894}
    for energy, expected in table.items():
        assert lines[energy] == pytest.approx(expected, rel=0.03), energy
    assert lines[30.973] / lines[30.625] == pytest.approx(0.525 / 0.284)
    assert sum(v for e, v in lines.items() if e < 40) == pytest.approx(1.215, rel=0.04)
    assert sum(p for _, p, _ in CAPTURE) == pytest.approx(1)
    for t in TRANSITIONS:
        assert LEVELS_KEV[t.upper] - LEVELS_KEV[t.lower] == pytest.approx(t.energy_keV, abs=0.01)
        assert 0 < t.alpha_k < t.alpha
