"""The trap: closed forms, the Lorentz force, real tracks, published numbers, derivatives, and bad input."""
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.constants import c as LIGHT
from scipy.constants import mu_0
from scipy.integrate import solve_ivp
from scipy.special import ellipe, ellipk, jv

from deadlayer_cres.core import ELECTRON_MASS_EV, ConfigError, DataError
from deadlayer_cres.cres import trap as module
from deadlayer_cres.cres.trap import (
    BathtubTrap,
    BoxTrap,
    Cavity,
    CoilTrap,
    FieldMapTrap,
    HarmonicTrap,
    Trap,
    axial_motion,
    chirp_rate,
    comb,
    cyclotron_frequency,
    default_trap,
    energy_from_frequency,
    larmor_power,
    locust_power,
    orbit,
    pitch_weight,
    purcell_power,
    read_field_map,
)

F64 = torch.float64
PITCH = torch.tensor([85, 87.5, 89, 89.9, 89.99], dtype=F64)
ENERGY = torch.tensor([1e3, 17830, 18600, 30000, 1e5], dtype=F64)


def published(name):
    for place in (os.environ.get("DEADLAYER_CRES_DATA", ""),):
        for folder in (Path(place), Path(place) / "cres"):
            if place and (folder / name).exists():
                return folder / name
    pytest.skip(f"the published file {name} is not here")


def speed(energy):
    return LIGHT * torch.sqrt(1 - (1 + energy / ELECTRON_MASS_EV) ** -2)


def close(found, expected, rtol, atol=0.0):
    found, expected = (torch.as_tensor(v, dtype=F64) for v in (found, expected))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


# ---- laws


def test_frequency_and_power_of_the_facts():
    f = cyclotron_frequency(np.array([18500.0, 18600, 18700]), 0.959)
    assert np.allclose(f / 1e9, [25.9069, 25.9020, 25.8971], atol=6e-5)
    assert np.allclose(energy_from_frequency(f, 0.959), [18500, 18600, 18700], rtol=1e-10)
    assert larmor_power(18600.0, 90.0, 0.959) == pytest.approx(1.08e-15, rel=5e-3)
    assert larmor_power(18600.0, 90.0, 1.0) == pytest.approx(1.18e-15, rel=5e-3)
    assert larmor_power(18600.0, 30.0, 1.0) == pytest.approx(larmor_power(18600.0, 90.0, 1.0) / 4)
    tensor = larmor_power(torch.tensor([18600.0], dtype=F64), torch.tensor([60.0], dtype=F64), 1.0)
    assert tensor.item() == pytest.approx(larmor_power(18600.0, 60.0, 1.0))


def test_chirp_is_the_derivative_of_the_frequency():
    power, dt = larmor_power(18600.0, 90.0, 0.959), 1e-4
    loss = power * dt / 1.602176634e-19
    rise = cyclotron_frequency(18600 - loss, 0.959) - cyclotron_frequency(18600.0, 0.959)
    chirp = chirp_rate(power, 18600.0, cyclotron_frequency(18600.0, 0.959))
    assert rise / dt == pytest.approx(chirp, rel=1e-5)
    assert chirp == pytest.approx(0.330e9, rel=2e-3)


def test_chirp_of_real_tracks():
    uproot = pytest.importorskip("uproot", reason="reading run 7031 needs the package uproot: pip install uproot")
    slopes = uproot.open(published("events_7031.root"))["procTracks"]["fSlope"].array(library="np")
    median = np.median(slopes)
    assert len(slopes) == 339 and median == pytest.approx(0.328e9, rel=5e-3)
    assert chirp_rate(larmor_power(18600.0, 90.0, 0.959), 18600.0, 25.902e9) == pytest.approx(median, rel=0.02)


# ---- the cavity


