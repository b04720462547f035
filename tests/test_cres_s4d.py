"S4D: kernel and gradients against plain float64 sums, streaming, stability, precision, and what the optimiser is told."
import copy
import dataclasses
import math
import pickle

import pytest
import torch

from deadlayer_cres.core import ConfigError, DataError, config_from_dict
from deadlayer_cres.cres.s4d import (
    S4D,
    S4DConfig,
    S4DKernel,
    discretise,
    end_state,
    geometric_sum,
    initial_poles,
    legs_frequencies,
    long_convolution,
    pole_powers,
)
from deadlayer_cres.train import TrainConfig, param_groups

INITS = ("lin", "inv", "legs", "fourier")
BAND = {"band_low": 0.067, "band_high": 0.223}
both_rules = pytest.mark.parametrize("rule", ["zoh", "bilinear"])
each_init = pytest.mark.parametrize("init", INITS)


def small(**settings) -> S4DConfig:
    return S4DConfig(**({"channels": 6, "state": 16, "memory_samples": 1024} | settings))


def seeded(config: S4DConfig, cls=S4D):
    torch.manual_seed(0)
    return cls(config)


def plain_kernel(kernel: S4DKernel, length: int) -> torch.Tensor:
    "(directions, H, L) term by term in complex128, from the textbook formulas, differentiable."
    a = torch.complex(-kernel.log_decay.double().exp(), kernel.frequency.double())
    c, step = torch.complex(*kernel.C.double().unbind(0)), kernel.log_step.double().exp()
    if kernel.config.discretisation == "zoh":
        z, gain = torch.exp(step * a), (torch.exp(step * a) - 1) / a
    else:
        z, gain = (1 + step * a / 2) / (1 - step * a / 2), step / (1 - step * a / 2)
    powers = z.unsqueeze(-1) ** torch.arange(length, dtype=torch.float64)
    return 2 * torch.einsum("dhn,hn,hnl->dhl", c, gain, powers).real


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.abs().max()).item()


@both_rules
@each_init
@pytest.mark.parametrize("length", [1, 2, 3, 1000, 2048])
def test_kernel_is_the_plain_sum(init, rule, length):
    kernel = seeded(small(init=init, discretisation=rule, bidirectional=True), S4DKernel)
    found = kernel(length)
    assert found.shape == (2, 6, length) and found.dtype == torch.float32
    assert relative(found, plain_kernel(kernel, length)) < 2e-6


@both_rules
@each_init
def test_gradients_are_those_of_the_plain_sum(init, rule):
    kernel = seeded(small(init=init, discretisation=rule), S4DKernel)
    target = torch.randn(1, 6, 1500, dtype=torch.float64)
    grads = []
    for k in (kernel(1500), plain_kernel(kernel, 1500)):
        kernel.zero_grad()
        ((k - target) ** 2).sum().backward()
        grads.append({n: p.grad.clone() for n, p in kernel.named_parameters()})
    assert set(grads[0]) == {"log_step", "log_decay", "frequency", "C"}
    for name in grads[0]:
        assert relative(grads[0][name], grads[1][name]) < 1e-5, name


def test_kernel_of_a_full_track_keeps_its_phase():
    "163,840 samples: a phase error of 1e-7 per sample would show as 2e-2."
    kernel = seeded(small(channels=1, state=8, init="fourier", memory_samples=163_840, **BAND), S4DKernel)
    assert relative(kernel(163_840), plain_kernel(kernel, 163_840)) < 2e-6


