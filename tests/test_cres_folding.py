"The encoder that folds a spectrum about its lines, and the mixture it answers with."
import math

import numpy as np
import pytest
import torch

from deadlayer_cres.core import ConfigError, DataError, NotFittedError
from deadlayer_cres.cres.folding import (
    CombTables,
    Fold,
    FoldEncoder,
    FoldSettings,
    components,
    half_bins,
    log_density,
    mixture,
    mixture_numbers,
    moments,
    quantiles,
    strongest_lines,
)
from deadlayer_cres.cres.model import Axis, EncoderConfig, EventLoss, LossConfig, ModelConfig, Reconstructor
from deadlayer_cres.cres.trap import cyclotron_frequency

LO, SAMPLES, RATE, FIRST, BINS = 25.9702e9, 4096, 403e6, -900, 600  # bins of the spectrum, from -88.5 MHz
BIN = RATE / SAMPLES
FREQUENCY = (FIRST + torch.arange(BINS, dtype=torch.float64)) * BIN
TARGETS = ("energy_eV", "pitch_angle_deg")
LABELS = ("avg_axial_frequency_Hz", "avg_carrier_frequency_Hz", "pitch_angle_deg")


def spectrum(*lines):
    "The band of the orthonormal transform of lines (bin, amplitude, phase), as (1, 2, BINS)."
    t = np.arange(SAMPLES)
    z = sum(a * np.exp(2j * np.pi * (b * t / SAMPLES) + 1j * phase) for b, a, phase in lines)
    z = np.fft.fft(z, norm="ortho")[FIRST + np.arange(BINS)]
    return torch.from_numpy(np.stack([z.real, z.imag])[None]).float()


def electrons(n=4000, seed=0):
    "Labels of a made-up trap: the axial frequency has a maximum at 88.2 degrees."
    rng = np.random.default_rng(seed)
    pitch, energy = rng.uniform(88, 90, n), rng.uniform(18_500, 18_700, n)
    axial = 8e6 - 3.5e6 * np.abs(pitch - 88.2) ** 1.2
    carrier = cyclotron_frequency(energy, 0.959) + 6e6 * (90 - pitch) ** 2 / 4
    return np.stack([energy, pitch], 1), (axial, carrier, pitch)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    encoder = EncoderConfig("fold", d_model=8, layers=2, dropout=0.0, fold=FoldSettings(lines=3))
    net = Reconstructor(ModelConfig([encoder], head="mixture", hidden=[8]), [2], TARGETS, Axis(FREQUENCY, LO))
    y, labels = electrons()
    net.scale.fit(y)
    net.fit_tables(y, labels)
    return net.eval()


def test_half_bins_are_those_of_a_record_twice_as_long():
    t = np.arange(SAMPLES)
    z = np.exp(2j * np.pi * -700.37 * t / SAMPLES)
    exact = np.fft.fft(z, 2 * SAMPLES)[2 * FIRST + np.arange(2 * BINS)] / math.sqrt(SAMPLES)
    found = half_bins(spectrum((-700.37, 1.0, 0.0)))[0].numpy()
    left = np.abs(found[0] + 1j * found[1] - exact)
    assert left[::2].max() < 1e-4 * np.abs(exact).max()  # the bins themselves
    assert (left**2).sum() < 0.03 * (np.abs(exact) ** 2).sum() and left.max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("at", np.linspace(-700, -699, 7))
def test_a_line_is_found_to_a_fraction_of_a_bin(at):
    power = half_bins(spectrum((at, 0.3, 1.0), (at + 90, 0.1, 0.0))).square().sum(1)
    k, shift = strongest_lines(power, 2)
    assert (k + shift)[0] / 2 + FIRST == pytest.approx([at, at + 90], abs=0.03)