def test_coupling_and_response():
    c = Cavity()
    r = torch.linspace(0, c.radius_m, 4001, dtype=F64)
    g = c.coupling(r, 0 * r)
    assert g.max().item() == pytest.approx(1, abs=1e-6)
    assert r[g.argmax()].item() == pytest.approx(c.best_radius_m, abs=2e-6)
    outside = torch.tensor([[c.radius_m, 1.0, 3e-3, 3e-3], [0, 0, c.length_m / 2, -1]], dtype=F64)
    assert (c.coupling(*outside) == 0).all()
    r = torch.tensor([5e-4, 2e-3, 5e-3, 6.5e-3], dtype=F64)
    relative = Cavity(radius_m=7e-3).coupling(r, 0 * r) ** 2
    close(relative, [0.054, 0.651, 0.546, 0.038], rtol=0, atol=6e-4)
    f0 = c.resonance_Hz
    h = c.response(torch.tensor([f0, f0 * (1 + 0.5 / 400), f0 * (1 - 0.5 / 400)], dtype=F64))
    close(h.abs() ** 2, [1, 0.5, 0.5], rtol=2e-3)
    assert h[1].angle() < 0 < h[2].angle()  # it lags above resonance
    assert Cavity(radius_m=7e-3, length_m=0.1).cylinder_resonance_Hz == pytest.approx(26.16e9, rel=1e-3)
    closed = Cavity(resonance_Hz=None)
    assert closed.response(torch.tensor(closed.cylinder_resonance_Hz, dtype=F64)).abs().item() == pytest.approx(1)


def test_powers_in_the_cavity():
    c = Cavity(length_m=0.1, resonance_Hz=25.9e9)
    r = torch.tensor([0.5, 1, 2, 3.4, 5, 6], dtype=F64) * 1e-3
    g = c.coupling(r, 0 * r) ** 2
    close(purcell_power(18600.0, 90.0, 25.9e9, c, g) * 1e15, [0.31, 1.18, 3.77, 5.87, 3.34, 1.00], rtol=0, atol=0.011)
    volume = torch.tensor(0.0, dtype=F64)  # the normalisation of the mode by brute force
    edges = torch.linspace(0, c.radius_m, 2001, dtype=F64)
    middle = (edges[1:] + edges[:-1]) / 2
    volume = (c.coupling(middle, 0 * middle) ** 2 * 2 * math.pi * middle).sum() * edges.diff()[0] * c.length_m / 2
    v = speed(torch.tensor(18600.0, dtype=F64))
    direct = (1.602176634e-19 * v) ** 2 * 400 / volume / (2 * 8.8541878188e-12 * 2 * math.pi * 25.9e9)
    close(purcell_power(18600.0, 90.0, 25.9e9, c), direct, rtol=1e-6)
    free = larmor_power(18600.0, 90.0, 0.959)
    far, on = (locust_power(18600.0, 90.0, f, 0.959, c).item() / free for f in (40e9, 25.9e9))
    assert on == pytest.approx(1 + 3 * 4 / math.pi**2) and far == pytest.approx(1, abs=1e-3)
    assert locust_power(18600.0, 90.0, 25.9e9, 0.959, c, 0.0).item() == pytest.approx(free)


# ---- closed forms


def test_harmonic_trap():
    o = orbit(HarmonicTrap(0.959, 0.2), ENERGY, PITCH, 0.0)
    angle = PITCH * math.pi / 180
    f_a, z = speed(ENERGY) * angle.sin() / 0.2 / (2 * math.pi), 0.2 / angle.tan()
    close(o.motion.axial_frequency_Hz, f_a, rtol=1e-10)
    close(o.motion.z_max_m, z, rtol=1e-11)  # tan near 90 degrees rounds
    close(o.motion.z_min_m, -z, rtol=1e-11)
    f_c = cyclotron_frequency(ENERGY, 0.959)
    close(o.motion.carrier_frequency_Hz, f_c * (1 + 0.5 / angle.tan() ** 2), rtol=1e-13)
    index = -f_c * z**2 / (4 * 0.2**2 * f_a)
    close(o.modulation / index[:, None], (2 * o.axial_phase).sin(), rtol=0, atol=1e-9)
    close(o.z_m / z[:, None], o.axial_phase.sin(), rtol=0, atol=1e-10)
    close(o.weight.sum(1), torch.ones(5), rtol=1e-12)
    order = torch.arange(-12, 13, 2)
    lines = module._lines(o, torch.ones_like(o.z_m), order, True)
    close(lines[1:].real, jv(order.numpy() / 2, index[1:, None].numpy()), rtol=0, atol=1e-9)


def test_bathtub_trap():
    L0, L1 = 0.2, 0.05
    o = orbit(BathtubTrap(0.959, L0, L1), ENERGY, PITCH, 0.0)
    angle = PITCH * math.pi / 180
    longer = 1 + L1 * angle.tan() / (math.pi * L0)
    f_a, cot = speed(ENERGY) * angle.sin() / L0 / (2 * math.pi) / longer, 1 / angle.tan()
    close(o.motion.axial_frequency_Hz, f_a, rtol=1e-9)
    f_c, shift = cyclotron_frequency(ENERGY, 0.959), cot**2 / 2 / longer
    close(o.motion.carrier_frequency_Hz, f_c * (1 + shift), rtol=1e-12)
    flat = o.z_m < L1 / 2  # the phase falls behind evenly where the field is flat
    expected = -2 * math.pi * (f_c * shift)[:, None] * o.z_m / (speed(ENERGY) * angle.cos())[:, None]
    scale = expected.abs().amax(1, keepdim=True)
    assert ((o.modulation - expected).abs() / scale)[flat].max() < 1e-9
    close(BathtubTrap(0.959, L0, 0.0).field(0.0, 0.07), HarmonicTrap(0.959, L0).field(0.0, 0.07), rtol=1e-15)