def test_no_tensor_of_channels_by_poles_by_samples():
    kernel, largest = seeded(small(channels=8, state=64), S4DKernel), 0

    def note(t):
        nonlocal largest
        largest = max(largest, t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        kernel(8192).sum().backward()
    assert 0 < largest <= 8 * 8192 < 8 * 32 * 8192 / 8


@both_rules
def test_discretisation_without_cancellation(rule):
    decay, frequency = torch.tensor([[1e-4, 0.5]]).double(), torch.tensor([[0.0, 3.0]]).double()
    log_z, gain = discretise(decay, frequency, torch.tensor([[1e-9]]).double(), rule)
    torch.testing.assert_close(gain[0], torch.full((1, 2), 1e-9).double(), rtol=1e-8, atol=0)
    torch.testing.assert_close(log_z[0], -1e-9 * decay, rtol=1e-7, atol=0)


def test_bilinear_is_finite_where_its_pole_is_zero():
    log_z, gain = discretise(*(torch.tensor([[v]]).double() for v in (2.0, 0.0, 1.0)), "bilinear")
    assert torch.isfinite(log_z).all() and torch.isfinite(pole_powers(log_z, torch.arange(3))).all()


def test_end_state_is_the_recurrence():
    log_z = seeded(small(), S4DKernel).poles()[0]
    u, z = torch.randn(3, 6, 333), torch.polar(log_z[0].exp(), log_z[1])
    state = torch.zeros(3, 6, 8, dtype=torch.complex128)
    for sample in u.double().unbind(-1):
        state = z * state + sample.unsqueeze(-1)
    assert relative(end_state(u, log_z), torch.stack([state.real, state.imag])) < 2e-6


def test_geometric_sum_takes_many_weights():
    log_z, weights = seeded(small(), S4DKernel).poles()[0], torch.randn(2, 5, 6, 8)
    alone = torch.cat([geometric_sum(weights[:, i:i + 1], log_z, 100) for i in range(5)])
    torch.testing.assert_close(geometric_sum(weights, log_z, 100), alone)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 97])
@pytest.mark.parametrize("directions", [1, 2])
def test_convolution_is_the_plain_sum(directions, length):
    u, k, skip = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, length), (directions, 3, length), (3, 1)))
    expected = skip * u
    for to in range(length):
        for at in range(length):
            if at <= to:
                expected[..., to] += k[0, :, to - at] * u[..., at]
            elif directions == 2:
                expected[..., to] += k[1, :, at - to - 1] * u[..., at]
    torch.testing.assert_close(long_convolution(u, k, skip), expected.float(), rtol=1e-5, atol=1e-4)


@each_init
@pytest.mark.parametrize("bidirectional", [False, True])
def test_shapes_and_batches(init, bidirectional):
    layer = seeded(small(init=init, bidirectional=bidirectional))
    u = torch.randn(4, 6, 300)
    y = layer(u)
    assert y.shape == u.shape and y.dtype == torch.float32
    for i in range(4):
        torch.testing.assert_close(layer(u[i:i + 1]), y[i:i + 1], rtol=1e-4, atol=1e-5)
    assert layer(torch.randn(1, 6, 1)).shape == (1, 6, 1)


def test_causal_unless_bidirectional():
    u = torch.randn(1, 6, 200)
    later = u.clone()
    later[..., 120:] += 1
    causal, both = seeded(small()), seeded(small(bidirectional=True))
    torch.testing.assert_close(causal(u)[..., :120], causal(later)[..., :120], rtol=1e-4, atol=1e-5)
    assert (both(u)[..., :120] - both(later)[..., :120]).abs().max() > 1e-2


@both_rules
@each_init
def test_stream_and_chunks_equal_the_convolution(init, rule):
    layer = seeded(small(init=init, discretisation=rule)).eval()
    u = torch.randn(3, 6, 500)
    with torch.no_grad():
        whole = layer(u)
        state, y = layer.initial_state(3), []
        for part in u.split([1, 200, 2, 297], dim=-1):
            out, state = layer.chunk(part, state)
            y.append(out)
        assert (torch.cat(y, -1) - whole).abs().max() < 1e-4
        running, y, poles = layer.initial_state(3), [], layer.kernel.poles()
        for sample in u.unbind(-1):
            out, running = layer.step(sample, running, poles)
            y.append(out)
        assert (torch.stack(y, -1) - whole).abs().max() < 1e-4
        assert relative(state, running) < 1e-5


def test_long_stream_stays_equal():
    "8,192 steps of poles that hardly decay."
    layer = seeded(small(channels=2, init="fourier", memory_samples=8192, **BAND)).eval()
    u = torch.randn(1, 2, 8192)
    with torch.no_grad():
        whole, state, poles, y = layer(u), layer.initial_state(1), layer.kernel.poles(), []
        for sample in u.unbind(-1):
            out, state = layer.step(sample, state, poles)
            y.append(out)
    assert (torch.stack(y, -1) - whole).abs().max() < 1e-4


def test_gradients_flow_through_the_state():
    layer, u = seeded(small()), torch.randn(2, 6, 256)
    grads = []
    for chunks in (1, 4):
        layer.zero_grad()
        state, total = layer.initial_state(2), 0
        for part in u.chunk(chunks, dim=-1):
            y, state = layer.chunk(part, state)
            total = total + (y**2).sum()
        total.backward()
        grads.append({n: p.grad.clone() for n, p in layer.named_parameters()})
    for name in grads[0]:
        assert relative(grads[1][name], grads[0][name]) < 1e-4, name


