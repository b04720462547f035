"""Batch steps of the CRES half: noise, filters, spectra, scales and the preparation built from a config."""

import copy
import math

import numpy as np
import pytest
import scipy.signal
import scipy.stats
import torch
from jsonargparse import ArgumentParser
from torch import nn

from deadlayer_cres.core import ConfigError, DataError, NotFittedError, derive_seed
from deadlayer_cres.cres.prep import (
    BAND_HZ,
    NOISE_SIGMA_V,
    SAMPLING_RATE_HZ,
    STFT,
    AddColouredNoise,
    AddNoise,
    BandPass,
    LogPower,
    MixDecimate,
    ParallelPrep,
    Prep,
    PrepConfig,
    QTransform,
    Scale,
    ScaleEvent,
    ScaleTargets,
    Spectrum,
    Window,
    band_bins,
    build_prep,
    butterworth_response,
    fft_frequencies,
    log_power,
    q_rows,
    to_channels,
    to_complex,
)
from deadlayer_cres.cres.simulate import noise_sigma_V, numbered_noise, squares64

N, RATE = 1024, SAMPLING_RATE_HZ
TIME = torch.arange(N, dtype=torch.float64) / RATE


def tone(*frequencies_Hz, amplitude=0.01, samples=N, dtype=torch.float64):
    "Events (n, 2, samples), each one tone."
    t = torch.arange(samples, dtype=torch.float64) / RATE
    f = torch.tensor(frequencies_Hz, dtype=torch.float64)[:, None]
    return to_channels(amplitude * torch.exp(2j * torch.pi * f * t)).to(dtype)


def bin_Hz(k, samples=N):
    return k * RATE / samples


@pytest.fixture(scope="module")
def noise():
    return NOISE_SIGMA_V * numbered_noise(torch.arange(400), N, seed=5)


ALL_STEPS = {
    "noise": lambda: AddNoise(),
    "filter": lambda: BandPass(N, order=4),
    "brick wall": lambda: BandPass(N),
    "causal": lambda: BandPass(N, order=2, zero_phase=False),
    "decimate": lambda: MixDecimate(N),
    "window": lambda: Window(N),
    "spectrum": lambda: Spectrum(N, *BAND_HZ),
    "log power": lambda: LogPower(),
    "stft": lambda: STFT(N, 128, 32),
    "q": lambda: QTransform(N, q=16),
    "event": lambda: ScaleEvent(),
}


@pytest.mark.parametrize("name", ALL_STEPS)
def test_steps_return_new_tensors_event_by_event(name, noise):
    step, x = ALL_STEPS[name](), noise[:6].clone()
    step.eval()
    args = (torch.arange(6),) if name == "noise" else ()
    out = step(x, *args)
    assert torch.equal(x, noise[:6]) and x._version == 0
    assert out.dtype == torch.float32 and torch.isfinite(out).all() and len(out) == 6
    one = step(x[4:5], *(a[4:5] for a in args))
    assert torch.allclose(out[4:5], one, atol=1e-6 * float(out.abs().max()))  # whatever the batch
    assert list(step.state_dict()) == []  # nothing to save: made anew from the config


@pytest.mark.parametrize("name", [n for n in ALL_STEPS if n not in ("noise", "log power", "event")])
@pytest.mark.parametrize("shape", [(3, 2, N - 1), (2, N), (3, 1, N), (3, 2, N, 1), (0, 2, N)])
def test_steps_refuse_other_shapes(name, shape):
    with pytest.raises(DataError, match=f"shape .*{N}"):
        ALL_STEPS[name]()(torch.zeros(shape))
    with pytest.raises(DataError, match="float"):
        ALL_STEPS[name]()(torch.zeros(3, 2, N, dtype=torch.int16))


# noise


def squares_by_hand(counter, key):
    "The published C function with Python's whole numbers."
    m = 2**64 - 1
    y = x = counter * key & m
    z = y + key & m
    for add in (y, z, y):
        x = (x * x + add) & m
        x = x >> 32 | (x << 32) & m
    t = (x * x + z) & m
    x = t >> 32 | (t << 32) & m
    return t ^ (x * x + y & m) >> 32


def test_squares_is_the_published_generator():
    counters = [0, 1, 2, 12345, 2**32 + 7, 2**62, -1, -(2**40)]
    for key in (0x48C4D3A5B1F62E97, derive_seed(3, "noise") | 1):
        found = squares64(torch.tensor(counters), key)
        assert [int(v) % 2**64 for v in found] == [squares_by_hand(c % 2**64, key) for c in counters]


def test_numbered_noise_is_pinned():
    x = numbered_noise(torch.tensor([0, 7, -1]), 3, seed=0)
    key, want = derive_seed(0, "noise") | 1, []
    for event in (0, 7, -1):
        for sample in range(3):
            bits = squares_by_hand(((event << 32) + sample) % 2**64, key)
            radius, angle = math.sqrt(-2 * math.log(((bits >> 32) + 0.5) / 2**32)), 2 * math.pi * (bits % 2**32) / 2**32
            want.append([radius * math.cos(angle), radius * math.sin(angle)])
    assert torch.allclose(x, torch.tensor(want).view(3, 3, 2).transpose(1, 2), atol=2e-6)