def test_box_trap():
    m = axial_motion(BoxTrap(0.959, 0.13, 1.268e-3), 18600.0, [87.9, 88.0, 89.0, 90.0], 0.0)
    assert m.trapped.tolist() == [False, True, True, True]
    angle = torch.tensor([88.0, 89.0], dtype=F64) * math.pi / 180
    close(m.axial_frequency_Hz[1:3], speed(torch.tensor(18600.0, dtype=F64)) * angle.cos() / 0.26, rtol=1e-10)
    close(m.carrier_frequency_Hz, [cyclotron_frequency(18600.0, 0.959)] * 4, rtol=1e-14)


# ---- coils


def test_loop_field_is_exact_and_regular_on_the_axis():
    rng = np.random.default_rng(0)
    a, r, z = rng.uniform(0.5, 2, 500), rng.uniform(1e-3, 3, 500), rng.uniform(-3, 3, 500)
    near, far = (a - r) ** 2 + z**2, (a + r) ** 2 + z**2
    keep = near / far > 0.0016
    K, E = ellipk(1 - near / far), ellipe(1 - near / far)
    b_z = (K + (a**2 - r**2 - z**2) / near * E) / np.sqrt(far)
    b_r = z / r * (-K + (a**2 + r**2 + z**2) / near * E) / np.sqrt(far)
    found = module._loop_field(*map(torch.tensor, (a, r, z)))
    size = np.hypot(b_z, b_r)
    for x, y in zip(found, (b_z, b_r), strict=True):
        assert np.abs((x.numpy() - y) / size)[keep].max() < 1e-11
    r = torch.zeros(3, dtype=F64, requires_grad=True)
    z = torch.tensor([0.0, 0.5, -1.0], dtype=F64)
    b_z, b_r = module._loop_field(torch.ones(3, dtype=F64), r, z)
    close(b_z.detach(), math.pi / (1 + z**2) ** 1.5, rtol=1e-14)
    slope = torch.autograd.grad(b_r.sum(), r)[0]
    close(slope, 1.5 * math.pi * z / (1 + z**2) ** 2.5, rtol=1e-13, atol=1e-15)  # -half of dB_z/dz


def test_coil_at_its_centre():
    demo = CoilTrap(0.958709, [-0.03, 0.03], [0.004, 0.004], [400.0, 400.0])
    alone = mu_0 * 400 / (2 * 0.004)
    assert float(demo.field(0.0, 0.03)) - 0.958709 == pytest.approx(alone, rel=1e-3)


def lorentz(trap, energy, pitch, radius, seconds, rtol=1e-8):
    "Axial and cyclotron frequency from half a swing of the Lorentz force, in a frame that turns with the background."
    z0, a, current = (np.asarray(v)[:, None] for v in (trap.z_m, trap.radius_m, trap.current_A))
    k, n = LIGHT**2 / (ELECTRON_MASS_EV + energy), len(energy)
    w, v = k * trap.background_T, LIGHT * np.sqrt(1 - (1 + energy / ELECTRON_MASS_EV) ** -2)

    def loops(r, z):
        far, near = (a + r) ** 2 + (z - z0) ** 2, (a - r) ** 2 + (z - z0) ** 2
        K, E, f = ellipk(1 - near / far), ellipe(1 - near / far), mu_0 * current / (2 * np.pi * np.sqrt(far))
        axial = f * (K + (a**2 - r**2 - (z - z0) ** 2) / near * E)
        return axial.sum(0), (f * (z - z0) / r * (-K + (a**2 + r**2 + (z - z0) ** 2) / near * E)).sum(0)

    def rate(t, y):
        X, U, z, vz = y.reshape(4, -1)
        turn = np.exp(1j * w * t)
        x = X - 1j * U * turn / w
        b_z, b_r = loops(abs(x), z.real)
        across = b_r * x / abs(x)
        kick = 1j * k * (b_z * U * turn - vz * across)
        return np.concatenate([1j * kick / w, kick / turn, vz, -k * ((U * turn).conj() * across).imag])

    U = 1j * v * np.sin(np.radians(pitch))
    larmor = abs(U) / (k * (trap.background_T + loops(radius, 0.0)[0]))
    start = np.concatenate([radius + larmor + 1j * U / w, U, 0 * U, v * np.cos(np.radians(pitch)) + 0j])
    home = [lambda t, y, i=i: y[2 * n + i].real for i in range(n)]
    for h in home:
        h.direction = -1
    atol = rtol * np.repeat([1e-3, 1e8, 1e-2, 1e6], n)
    s = solve_ivp(rate, (0, seconds), start, method="DOP853", rtol=rtol, atol=atol, events=home)
    f_a, f_c = [], []
    for i in range(n):
        t, u = s.t_events[i][-1], s.y_events[i][-1][n + i]
        part = s.t < t
        angle = np.unwrap(np.angle(np.append(s.y[n + i][part], u) / U[i]))[-1]
        f_a.append(0.5 / t)
        f_c.append((w[i] + angle / t) / (2 * np.pi))
    return np.array(f_a), np.array(f_c)


