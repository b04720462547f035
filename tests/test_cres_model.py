"Networks of the CRES wing: shapes, gradients, encoders against plain formulas, heads, losses, and starting weights."
import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.interpolate import RegularGridInterpolator
from torch import nn
from torch.nn import functional as F

from deadlayer_cres.core import ConfigError, DataError, NotFittedError, config_from_dict, to_plain
from deadlayer_cres.cres import model
from deadlayer_cres.cres.data import EfficiencyGrid, read_efficiency, shared_data
from deadlayer_cres.cres.model import (
    ENCODERS,
    HEADS,
    QUANTILES,
    EncoderConfig,
    EventLoss,
    GatedFusion,
    Head,
    LinOSSLayer,
    LinOSSSettings,
    LossConfig,
    ModelConfig,
    Oscillators,
    Prediction,
    Reconstructor,
    S4DSettings,
    SelfAttention,
    denoising_error,
    input_channels,
    ordered_quantiles,
    sinusoids,
    start_branch,
)
from deadlayer_cres.metrics import pinball_loss
from deadlayer_cres.train import TrainConfig, param_groups

TARGETS = ("energy_eV", "pitch_angle_deg")
KINDS, SEQUENCES = ("s4d", "cnn", "lstm", "linoss", "conformer"), ("s4d", "lstm", "linoss", "conformer")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_sequence = pytest.mark.parametrize("kind", SEQUENCES)
each_head = pytest.mark.parametrize("head", ["mean", "gaussian", "quantiles"])


def encoder(kind="s4d", **settings) -> EncoderConfig:
    return EncoderConfig(**({"kind": kind, "d_model": 8, "layers": 2, "dropout": 0.0} | settings))


def network(*encoders, channels=(2,), seed=0, **settings) -> Reconstructor:
    torch.manual_seed(seed)
    net = Reconstructor(ModelConfig(list(encoders), **({"hidden": [16]} | settings)), channels, TARGETS)
    if settings.get("task") != "denoise":
        net.scale.fit([[18500.0, 88.0], [18700.0, 90.0], [18560.0, 88.5]])
    return net