def test_a_pair_stands_in_its_cell():
    fold = Fold(FoldSettings(lines=2), BINS, BIN)
    x = spectrum((-600, 1.0, 0.3), (-600 + 77, 0.5, 1.3), (-600 - 77, 0.5, 2.0), (-600 - 154, 0.3, 0.0))
    cells, lines, k, _ = fold(x)
    assert k[0, 0] == 2 * (-600 - FIRST)
    m, w = fold.sizes
    plus, minus, second = cells[0, 0, :, :m], cells[0, 0, :, m:2 * m], cells[0, 0, :, 2 * m + w:2 * m + 2 * w]
    for part in (plus, minus):
        assert int(part[2:].amax(1).argmax()) + 2 in (37, 38, 39)  # the line itself is in 0 and 1
    assert second[38].max() > 2 and second[50:].max() < 0.1
    at = int(plus[77 // 2].argmax())
    turned = torch.complex(cells[..., 2 * m + 2 * w:3 * m + 2 * w], cells[..., 3 * m + 2 * w:4 * m + 2 * w])
    assert float(turned[0, 0, 77 // 2, at].angle()) == pytest.approx(1.3 + 2.0 - 2 * 0.3, abs=0.05)
    centre = float(cells[0, 0, 77 // 2, -2])  # 77 bins = 38.5 cells: the middle of one
    assert centre == pytest.approx(0.0, abs=0.02)


def test_the_phases_of_the_motion_cancel():
    fold, found = Fold(FoldSettings(lines=1), BINS, BIN), []
    for cyclotron, axial in ((0, 0), (1, 0), (0, 2), (2.5, -1)):
        x = spectrum((-600, 1.0, cyclotron), (-520, 0.5, cyclotron + axial), (-680, 0.5, cyclotron - axial))
        cells, *_ = fold(x)
        found.append(cells[0, 0, 40])
    assert all(torch.allclose(found[0], f, atol=2e-2) for f in found[1:])


def test_the_tables_say_what_the_labels_say(net):
    t = net.branches[0].encoder.tables
    y, (axial, carrier, pitch) = electrons(500, seed=1)
    scaled = net.scale(torch.from_numpy(y)).numpy()
    anchor = np.interp(carrier, LO + float(FREQUENCY[0]) + np.arange(2 * BINS) * BIN / 2, t.anchor.numpy())
    cell = (2 * axial / BIN / 2).astype(int)
    side = (pitch <= 88.2).astype(int)
    clear = np.abs(pitch - 88.2) > 0.1
    found = t.mean.numpy()[side, :, cell]
    assert np.abs((anchor + found[:, 0] - scaled[:, 0]) * float(net.scale.std[0]))[clear].mean() < 1.5  # eV
    assert np.abs((found[:, 1] - scaled[:, 1]) * float(net.scale.std[1]))[clear].max() < 0.05  # degrees
    assert t.log_prior.exp().sum() == pytest.approx(4000, rel=0.01)
    assert float(t.unit[0]) * float(net.scale.std[0]) == pytest.approx(20.45e-6 * BIN, rel=0.01) and t.unit[1] == 0


def test_what_the_network_says(net):
    y, (_, carrier, _) = electrons()
    x = torch.randn(5, 2, BINS) + torch.cat([spectrum(((f - LO) / BIN, 0.5, 0.0)) for f in carrier[:5]])
    with torch.no_grad():
        raw = net(x)
        p = net.read(raw)
        alone = net.read(net(x[2:3]))
    assert torch.allclose(p.mean[2:3], alone.mean) and torch.allclose(p.quantiles[2:3], alone.quantiles, rtol=1e-4)
    assert (p.mean >= torch.from_numpy(y.min(0))).all() and (p.mean <= torch.from_numpy(y.max(0))).all()
    assert (p.weight.diff(dim=1) <= 0).all() and (p.sigma > 0).all() and (p.quantiles.diff(dim=2) > 0).all()
    c = components(raw.double(), 2)
    assert torch.allclose(net.scale.inverse(moments(c)[0]), p.mean)


def test_density_is_normalised(net):
    with torch.no_grad():
        c = components(net(torch.randn(1, 2, BINS)).double(), 2)
    grid = torch.linspace(-4, 4, 401).double()
    y = torch.cartesian_prod(grid, grid)
    density = torch.cat([log_density(type(c)(*(v.expand(len(p), *v.shape[1:]) for v in c)), p) for p in y.split(2000)])
    assert float(density.exp().sum()) * 0.02**2 == pytest.approx(1, abs=0.01)
    w, width = c.log_weight.exp(), c.log_width.exp()
    level = (w[..., None] * torch.special.ndtr((quantiles(c, (0.3,))[..., 0][:, None] - c.mean) / width)).sum(1)
    assert torch.allclose(level, torch.full_like(level, 0.3), atol=2e-3)  # the lighter components are points


def test_loss_is_the_log_density_and_reaches_every_weight(net):
    y, labels = electrons(8, seed=2)
    loss = EventLoss(net, LossConfig(), TARGETS)
    raw = net(torch.randn(8, 2, BINS))
    value = loss(raw, torch.from_numpy(y))
    by_hand = -log_density(components(raw, 2), net.scale(torch.from_numpy(y))).mean() / 2
    assert torch.allclose(value, by_hand)
    value.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    net.zero_grad()


def test_it_learns_where_a_comb_is(net):
    import copy

    learner = copy.deepcopy(net).train()
    y, (axial, carrier, _) = electrons(64, seed=3)
    place = (carrier - LO) / BIN
    x = torch.cat([spectrum((b, 0.5, 0.0), (b + 2 * a, 0.3, 1.0), (b - 2 * a, 0.3, 1.0))
                   for b, a in zip(place, axial / BIN, strict=True)])
    y, loss = torch.from_numpy(y), EventLoss(learner, LossConfig(), TARGETS)
    generator = torch.Generator().manual_seed(0)
    optimiser, values = torch.optim.Adam(learner.parameters(), 5e-3), []
    for _ in range(60):
        value = loss(learner(x + torch.randn(x.shape, generator=generator)), y)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert np.mean(values[-5:]) < np.mean(values[:5]) - 1
    with torch.no_grad():
        left = learner.read(learner.eval()(x + torch.randn(x.shape, generator=generator))).mean[:, 0] - y[:, 0]
    assert left.abs().median() < 10  # eV, of a range of 200


def test_weights_and_tables_travel_together(net, tmp_path):
    encoder = EncoderConfig("fold", d_model=8, layers=2, dropout=0.0, fold=FoldSettings(lines=3))
    other = Reconstructor(ModelConfig([encoder], head="mixture", hidden=[8]), [2], TARGETS, Axis(FREQUENCY, LO)).eval()
    x = torch.randn(2, 2, BINS)
    with pytest.raises(NotFittedError):
        other(x)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))


def test_wrong_settings_and_inputs():
    encoder = EncoderConfig("fold", d_model=8, layers=1)
    with pytest.raises(ConfigError, match="fold alone with the head mixture"):
        ModelConfig([encoder], head="gaussian")
    with pytest.raises(ConfigError, match="fold alone with the head mixture"):
        ModelConfig([EncoderConfig()], head="mixture")
    config = ModelConfig([encoder], head="mixture")
    with pytest.raises(ConfigError, match="frequency axis"):
        Reconstructor(config, [2], TARGETS)
    with pytest.raises(ConfigError, match="energy_eV"):
        Reconstructor(config, [2], ("pitch_angle_deg",), Axis(FREQUENCY, LO))
    with pytest.raises(ConfigError, match="lines"):
        FoldSettings(lines=0)
    with pytest.raises(ConfigError, match="max_axial_frequency_Hz"):
        FoldSettings(max_axial_frequency_Hz=-1.0)
    fold = Fold(FoldSettings(), BINS, BIN)
    with pytest.raises(DataError, match="log_power"):
        fold(torch.zeros(2, 1, BINS))
    tables = CombTables(fold, 1, FREQUENCY, LO)
    with pytest.raises(DataError, match="finite"):
        tables.fit(np.zeros((3, 1)), 0, (0.0, 1.0), np.array([1, 2, np.nan]), np.ones(3))


def test_one_target_and_no_pitch_label():
    torch.manual_seed(0)
    encoder = FoldEncoder(FoldSettings(lines=2), FREQUENCY, 1, LO, width=8)
    y, (axial, carrier, _) = electrons()
    scaled = (y[:, :1] - y[:, :1].mean()) / y[:, :1].std()
    encoder.tables.fit(scaled, 0, (y[:, 0].mean(), y[:, 0].std()), axial, carrier)
    cells = encoder(torch.randn(2, 2, BINS))
    raw = mixture(cells, torch.zeros(2, cells.features.shape[1], mixture_numbers(1)))
    assert moments(components(raw, 1))[0].shape == (2, 1)


def test_without_a_line_in_reach_the_answer_is_the_training(net):
    x = spectrum((FIRST + 20, 1.0, 0.0)).repeat(2, 1, 1)  # no electron of the training has such a carrier
    with torch.no_grad():
        p = net.read(net(x))
    assert torch.allclose(p.mean[0], net.scale.mean, rtol=1e-3) and torch.allclose(p.sigma[0], net.scale.std, rtol=0.1)