def test_lorentz_force():
    energy, pitch, radius = np.array([18600.0, 18550]), np.array([88.15, 88.6]), np.array([1.5e-3, 5e-3])
    trap = default_trap()
    f_a, f_c = lorentz(trap, energy, pitch, radius, 0.069e-6)
    m = axial_motion(trap, energy, pitch, radius)
    close(m.axial_frequency_Hz, f_a, rtol=2e-6)
    close(m.carrier_frequency_Hz, f_c, rtol=4e-9)


# ---- the default trap

TABLE = np.array([  # pitch, axial frequency in MHz, carrier shift in MHz, bias in eV
    [89.9, 1.38, 0.022, 0.5], [89.8, 2.24, 0.08, 1.6], [89.6, 3.45, 0.33, 6.8], [89.3, 4.83, 1.07, 22],
    [89.0, 6.02, 2.18, 45], [88.7, 7.09, 3.67, 75], [88.5, 7.73, 4.91, 100], [88.4, 8.02, 5.64, 115],
    [88.3, 8.26, 6.48, 133], [88.2, 8.45, 7.48, 153], [88.1, 8.53, 8.76, 179], [88.0, 8.37, 10.7, 218],
    [87.95, 7.98, 12.5, 256]])


def test_default_trap_reproduces_the_table_the_fold_and_the_edge():
    trap = default_trap()
    m, f0 = axial_motion(trap, 18600.0, TABLE[:, 0], 0.0), cyclotron_frequency(18600.0, float(trap.field(0.0, 0.0)))
    close(m.axial_frequency_Hz / 1e6, TABLE[:, 1], rtol=0, atol=0.08)
    close(m.axial_frequency_Hz[2:] / 1e6, TABLE[2:, 1], rtol=0, atol=0.05)
    close((m.carrier_frequency_Hz - f0) / 1e6, TABLE[:, 2], rtol=0, atol=0.035)
    assert float(trap.field(0.0, 0.0)) == pytest.approx(0.95901, abs=2e-6)
    theta = np.arange(87.88, 88.4, 0.001)
    m = axial_motion(trap, 18600.0, theta, 0.0)
    assert theta[m.axial_frequency_Hz.argmax()] == pytest.approx(88.1, abs=0.03)
    assert theta[m.trapped.numpy()][0] == pytest.approx(87.921, abs=0.005)
    assert (m.trapped.diff().int() >= 0).all()


def test_default_trap_is_lowest_at_its_centre():
    trap, z = default_trap(), torch.linspace(0, 0.05, 501, dtype=F64)
    for radius in np.linspace(0, 6.5e-3, 14):
        assert (trap.field(radius, z).diff() > 0).all()


def test_pitch_density_of_the_published_simulations():
    angle, density = np.load(published("pitch_pdf.npy"))
    keep = angle > 88.1
    ours = sum(r * pitch_weight(default_trap(), 18600.0, angle[keep], r * 1e-3) for r in range(1, 7)).numpy()
    ratio = ours / ours.sum() / (density[keep] / density[keep].sum())
    assert abs(ratio[angle[keep] < 89.8] - 1).max() < 0.1  # the published coils are unknown


# ---- the comb