def inputs(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(n: int, seed=0) -> torch.Tensor:
    "(n, 3) energy, pitch angle, radius."
    u = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.tensor([18500.0, 88, 0]) + u * torch.tensor([200.0, 2, 0.0065])


COLUMNS = (*TARGETS, "radius_m")

# --- shapes, batches, gradients ---


@each_head
@each_kind
@pytest.mark.parametrize("shape, patch", [((2, 70), 1), ((2, 70), 8), ((2, 3), 8), ((2, 12, 9), 1), ((1, 12, 9), 4)])
def test_shapes(kind, head, shape, patch):
    x = inputs(3, *shape)
    net = network(encoder(kind, patch=patch), channels=[input_channels(x)], head=head).eval()
    raw = net(x)
    assert raw.shape == (3, {"mean": 2, "gaussian": 4, "quantiles": 10}[head])
    p = net.read(raw)
    assert p.mean.shape == p.sigma.shape == (3, 2) and p.mean.dtype == p.sigma.dtype == torch.float64
    assert p.mean.isfinite().all() and (p.sigma.isnan() if head == "mean" else p.sigma > 0).all()
    assert (p.quantiles is None) == (head != "quantiles") and p.weight is p.modes is p.widths is None
    if head == "quantiles":
        assert p.quantiles.shape == (3, 2, 5) and (p.quantiles.diff(dim=-1) > 0).all()
    torch.testing.assert_close(net(x[1:2]), raw[1:2], rtol=1e-4, atol=1e-5)  # an event does not depend on its batch


@each_kind
@pytest.mark.parametrize("norm, pool", [("pre", "mean"), ("post", "attention"), ("pre", "last")])
@pytest.mark.parametrize("axes", [1, 2])
def test_gradients_are_finite_and_reach_every_parameter(kind, norm, pool, axes):
    x = inputs(4, 2, 6, 40) if axes == 2 else inputs(4, 2, 70)
    net = network(encoder(kind, norm=norm, pool=pool), channels=[input_channels(x)])
    EventLoss(net, LossConfig(), COLUMNS)(net(x), labels(4)).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


@each_kind
def test_the_same_seed_gives_the_same_network(kind):
    x = inputs(2, 2, 50)
    nets = [network(encoder(kind, dropout=0.3), seed=seed) for seed in (1, 1, 2)]
    outputs = []
    for net in nets:
        torch.manual_seed(7)
        outputs.append(net(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(nets[0](x), nets[0](x))  # dropout
    assert torch.equal(nets[0].eval()(x), nets[0](x))


@each_kind
def test_checkpoints_change_no_gradient(kind):
    x, grads = inputs(3, 2, 64), []
    for again in (False, True):
        net = network(encoder(kind, dropout=0.2, checkpoint=again))
        torch.manual_seed(3)
        loss = EventLoss(net, LossConfig(), COLUMNS)(net(x), labels(3))
        loss.backward()
        grads.append({"loss": loss} | {n: p.grad for n, p in net.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-5, atol=1e-7)


@each_kind
def test_checkpoints_keep_less(kind):
    kept = []
    for again in (False, True):
        net, sizes = network(encoder(kind, layers=3, checkpoint=again)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            net(inputs(2, 2, 512))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


@each_kind
def test_half_precision(kind):
    net = network(encoder(kind))
    with torch.autocast("cpu", torch.bfloat16):
        raw = net(inputs(3, 2, 64))
    loss = EventLoss(net, LossConfig(), COLUMNS)(raw, labels(3))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    torch.testing.assert_close(raw.float(), net(inputs(3, 2, 64)), rtol=0.1, atol=0.1)


@each_kind
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_each_encoder_can_learn(kind, norm):
    "A tiny clean set of spectra: where is the line, and how strong?"
    g = torch.Generator().manual_seed(0)
    place, size = torch.randint(4, 44, (16,), generator=g), 0.5 + torch.rand(16, generator=g)
    x = torch.zeros(16, 2, 48)
    x[torch.arange(16), 0, place], x[torch.arange(16), 1, place] = 3 * size, -2 * size
    y = torch.stack([18500 + 3.0 * place, 88 + size], 1).double()
    net = network(encoder(kind, d_model=16, pool="attention", norm=norm), head="mean")
    net.scale.fit(y)
    loss = EventLoss(net, LossConfig(), TARGETS)
    adam = torch.optim.Adam(net.parameters(), {"lstm": 1e-2, "conformer": 2e-3}.get(kind, 5e-3))
    values = []
    for _ in range(150):
        adam.zero_grad()
        values.append(loss(net(x), y))
        values[-1].backward()
        adam.step()
    assert 0.5 < values[0] < 2 and min(values[-10:]) < values[0] / 30, f"{values[0]:.3f} to {values[-1]:.4f}"


# --- encoders against plain formulas ---


class PublishedS4D(nn.Module):
    "The residual network of the S4 repository's example, around given layers."

    def __init__(self, d_input, layers, width, prenorm):
        super().__init__()
        self.encoder, self.layers, self.prenorm = nn.Linear(d_input, width), layers, prenorm
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in layers)

    def forward(self, x):  # (B, L, d_input)
        x = self.encoder(x).transpose(-1, -2)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            z = norm(x.transpose(-1, -2)).transpose(-1, -2) if self.prenorm else x
            x = layer(z) + x
            if not self.prenorm:
                x = norm(x.transpose(-1, -2)).transpose(-1, -2)
        return x.transpose(-1, -2).mean(1)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_s4d_is_the_published_network(norm):
    branch = network(encoder(norm=norm, layers=3)).branches[0]
    plain = PublishedS4D(2, [r.layer for r in branch.encoder.layers], 8, norm == "pre")
    lift = branch.encoder.stem.lift
    plain.encoder.weight.data, plain.encoder.bias.data = lift.weight[..., 0], lift.bias
    for mine, theirs in zip(branch.encoder.layers, plain.norms, strict=True):
        mine.norm.weight.data.uniform_(0.5, 2)
        mine.norm.bias.data.uniform_(-1, 1)
        theirs.load_state_dict(mine.norm.state_dict())
    if norm == "pre":
        branch.encoder.norm = nn.Identity()  # theirs has none at the end
    x = inputs(3, 2, 90)
    torch.testing.assert_close(branch(x), plain(x.transpose(1, 2)), rtol=1e-5, atol=1e-6)


def test_s4d_settings_reach_the_layers():
    settings = S4DSettings(8, "fourier", "bilinear", memory_samples=256, band_low=0.1, band_high=0.3, lr=None,
                           bidirectional=True)
    layer = network(encoder(s4d=settings, dropout=0.25)).branches[0].encoder.layers[1].layer
    assert layer.config == model.s4d_config(encoder(s4d=settings, dropout=0.25))
    assert layer.config.channels == 8 and layer.config.init == "fourier" and layer.kernel(10).shape[0] == 2


def test_lstm_sees_both_ways():
    net = network(encoder("lstm", pool="last", layers=1, norm="post"))
    branch, layer = net.branches[0], net.branches[0].encoder.layers[0]
    u = model.add_positions(branch.encoder.stem(inputs(2, 2, 30)))
    both = layer.layer.lstm(u.transpose(1, 2))[0].transpose(1, 2)
    full = layer.norm(u + both)
    expected = torch.cat([full[:, :4, -1], full[:, 4:, 0]], 1)
    torch.testing.assert_close(branch(inputs(2, 2, 30)), expected)
    one_way = nn.LSTM(8, 4, batch_first=True)
    one_way.load_state_dict({k: v for k, v in layer.layer.lstm.state_dict().items() if "reverse" not in k})
    torch.testing.assert_close(both[:, :4], one_way(u.transpose(1, 2))[0].transpose(1, 2))


def test_attention_is_the_softmax_of_products():
    attention, x = SelfAttention(8, 2), inputs(3, 8, 20)
    q, k, v = attention.qkv(x).split(8, 1)
    parts = []
    for h in (slice(0, 4), slice(4, 8)):
        weights = torch.softmax(torch.einsum("ndl,ndm->nlm", q[:, h], k[:, h]) / 2, -1)
        parts.append(torch.einsum("nlm,ndm->ndl", weights, v[:, h]))
    torch.testing.assert_close(attention(x), attention.out(torch.cat(parts, 1)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("damped", [True, False])
@pytest.mark.parametrize("scheme", ["imex", "im"])
def test_oscillators_are_those_of_the_recurrence(scheme, damped):
    "Kick and drift in float64, and the poles of the matrix of a step."
    o = Oscillators(LinOSSSettings(oscillators=7, scheme=scheme, damped=damped, memory_samples=400))
    with torch.no_grad():
        o.angle += torch.linspace(-3, 3, 7)
        stiffness, damping = o.constants()
        found = o(3000)[0]
    assert (stiffness > 0).all() and ((damping > 0) if damped else (damping == 0)).all()
    a, g = stiffness.numpy(), damping.numpy()
    s = 1 / (1 + g) if scheme == "imex" else 1 / (1 + g + a)
    rows = [[s, -s * a], [s, 1 - s * a] if scheme == "imex" else [s, s * (1 + g)]]
    step = np.moveaxis(np.array([[*rows[0]], [*rows[1]]]), -1, 0)  # (7, 2, 2) of (velocity, place)
    state, expected = np.stack([s, s], -1), []
    for _ in range(3000):
        expected.append(state[:, 1])
        state = np.einsum("pij,pj->pi", step, state)
    expected = np.stack(expected, -1)
    assert np.abs(found.numpy() - expected).max() < 2e-6 * np.abs(expected).max()
    radius = np.abs(np.linalg.eigvals(step))
    assert (radius <= 1 + 1e-9).all() and np.iscomplex(np.linalg.eigvals(step)).all()
    if scheme == "imex":
        assert np.allclose(radius, math.exp(-1 / 400) if damped else 1, rtol=1e-6)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_linoss_layer_is_its_equation(bidirectional):
    torch.manual_seed(0)
    layer = LinOSSLayer(4, LinOSSSettings(oscillators=6, memory_samples=50, bidirectional=bidirectional)).eval()
    u, h = inputs(2, 4, 80), layer.oscillators(80)[0]
    toeplitz = torch.zeros(6, 80, 80)
    for m in range(80):
        toeplitz[:, m:, m] = h[:, :80 - m]
    force = layer.B(u)
    y = [torch.einsum("plm,npm->npl", toeplitz, force)]
    if bidirectional:
        y.append(torch.einsum("pml,npm->npl", toeplitz, force))
    x = F.gelu(layer.C(torch.cat(y, 1)) + layer.D * u)
    torch.testing.assert_close(layer(u), F.glu(layer.mix(x), 1), rtol=1e-4, atol=1e-5)


def test_linoss_neither_amplifies_nor_kills_noise():
    torch.manual_seed(0)
    for settings in ({}, {"scheme": "im"}, {"damped": False}, {"band_high": 0.01}):
        layer = LinOSSLayer(16, LinOSSSettings(**settings))
        with torch.no_grad():
            force = layer.B(inputs(4, 16, 1024))
            y = model.long_convolution(force, layer.oscillators(1024), torch.zeros(64, 1))
        assert 0.3 < y.std() < 1.5, settings


def test_sinusoids_tell_positions_apart():
    p = sinusoids(8192, 32)
    assert p.shape == (32, 8192) and torch.equal(p[::2, 0], torch.zeros(16)) and sinusoids(5, 7).shape == (7, 5)
    torch.testing.assert_close(p[:2, 100], torch.tensor([math.sin(100), math.cos(100)]))
    distance = (p - p[:, 4000:4001]).norm(dim=0)
    assert distance[4000] == 0 and distance[torch.arange(8192) != 4000].min() > 0.5


@pytest.mark.parametrize("kind", ["cnn", "conformer", "s4d", "lstm", "linoss"])
def test_every_encoder_tells_where_a_line_is(kind):
    x = torch.zeros(2, 2, 256)
    x[0, :, 80] = x[1, :, 144] = 10.0
    with torch.no_grad():
        features = network(encoder(kind)).branches[0](x)
    assert (features[0] - features[1]).norm() > 1e-4 * features.norm()  # 1e-7 without a sense of place


@each_sequence
def test_an_image_is_a_sequence_of_spectra(kind):
    net, image = network(encoder(kind), channels=[24]).eval(), inputs(3, 2, 12, 30)
    same = network(encoder(kind), channels=[(2, 12)]).eval()
    assert torch.equal(net(image), same(image)) and torch.equal(net(image), net(image.flatten(1, 2)))


def test_wrong_inputs_are_data_errors():
    net = network(encoder())
    for x in (inputs(2, 3, 40), inputs(2, 40), inputs(2, 2, 0), inputs(0, 2, 40)):
        with pytest.raises(DataError, match="channels"):
            net(x)
    with pytest.raises(DataError, match="1 inputs"):
        net(inputs(2, 2, 40), inputs(2, 2, 40))
    with pytest.raises(DataError, match="channels"):
        network(encoder("cnn"), channels=[(2, 12)])(inputs(2, 2, 40))
    with pytest.raises(DataError, match="axes"):
        input_channels(inputs(3, 4))


# --- branches ---


@pytest.mark.parametrize("fusion", ["concat", "gated"])
@pytest.mark.parametrize("first", KINDS)
def test_two_branches_of_any_kind(first, fusion):
    x, image = inputs(3, 2, 60), inputs(3, 2, 10, 16)
    net = network(encoder(first), encoder("cnn", d_model=12), channels=[2, (2, 10)], fusion=fusion)
    raw = net(x, image)
    raw.sum().backward()
    assert raw.shape == (3, 4) and all(p.grad is not None for p in net.parameters())
    assert not torch.equal(raw, net(x, 2 * image)) and not torch.equal(raw, net(2 * x, image))


def test_the_gate_lies_between_its_inputs():
    torch.manual_seed(0)
    fusion, a, b = GatedFusion(6, 6), inputs(50, 6), inputs(50, 6, seed=1)
    g = torch.sigmoid(F.linear(torch.cat([a, b], 1), fusion.gate.weight, fusion.gate.bias))
    torch.testing.assert_close(fusion(a, b), g * a + (1 - g) * b)
    assert GatedFusion(4, 6)(inputs(2, 4), inputs(2, 6)).shape == (2, 6)


@pytest.mark.parametrize("prefix", ["", "net."])
def test_branches_start_from_trained_ones_and_stay_frozen(prefix):
    single = network(encoder("cnn", d_model=12, dropout=0.5), channels=[(2, 10)], seed=5)
    net = network(encoder(dropout=0.5), encoder("cnn", d_model=12, dropout=0.5), channels=[2, (2, 10)])
    others = {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("branches.1.")}
    start_branch(net, 1, {prefix + k: v for k, v in single.state_dict().items()}, freeze=True)
    for k, v in single.branches[0].state_dict().items():
        assert torch.equal(net.branches[1].state_dict()[k], v), k
    assert all(torch.equal(net.state_dict()[k], v) for k, v in others.items())

    net.train()
    x, image = inputs(4, 2, 60), inputs(4, 2, 10, 16)
    assert torch.equal(net.branches[1](image), single.eval().branches[0](image))  # without dropout
    assert not torch.equal(net.branches[0](x), net.branches[0](x))
    before = copy.deepcopy(net.state_dict())
    optimiser = torch.optim.AdamW(param_groups(net, TrainConfig(lr=0.1)))
    EventLoss(net, LossConfig(), COLUMNS)(net(x, image), labels(4)).backward()
    optimiser.step()
    moved = {k.split(".")[0] + k.split(".")[1] for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert "branches0" in moved and "headnet" in moved and "branches1" not in moved
    assert model.count_parameters(net.branches[1]) == 0 < model.count_parameters(net.branches[0])


def test_weights_of_another_architecture_are_refused():
    net = network(encoder(), encoder(), channels=[2, 2])
    for weights in (network(encoder("cnn")).state_dict(), network(encoder(d_model=4)).state_dict(), {}):
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ConfigError) as e:
            start_branch(net, 0, weights)
        assert e.value.row == "start_from" and "branches.0" in str(e.value)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(ConfigError):
        start_branch(net, 2, network(encoder()).state_dict())
    with pytest.raises(ConfigError):
        start_branch(net, "denoiser", network(encoder()).state_dict())


# --- denoising ---


@each_sequence
@pytest.mark.parametrize("shape, patch", [((2, 50), 1), ((2, 50), 8), ((2, 6, 20), 1)])
def test_a_denoiser_keeps_the_shape(kind, shape, patch):
    x = inputs(3, *shape)
    settings = {"task": "denoise", "denoiser": encoder(kind, patch=patch)}
    net = network(encoder(), channels=[input_channels(x)], **settings)
    clean = net(x)
    assert clean.shape == x.shape and net.head is None and len(net.branches) == 0
    EventLoss(net, LossConfig(denoise="mse_spectral"), ())(clean, labels(3), torch.zeros_like(x)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_denoise_and_regress():
    x, y = inputs(3, 2, 64), labels(3)
    net = network(encoder(), task="both", denoiser=encoder(layers=1))
    clean, raw = pred = net(x)
    loss = EventLoss(net, LossConfig(denoise_weight=0.5), COLUMNS)
    alone = EventLoss(net, LossConfig(denoise_weight=0), COLUMNS)(pred, y, x)
    torch.testing.assert_close(loss(pred, y, x), alone + 0.5 * F.mse_loss(clean, x))
    assert torch.equal(net.read(pred).mean, net.read(raw).mean)
    torch.testing.assert_close(net.head(net.branches[0](clean)), raw)  # the branch reads what was denoised
    for wrong in (None, x[:, :1], x[..., 1:]):
        with pytest.raises(DataError, match="clean"):
            loss(pred, y, wrong)

    trained = network(encoder(), task="denoise", denoiser=encoder(layers=1), seed=9)
    start_branch(net, "denoiser", trained.state_dict(), freeze=True)
    assert torch.equal(net(x)[0], trained(x)) and not net.train().denoiser.training


def test_the_spectral_error_sees_power_and_not_phase():
    x = torch.stack([torch.cos(0.5 * torch.arange(256)), torch.sin(0.5 * torch.arange(256))])[None]
    moved = torch.roll(x, 7, -1)
    assert denoising_error(moved, x, 1.0) < 1e-10 < 0.1 < denoising_error(moved, x)
    a, b = inputs(3, 2, 50), inputs(3, 2, 50, seed=1)
    plain = np.abs(np.fft.fft(a.double(), norm="ortho")) - np.abs(np.fft.fft(b.double(), norm="ortho"))
    expected = 0.7 * np.mean((a - b).double().numpy() ** 2) + 0.3 * np.mean(plain**2)
    assert denoising_error(a, b, 0.3).item() == pytest.approx(expected, rel=1e-5)


# --- heads and losses ---


def test_nll_is_that_of_torch_distributions():
    net, raw, y = network(encoder()), inputs(200, 4), labels(200)
    raw[:, 2:] *= 3
    p = net.read(raw)
    nll = -torch.distributions.Normal(p.mean, p.sigma).log_prob(y[:, :2]) - net.scale.std.log()
    assert EventLoss(net, LossConfig(), COLUMNS)(raw, y).item() == pytest.approx(nll.mean().item(), rel=1e-5)
    assert EventLoss(net, LossConfig("nll"), COLUMNS)(raw, y).item() == pytest.approx(nll.mean().item(), rel=1e-5)


def test_nll_stays_finite_far_out():
    net = network(encoder())
    raw = torch.tensor([[1e3, 0, -1e4, -50], [0, -1e3, 60, 1e-3]], requires_grad=True)
    loss = EventLoss(net, LossConfig(), COLUMNS)(raw, labels(2))
    loss.backward()
    assert loss.isfinite() and raw.grad.isfinite().all() and (net.read(raw).sigma > 0).all()


def test_pinball_is_that_of_metrics():
    net, raw, y = network(encoder(), head="quantiles"), inputs(100, 10), labels(100)
    scaled, q = net.scale(y[:, :2]).numpy(), net.head.quantiles(raw).numpy()
    expected = np.mean([pinball_loss(scaled[:, t], q[:, t], QUANTILES) for t in range(2)])
    for kind in ("auto", "pinball"):
        assert EventLoss(net, LossConfig(kind), COLUMNS)(raw, y).item() == pytest.approx(expected, rel=1e-5)


def test_quantiles_never_cross():
    raw = 30 * inputs(2000, 3, 5)
    q = ordered_quantiles(raw)
    assert (q.diff(dim=-1) >= 0).all() and torch.equal(q[..., 2], raw[..., 2])
    assert (ordered_quantiles(inputs(2000, 5)).diff(dim=-1) > 0).all()
    gaps = F.softplus(raw)
    torch.testing.assert_close(q[..., 0], raw[..., 2] - gaps[..., 0] - gaps[..., 1])
    torch.testing.assert_close(q[..., 4], raw[..., 2] + gaps[..., 3] + gaps[..., 4])


@pytest.mark.parametrize("kind", ["auto", "mse", "weighted_mse", "huber"])
def test_losses_of_the_mean(kind):
    net, raw, y = network(encoder(), head="mean"), 3 * inputs(40, 2), labels(40)
    weights = [3.0, 1.0] if kind == "weighted_mse" else None
    found = EventLoss(net, LossConfig(kind, weights, huber_delta=0.7), COLUMNS)(raw, y)
    scaled = net.scale(y[:, :2])
    if kind == "huber":
        expected = nn.HuberLoss(delta=0.7)(raw, scaled)
    else:
        expected = ((raw - scaled) ** 2 * torch.tensor([1.5, 0.5] if weights else [1.0, 1.0])).mean()
    torch.testing.assert_close(found, expected)


@each_head
def test_the_loss_finds_its_columns(head):
    net, y = network(encoder(), head=head), labels(20)
    raw = inputs(20, net.head.n_out)
    straight = EventLoss(net, LossConfig(weights=[1.0, 4.0]), COLUMNS)(raw, y)
    turned = EventLoss(net, LossConfig(weights=[1.0, 4.0]), COLUMNS[::-1])(raw, y.flip(1))
    assert torch.equal(straight, turned)
    assert not torch.equal(straight, EventLoss(net, LossConfig(weights=[4.0, 1.0]), COLUMNS)(raw, y))


@each_head
def test_events_are_weighted_by_their_efficiency(head, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "grid.npz"
    write_grid(path, epsilon=rng.random((6, 3, 4, 5)))
    net, y = network(encoder(), head=head), labels(30)
    raw = inputs(30, net.head.n_out)
    plain = EventLoss(net, LossConfig(), COLUMNS)
    each = torch.stack([plain(raw[i:i + 1], y[i:i + 1]) for i in range(30)])
    weight = read_efficiency(path, 3)(*y.unbind(1)).float()
    found = EventLoss(net, LossConfig(efficiency=str(path), efficiency_threshold=3), COLUMNS)(raw, y)
    torch.testing.assert_close(found, (weight * each).mean())
    with pytest.raises(ConfigError, match="radius_m"):
        EventLoss(net, LossConfig(efficiency=str(path)), TARGETS)


@each_head
def test_read_is_in_units_of_the_targets(head):
    "Other units of the targets: the same events, other numbers."
    net, y = network(encoder(), head=head), labels(50)
    raw = inputs(10, net.head.n_out)
    factor, shift = torch.tensor([1e-3, 60.0], dtype=torch.float64), torch.tensor([5.0, -90.0], dtype=torch.float64)
    net.scale.fit(y[:, :2])
    p = net.read(raw)
    net.scale.fit(factor * y[:, :2] + shift)
    q = net.read(raw)
    torch.testing.assert_close(q.mean, factor * p.mean + shift)
    torch.testing.assert_close(q.sigma, factor * p.sigma, equal_nan=True)
    if head == "quantiles":
        torch.testing.assert_close(q.quantiles, factor[:, None] * p.quantiles + shift[:, None])
        torch.testing.assert_close(p.sigma, (p.quantiles[..., 3] - p.quantiles[..., 1]) / 2)
        torch.testing.assert_close(p.mean, p.quantiles[..., 2])

    net.sigma_scale.copy_(torch.tensor([2.0, 0.5]))
    wide = net.read(raw)
    assert torch.equal(wide.mean, q.mean)
    torch.testing.assert_close(wide.sigma, torch.tensor([2.0, 0.5]) * q.sigma, equal_nan=True)
    if head == "quantiles":
        torch.testing.assert_close(wide.sigma, (wide.quantiles[..., 3] - wide.quantiles[..., 1]) / 2)


def test_reading_needs_a_fitted_scale():
    net = Reconstructor(ModelConfig([encoder()]), [2], TARGETS)
    with pytest.raises(NotFittedError):
        net.read(net(inputs(2, 2, 30)))


# --- registries ---


@pytest.fixture
def plugged():
    "An encoder and a head from outside."
    class Power(nn.Module):
        keeps_length = True

        def __init__(self, config, channels):
            super().__init__()
            self.lift = nn.Conv1d(1, config.d_model, 1)

        def forward(self, x):
            return self.lift(x.square().sum(1, keepdim=True))

    class Place(Head):
        "A weight for each position."
        losses, per_position, n_out = ("mse",), True, 1

        def forward(self, features):
            return self.net(features.transpose(1, 2))[..., 0]

        def loss(self, raw, y, weight, config):
            return (weight.mean(1) * -raw.log_softmax(1).amax(1)).mean()

        def read(self, raw):
            mean = torch.full((len(raw), self.targets), 0.5, dtype=raw.dtype)
            modes = torch.zeros(*raw.shape, self.targets)
            return Prediction(mean, mean, None, raw.softmax(1), modes, modes + 1)

    ENCODERS["power"], HEADS["place"] = Power, Place
    yield
    del ENCODERS["power"], HEADS["place"]


def test_new_kinds_plug_in(plugged):
    net = network(encoder("power"), head="place")
    raw = net(inputs(3, 2, 40))
    assert raw.shape == (3, 40)
    EventLoss(net, LossConfig(), COLUMNS)(raw, labels(3)).backward()
    net.sigma_scale.copy_(torch.tensor([2.0, 3.0]))
    p = net.read(raw)
    assert p.weight.shape == (3, 40) and p.modes.shape == p.widths.shape == (3, 40, 2)
    torch.testing.assert_close(p.modes[0, 0], net.scale.mean)
    torch.testing.assert_close(p.widths[0, 0], net.scale.std * torch.tensor([2.0, 3.0]))
    with pytest.raises(ConfigError, match="one branch"):
        ModelConfig([encoder(), encoder()], head="place")


# --- settings, weights on disk ---


def test_settings_survive_a_file():
    config = ModelConfig([encoder("cnn", kernel=5), encoder(s4d=S4DSettings(state=8, lr=None))], "gated", "quantiles",
                         [32, 16], "both", encoder("linoss", linoss=LinOSSSettings(12, "im", band_high=0.2)))
    assert config_from_dict(ModelConfig, to_plain(config)) == config
    partial = config_from_dict(ModelConfig, {"encoders": [{"kind": "s4d", "s4d": {"state": 16}}], "head": "mean"})
    assert partial == ModelConfig([EncoderConfig(s4d=S4DSettings(state=16))], head="mean")
    assert config_from_dict(LossConfig, to_plain(LossConfig("huber", [1.0, 2.0]))) == LossConfig("huber", [1.0, 2.0])
    with pytest.raises(ConfigError):
        config_from_dict(ModelConfig, {"encoders": [{"kindd": "s4d"}]})


BAD = {
    "kind": (EncoderConfig, {"kind": "transformer"}),
    "d_model": (EncoderConfig, {"d_model": 0}),
    "layers": (EncoderConfig, {"layers": 0}),
    "dropout": (EncoderConfig, {"dropout": 1.0}),
    "norm": (EncoderConfig, {"norm": "none"}),
    "pool": (EncoderConfig, {"pool": "max"}),
    "patch": (EncoderConfig, {"patch": 0}),
    "kernel": (EncoderConfig, {"kernel": 4}),
    "heads": (EncoderConfig, {"heads": 0}),
    "d_model ": (EncoderConfig, {"kind": "conformer", "d_model": 30}),
    "d_model  ": (EncoderConfig, {"kind": "lstm", "d_model": 9}),
    "state": (EncoderConfig, {"s4d": S4DSettings(state=3)}),
    "band_high": (EncoderConfig, {"s4d": S4DSettings(init="fourier", memory_samples=64, band_high=0.1)}),
    "oscillators": (LinOSSSettings, {"oscillators": 0}),
    "scheme": (LinOSSSettings, {"scheme": "euler"}),
    "memory_samples": (LinOSSSettings, {"memory_samples": 1}),
    "band_low": (LinOSSSettings, {"band_low": 0.3, "scheme": "im"}),
    "band_low ": (LinOSSSettings, {"band_low": 0.3, "band_high": 0.2}),
    "lr": (LinOSSSettings, {"lr": 0.0}),
    "encoders": (ModelConfig, {"encoders": []}),
    "fusion": (ModelConfig, {"fusion": "sum"}),
    "head": (ModelConfig, {"head": "flow"}),
    "hidden": (ModelConfig, {"hidden": [0]}),
    "task": (ModelConfig, {"task": "classify"}),
    "kind ": (LossConfig, {"kind": "l1"}),
    "weights": (LossConfig, {"weights": [1.0, -1.0]}),
    "weights ": (LossConfig, {"kind": "weighted_mse"}),
    "huber_delta": (LossConfig, {"huber_delta": 0.0}),
    "efficiency_threshold": (LossConfig, {"efficiency_threshold": -1}),
    "denoise": (LossConfig, {"denoise": "l1"}),
    "spectral": (LossConfig, {"spectral": 1.1}),
    "denoise_weight": (LossConfig, {"denoise_weight": math.nan}),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_settings_name_themselves(row):
    cls, settings = BAD[row]
    with pytest.raises(ConfigError) as e:
        cls(**settings)
    assert e.value.row == row.strip()


def test_settings_that_do_not_fit_together():
    for make, row in (
        (lambda: network(encoder(), encoder()), "encoders"),
        (lambda: Reconstructor(ModelConfig([encoder()]), [2], ()), "targets"),
        (lambda: network(encoder(), task="denoise", denoiser=encoder("cnn")), "denoiser.kind"),
        (lambda: EventLoss(network(encoder()), LossConfig("mse"), COLUMNS), "kind"),
        (lambda: EventLoss(network(encoder(), head="mean"), LossConfig("pinball"), COLUMNS), "kind"),
        (lambda: EventLoss(network(encoder()), LossConfig(weights=[1.0]), COLUMNS), "weights"),
        (lambda: EventLoss(network(encoder()), LossConfig(), ("energy_eV",)), "columns"),
    ):
        with pytest.raises(ConfigError) as e:
            make()
        assert e.value.row == row


def test_poles_bring_their_own_rate_and_do_not_decay():
    net = copy.deepcopy(network(encoder("linoss"), encoder(), channels=[2, 2]))
    groups = param_groups(net, TrainConfig(lr=0.1, weight_decay=0.3))
    where = {id(p): g for g in groups for p in g["params"]}
    for name, lr in (("branches.0.encoder.layers.0.layer.oscillators.angle", 1e-4),
                     ("branches.0.encoder.layers.0.layer.oscillators.log_damping", 1e-4),
                     ("branches.1.encoder.layers.0.layer.kernel.frequency", 1e-3)):
        group = where[id(net.get_parameter(name))]
        assert group["lr"] == lr and group["weight_decay"] == 0
    assert where[id(net.branches[0].encoder.stem.lift.weight)]["weight_decay"] == 0.3
    assert where[id(net.branches[0].encoder.layers[0].norm.weight)]["weight_decay"] == 0


def test_weights_and_scaling_travel_together(tmp_path):
    net, x = network(encoder("lstm")), inputs(3, 2, 40)
    net.sigma_scale.fill_(1.7)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    again = Reconstructor(net.config, [2], TARGETS)
    again.load_state_dict(load_file(tmp_path / "w.safetensors"))
    for a, b in zip(net.eval().read(net(x))[:2], again.eval().read(again(x))[:2], strict=True):
        assert torch.equal(a, b)


# --- detection efficiency ---


def write_grid(path, **changes):
    grid = {"thresholds": np.arange(6.0), "energies": np.array([18500.0, 18600, 18700]),
            "pitches": np.array([88, 88.5, 89.5, 90]), "radii": np.linspace(0, 0.0065, 5),
            "epsilon": np.full((6, 3, 4, 5), 0.5)} | changes
    np.savez(path, **{k: v for k, v in grid.items() if v is not None})
    return path


def check_grid(grid: EfficiencyGrid):
    axes = [a.numpy() for a in grid.axes]
    plain, rng = RegularGridInterpolator(axes, grid.epsilon.numpy()), np.random.default_rng(1)
    points = np.stack([rng.uniform(a[0], a[-1], 500) for a in axes])
    corners = np.stack([rng.choice(a, 50) for a in axes])
    for p in (points, corners):
        found = grid(*p)
        assert isinstance(found, np.ndarray) and found.dtype == float
        np.testing.assert_allclose(found, plain(p.T), atol=1e-12)
        assert torch.equal(grid(*map(torch.tensor, p)), torch.tensor(found))
    beyond = points + (rng.choice([-2, 2], points.shape).T * (np.array([1e3, 0, 1]))).T
    edge = np.stack([np.clip(p, a[0], a[-1]) for p, a in zip(beyond, axes, strict=True)])
    np.testing.assert_allclose(grid(*beyond), plain(edge.T), atol=1e-12)


def test_efficiency_is_scipys_interpolation(tmp_path):
    epsilon = np.random.default_rng(0).random((6, 3, 4, 5))
    path = write_grid(tmp_path / "grid.npz", epsilon=epsilon)
    check_grid(read_efficiency(path))
    assert np.array_equal(read_efficiency(path, 2).epsilon, epsilon[2])
    grid = read_efficiency(path)
    one = np.array([18555.0]), np.array([88.3]), np.array([0.001])
    assert grid(*one) == grid(one[0], 180 - one[1], one[2]) != grid(one[0], one[1] + 0.3, one[2])
    assert grid(np.array([18555.0]), np.array([20.0]), np.array([0.0])) == grid(one[0], np.array([88.0]), 0 * one[2])
    assert grid(torch.tensor([18555.0]), torch.tensor([88.0]), torch.tensor([0.0])).dtype == torch.float64


def test_efficiency_of_the_published_grid():
    path = shared_data() and shared_data() / "epsilon_grid.npz"
    if not path or not path.exists():
        pytest.skip("the published grid is not at hand")
    grid = read_efficiency(path)
    check_grid(grid)
    assert grid.epsilon.shape == (11, 41, 14) and abs(grid.epsilon.mean() - 0.77) < 0.01  # facts: 0.77 at threshold 4
    assert float(grid(np.array([18550.0]), np.array([89.0]), np.array([0.0034]))[0]) > 0.95


def test_bad_grids_are_typed_errors(tmp_path):
    text = tmp_path / "text.npz"
    text.write_text("no grid")
    cut = tmp_path / "cut.npz"
    cut.write_bytes(write_grid(tmp_path / "whole.npz").read_bytes()[:1500])
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "object.npz", thresholds=np.array([None]))
    paths = [tmp_path / "none.npz", tmp_path, text, cut, tmp_path / "array.npy", tmp_path / "object.npz"]
    wrong = {"radii": None, "energies": np.array([3.0, 2, 1]), "epsilon": np.full((6, 3, 4, 5), 1.5),
             "pitches": np.arange(5.0), "thresholds": np.arange(5.0)}
    paths += [write_grid(tmp_path / f"{k}.npz", **{k: v}) for k, v in wrong.items()]
    paths += [write_grid(tmp_path / "nan.npz", epsilon=np.full((6, 3, 4, 5), np.nan)),
              write_grid(tmp_path / "flat.npz", epsilon=np.zeros(6))]
    for path in paths:
        with pytest.raises(DataError) as e:
            read_efficiency(path)
        assert e.value.path == path, path
    with pytest.raises(ConfigError, match="threshold"):
        read_efficiency(tmp_path / "whole.npz", 6)
