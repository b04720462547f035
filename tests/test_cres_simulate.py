"""The simulation against direct formulas, the laws it draws from, and itself: any batch, any order, after any kill."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from deadlayer_cres.core import ELECTRON_MASS_EV, ConfigError, DataError
from deadlayer_cres.cres import simulate
from deadlayer_cres.cres.data import EventStore, shared_data
from deadlayer_cres.cres.simulate import (
    CHECKSUMS,
    DRAWN,
    ELASTIC_M2,
    INELASTIC_M2,
    LABELS,
    TEST_SETS,
    ElectronConfig,
    EventStream,
    Noise,
    PitchLaw,
    ReceiverConfig,
    SimulateConfig,
    Simulator,
    TrackConfig,
    TrapConfig,
    drift,
    energy_loss_eV,
    mean_track_length_s,
    noise_sigma_V,
    numbered_noise,
    random_bits,
    read_noise_spectrum,
    read_table,
    scatter,
    set_checksum,
    simulate_events,
    simulate_store,
    test_set,
    uniforms,
    waveforms,
)
from deadlayer_cres.cres.trap import BoxTrap, HarmonicTrap, axial_motion, default_trap

FS, LO, SIGMA = 403e6, 25.9702e9, 0.0471

PINNED_BITS = [7304651795658354200, 17270885979503866812, 13298336128316543787]
PINNED_NOISE = [-0.717586935, -1.597030044]
PINNED_SUMS = {  # V, of 8 events: clean and noisy
    "cca-8k": (0.03543, 13.70785),
    "cca-24k": (0.01593, 4.84429),
}


def double(*values):
    return torch.tensor(*values, dtype=torch.float64)


def exact(f, a, slopes, samples, start=0.0, stop=math.inf):
    "The defining formula, sample by sample in double precision; (n, samples) complex."
    t = torch.arange(samples, dtype=torch.float64) / FS
    s = (t - start)[None, None]
    cycles = (f - LO)[..., None] * s + slopes.view(len(f), -1, 1) * s**2 / 2
    z = (a[..., None] * torch.exp(2j * math.pi * (cycles - cycles.round()))).sum(1)
    return z * ((t >= start) & (t < stop))


def some_lines(n=2, K=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    f = 25.9e9 + 40e6 * torch.rand(n, K, generator=g, dtype=torch.float64)
    a = 0.012 * torch.exp(2j * math.pi * torch.rand(n, K, generator=g, dtype=torch.float64))
    return f, a, 3.3e8 * (1 + 5 * torch.rand(n, generator=g, dtype=torch.float64))


@pytest.fixture(scope="module")
def simulator():
    return Simulator(SimulateConfig(seed=5, receiver=ReceiverConfig(samples=2048)), device="cpu")


GAS = SimulateConfig(seed=3, tracks=TrackConfig(-5e-6, 10e-6, mean_length_s=20e-6, max_tracks=4),
                     receiver=ReceiverConfig(samples=20_000))


# --- waveforms ---


@pytest.mark.parametrize("samples, block", [(163_840, 128), (1, 128), (8191, 100), (8192, 256)])
def test_waveforms_are_the_formula(samples, block):
    f, a, slope = some_lines()
    z = torch.complex(*waveforms(f, a, slope, samples, block=block).double().unbind(1))
    assert z.shape == (2, samples)
    assert (z - exact(f, a, slope, samples)).abs().max() < 2e-5 * SIGMA


def test_lines_may_have_slopes_of_their_own():
    "Within a block the mean slope is used: the error is bounded by the rest, and small for what a trap does."
    f, a, slope = some_lines()
    rest = 4e6 * torch.linspace(-1, 1, f.shape[1], dtype=torch.float64)
    z = torch.complex(*waveforms(f, a, slope[:, None] + rest, 163_840).double().unbind(1))
    bound = float((a.abs() * rest.abs()).sum(1).max()) * 2 * math.pi * 163_840 / FS * 64 / FS
    assert (z - exact(f, a, slope[:, None] + rest, 163_840)).abs().max() < 1.01 * bound
    table = {"pitch_angle_deg": [88.0, 88.05, 88.5, 89.0], "radius_m": [3e-3, 5e-3, 3e-3, 3e-3]}
    config = SimulateConfig(receiver=ReceiverConfig(samples=163_840))
    simulator = Simulator(config, table=table, device="cpu")
    t = simulator.tracks(4)[0]
    z = torch.complex(*simulator.signal(4)[0].double().unbind(1))
    want = exact(t.comb.frequency_Hz, 0.012 * t.comb.amplitude, t.slope_Hz_per_s, 163_840)
    assert (z - want).abs().max() < 1e-3 * SIGMA


def test_tracks_begin_and_end_within_the_record():
    f, a, slope = some_lines(1)
    for start, stop in ((3.3e-6, 9.1e-6), (-50e-6, 4e-6), (5 / FS, 17 / FS)):
        z = waveforms(f, a, slope, 4096, start_s=double([start]), stop_s=double([stop]))
        z = torch.complex(*z.double().unbind(1))
        want = exact(f, a, slope, 4096, start, stop)
        assert (z - want).abs().max() < 2e-5 * SIGMA
        assert torch.equal(z != 0, want != 0)


def test_waveforms_have_gradients():
    f, a, slope = some_lines(1, 3)
    weight = torch.randn(2, 2048, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for engine in (lambda *x: waveforms(*x, 2048).double(),
                   lambda *x: torch.view_as_real(exact(*x, 2048)).movedim(-1, 1)):
        inputs = [x.clone().requires_grad_() for x in (f, a, slope)]
        (engine(*inputs)[0] * weight).sum().backward()
        gradients.append([x.grad for x in inputs])
    for mine, direct in zip(*gradients, strict=True):
        assert (mine - direct).abs().max() < 1e-4 * direct.abs().max()


# --- noise ---


def test_random_bits_are_pinned_and_belong_to_the_event():
    bits = random_bits(1, "noise", 0, 50, 33)
    assert [int(x) for x in bits[7, :3]] == PINNED_BITS
    assert np.array_equal(random_bits(1, "noise", 20, 5, 33), bits[20:25])
    assert not np.array_equal(random_bits(1, "other", 0, 50, 33), bits)
    assert not np.array_equal(random_bits(2, "noise", 0, 50, 33), bits)


def test_numbered_noise_is_normal_and_pinned():
    x = numbered_noise(torch.arange(200), 4096, seed=4)
    assert np.allclose(x[3, :, 5].numpy(), PINNED_NOISE, atol=1e-6)
    assert torch.equal(numbered_noise(torch.arange(100, 103), 4096, seed=4), x[100:103])
    n = x.numel()
    for k, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x.double() ** k).mean() - moment) < 4.5 * math.sqrt(variance / n), k
    beyond = (x.abs() > 4).double().mean()
    assert beyond == pytest.approx(6.334e-5, rel=4 / math.sqrt(6.334e-5 * n))
    assert torch.isfinite(x).all()
    neighbours = (x[..., 1:] * x[..., :-1]).mean(), (x[1:] * x[:-1]).mean(), (x[:, 0] * x[:, 1]).mean()
    assert max(abs(v) for v in neighbours) < 5 * math.sqrt(2 / n)


def test_extreme_bits_give_finite_numbers(monkeypatch):
    for value in (0, 2**64 - 1):
        bits = np.full((1, 4), value, np.uint64)
        monkeypatch.setattr(simulate, "random_bits", lambda *args, bits=bits: bits)
        whole = torch.full((1, 4), value - (2**64 if value else 0), dtype=torch.int64)
        monkeypatch.setattr(simulate, "squares64", lambda *args, whole=whole: whole)
        assert torch.isfinite(numbered_noise(torch.zeros(1), 4, 0)).all()
        u = uniforms(0, "x", 0, 1, 4)
        assert ((u > 0) & (u < 1)).all()


def test_coloured_noise_has_its_spectrum():
    f = np.linspace(-FS / 2, FS / 2, 401)
    density = 1e-12 * (1 + np.exp(-((f - 50e6) / 30e6) ** 2))
    noise = Noise(spectrum=(f, density))
    x = noise.counted(400, 1024, seed=1)
    assert float(x.std()) == pytest.approx(noise.sigma_V, rel=0.01)
    power = torch.fft.fft(torch.complex(x[:, 0], x[:, 1])).abs().square().mean(0) / (2 * 1024 * FS)
    want = np.interp(np.fft.fftfreq(1024, 1 / FS), f, density)
    pull = (power.numpy() / want - 1) * math.sqrt(400)
    assert abs(pull.std() - 1) < 0.15 and abs(pull.mean()) < 0.2
    flat = Noise(spectrum=(f, np.full_like(f, SIGMA**2 / FS)))
    assert np.allclose(flat.counted(2, 512, 3), Noise(SIGMA).counted(2, 512, 3), atol=1e-6)
    assert noise_sigma_V(2.2e-13) == pytest.approx(SIGMA, rel=1e-3)


def test_fresh_noise_follows_the_generator():
    one, two = (Noise(0.5).fresh(4, 1000, torch.Generator().manual_seed(9)) for _ in range(2))
    assert torch.equal(one, two) and float(one.std()) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("text, row", [
    ("frequency_Hz,density_V2_per_Hz\n-3e8,1e-12\n3e8,-1e-12\n", 1),
    ("frequency_Hz,density_V2_per_Hz\n-3e8,1e-12\n-4e8,1e-12\n", None),
    ("frequency_Hz,density_V2_per_Hz\n-3e8,1e-12\n3e8,nan\n", 1),
    ("frequency_Hz,density_V2_per_Hz\n-3e8,1e-12\n3e8,a lot\n", 1),
    ("frequency_Hz,density_V2_per_Hz\n-3e8,1e-12\n3e8\n", 1),
    ("frequency_Hz,power\n-3e8,1\n3e8,1\n", None),
    ("frequency_Hz,density_V2_per_Hz\n", None),
])
def test_bad_noise_spectra_are_refused(tmp_path, text, row):
    path = tmp_path / "noise.csv"
    path.write_text(text)
    with pytest.raises(DataError) as e:
        read_noise_spectrum(path)
    assert e.value.path == path and e.value.row == row


def test_noise_spectrum_must_be_there_and_cover_the_band(tmp_path):
    with pytest.raises(DataError, match="readable CSV"):
        read_noise_spectrum(tmp_path / "none.csv")
    path = tmp_path / "narrow.csv"
    path.write_text("frequency_Hz,density_V2_per_Hz\n-1e8,1e-12\n1e8,1e-12\n")
    with pytest.raises(ConfigError, match="noise_spectrum"):
        Simulator(SimulateConfig(receiver=ReceiverConfig(noise_spectrum=str(path))), device="cpu")


# --- which electrons ---


def kolmogorov(x, cdf):
    "Largest distance of the sample `x` from a distribution function, times the root of its size; 1.95 is 1 in 1000."
    x = np.sort(np.asarray(x))
    return np.abs(cdf(x) - (np.arange(len(x)) + 0.5) / len(x)).max() * math.sqrt(len(x))


@pytest.mark.parametrize("trap, cdf", [
    (HarmonicTrap(0.959, 0.2), lambda a, low: (np.sin(a) - np.sin(low)) / (1 - np.sin(low))),
    (BoxTrap(0.959, 0.1, 5e-3), lambda a, low: 1 - np.cos(a) / np.cos(low)),
])
def test_pitch_law_has_the_closed_forms(trap, cdf):
    law = PitchLaw(trap, 86.0, 90.0, 5e-3)
    u = uniforms(0, "pitch", 0, 3000, 1)[:, 0]
    pitch = law.quantile(u, torch.full_like(u, 2e-3))
    assert np.abs(cdf(np.deg2rad(pitch.numpy()), np.deg2rad(86.0)) - u.numpy()).max() < 1e-4


def test_pitch_law_is_isotropic_emission_in_the_trap():
    "Electrons born anywhere on the axis, in any direction: no formula used but the conserved magnetic moment."
    trap, rng, n = default_trap(), np.random.default_rng(0), 4_000_000
    z = np.linspace(-0.066, 0.066, 20_001)[1::2]  # middles of 10,000 equal steps
    ratio = (trap.field(0.0, z) / trap.field(0.0, 0.0)).numpy()
    ratio = np.repeat(np.where(np.abs(z) < np.abs(z[ratio.argmax()]), ratio, np.inf), n // 10_000)
    cosine = rng.uniform(0, 0.05, n)  # of the local pitch angle; electrons beyond are not trapped
    keep = rng.random(n) < ratio.min() / ratio  # tube of field lines: its cross section is 1/B
    sine0 = (1 - cosine**2) / ratio  # squared
    pitch = np.rad2deg(np.arcsin(np.sqrt(sine0[keep & (sine0 < 1)])))
    pitch = pitch[pitch > 88.0]
    law = PitchLaw(trap, 88.0)
    assert len(pitch) > 100_000
    assert kolmogorov(pitch, lambda x: np.interp(x, law.pitch_deg, law.cdf[0])) < 1.95


def test_pitch_law_is_that_of_the_published_simulations():
    path = shared_data() and shared_data() / "pitch_pdf.npy"
    if not path or not path.is_file():
        pytest.skip("pitch_pdf.npy is not here")
    angle, pdf = np.load(path)
    middle = (angle > 88.5) & (angle < 89.85)
    law = PitchLaw(default_trap(), 88.0)
    ratio = pdf[middle] / np.interp(angle[middle], law.pitch_deg, law.pdf_per_deg[0])
    assert ratio.std() / ratio.mean() < 0.02


def test_pitch_law_needs_angles_that_are_trapped():
    with pytest.raises(ConfigError, match="pitch"):
        PitchLaw(default_trap(), 80.0, 85.0)
    law = PitchLaw(default_trap(), 87.0, 90.0, 0.0)  # on the axis only, and partly below the edge
    pitch = law.quantile(uniforms(0, "pitch", 0, 2000, 1)[:, 0], torch.zeros(2000, dtype=torch.float64))
    assert pitch.min() > 87.90 and pitch.max() < 90 and torch.isfinite(pitch).all()


def test_electrons_follow_their_distributions():
    simulator = Simulator(SimulateConfig(electrons=ElectronConfig(energy="triangular")), device="cpu")
    drawn = {k: v.numpy() for k, v in simulator.draw(20_000).items()}
    assert set(drawn) == set(DRAWN)
    x = (drawn["energy_eV"] - 18_500) / 200
    assert kolmogorov(x, lambda v: np.where(v < 0.5, 2 * v**2, 1 - 2 * (1 - v) ** 2)) < 1.95
    assert kolmogorov(drawn["radius_m"] / 6.5e-3, lambda v: v**2) < 1.95
    for k in ("radius_phase", "axial_phase", "cyclotron_phase"):
        assert kolmogorov(drawn[k] / (2 * np.pi) + 0.5, lambda v: v) < 1.95
    assert np.isinf(drawn["track_length_s"]).all() and (drawn["start_time_s"] == 0).all()
    names = [k for k in DRAWN[:6]]
    correlation = np.corrcoef([drawn[k] for k in names]) - np.eye(6)
    assert np.abs(correlation).max() < 4.5 / math.sqrt(20_000)
    config = SimulateConfig(electrons=ElectronConfig(pitch="flat", pitch_low_deg=88.5))
    flat = Simulator(config, device="cpu").draw(9000)
    assert kolmogorov((flat["energy_eV"] - 18_500) / 200, lambda v: v) < 1.95
    assert kolmogorov((flat["pitch_angle_deg"] - 88.5) / 1.5, lambda v: v) < 1.95


def test_gas_takes_energy_as_measured():
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    loss = energy_loss_eV(u, torch.full_like(u, 18.6e3)).numpy()
    e = np.linspace(5, 9300, 4_000_000)
    f = np.where(e < 14.09, 0.204 * np.exp(-2 * ((e - 12.6) / 1.85) ** 2),
                 0.0556 * 12.5**2 / (12.5**2 + 4 * (e - 14.30) ** 2))
    cdf = np.cumsum(f) / f.sum()
    assert f.sum() * (e[1] - e[0]) == pytest.approx(1, abs=0.01)  # the published parameters are normalised
    assert (np.diff(loss) > 0).all() and loss.max() < 9300
    assert np.abs(np.interp(loss, e, cdf) - u.numpy()).max() < 1e-3


def test_gas_turns_the_electrons():
    n = 200_000
    e, pitch = torch.full((n,), 18.6e3, dtype=torch.float64), torch.full((n,), 89.0, dtype=torch.float64)
    energy, after = scatter(e, pitch, uniforms(0, "gas", 0, n, 4))
    elastic = (energy == e).double().mean()
    share = ELASTIC_M2 / (ELASTIC_M2 + INELASTIC_M2)
    assert elastic == pytest.approx(share, abs=4 * math.sqrt(share / n))
    assert (energy <= e).all() and (after <= 90).all() and (after > 0).all()
    angle = (after - 89).abs()
    assert angle[energy == e].median() > 5 * angle[energy < e].median()  # elastic collisions turn more
    straight, same = scatter(e[:1], pitch[:1], double([[0.5, 0.3, 1e-12, 0.2]]))
    assert same == pytest.approx(89.0, abs=1e-4)
    assert mean_track_length_s(1e17) == pytest.approx(1 / (1e17 * 3.69e-22 * 7.875e7), rel=1e-3)


# --- tracks ---


@pytest.mark.parametrize("trap, axial_law, field_law", [
    # f_a is proportional to v sin(theta), the mean field to 1 + cot(theta)^2 / 2, the mean of cos^2 is half of it
    (HarmonicTrap(0.959, 0.2), lambda c: 1 + c**2 / 2, lambda c: -(c**2) / 2 / (1 - c**2 / 2)),
    # f_a is proportional to v cos(theta), the mean field is constant
    (BoxTrap(0.959, 0.1, 5e-3), lambda c: c**2, lambda c: 0 * c),
])
def test_drift_has_the_closed_forms(trap, axial_law, field_law):
    pitch, e = double([89.5, 88.0, 86.5]), torch.full((3,), 18.6e3, dtype=torch.float64)
    power = torch.full_like(e, 1.1e-15)
    carrier, axial = drift(trap, e, pitch, torch.zeros_like(e), power)
    rate, total = power / 1.602176634e-19, e + ELECTRON_MASS_EV  # eV/s and eV
    speed = -rate * total / (e * (e + 2 * ELECTRON_MASS_EV)) * (ELECTRON_MASS_EV / total) ** 2  # d ln v / dt
    motion = axial_motion(trap, e, pitch, torch.zeros_like(e))
    cosine = torch.deg2rad(pitch).cos()
    second_order = 1e-4 * speed.abs().max()  # of the loss of 1 eV
    assert (axial / motion.axial_frequency_Hz - speed * axial_law(cosine)).abs().max() < second_order
    want = rate / total + speed * field_law(cosine)
    assert (carrier / motion.carrier_frequency_Hz / want - 1).abs().max() < 1e-3


def test_events_do_not_depend_on_the_batch(simulator):
    whole = simulator.events(70, noise="added")
    for first, n in ((0, 1), (33, 7), (69, 1)):
        part = simulator.events(n, first, noise="added")
        assert np.allclose(part.ts, whole.ts[first:first + n], rtol=0, atol=1e-7)
        for k, v in part.columns.items():
            same = whole.columns[k][first:first + n]
            assert np.array_equal(v, same) if k in DRAWN[:6] else np.allclose(v, same, rtol=1e-11, atol=1e-18), k
    other = Simulator(SimulateConfig(seed=6, receiver=ReceiverConfig(samples=2048)), device="cpu").events(1)
    assert not np.array_equal(other.columns["energy_eV"], whole.columns["energy_eV"][:1])


def test_many_events_are_made_in_parts(simulator, monkeypatch):
    whole = simulator.events(30)
    monkeypatch.setattr(simulate, "_AT_ONCE", 8)
    assert np.allclose(simulator.events(30).ts, whole.ts, rtol=0, atol=1e-7)


def test_noise_is_added_or_kept(simulator):
    clean, noisy, kept = (simulator.events(5, 3, noise=kind) for kind in ("none", "added", "kept"))
    assert np.array_equal(clean.ts, kept.ts) and not clean.noise
    assert np.allclose(noisy.ts - clean.ts, kept.noise["gauss"], atol=1e-6)
    assert kept.noise["gauss"].std() == pytest.approx(SIGMA, rel=0.03)


def test_samples_and_columns_tell_the_same(simulator):
    long = Simulator(SimulateConfig(seed=2, electrons=ElectronConfig(radius_max_m=5e-3)), device="cpu")
    events = long.events(40)
    c = events.columns
    z = events.ts[:, 0].astype(float) + 1j * events.ts[:, 1]
    assert np.allclose(c["snr"], np.sqrt((np.abs(z) ** 2).sum(1) / (2 * SIGMA**2)), rtol=0.05)
    made = long.tracks(40)[0].comb
    strongest = made.amplitude.abs().argmax(1, keepdim=True)
    line = made.frequency_Hz.gather(1, strongest)[:, 0].numpy() - LO
    pad = 8 * 8192
    peak = np.fft.fftfreq(pad, 1 / FS)[np.abs(np.fft.fft(z, pad)).argmax(1)]
    assert np.abs(peak - line - 3.3e8 * 10e-6).max() < 0.3 * FS / 8192  # the middle of the rise
    assert np.allclose(c["slope_Hz"], 3.3e8, rtol=0.02)
    assert np.allclose(c["avg_carrier_frequency_Hz"] - c["start_carrier_frequency_Hz"],
                       c["slope_Hz"] * c["track_length_s"] / 2, rtol=1e-3)
    assert set(LABELS) | {"snr"} == set(c)


def test_collisions_link_the_tracks():
    simulator = Simulator(GAS, device="cpu")
    events = simulator.events(200)
    events.validate()
    c, duration = events.columns, 20_000 / FS
    count = c["tracks"]
    assert count.min() >= 1 and count.max() == 4
    for k in range(1, 4):
        has = count > k
        before = "" if k == 1 else f"_{k - 1}"
        end = c["start_time_s" + before] + c["track_length_s" + before]
        assert np.allclose(c[f"start_time_s_{k}"][has], end[has], rtol=1e-12)
        assert (np.diff([c["energy_eV" + before][has], c[f"energy_eV_{k}"][has]], axis=0) <= 0).all()
        assert all(np.isnan(c[f"{name}_{k}"][~has]).all() for name in LABELS)
        assert (c[f"start_time_s_{k}"][has] + c[f"track_length_s_{k}"][has] < duration * (1 + 1e-9)).all()
    z = np.abs(events.ts).max(1)
    t = np.arange(20_000) / FS
    for i in range(10):
        name = "" if count[i] == 1 else f"_{int(count[i]) - 1}"
        end = c["start_time_s" + name][i] + c["track_length_s" + name][i]
        assert not z[i][(t < c["start_time_s"][i]) | (t >= end)].any()
    energy = (z**2).sum()
    assert energy > 0
    power = (events.ts.astype(float) ** 2).sum((1, 2))
    assert np.allclose(c["snr"], np.sqrt(power / (2 * SIGMA**2)), rtol=0.1, atol=0.3)


def test_collisions_do_not_depend_on_the_batch():
    simulator = Simulator(GAS, device="cpu")
    whole, part = simulator.events(40), simulator.events(5, 20)
    assert np.allclose(part.ts, whole.ts[20:25], rtol=0, atol=1e-7)


def test_mean_track_length_is_what_was_asked():
    config = SimulateConfig(tracks=TrackConfig(mean_length_s=1e-6), receiver=ReceiverConfig(samples=8192))
    length = Simulator(config, device="cpu").draw(20_000)["track_length_s"]
    assert kolmogorov(length * 1e6, lambda v: 1 - np.exp(-v)) < 1.95


def test_long_records_use_the_drift_of_each_line():
    settings = {"table": {"energy_eV": [18.6e3], "pitch_angle_deg": [88.2], "radius_m": [3e-3]}, "device": "cpu"}
    short, long = (Simulator(SimulateConfig(receiver=ReceiverConfig(samples=s)), **settings).tracks(1)[0]
                   for s in (8192, 163_840))
    assert short.slope_Hz_per_s.shape == (1,) and long.slope_Hz_per_s.shape == long.comb.frequency_Hz.shape
    middle = long.comb.order.tolist().index(0)
    assert long.slope_Hz_per_s[0, middle] == pytest.approx(float(short.slope_Hz_per_s[0]), rel=0.02)
    spread = long.slope_Hz_per_s[0, middle + 1] - long.slope_Hz_per_s[0, middle]
    assert -3e6 < spread < -5e5  # twice the axial frequency falls by some 1 MHz/s


# --- tables and bad settings ---


def test_tables_replace_what_is_drawn(tmp_path):
    path = tmp_path / "electrons.csv"
    path.write_text("energy_eV, pitch_angle_deg,radius_m\n18600,89,0.003\n18500,88.5,0.001\n")
    config = SimulateConfig(electrons=ElectronConfig(table=str(path)), receiver=ReceiverConfig(samples=256))
    events = Simulator(config, device="cpu").events(2)
    assert events.columns["energy_eV"].tolist() == [18600, 18500]
    assert events.columns["radius_m"].tolist() == [0.003, 0.001]
    direct = simulate_events(2, SimulateConfig(receiver=ReceiverConfig(samples=256)), device="cpu", table={
        "energy_eV": [18600, 18500], "pitch_angle_deg": [89, 88.5], "radius_m": [0.003, 0.001]})
    assert np.array_equal(direct.ts, events.ts)
    one = Simulator(config, device="cpu").events(1, first=1)
    assert one.columns["energy_eV"].tolist() == [18500]
    with pytest.raises(ConfigError, match="3 rows"):
        Simulator(config, device="cpu").events(2, first=1)


def test_times_of_a_table_are_used():
    table = {"start_time_s": [2e-6], "track_length_s": [1e-6]}
    events = simulate_events(1, SimulateConfig(receiver=ReceiverConfig(samples=2048)), table=table, device="cpu")
    on = np.flatnonzero(events.ts[0].any(0)) / FS
    assert on[0] == pytest.approx(2e-6, abs=1 / FS) and on[-1] == pytest.approx(3e-6, abs=1.01 / FS)


@pytest.mark.parametrize("table, row", [
    ({"energy_eV": [18600.0, math.nan]}, 1),
    ({"pitch_angle_deg": [89.0, 91.0]}, 1),
    ({"energy_eV": [-5.0]}, 0),
    ({"energy_eV": [1.0, 2.0], "radius_m": [1e-3]}, "radius_m"),
    ({"energy_keV": [18.6]}, None),
    ({"energy_eV": []}, "energy_eV"),
    ({}, None),
])
def test_bad_tables_are_refused(table, row):
    with pytest.raises(DataError) as e:
        read_table(table)
    assert e.value.row == row


def test_untrapped_electrons_are_refused():
    flat = SimulateConfig(electrons=ElectronConfig(pitch="flat", pitch_low_deg=80.0))
    with pytest.raises(ConfigError, match="the trap holds"):
        Simulator(flat, device="cpu").events(5)
    table = {"pitch_angle_deg": [89.0, 85.0], "radius_m": [1e-3, 2e-3]}
    with pytest.raises(ConfigError, match="85 degrees at 2 mm") as e:
        Simulator(table=table, device="cpu").events(2)
    assert e.value.row == 1


@pytest.mark.parametrize("make", [
    lambda: ElectronConfig(energy_low_eV=19e3),
    lambda: ElectronConfig(pitch_low_deg=90.0),
    lambda: ElectronConfig(pitch_high_deg=91.0),
    lambda: ElectronConfig(radius_max_m=-1.0),
    lambda: TrackConfig(start_low_s=1e-6),
    lambda: TrackConfig(mean_length_s=0.0),
    lambda: TrackConfig(max_tracks=0),
    lambda: TrackConfig(max_tracks=3),
    lambda: ReceiverConfig(samples=0),
    lambda: ReceiverConfig(noise_sigma_V=-1.0),
    lambda: ReceiverConfig(sampling_rate_Hz=math.nan),
    lambda: TrapConfig(kind="map"),
    lambda: TrapConfig(map="field.csv"),
    lambda: TrapConfig(field_T=0.0),
    lambda: SimulateConfig(events=0),
    lambda: SimulateConfig(events_per_shard=0),
    lambda: SimulateConfig(tracks=TrackConfig(0.0, 1.0)),
    lambda: Noise(math.inf),
    lambda: EventStream(Simulator(device="cpu"), 0),
    lambda: EventStream(Simulator(device="cpu"), 1, targets=("energy_keV",)),
    lambda: test_set("cca-12k"),
])
def test_bad_settings_are_refused(make):
    with pytest.raises(ConfigError) as e:
        make()
    assert e.value.row


def test_settings_are_read_from_the_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SimulateConfig)
    args = parser.parse_args(["--events=7", "--electrons.energy=triangular", "--receiver.samples=512",
                              "--cavity.length_m=0.2", "--tracks.mean_length_s=1e-4", "--trap.kind=harmonic"])
    config = getattr(parser, "instantiate", parser.instantiate_classes)(args)
    assert config.events == 7 and config.receiver.samples == 512 and config.cavity.length_m == 0.2
    assert config.tracks.mean_length_s == 1e-4 and config.trap.kind == "harmonic"


@pytest.mark.parametrize("kind", ["harmonic", "bathtub", "box"])
def test_other_traps_can_be_chosen(kind):
    config = SimulateConfig(trap=TrapConfig(kind), receiver=ReceiverConfig(samples=256))
    events = simulate_events(20, config, device="cpu")
    assert np.isfinite(events.ts).all() and events.ts.any((1, 2)).all()


def test_a_field_map_can_be_chosen(tmp_path):
    r, z = np.linspace(0, 8e-3, 9), np.linspace(0, 0.08, 161)
    field = default_trap().field(r[:, None], z).numpy()
    np.savez(tmp_path / "map.npz", r_m=r, z_m=z, field_T=field)
    made = [simulate_events(20, SimulateConfig(trap=trap, receiver=ReceiverConfig(samples=256)), device="cpu")
            for trap in (TrapConfig(), TrapConfig("map", map=str(tmp_path / "map.npz")))]
    f = [x.columns["start_carrier_frequency_Hz"] for x in made]
    assert np.abs(f[1] - f[0]).max() < 2e3


@pytest.mark.parametrize("power, low, high", [("larmor", 3.2e8, 3.4e8), ("purcell", 1e6, 4e9), ("locust", 3e8, 1.4e9)])
def test_the_power_law_sets_the_slope(power, low, high):
    config = SimulateConfig(power=power, receiver=ReceiverConfig(samples=256))
    slope = simulate_events(20, config, device="cpu").columns["slope_Hz"]
    assert (slope > low).all() and (slope < high).all()


# --- test sets, stores, streams ---


@pytest.mark.parametrize("name", TEST_SETS)
def test_test_sets_are_pinned(name):
    events = test_set(name, 8, device="cpu")
    assert events.samples == {"cca-8k": 8192, "cca-24k": 24_576}[name]
    clean = test_set(name, 8, noise="none", device="cpu")
    weight = np.cos(0.01 * np.arange(events.samples))
    found = [(x.ts.astype(float) @ weight).sum() for x in (clean, events)]
    assert np.allclose(found, PINNED_SUMS[name], rtol=0, atol=1e-3)
    low, high = {"cca-8k": (18_500, 18_700), "cca-24k": (18_550, 18_650)}[name]
    columns = Simulator(TEST_SETS[name], device="cpu").tracks(300)[0].columns
    assert low < columns["energy_eV"].min() < low + 10 and high - 10 < columns["energy_eV"].max() < high
    assert columns["pitch_angle_deg"].min() > 88.0 and columns["radius_m"].max() < 6.5e-3


def test_a_changed_test_set_is_refused(monkeypatch):
    config = SimulateConfig(seed=8192, noise="added", electrons=ElectronConfig(energy_low_eV=18_500.01))
    assert set_checksum(Simulator(config, device="cpu")) != CHECKSUMS["cca-8k"]
    monkeypatch.setitem(simulate.TEST_SETS, "cca-8k", config)
    with pytest.raises(DataError, match="cca-8k"):
        test_set("cca-8k", 1, device="cpu")


STORE = SimulateConfig(events=25, events_per_shard=10, seed=4, receiver=ReceiverConfig(samples=512), noise="kept")


def test_store_goes_on_after_a_kill(tmp_path, monkeypatch):
    straight = simulate_store(STORE, tmp_path / "straight", device="cpu")
    assert straight["events"] == 25 and len(straight["shards"]) == 3
    made, events = [], Simulator.events

    def killed(self, n, first=0, noise=None):
        if first == 20 and not made:
            made.append(first)
            raise KeyboardInterrupt
        return events(self, n, first, noise)

    monkeypatch.setattr(Simulator, "events", killed)
    with pytest.raises(KeyboardInterrupt):
        simulate_store(STORE, tmp_path / "killed", device="cpu")
    assert not (tmp_path / "killed").exists()
    first = next((tmp_path / "killed.part").glob("shard_00000*"))
    stamp = first.stat().st_mtime_ns
    simulate_store(STORE, tmp_path / "killed", device="cpu")
    assert (tmp_path / "killed" / first.name).stat().st_mtime_ns == stamp
    a, b = (EventStore(tmp_path / name).read(noise=("gauss",)) for name in ("straight", "killed"))
    assert len(a) == 25 and a.checksum == b.checksum
    assert np.array_equal(a.noise["gauss"], b.noise["gauss"]) and np.array_equal(a.ts, b.ts)
    direct = Simulator(STORE, device="cpu").events(25)
    assert np.allclose(a.ts, direct.ts, atol=1e-7)
    assert np.array_equal(a.columns["energy_eV"], direct.columns["energy_eV"])


def test_store_is_not_overwritten_nor_mixed(tmp_path, monkeypatch):
    simulate_store(STORE, tmp_path / "store", device="cpu")
    with pytest.raises(DataError, match="not taken"):
        simulate_store(STORE, tmp_path / "store", device="cpu")
    monkeypatch.setattr(Simulator, "events", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        simulate_store(STORE, tmp_path / "other", device="cpu")
    for changed in ({"config": replace(STORE, seed=5)}, {"trap": HarmonicTrap()}, {"table": {"radius_m": [1e-3] * 25}}):
        with pytest.raises(DataError, match="same job"):
            simulate_store(**{"config": STORE, "path": tmp_path / "other", "device": "cpu"} | changed)


def test_streams_are_fresh_or_fixed(simulator):
    train, valid = (EventStream(simulator, 2, 16, fixed=fixed) for fixed in (False, True))
    passes = []
    for stream, epoch in ((train, 0), (train, 1), (train, 0), (valid, 0), (valid, 1)):
        stream.set_epoch(epoch)
        passes.append(list(stream))
        assert len(passes[-1]) == len(stream) == 2
    xs = [torch.cat([x for x, _ in p]) for p in passes]
    ys = [torch.cat([y for _, y in p]) for p in passes]
    assert torch.equal(xs[0], xs[2]) and torch.equal(ys[0], ys[2])
    assert torch.equal(xs[3], xs[4]) and torch.equal(ys[3], ys[4])
    energies = torch.cat([ys[0], ys[1], ys[3]])[:, 0]
    assert len(energies.unique()) == 96
    assert ys[0].shape == (32, 2) and ys[0].dtype == torch.float64 and xs[0].dtype == torch.float32


def test_streams_add_noise_to_the_same_events(simulator):
    noisy, clean = (next(iter(EventStream(simulator, 1, 8, targets=("snr",), noise=noise))) for noise in (True, False))
    assert torch.equal(noisy[1], clean[1])
    assert float((noisy[0] - clean[0]).std()) == pytest.approx(SIGMA, rel=0.02)


def test_any_batch_of_events_with_collisions_can_be_made():
    config = SimulateConfig(seed=3, receiver=ReceiverConfig(samples=1024),
                            tracks=TrackConfig(mean_length_s=2e-6, max_tracks=3))
    simulator = Simulator(config, device="cpu")
    whole, columns = simulator.signal(30)
    assert (columns["tracks"] == 1).any() and (columns["tracks"] == 3).any()
    for i in range(30):
        alone, own = simulator.signal(1, first=i)
        assert torch.allclose(alone[0], whole[i], atol=1e-7)
        for name, v in columns.items():
            assert torch.allclose(own[name][0], v[i], rtol=1e-9, equal_nan=True), name


def test_electrons_lose_what_they_radiate_before_a_collision():
    config = SimulateConfig(seed=1, receiver=ReceiverConfig(samples=163_840),
                            electrons=ElectronConfig(energy_low_eV=18_600, energy_high_eV=18_600),
                            tracks=TrackConfig(mean_length_s=1e-4, max_tracks=2))
    simulator = Simulator(config, device="cpu")
    first, second = simulator.tracks(64)
    c = {k: v[second.event] for k, v in first.columns.items()}
    lost = first.comb.power_W[second.event] * c["track_length_s"] / 1.602176634e-19
    u = uniforms(1, "collision 1", 0, 64, 8)[second.event]
    want, _ = scatter(c["energy_eV"] - lost, c["pitch_angle_deg"], u[:, :4])
    assert lost.max() > 0.5 and torch.allclose(second.columns["energy_eV"], want, atol=1e-6)


def test_an_electron_at_90_degrees_radiates_for_long():
    table = {"pitch_angle_deg": [90.0, 89.9999], "energy_eV": [18_600.0] * 2, "radius_m": [3e-3] * 2}
    config = SimulateConfig(receiver=ReceiverConfig(samples=45_000))
    columns = Simulator(config, table=table, device="cpu").signal(2)[1]
    assert columns["slope_Hz"][0] == pytest.approx(float(columns["slope_Hz"][1]), rel=1e-3)


@pytest.mark.parametrize("options", [{"sampling_rate_Hz": 403.0}, {"lo_frequency_Hz": 25.9702}])
def test_settings_in_other_units_are_noticed(options):
    with pytest.raises(ConfigError, match="in Hz"):
        Simulator(SimulateConfig(receiver=ReceiverConfig(samples=64, **options)), device="cpu").signal(2)
    with pytest.raises(ConfigError, match="radius"):
        SimulateConfig(electrons=ElectronConfig(radius_max_m=8e-3))