def test_comb_is_the_wave():
    "The wave in closed form, in a harmonic trap with a cavity; the conventions of both phases."
    trap, cavity, pitch, phase0, phase = HarmonicTrap(0.959, 1.0), Cavity(quality_factor=0.0), 87.5, -2.0, 0.4
    c = comb(trap, cavity, 18600.0, pitch, 2e-3, phase0, phase, orders=range(-60, 61, 2))
    f_a, f_c = c.motion.axial_frequency_Hz.item(), c.motion.carrier_frequency_Hz.item()
    t = torch.linspace(0, 1e-6, 700, dtype=F64)
    axial, z_max = 2 * math.pi * f_a * t + phase0, 1 / math.tan(math.radians(pitch))
    z, index = z_max * axial.sin(), -cyclotron_frequency(18600.0, 0.959) * z_max**2 / (4 * f_a)
    sine = math.sin(math.radians(pitch)) * (1 + z**2).sqrt()
    g = cavity.coupling(2e-3 * math.sin(math.radians(pitch)) / sine, z) * sine  # on the flux tube
    direct = g * torch.exp(1j * (index * (2 * axial).sin() + phase))
    lines = (c.amplitude[0] * torch.exp(2j * math.pi * (c.frequency_Hz[0] - f_c) * t[:, None])).sum(1)
    assert (direct - lines).abs().max() < 2e-9 and abs(index) > 0.9


def test_comb_lines_response_and_units():
    trap, cavity = default_trap(), Cavity()
    c = comb(trap, cavity, 18600.0, [88.5, 89.5], 4e-3, [0.3, 1.0], [0.1, -2.0], orders=[-2, -1, 0, 3, 4])
    assert c.order.tolist() == [-2, -1, 0, 3, 4] and c.amplitude.dtype == torch.complex128
    carrier, axial = (v[:, None] for v in c.motion[4:2:-1])
    close(c.frequency_Hz, carrier + c.order * axial, rtol=1e-15)
    assert (c.amplitude[:, [1, 3]] == 0).all() and (c.amplitude[:, [0, 2, 4]] != 0).all()
    plain = comb(trap, Cavity(quality_factor=0.0), 18600.0, [88.5, 89.5], 4e-3, orders=[-2, -1, 0, 3, 4])
    axial, cyclotron = torch.tensor([[[0.3], [1.0]], [[0.1], [-2.0]]], dtype=F64)
    expected = plain.amplitude * torch.exp(1j * (c.order * axial + cyclotron)) * cavity.response(c.frequency_Hz)
    torch.testing.assert_close(c.amplitude, expected, rtol=1e-12, atol=1e-14)
    assert plain.amplitude.imag.abs().max() == 0
    tuned = Cavity(resonance_Hz=cyclotron_frequency(18600.0, float(trap.field(3.4e-3, 0.0))))
    best = comb(trap, tuned, 18600.0, 90.0, 3.397e-3)
    assert best.amplitude.abs().max().item() == pytest.approx(1, abs=1e-5)
    wide = comb(trap, Cavity(quality_factor=0.0), 18600.0, 88.5, 4e-3, orders=range(-50, 51, 2))
    o = orbit(trap, 18600.0, 88.5, 4e-3)
    parseval = (o.weight * (o.sine * cavity.coupling(o.radius_m, o.z_m)) ** 2).sum(1)
    close((wide.amplitude.abs() ** 2).sum(1), parseval, rtol=1e-9)


def test_powers_and_slopes_of_the_comb():
    args = default_trap(), Cavity(), 18600.0, [88.5, 89.9], 3.4e-3
    free = comb(*args)
    close(free.slope_Hz_per_s, chirp_rate(free.power_W, 18600.0, free.motion.carrier_frequency_Hz), rtol=1e-14)
    close(free.slope_Hz_per_s / 1e9, [0.33, 0.33], rtol=5e-3)
    purcell, locust = (comb(*args, power=p).power_W / free.power_W for p in ("purcell", "locust"))
    assert (purcell > 1).all() and (purcell < 4).all() and (locust > 1).all() and (locust < 2.3).all()
    assert purcell[1] > purcell[0]  # flat electrons stay where the mode is strong
    with pytest.raises(ConfigError, match="larmor, purcell or locust"):
        comb(*args, power="Larmor")


def test_same_result_for_any_batch():
    rng = np.random.default_rng(3)
    low, high = (18500, 87.6, 0, 0, 0), (18700, 90, 6.5e-3, 6, 6)
    args = rng.uniform(low, high, (40, 5)).T
    trap, cavity = default_trap(), Cavity()
    whole = comb(trap, cavity, *args)
    for i in (0, 17, 39):
        one = comb(trap, cavity, *(a[i] for a in args))
        close(one.frequency_Hz[0], whole.frequency_Hz[i], rtol=1e-14)
        torch.testing.assert_close(one.amplitude[0], whole.amplitude[i], rtol=1e-9, atol=1e-12)