@both_rules
@each_init
def test_stable_under_huge_steps(init, rule):
    "Steps of 3 in the logarithms, a thousand times the usual: decay stays above zero, nothing becomes infinite."
    layer = seeded(small(init=init, discretisation=rule))
    optimiser = torch.optim.Adam(layer.parameters(), lr=3.0)
    u, target = torch.randn(2, 6, 500), torch.randn(2, 6, 500)
    for _ in range(30):
        optimiser.zero_grad()
        y = layer(u)
        assert torch.isfinite(y).all()
        ((y - target) ** 2).mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
        optimiser.step()
        assert (layer.kernel.poles()[0][0] < 0).all()


@both_rules
@pytest.mark.parametrize("value", [-1e30, -200.0, 200.0, 1e30])
@pytest.mark.parametrize("name", ["log_decay", "log_step"])
def test_no_value_of_a_logarithm_breaks_the_layer(name, value, rule):
    layer = seeded(small(discretisation=rule))
    getattr(layer.kernel, name).data.fill_(value)
    y = layer(torch.randn(1, 6, 400))
    y.sum().backward()
    assert (layer.kernel.poles()[0][0] < 0).all() and torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_convolution_alone(dtype):
    layer, u = seeded(small()), torch.randn(2, 6, 500)
    expected, kernel = layer(u), layer.kernel(500)
    filtered = long_convolution(u, kernel, layer.D)
    with torch.autocast("cpu", dtype):
        y, k = layer(u), layer.kernel(500)
        torch.testing.assert_close(long_convolution(u, k, layer.D), filtered, rtol=0, atol=0)
        streamed = layer.step(u[..., 0], layer.initial_state(2))[0]
        chunked = layer.chunk(u, layer.initial_state(2))[0]
    assert k.dtype == torch.float32 and torch.equal(k, kernel)
    assert y.dtype == dtype and relative(y, expected) < 0.03
    assert relative(chunked, expected) < 0.03 and relative(streamed, expected[..., 0]) < 0.03
    y.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_convolution_of_half_precision_input_is_float32():
    u, kernel, skip = torch.randn(2, 6, 300).bfloat16(), torch.randn(1, 6, 300), torch.randn(6, 1)
    found = long_convolution(u, kernel, skip)
    assert found.dtype == torch.float32 and torch.equal(found, long_convolution(u.float(), kernel, skip))