def test_numbered_noise_is_white_and_gaussian():
    x = numbered_noise(torch.arange(300, 700), 4096, seed=1)
    flat = x.double().flatten().numpy()
    n = flat.size
    assert abs(flat.mean()) < 4 / n**0.5 and abs(flat.var() - 1) < 4 * (2 / n) ** 0.5
    assert scipy.stats.kstest(flat[:: n // 200_000], "norm").pvalue > 1e-3
    assert scipy.stats.kstest(flat[np.abs(flat) > 3][:20_000], lambda v: np.where(  # the tails by themselves
        v < 0, scipy.stats.norm.cdf(v), scipy.stats.norm.cdf(v) - scipy.stats.norm.cdf(3) + scipy.stats.norm.cdf(-3))
        / (2 * scipy.stats.norm.cdf(-3))).pvalue > 1e-3
    power = torch.fft.fft(to_complex(x), norm="ortho").abs().square().mean(0) / 2  # 400 events: each bin 1 +- 0.05
    assert abs(power.std() * 400**0.5 - 1) < 0.1 and power.min() > 0.7 and power.max() < 1.3


def correlation(a, b):
    "Correlation of two noises in units of its standard error."
    return float((a * b).double().mean()) * a.numel() ** 0.5


def test_numbered_noise_is_independent():
    x, other = (numbered_noise(torch.arange(200), 4096, seed=s) for s in (0, 1))
    pairs = {"samples": (x[:, :, 1:], x[:, :, :-1]), "channels": (x[:, 0], x[:, 1]), "events": (x[1:], x[:-1]),
             "seeds": (x, other), "powers of channels": (x[:, 0] ** 2 - 1, (x[:, 1] ** 2 - 1) / 2),
             "powers of events": (x[1:] ** 2 - 1, (x[:-1] ** 2 - 1) / 2)}
    for name, (a, b) in pairs.items():
        assert abs(correlation(a, b)) < 4, name


def test_noise_is_fresh_in_training_and_numbered_in_evaluation():
    step, x, index = AddNoise(seed=3), torch.zeros(9, 2, 2**15), torch.arange(100, 109)
    torch.manual_seed(0)
    first = step(x)
    assert not torch.equal(first, step(x))
    torch.manual_seed(0)
    assert torch.equal(first, step(x, index))  # numbers play no role in training
    assert abs(first.std() / NOISE_SIGMA_V - 1) < 0.01
    step.eval()
    fixed = step(x, index)
    torch.manual_seed(1)
    assert torch.equal(fixed, step(x, index)) and abs(fixed.std() / NOISE_SIGMA_V - 1) < 0.01
    shuffled = torch.randperm(9)
    assert torch.equal(step(x, index[shuffled]), fixed[shuffled])
    assert torch.equal(step(x[:, :, :500], index), fixed[:, :, :500])  # nor does the length of the record
    assert not torch.equal(AddNoise(seed=4).eval()(x, index), fixed)
    state = torch.get_rng_state()
    step(x, index)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("index", [None, torch.arange(2), torch.arange(3)[None]])
def test_evaluation_needs_the_numbers_of_the_events(index):
    with pytest.raises(DataError, match="numbers of 3 events"):
        AddNoise().eval()(torch.zeros(3, 2, 8), index)


def test_noise_keeps_double_precision_and_takes_another_sigma():
    step = AddNoise(0.0)
    x = torch.rand(3, 2, 8, dtype=torch.float64)
    assert torch.equal(step(x), x)
    step.sigma_V = 1.0
    assert step(x).dtype == torch.float64 and not torch.equal(step(x), x)
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(ConfigError):
            AddNoise(bad)
    assert abs(noise_sigma_V(2.2e-13) - math.sqrt(50 * 0.5) * math.sqrt(2.2e-13 * 403e6)) < 1e-12


def test_coloured_noise_has_its_spectrum():
    f = np.linspace(-200e6, 200e6, 50)
    density = 1e-11 * (1 + 3 * np.exp(-(((f + 60e6) / 20e6) ** 2)))
    step = AddColouredNoise(N).from_density(f, density)
    with pytest.raises(NotFittedError):
        AddColouredNoise(N)(torch.zeros(1, 2, N))
    x = step(torch.zeros(1000, 2, N))
    found_f, found = scipy.signal.welch(to_complex(x).numpy(), RATE, nperseg=N, window="boxcar", detrend=False,
                                        return_onesided=False)
    want = 2 * np.interp(found_f, f, density)  # both quadratures
    ratio = found.mean(0) / want
    assert abs(ratio.mean() - 1) < 0.005 and ratio.std() < 1.2 / 1000**0.5
    assert abs(correlation(x[:, 0] / x[:, 0].std(), x[:, 1] / x[:, 1].std())) < 6  # neighbouring samples are correlated
    again = AddColouredNoise(N // 2).fit(x[:300])  # shorter records, two of each
    g = np.fft.fftfreq(N // 2, 1 / RATE)
    want = np.sqrt(np.interp(g, f, density) * RATE)
    assert np.abs(again.sigma_V.numpy() / want - 1).max() < 0.12
    again.eval()
    assert torch.equal(again(torch.zeros(2, 2, N // 2), torch.tensor([4, 9]))[1:],
                       again(torch.zeros(1, 2, N // 2), torch.tensor([9])))


def test_coloured_noise_of_a_flat_density_is_the_white_one():
    flat = AddColouredNoise(N).from_density([0.0], [NOISE_SIGMA_V**2 / RATE]).eval()
    x, index = torch.zeros(5, 2, N), torch.arange(5)
    assert torch.allclose(flat(x, index), AddNoise().eval()(x, index), atol=1e-7)


@pytest.mark.parametrize("recorded", [torch.zeros(0, 2, N), torch.zeros(3, 2, N - 1), torch.zeros(3, 1, N),
                                      torch.full((3, 2, N), math.nan)])
def test_unusable_recorded_noise_is_refused(recorded):
    with pytest.raises(DataError):
        AddColouredNoise(N).fit(recorded)


def test_negative_density_is_refused():
    with pytest.raises(DataError, match="density"):
        AddColouredNoise(N).from_density([0.0, 1e6], [1.0, -1.0])


# bands, filters, decimation


def test_band_bins():
    assert list(band_bins(10, 10.0, -5, 5)) == list(range(-5, 5))  # an even record has its lowest bin only
    assert list(band_bins(9, 9.0, -4.5, 4.5)) == list(range(-4, 5))
    assert list(band_bins(10, 10.0, -3, -1)) == [-3, -2, -1]
    assert list(band_bins(10, 10.0, -3.1, -1.9)) == [-3, -2]
    for low, high in ((-1, -3), (2, 2), (-6, 0), (0, 6), (0.2, 0.8)):
        with pytest.raises(ConfigError, match="MHz"):
            band_bins(10, 10.0, low, high)


def test_brick_wall_knows_the_sign_of_a_frequency():
    inside, outside = (bin_Hz(k) for k in (-152, 152))  # -59.8 MHz, +59.8 MHz
    out = BandPass(N)(tone(inside, outside))
    assert torch.allclose(out[0], tone(inside)[0], atol=1e-8) and out[1].abs().max() < 1e-8


@pytest.mark.parametrize("order", [1, 4, 7])
def test_butterworth_is_scipys(order):
    low, high = -80e6, -40e6
    f = np.fft.fftfreq(N, 1 / RATE)
    sos = scipy.signal.butter(order, 20e6, fs=RATE, output="sos")
    once = scipy.signal.sosfreqz(sos, 2 * np.pi * (f + 60e6) / RATE)[1]
    assert np.allclose(butterworth_response(f, low, high, order, RATE, zero_phase=False), once)
    closed = 1 / (1 + (np.tan(np.pi * (f + 60e6) / RATE) / np.tan(np.pi * 20e6 / RATE)) ** (2 * order))
    assert np.allclose(butterworth_response(f, low, high, order, RATE), closed, atol=1e-9)


@pytest.mark.parametrize("zero_phase", [True, False])
def test_butterworth_filters_as_scipy_in_time(noise, zero_phase):
    "Mix the band to zero, low-pass I and Q with SciPy, and mix back."
    low, high, order = -80e6, -40e6, 4
    z = to_complex(noise[:5].double()).numpy()
    shift = np.exp(2j * np.pi * 60e6 * TIME.numpy())
    sos = scipy.signal.butter(order, 20e6, fs=RATE, output="sos")
    low_passed = (scipy.signal.sosfiltfilt if zero_phase else scipy.signal.sosfilt)(sos, z * shift)
    want = low_passed / shift
    found = to_complex(BandPass(N, low, high, order, zero_phase=zero_phase)(noise[:5])).numpy()
    inner = slice(150, N - 150)  # SciPy's record begins and ends, ours is periodic
    assert np.abs(found - want)[:, inner].max() < 1e-6 < 1e-3 < np.abs(want)[:, inner].std()


def test_butterworth_order_must_be_positive():
    with pytest.raises(ConfigError, match="order"):
        BandPass(N, order=0)


@pytest.mark.parametrize("samples", [1024, 1000, 999, 8192])
def test_decimation_keeps_tones_of_the_band(samples):
    step = MixDecimate(samples)
    bins = band_bins(samples, RATE, *BAND_HZ)
    assert step.samples_out >= len(bins) and step.sampling_rate_Hz == RATE * step.samples_out / samples
    t = torch.arange(step.samples_out, dtype=torch.float64) / step.sampling_rate_Hz
    for k in (bins[0], bins[3], (bins[0] + bins[-1]) // 2, bins[-1]):  # edges included
        f = bin_Hz(k, samples)
        want = 0.01 * torch.exp(2j * torch.pi * (f - step.centre_Hz) * t)
        found = to_complex(step(tone(f, samples=samples)))[0]
        assert (found - want).abs().max() < 1e-9, k
    far = step.samples_out // 2 + 2  # just outside what is kept, and the mirror image of the band
    for f in (step.centre_Hz + far * RATE / samples, step.centre_Hz - far * RATE / samples, -step.centre_Hz):
        assert step(tone(f, samples=samples)).abs().max() < 1e-9


def test_decimation_of_a_chirp_between_bins():
    "A line that begins and ends off the bins keeps amplitude and phase away from the edges of the record."
    samples = 8192
    t = torch.arange(samples, dtype=torch.float64) / RATE
    phase = -61.234567e6 * t + 0.33e9 * t**2 / 2 + 0.1
    step = MixDecimate(samples)
    u = torch.arange(step.samples_out, dtype=torch.float64) / step.sampling_rate_Hz
    want = torch.exp(2j * torch.pi * (-61.234567e6 * u + 0.33e9 * u**2 / 2 + 0.1 - step.centre_Hz * u))
    found = to_complex(step(to_channels(torch.exp(2j * torch.pi * phase)[None])))[0]
    assert (found - want)[100:-100].abs().max() < 0.01


def test_decimated_noise_is_white_and_lower(noise):
    step = MixDecimate(N)
    out = step(noise)
    want = NOISE_SIGMA_V * (step.samples_out / N) ** 0.5
    assert abs(out.std() / want - 1) < 4 / (2 * out.numel()) ** 0.5
    unit = out / out.std()
    assert abs(correlation(unit[:, :, 1:], unit[:, :, :-1])) < 4
    everything = MixDecimate(N, -RATE / 2, RATE / 2)  # nothing to cut: only mixed
    assert everything.samples_out == N and abs(everything.centre_Hz) <= bin_Hz(1)
    assert torch.allclose(to_complex(everything(noise)).abs(), to_complex(noise).abs(), atol=1e-6)


# spectra and maps


def test_spectrum_is_the_transform_in_ascending_order(noise):
    want = np.fft.fftshift(np.fft.fft(to_complex(noise.double()).numpy(), norm="ortho"), axes=1)
    step = Spectrum(N)
    assert np.abs(to_complex(step(noise)).numpy() - want).max() < 1e-6
    assert torch.equal(step.frequency_Hz, fft_frequencies(N)) and (step.frequency_Hz.diff() > 0).all()
    for low, high in (BAND_HZ, (27e6, 90e6), (-30e6, 45e6), (-RATE / 2, -1e6)):
        cut = Spectrum(N, low, high)
        keep = ((step.frequency_Hz >= low) & (step.frequency_Hz <= high)).numpy()
        assert np.abs(to_complex(cut(noise)).numpy() - want[:, keep]).max() < 1e-6
        assert torch.equal(cut.frequency_Hz, step.frequency_Hz[keep])


def test_spectrum_of_an_odd_record(noise):
    x = noise[:3, :, :999]
    want = np.fft.fftshift(np.fft.fft(to_complex(x).numpy(), norm="ortho"), axes=1)
    assert np.abs(to_complex(Spectrum(999)(x)).numpy() - want).max() < 1e-6


def test_a_line_stands_in_its_bin_with_its_height():
    step = Spectrum(N, *BAND_HZ)
    power = to_complex(step(tone(bin_Hz(-150)))).abs()[0]
    assert abs(step.frequency_Hz[power.argmax()] - bin_Hz(-150)) < 1 and abs(power.max() - 0.01 * N**0.5) < 1e-9


@pytest.mark.parametrize("name", ["hann", "hamming", "blackman", "boxcar"])
def test_tapers_keep_the_noise(noise, name):
    step = Window(N, name)
    assert abs(step(noise).std() / noise.std() - 1) < 0.01
    want = scipy.signal.get_window(name, N)
    assert np.allclose(step.taper / step.taper.max(), want / want.max(), atol=1e-6)


def test_unknown_taper_is_refused():
    with pytest.raises(ConfigError, match="window"):
        Window(N, "hat")


def test_log_power(noise):
    x = torch.stack([torch.full((1, 4), 3 * NOISE_SIGMA_V), torch.full((1, 4), 4 * NOISE_SIGMA_V)], 1)
    assert torch.allclose(LogPower()(x), torch.full((1, 1, 4), math.log1p(12.5)))
    assert abs(log_power(noise).mean() - 0.59635) < 0.003  # Gompertz' constant
    assert log_power(torch.zeros(1, 2, 5)).abs().max() == 0
    for bad in (0.0, -1.0, math.inf):
        with pytest.raises(ConfigError):
            LogPower(bad)


def test_stft_is_scipys(noise):
    step = STFT(N, 128, 48, "hann")
    f, t, want = scipy.signal.stft(to_complex(noise[:4].double()).numpy(), RATE, "hann", 128, 128 - 48, boundary=None,
                                   padded=False, return_onesided=False, scaling="psd")
    found = to_complex(step(noise[:4])).numpy()
    want = np.fft.fftshift(want, axes=1) * RATE**0.5  # SciPy's density to the orthonormal scale
    assert found.shape == want.shape and np.abs(found - want).max() < 1e-6
    assert np.allclose(step.time_s, t) and np.allclose(step.frequency_Hz, np.fft.fftshift(f))
    assert abs(step(noise).std() / NOISE_SIGMA_V - 1) < 0.01
    assert torch.equal(STFT(N, 128, 48, centre_Hz=-5e6).frequency_Hz, step.frequency_Hz - 5e6)
    for segment, hop in ((N + 1, 1), (128, 0), (128, 129)):
        with pytest.raises(ConfigError, match="hop"):
            STFT(N, segment, hop)


def test_stft_finds_a_step_in_frequency():
    x = tone(-60e6, -40e6)
    x = torch.cat([x[:1, :, : N // 2], x[1:, :, N // 2:]], 2)
    step = STFT(N, 64, 16)
    peak = step.frequency_Hz[to_complex(step(x))[0].abs().argmax(0)]
    before, after = step.time_s < (N / 2 - 32) / RATE, step.time_s > (N / 2 + 32) / RATE
    assert (peak[before] + 60e6).abs().max() < RATE / 64 and (peak[after] + 40e6).abs().max() < RATE / 64


def q_direct(z, phi, tau, q, rate=RATE):
    "The definition, summed up: one row at the times tau (m,)."
    n = len(z)
    f = np.fft.fftfreq(n, 1 / rate)
    u = (f - phi) * q / (11**0.5 * phi)
    w = np.where(np.abs(u) < 1, (1 - u**2) ** 2, 0)
    w = w / np.sqrt((w**2).sum())
    f0 = np.round(phi * n / rate) * rate / n
    return (np.fft.fft(z) / n**0.5 * w) @ np.exp(2j * np.pi * np.outer(f - f0, tau))


@pytest.mark.parametrize("band", [BAND_HZ, (20e6, 110e6)])
@pytest.mark.parametrize("q,times", [(5.0, None), (16.0, None), (64.0, 300)])
def test_q_transform_is_its_definition(noise, band, q, times):
    step = QTransform(N, *band, q=q, times=times)
    found = to_complex(step(noise[:2])).numpy()
    z = to_complex(noise[:2].double()).numpy()
    assert found.shape == (2, len(step.frequency_Hz), len(step.time_s))
    for row in {0, len(step.frequency_Hz) // 3, len(step.frequency_Hz) // 2, len(step.frequency_Hz) - 1}:
        for event in range(2):
            want = q_direct(z[event], float(step.frequency_Hz[row]), step.time_s[::7].numpy(), q)
            assert np.abs(found[event, row, ::7] - want).max() < 1e-6
    assert abs(step(noise).std() / NOISE_SIGMA_V - 1) < 0.02


def test_q_transform_is_a_projection_on_wave_packets(noise):
    "The same number as in time: the overlap with a packet of unit energy, at the right sampling rate and frequency."
    step, row, m = QTransform(N, q=16.0), 8, 40
    phi, tau, f = float(step.frequency_Hz[row]), float(step.time_s[m]), np.fft.fftfreq(N, 1 / RATE)
    u = (f - phi) * 16 / (11**0.5 * phi)
    spectrum = np.where(np.abs(u) < 1, (1 - u**2) ** 2, 0) * np.exp(-2j * np.pi * f * tau)
    packet = np.fft.ifft(spectrum)
    packet /= np.linalg.norm(packet)
    assert abs(np.argmax(np.abs(packet)) - tau * RATE) <= 1
    for event in range(5):
        overlap = np.vdot(packet, to_complex(noise[event:event + 1].double())[0].numpy())
        found = to_complex(step(noise[event:event + 1]))[0, row, m]
        assert abs(abs(found) - abs(overlap)) < 1e-6


def test_q_transform_sees_the_band_and_not_its_mirror():
    step = QTransform(N, q=32.0)
    row = len(step.frequency_Hz) // 2
    f = bin_Hz(round(float(step.frequency_Hz[row]) * N / RATE))
    power = to_complex(step(tone(f, -f))).abs().square().mean(2)
    assert power[0].argmax() == row and power[1].max() < 1e-9 * power[0].max()


def test_q_rows_are_close_enough():
    "The loss half a step away from a row is about that of the mismatch metric, and never above it."
    q, mismatch = 32.0, 0.2
    rows = q_rows(-90e6, -27e6, q, mismatch)
    assert (np.diff(rows) > 0).all() and rows[0] > -90e6 and rows[-1] < -27e6
    assert np.allclose(q_rows(27e6, 90e6, q, mismatch), -rows[::-1])
    u = np.linspace(-2, 2, 100_001)

    def window(phi):
        v = (u - phi) * q / 11**0.5 / phi
        return np.where(np.abs(v) < 1, (1 - v**2) ** 2, 0)

    step = (rows[1] / rows[0]) ** 0.5
    a, b = window(1.0), window(step)
    assert 1 - (a @ b) ** 2 / (a @ a) / (b @ b) < mismatch


@pytest.mark.parametrize("options", [{"q": 3.0}, {"low_Hz": -90e6, "high_Hz": 10e6}, {"low_Hz": 0.0, "high_Hz": 10e6},
                                     {"low_Hz": -190e6, "q": 16.0}, {"mismatch": 0.0}, {"q": 16.0, "times": 10},
                                     {"low_Hz": -27e6, "high_Hz": -90e6}])
def test_q_transform_refuses_what_it_cannot_do(options):
    with pytest.raises(ConfigError):
        QTransform(N, **options)


def test_q_transform_energies_are_gwpys():
    "GWpy takes each row's bins one too high; a spectrum shifted by one bin undoes that."
    qtransform = pytest.importorskip("gwpy.signal.qtransform", reason="gwpy is not installed")
    from gwpy.frequencyseries import FrequencySeries

    n, q, rate = 1024, 12.0, 1024.0  # one second, so that bins lie at whole Hz
    rng = np.random.default_rng(0)
    x = rng.normal(size=n)
    step = QTransform(n, 40.0, 200.0, q=q, sampling_rate_Hz=rate)
    shifted = FrequencySeries(np.roll(np.fft.rfft(x), 1), df=1, epoch=0)
    rows = np.round(step.frequency_Hz.numpy())
    assert len(rows) > 10
    for phi in rows:
        want = qtransform.QTile(q, phi, 1.0, rate).transform(shifted, norm=False, epoch=0).value
        row = QTransform(n, phi * 0.999, phi / 0.999, q=q, times=len(want), sampling_rate_Hz=rate)
        assert np.allclose(row.frequency_Hz, [phi])
        found = to_complex(row(torch.tensor(np.stack([x, 0 * x])[None])))[0, 0].abs().square().numpy()
        assert np.allclose(found, want * rate / 2, rtol=1e-3, atol=1e-4 * found.max())  # its scale is another


# scales


@pytest.mark.parametrize("how", ["amplitude", "standard"])
def test_scale_takes_one_number_for_all_events(how, noise):
    x = noise * torch.tensor([1.0, 3.0])[:, None] + torch.tensor([0.0, 0.2])[:, None]
    scale = Scale(2, how).fit(x.split(70))
    out = scale(x)
    if how == "amplitude":
        assert torch.allclose(out, x / x.double().square().mean().sqrt(), rtol=1e-5)
    else:
        assert torch.allclose(out.mean((0, 2)), torch.zeros(2), atol=1e-5)
        assert torch.allclose(out.std((0, 2)), torch.ones(2), atol=1e-4)
    assert torch.allclose(scale(2 * x) - scale(torch.zeros_like(x)), 2 * (out - scale(torch.zeros_like(x))), atol=1e-4)
    again = Scale(2, how)
    with pytest.raises(NotFittedError):
        again(x)
    again.load_state_dict(scale.state_dict())
    assert torch.equal(again(x), out)


def test_scale_of_constant_input_and_bad_use():
    assert torch.equal(Scale(1, "standard").fit([torch.ones(4, 1, 3)])(torch.ones(2, 1, 3)), torch.zeros(2, 1, 3))
    assert torch.equal(Scale(1).fit([torch.zeros(4, 1, 3)])(torch.ones(2, 1, 3)), torch.ones(2, 1, 3))
    with pytest.raises(DataError, match="none"):
        Scale().fit([])
    with pytest.raises(DataError, match="finite"):
        Scale().fit([torch.full((2, 2, 3), math.nan)])
    with pytest.raises(ConfigError):
        Scale(2, "max")


def test_event_scale_is_the_published_one(noise):
    out = ScaleEvent()(noise + 0.3)
    want = scipy.stats.zscore(noise.double().numpy(), axis=2)
    assert np.abs(out.numpy() - want).max() < 1e-4


def test_targets_go_and_come_back():
    rng = np.random.default_rng(0)
    y = np.stack([rng.uniform(18500, 18700, 500), 25.9e9 + rng.normal(0, 1e4, 500)], 1)
    step = ScaleTargets(2)
    for use in (step, step.inverse, step.inverse_sigma):
        with pytest.raises(NotFittedError):
            use(torch.zeros(1, 2))
    step.fit(y[:400])
    z = step(torch.tensor(y))
    assert z.dtype == torch.float32
    assert np.allclose(z[:400].mean(0), 0, atol=1e-5) and np.allclose(z[:400].std(0), 1, atol=0.01)
    assert np.abs(step.inverse(z).numpy() - y).max() < 0.01  # Hz, of 25.9 GHz
    assert np.allclose(step.inverse_sigma(torch.ones(1, 2)), y[:400].std(0))
    again = ScaleTargets(2)
    again.load_state_dict(step.state_dict())
    assert torch.equal(again.inverse(z), step.inverse(z))


@pytest.mark.parametrize("y", [np.zeros((5, 2)), np.ones((1, 2)), np.zeros((5, 3)), np.full((5, 2), np.nan),
                               np.array([[1.0, 2.0], [1.0, np.inf]])])
def test_unusable_targets_are_refused(y):
    with pytest.raises(DataError):
        ScaleTargets(2).fit(y)


# the preparation of a run

CONFIGS = [{"representation": r, "log_power": p, "whole_band": w, "scale": s}
           for r in ("time", "spectrum", "stft", "q_transform") for p in (False, True) for w in (False, True)
           for s in ("amplitude", "event") if not (r == "time" and p)]


@pytest.mark.parametrize("options", CONFIGS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_every_representation(options, noise):
    config = PrepConfig(**options, segment=64, hop=16, q=16.0, window="hann", filter="butterworth")
    prep = build_prep(config, N).fit(noise[:50])
    assert prep.training
    x = prep.eval()(noise[:5], torch.arange(5))
    assert x.shape[:2] == (5, 1 if config.log_power else 2) and torch.isfinite(x).all()
    axes = [len(a) for a in (prep.frequency_Hz, prep.time_s) if a is not None]
    assert list(x.shape[2:]) == axes
    if prep.frequency_Hz is not None and not config.whole_band:
        slack = 1.5 * RATE / 64 if config.representation == "stft" else 0
        assert BAND_HZ[0] - slack <= prep.frequency_Hz[0] < prep.frequency_Hz[-1] <= BAND_HZ[1] + slack
    assert torch.allclose(x[3:4], prep(noise[3:4], torch.tensor([3])), atol=1e-4)


def test_default_is_noise_spectrum_and_one_scale(noise):
    prep = build_prep(PrepConfig(), N).fit(noise)
    assert list(prep.steps) == ["noise", "spectrum", "scale"]
    x = prep.eval()(noise, torch.arange(400))
    by_hand = Spectrum(N, *BAND_HZ)(noise + NOISE_SIGMA_V * numbered_noise(torch.arange(400), N))
    assert torch.allclose(x, by_hand / prep.steps["scale"].std[0], atol=1e-6)
    assert abs(x.square().mean() - 1) < 0.02


@pytest.mark.parametrize("representation", ["time", "spectrum", "stft", "q_transform"])
@pytest.mark.parametrize("frequency", [-60e6, -85e6, -31e6])
def test_axes_name_the_frequency_of_a_tone(representation, frequency):
    config = PrepConfig(noise="none", scale="none", representation=representation, segment=64, hop=16, q=32.0,
                        log_power=representation != "time")
    prep, x = build_prep(config, N), tone(frequency, dtype=torch.float32)
    out = prep(x)[0]
    if representation == "time":
        f = np.fft.fftfreq(out.shape[1], float(prep.time_s[1])) + prep.steps["decimate"].centre_Hz
        found = f[np.abs(np.fft.fft(out[0].numpy() + 1j * out[1].numpy())).argmax()]
    else:
        found = prep.frequency_Hz[out[0].reshape(len(prep.frequency_Hz), -1).mean(1).argmax()]
    assert abs(float(found) - frequency) < 1.2e6


def test_preparation_is_fresh_in_training_and_the_same_in_evaluation(noise):
    x, index = noise[:64], torch.arange(64)
    prep = build_prep(PrepConfig(), N).fit(x)
    assert not torch.equal(prep(x, index), prep(x, index))
    prep.eval()
    parts = [prep(x[i:i + 7], index[i:i + 7]) for i in range(0, 64, 7)]
    assert torch.allclose(torch.cat(parts), prep(x, index), atol=1e-6)
    with pytest.raises(DataError, match="numbers"):
        prep(x)


def test_measured_events_pass_without_noise(noise):
    prep = build_prep(PrepConfig(filter="brick_wall"), N).fit(noise[:64]).eval()
    clean, index = tone(-60e6, -50e6, dtype=torch.float32), torch.tensor([3, 8])
    measured = AddNoise().eval()(clean, index)
    assert torch.equal(prep.without_noise()(measured), prep(clean, index))
    assert set(prep.without_noise().state_dict()) == set(prep.state_dict())


def test_saved_statistics_restore_the_preparation(noise):
    config = PrepConfig(noise="coloured", log_power=True, scale="standard")
    prep = build_prep(config, N).fit(noise[:64], noise=noise[64:]).eval()
    fresh = build_prep(config, N).eval()
    with pytest.raises(NotFittedError):
        fresh(noise[:4], torch.arange(4))
    fresh.load_state_dict(copy.deepcopy(prep.state_dict()))
    assert torch.equal(fresh(noise[:4], torch.arange(4)), prep(noise[:4], torch.arange(4)))
    with pytest.raises(DataError, match="recorded noise"):
        build_prep(config, N).fit(noise[:64])


def test_fit_is_reproducible_and_leaves_the_random_numbers_alone(noise):
    state = torch.get_rng_state()
    a = build_prep(PrepConfig(), N).fit(noise.numpy(), batch_size=33)
    b = build_prep(PrepConfig(), N).fit(noise)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.allclose(a.steps["scale"].std, b.steps["scale"].std, rtol=1e-6)


def test_fit_draws_noise_that_no_event_has(noise):
    step = build_prep(PrepConfig(), N).fit(noise[:32]).steps["scale"]
    used = Spectrum(N, *BAND_HZ)(noise[:32] + NOISE_SIGMA_V * numbered_noise(-1 - torch.arange(32), N))
    assert torch.allclose(step.std, used.square().mean().sqrt(), rtol=1e-5)


@pytest.mark.parametrize("representation", ["spectrum", "stft", "q_transform"])
def test_log_power_is_in_units_of_the_noise_where_it_is_taken(representation):
    config = PrepConfig(representation=representation, log_power=True, scale="none", segment=64, hop=64, q=16.0)
    out = build_prep(config, N).eval()(torch.zeros(300, 2, N), torch.arange(300))
    assert abs(out.mean() - 0.59635) < 0.01  # Gompertz' constant


def test_pipeline_applies_the_preparation(noise):
    from deadlayer_cres.train import Pipeline

    prep = build_prep(PrepConfig(), N).fit(noise[:64])
    pipeline = Pipeline(prep, nn.Flatten()).eval()
    assert torch.equal(pipeline(noise[:3], torch.arange(3)), prep(noise[:3], torch.arange(3)).flatten(1))


def test_steps_of_ones_own_compose(noise):
    prep = Prep({"first": Spectrum(N, *BAND_HZ), "mine": nn.Tanh(), "scale": Scale()}).fit(noise)
    assert torch.allclose(prep(noise), prep.steps["scale"](torch.tanh(Spectrum(N, *BAND_HZ)(noise))))


def test_config_reads_with_jsonargparse():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PrepConfig, "prep")
    options = ["--prep.low_Hz=-80e6", "--prep.representation=stft", "--prep.log_power=true", "--prep.order=2"]
    config = PrepConfig(**parser.parse_args(options).prep)
    assert config.low_Hz == -80e6 and config.representation == "stft" and config.log_power and config.order == 2
    for bad in (["--prep.representation=fft"], ["--prep.q=many"]):
        with pytest.raises(Exception, match="prep"):
            parser.parse_args(bad)


@pytest.mark.parametrize("options", [{"noise": "pink"}, {"filter": "chebyshev"}, {"window": "kaiser"}, {"scale": "max"},
                                     {"representation": "wavelet"}, {"representation": "time", "log_power": True}])
def test_config_names_what_is_wrong(options):
    with pytest.raises(ConfigError):
        PrepConfig(**options)


@pytest.mark.parametrize("options", [{"low_Hz": -27e6, "high_Hz": -90e6}, {"low_Hz": -300e6}, {"sigma_V": -1.0},
                                     {"filter": "butterworth", "order": 0}, {"representation": "stft", "segment": 4096},
                                     {"representation": "q_transform", "q": 2.0}])
def test_build_names_what_does_not_fit(options):
    with pytest.raises(ConfigError):
        build_prep(PrepConfig(**options), N)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu_all_is_the_same(noise):
    for options in CONFIGS:
        config = PrepConfig(**options, segment=64, hop=16, q=16.0)
        prep = build_prep(config, N).fit(noise[:50]).eval()
        want, index = prep(noise[:5], torch.arange(5)), torch.arange(5, device="cuda")
        found = prep.cuda()(noise[:5].cuda(), index)
        assert found.is_cuda and torch.allclose(found.cpu(), want, atol=1e-4), options
        assert build_prep(config, N).cuda().fit(noise[:50])(noise[:5].cuda()).is_cuda


@pytest.mark.parametrize("kind", ["white", "coloured"])
def test_two_branches_share_the_noise(noise, kind):
    first = PrepConfig(noise=kind, representation="time", sigma_V=0.02)
    second = PrepConfig(noise=kind, sigma_V=0.02)
    clean, index = tone(*[-60e6] * 9).float(), torch.arange(9)
    recorded = 0.02 * torch.randn(8, 2, 4 * N, generator=torch.Generator().manual_seed(1))
    both = ParallelPrep(build_prep(first, N), build_prep(second, N)).fit(clean, recorded).eval()
    alone = [build_prep(c, N).fit(clean, recorded).eval() for c in (first, second)]
    assert all(torch.equal(x, p(clean, index)) for x, p in zip(both(clean, index), alone, strict=True))
    measured = both.noise(clean, index)
    assert all(torch.equal(a, b) for a, b in zip(both.without_noise()(measured), both(clean, index), strict=True))
    wave, spectrum = (to_complex(x) for x in both.train()(clean))
    z = torch.fft.fftshift(torch.fft.fft(wave, norm="ortho"), dim=1)
    assert all(abs(torch.vdot(a, b)) > 0.999 * a.norm() * b.norm() for a, b in zip(z, spectrum, strict=True))
    other = ParallelPrep(build_prep(first, N), build_prep(second, N))
    other.load_state_dict(both.state_dict())
    assert torch.equal(other.eval()(clean, index)[1], alone[1](clean, index))
    with pytest.raises(NotFittedError):
        ParallelPrep(build_prep(first, N), build_prep(second, N))(clean, index)