def test_untrapped_electrons_have_no_signal_and_no_nan():
    pitch = torch.tensor([20.0, 87.0, 87.91, 87.9185, 88.5, 90.0], dtype=F64, requires_grad=True)
    radius = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=F64, requires_grad=True)
    c = comb(default_trap(), Cavity(), 18600.0, pitch, radius + 1e-3 * torch.arange(6))
    trapped = c.motion.trapped
    assert trapped.tolist() == [False, False, True, True, True, True]
    values = [c.frequency_Hz, c.amplitude.real, c.amplitude.imag, c.power_W, c.slope_Hz_per_s, *c.motion[1:]]
    assert all(v.isfinite().all() for v in values)
    for v in (c.amplitude, c.power_W, c.slope_Hz_per_s, c.motion.axial_frequency_Hz, c.motion.z_max_m):
        assert (v[~trapped] == 0).all() and (v[trapped] != 0).any()
    (sum(v.sum() for v in values)).backward()
    assert pitch.grad.isfinite().all() and radius.grad.isfinite().all() and (pitch.grad[4] != 0)


def test_electron_that_escapes_on_one_side():
    trap = CoilTrap(0.959, [-0.065, 0.065], [0.016, 0.016], [40.0, 25.0], symmetric=False)
    pitch = torch.tensor([88.0, 89.0], dtype=F64, requires_grad=True)
    c = comb(trap, Cavity(), 18600.0, pitch, 2e-3)
    assert c.motion.trapped.tolist() == [False, True]
    path = orbit(trap, 18600.0, pitch, 2e-3)
    assert all(v.isfinite().all() for v in (c.frequency_Hz, c.amplitude.real, c.slope_Hz_per_s, *path[1:]))
    (c.amplitude.abs().square().sum() + c.frequency_Hz.sum()).backward()
    assert pitch.grad.isfinite().all()


def test_ninety_degrees_is_the_limit():
    m = axial_motion(default_trap(), 18600.0, [90.0, 89.9995, 89.999], 2e-3)
    assert m.trapped.all() and (m.axial_frequency_Hz.diff() >= -1e-4 * m.axial_frequency_Hz[0]).all()
    close(m.axial_frequency_Hz[:1], m.axial_frequency_Hz[1:2], rtol=1e-4)
    close(m.carrier_frequency_Hz[:1], cyclotron_frequency(18600.0, m.mean_field_T[:1]), rtol=1e-14)


# ---- derivatives


def outputs(energy, pitch, radius, axial, cyclotron, background, current, place):
    base = default_trap()
    trap = CoilTrap(background, base.z_m * place, base.radius_m, base.current_A * current)
    c = comb(trap, Cavity(), energy, pitch, radius, axial, cyclotron, orders=[-2, 0, 4], power="purcell")
    m = c.motion
    return torch.cat([m.z_max_m * 1e3, m.axial_frequency_Hz / 1e6, (m.carrier_frequency_Hz - 25.9e9) / 1e6,
                      c.slope_Hz_per_s / 1e9, c.amplitude[0].real, c.amplitude[0].imag])


@pytest.mark.parametrize("pitch, radius", [(89.7, 1e-3), (88.6, 5e-3), (88.0, 3e-3)])
def test_derivatives(pitch, radius):
    at = torch.tensor([18600, pitch, radius, 0.4, 1.0, 0.959, 1.0, 1.0], dtype=F64)
    step = torch.tensor([10, 5e-4, 1e-5, 1e-3, 1e-3, 1e-6, 1e-4, 1e-4], dtype=F64)
    found = torch.stack(torch.autograd.functional.jacobian(lambda *p: outputs(*p), tuple(at)), 1)
    weights = (-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12)
    with torch.no_grad():
        columns = [sum(k * outputs(*(at + j * s)) for j, k in weights) / s.sum() for s in torch.diag(step)]
    expected = torch.stack(columns, 1)
    size = (expected * step).abs().amax(1, keepdim=True) / step  # a line hardly moved by one parameter is rounding
    error = (found - expected).abs() / (expected.abs() + 1e-3 * size)
    assert error.max() < 1e-5, error