@pytest.mark.parametrize("made", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_optimiser_groups(made):
    net = made(torch.nn.Sequential(seeded(small(lr=3e-4)), torch.nn.Conv1d(6, 1, 1)))
    groups = {(g["lr"], g["weight_decay"]): g["params"] for g in param_groups(net, TrainConfig(lr=0.01))}
    kernel = net[0].kernel
    assert {id(p) for p in groups[3e-4, 0.0]} == {id(p) for p in (kernel.log_step, kernel.log_decay, kernel.frequency)}
    assert {id(p) for p in groups[0.01, 0.0]} >= {id(kernel.C), id(net[0].D)}
    assert {id(p) for p in groups[0.01, 0.01]} == {id(net[0].mix.weight), id(net[1].weight)}


def test_without_its_own_rate_the_poles_take_that_of_the_network():
    groups = param_groups(seeded(small(lr=None)), TrainConfig(lr=0.01))
    assert {g["lr"] for g in groups} == {0.01}


def test_everything_is_real_and_saved():
    layer = seeded(small(init="fourier"))
    assert not any(p.is_complex() for p in layer.parameters())
    torch.manual_seed(5)
    other = S4D(layer.config)
    other.load_state_dict(layer.state_dict())
    u = torch.randn(1, 6, 64)
    assert torch.equal(other(u), layer(u))


def test_published_initialisations():
    n = torch.arange(8, dtype=torch.float64)
    torch.testing.assert_close(initial_poles(small(init="lin"))[0][3], math.pi * n)
    torch.testing.assert_close(initial_poles(small(init="inv"))[0][3], 16 / math.pi * (16 / (2 * n + 1) - 1))
    root = torch.sqrt(2 * torch.arange(16, dtype=torch.float64) + 1)
    legs = -torch.tril(torch.outer(root, root), -1) - torch.diag(torch.arange(1, 17, dtype=torch.float64))
    values = torch.linalg.eigvals(legs + torch.outer(root, root) / 2)  # HiPPO-LegS and its low-rank part
    torch.testing.assert_close(values.real, torch.full((16,), -0.5, dtype=torch.float64))
    torch.testing.assert_close(values.imag.sort().values[8:], legs_frequencies(16))
    step = initial_poles(small(channels=4000, dt_min=1e-3, dt_max=0.1))[1].log()
    assert step.min() > math.log(1e-3) and step.max() < math.log(0.1)
    assert abs(step.mean() - math.log(1e-2)) < 0.1


def test_fourier_poles_lie_on_the_bins_of_the_band():
    kernel = seeded(S4DConfig(init="fourier", memory_samples=8192, **BAND), S4DKernel)
    log_z = kernel.poles()[0]
    bins = log_z[1] / (2 * math.pi) * 8192
    torch.testing.assert_close(bins, bins.round(), rtol=0, atol=1e-3)
    bins = bins.round().long()
    assert bins.min() >= math.floor(8192 * 0.067) and bins.max() <= math.ceil(8192 * 0.223)
    assert set(range(math.ceil(8192 * 0.067), math.floor(8192 * 0.223))) <= set(bins.flatten().tolist())
    assert (bins[:, 1:] - bins[:, :-1] == 1).all()
    torch.testing.assert_close(log_z[0], torch.full_like(log_z[0], -1 / 8192), rtol=1e-5, atol=0)


def test_fourier_kernel_passes_white_noise_with_its_variance():
    kernel = seeded(S4DConfig(init="fourier", memory_samples=4096, band_low=0.05, band_high=0.15), S4DKernel)
    assert kernel(20_000).square().sum(-1).mean().item() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("settings, where", [
    ({"channels": 0}, "channels"), ({"state": 15}, "state"), ({"state": 0}, "state"), ({"init": "dft"}, "init"),
    ({"discretisation": "euler"}, "discretisation"), ({"dt_min": 0.2}, "dt_min"), ({"dt_min": 0}, "dt_min"),
    ({"memory_samples": 1}, "memory_samples"), ({"band_low": 0.3, "band_high": 0.2}, "band_low"),
    ({"band_high": 0.6}, "band_low"), ({"dropout": 1.0}, "dropout"), ({"lr": 0.0}, "lr"),
    ({"dt_max": math.nan}, "dt_min"), ({"init": "fourier", "band_high": 0.001}, "band_high"),
])
def test_wrong_settings_are_named(settings, where):
    with pytest.raises(ConfigError, match=where):
        small(**settings)


def test_settings_from_a_file():
    settings = {"channels": 32, "init": "fourier", "band_low": 0.1, "lr": None}
    config = config_from_dict(S4DConfig, settings)
    assert dataclasses.asdict(config) == dataclasses.asdict(S4DConfig(**settings))


@pytest.mark.parametrize("shape", [(2, 5, 10), (6, 10), (2, 6, 0), (0, 6, 10), (2, 6, 10, 1)])
def test_wrong_shapes_are_named(shape):
    with pytest.raises(DataError, match="6 channels"):
        seeded(small())(torch.zeros(shape))


def test_bidirectional_layer_cannot_stream():
    with pytest.raises(ConfigError, match="bidirectional"):
        seeded(small(bidirectional=True)).initial_state(1)


def test_dropout_silences_whole_channels_in_training_only():
    layer = seeded(small(dropout=0.5))
    u = torch.randn(2, 6, 50)
    assert not torch.equal(layer(u), layer(u))
    layer.eval()
    assert torch.equal(layer(u), layer(u))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_same_on_the_gpu():
    layer, u = seeded(small()).eval(), torch.randn(2, 6, 1000)
    with torch.no_grad():
        expected, on_gpu = layer(u), layer.cuda()
        found = on_gpu(u.cuda())
        state, parts = on_gpu.initial_state(2), []
        for part in u.cuda().split(300, dim=-1):
            y, state = on_gpu.chunk(part, state)
            parts.append(y)
        first, _ = on_gpu.step(u[..., 0].cuda(), on_gpu.initial_state(2))
    for y, e in ((found, expected), (torch.cat(parts, -1), expected), (first, expected[..., 0])):
        torch.testing.assert_close(y.cpu(), e, rtol=1e-3, atol=1e-4)