def test_forward_mode_agrees():
    at = torch.tensor([18600, 88.6, 2e-3, 0.4, 1.0, 0.959, 1.0, 1.0], dtype=F64)
    ahead = torch.tensor([1, 1e-2, 1e-5, 0.1, 0.1, 1e-7, 1e-5, 1e-5], dtype=F64)
    forward = torch.func.jvp(lambda p: outputs(*p), (at,), (ahead,))[1]
    reverse = torch.stack(torch.autograd.functional.jacobian(lambda *p: outputs(*p), tuple(at)), 1) @ ahead
    close(forward, reverse, rtol=1e-7, atol=1e-9)


# ---- asymmetric traps, maps, a trap of one's own


class Tilted(Trap):
    background_T, reach_m, symmetric = 1.0, (-0.3, 0.3), False

    def excess(self, r_m, z_m):
        return z_m**2 * (1 + z_m) + 0 * r_m


def test_asymmetric_trap_against_the_equation_of_motion():
    c = comb(Tilted(), Cavity(quality_factor=0.0, length_m=0.6), 18600.0, 85.0, 3e-3, 0.5, 0.2, orders=range(-40, 41))
    low, high, f_a = (float(v[0]) for v in c.motion[1:4])
    target = 1 / math.tan(math.radians(85)) ** 2
    assert [z**2 * (1 + z) for z in (low, high)] == pytest.approx([target, target], rel=1e-12)
    v, B_t, f_c = float(speed(torch.tensor(18600.0, dtype=F64))), 1 + target, c.motion.carrier_frequency_Hz.item()

    def rate(t, y):
        z = y[0]
        return y[1], -0.5 * v**2 * (2 * z + 3 * z**2) / B_t, cyclotron_frequency(18600.0, 1 + z**2 * (1 + z)) - f_c

    t = np.linspace(0, 2 / f_a, 400)  # from the lower turning point
    s = solve_ivp(rate, (0, t[-1]), (low, 0, 0), t_eval=t, method="DOP853", rtol=1e-11, atol=[1e-13, 1e-6, 1e-9],
                  max_step=1e-9)
    assert s.y[0, -1] == pytest.approx(low, rel=1e-9) and abs(s.y[2, -1]) < 1e-7
    z, B = torch.tensor(s.y[0]), torch.tensor(1 + s.y[0] ** 2 * (1 + s.y[0]))
    coupling = Cavity(length_m=0.6).coupling(3e-3 / B.sqrt(), z).numpy() * np.sqrt(B.numpy() / B_t)
    direct = coupling * np.exp(2j * np.pi * s.y[2])
    order = c.order.to(F64)
    shift = torch.exp(1j * (order * (-math.pi / 2 - 0.5) - 0.2))  # the lower turning point is at -pi/2
    lines = (c.amplitude[0] * shift * torch.exp(2j * math.pi * order * f_a * torch.tensor(t)[:, None])).sum(1)
    assert abs(direct - lines.numpy()).max() < 1e-6
    assert c.amplitude[0, 41].abs() > 1e-3


def field_map():
    r, z = np.linspace(0, 8e-3, 17), np.linspace(0, 0.09, 181)
    return r, z, default_trap().field(r[:, None], z).numpy()


def test_field_map(tmp_path):
    r, z, B = field_map()
    rng = np.random.default_rng(1)
    args = np.full(60, 18600.0), rng.uniform(88, 90, 60), rng.uniform(0, 6.5e-3, 60)
    exact = axial_motion(default_trap(), *args)
    np.savez(tmp_path / "map.npz", r_m=r, z_m=z, field_T=B)
    rows = [f"{float(x)!r},{float(y)!r},{float(B[i, j])!r}" for i, x in enumerate(r) for j, y in enumerate(z)]
    rng.shuffle(rows)
    (tmp_path / "map.csv").write_text("\n".join(["r_m,z_m,field_T", *rows]) + "\n")
    for name in ("map.npz", "map.csv"):
        trap = read_field_map(tmp_path / name)
        assert trap.symmetric
        close(trap.field(r[:, None], z), B, rtol=1e-15)
        m = axial_motion(trap, *args)
        close(m.axial_frequency_Hz, exact.axial_frequency_Hz, rtol=2e-4)
        close(m.carrier_frequency_Hz, exact.carrier_frequency_Hz, rtol=2e-8)
    whole = FieldMapTrap(r, np.concatenate([-z[:0:-1], z]), np.concatenate([B[:, :0:-1], B], 1))
    close(axial_motion(whole, *args).axial_frequency_Hz, m.axial_frequency_Hz, rtol=1e-7)
    assert comb(whole, Cavity(), *args, orders=[1]).amplitude.abs().max() < 1e-6
    scale = torch.tensor(1.0, dtype=F64, requires_grad=True)
    axial_motion(FieldMapTrap(r, z, B, scale), *args).axial_frequency_Hz.sum().backward()
    step = [axial_motion(FieldMapTrap(r, z, B, s), *args).axial_frequency_Hz.sum() for s in (1 + 1e-5, 1 - 1e-5)]
    close(scale.grad, (step[0] - step[1]) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize("change, message", [
    (lambda r, z, B: (r + 1e-3, z, B), "radii from 0"),
    (lambda r, z, B: (r[::-1], z, B), "rising radii"),
    (lambda r, z, B: (r, z + 0.01, B), "around the centre"),
    (lambda r, z, B: (r, z, B[:-1]), "shape"),
    (lambda r, z, B: (r, z, np.where(B > B.max() - 1e-5, np.nan, B)), "finite field.*nan"),
    (lambda r, z, B: (r, z, -B), "above 0"),
    (lambda r, z, B: (r[:2], z, B[:2]), "at least 4"),
])
def test_bad_maps(change, message, tmp_path):
    with pytest.raises(DataError, match=message):
        FieldMapTrap(*change(*field_map()))
    np.savez(tmp_path / "bad.npz", **dict(zip(("r_m", "z_m", "field_T"), change(*field_map()), strict=True)))
    with pytest.raises(DataError, match="bad.npz"):
        read_field_map(tmp_path / "bad.npz")


def test_bad_map_files(tmp_path):
    head = "r_m,z_m,field_T\n"
    for name, text, message in (("a.csv", "r,z,B\n0,0,1\n", "KeyError"), ("b.csv", f"{head}0,0,x\n", "ValueError"),
                                ("c.csv", f"{head}0,0,1\n0,1,1\n1,0,1\n", "3 rows"), ("d.npz", "no", "field map"),
                                ("e.csv", head, "shape")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=message) as error:
            read_field_map(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(DataError, match="FileNotFoundError"):
        read_field_map(tmp_path / "missing.csv")
    with pytest.raises(DataError, match="cyclotron orbit included"):
        axial_motion(FieldMapTrap(*field_map()), 18600.0, 89.0, 7.9e-3)


@pytest.mark.parametrize("electron, row", [
    ((18600.0, 90.001, 0.0), "row 0"), ((18600.0, 0.0, 0.0), "row 0"), ((-1.0, 89.0, 0.0), "row 0"),
    ((18600.0, 89.0, -1e-3), "row 0"),
    ((18600.0, [89.0, math.nan], 0.0), "row 1"), (([18600.0, 1.0, math.inf], 89.0, 0.0), "row 2"),
    (([18600.0, 1.0], [89.0, 89.0, 89.0], 0.0), "equal length"), (([[18600.0]], 89.0, 0.0), "one-dimensional"),
])
def test_impossible_electrons(electron, row):
    with pytest.raises(DataError, match=row):
        comb(default_trap(), Cavity(), *electron)
    with pytest.raises(DataError, match=row):
        axial_motion(HarmonicTrap(), *electron)


def test_bad_traps_and_cavities():
    with pytest.raises(ConfigError, match="one position"):
        CoilTrap(1.0, [0.1, -0.1], [0.01], [1.0, 1.0])
    with pytest.raises(ConfigError, match="symmetric=False"):
        CoilTrap(1.0, [0.1, -0.1], [0.01, 0.011], [1.0, 1.0])
    CoilTrap(1.0, [0.1, -0.1], [0.01, 0.011], [1.0, 1.0], symmetric=False)
    with pytest.raises(ConfigError, match="positive radius"):
        Cavity(radius_m=0.0)
    with pytest.raises(DataError, match="row 0"):
        comb(default_trap(), Cavity(), 18600.0, 89.0, 0.0, math.nan)


@pytest.mark.parametrize("content", [b"PK\x03\x04garbage", b"", b"r_m,z_m\n1,2\n", b"\x00\xff" * 50])
@pytest.mark.parametrize("name", ["map.npz", "map.csv"])
def test_damaged_field_maps_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read_field_map(tmp_path / name)


def test_no_electrons_and_impossible_resonances():
    made = comb(default_trap(), Cavity(), [], [], [])
    assert made.frequency_Hz.shape == (0, 13) and made.motion.trapped.shape == (0,)
    with pytest.raises(ConfigError, match="resonance_Hz"):
        Cavity(resonance_Hz=float("nan"))
