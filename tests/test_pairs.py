"""Pairs, inputs, network, training and inference of the dead-layer half, on small synthetic spectra."""

import numpy as np
import pytest
import torch

from deadlayer_cres.core import (
    ConfigError,
    DataError,
    NotFittedError,
    RunError,
    config_from_dict,
    to_plain,
    torch_rng,
)
from deadlayer_cres.deadlayer import infer as infer_module
from deadlayer_cres.deadlayer.data import Spectra
from deadlayer_cres.deadlayer.model import (
    MODES,
    Attention,
    PairLoss,
    PairNet,
    PairNetConfig,
    count_parameters,
    ordered_quantiles,
    pinball,
    published_config,
)
from deadlayer_cres.deadlayer.prep import CHANNELS, SOFTEN, InputConfig, PairBatches, PairConfig, PairInputs, PairSource
from deadlayer_cres.deadlayer.train import (
    Config,
    DataConfig,
    calibrate_band,
    load_run,
    pair_source,
    split_spectra,
    train,
)
from deadlayer_cres.train import Pipeline, TrainConfig

EDGES = np.linspace(0, 400, 41)


def expected(fccd, dlf):
    b = np.arange(40)
    fccd, dlf = np.asarray(fccd)[:, None], np.asarray(dlf)[:, None]
    return 2000 * np.exp(-b / 15) * np.exp(-(0.3 + 0.2 * dlf) * fccd * np.exp(-b / 10))


def toy(n=400, n_dlf1=150, seed=0, exposure=3.0):
    rng = np.random.default_rng(seed)
    fccd, dlf = rng.uniform(0, 2, n).round(4), rng.uniform(0, 0.99, n).round(4)
    dlf[n - n_dlf1:] = 1
    return Spectra(rng.poisson(exposure * expected(fccd, dlf)), EDGES, fccd, dlf, exposure)


@pytest.fixture(scope="module")
def spectra():
    return toy()


@pytest.fixture(scope="module")
def source(spectra):
    return PairSource(spectra, device="cpu")


def small(**kw):
    return PairNetConfig(**({"segment": 5, "embedding": 8, "hidden": 8, "head": [16]} | kw))


# pairs


@pytest.mark.parametrize("how", ["uniform", "log_uniform"])
def test_pairs_respect_windows_and_labels(spectra, source, how):
    p = source.draw(5000, max_dfccd_in_mm=0.1, max_ddlf=0.3, how=how, generator=torch_rng(0))
    df, dd = (p.labels[:, 0] - p.labels[:, 1]).abs(), (p.labels[:, 2] - p.labels[:, 3]).abs()
    assert 0 < df.min() and df.max() <= 0.1 + 1e-9 and dd.max() <= 0.3 + 1e-9
    for index, f, d in ((p.index1, 0, 2), (p.index2, 1, 3)):
        assert np.array_equal(spectra.fccd_in_mm[index], p.labels[:, f].numpy())
        assert np.array_equal(spectra.dlf[index], p.labels[:, d].numpy())


def test_every_pair_of_a_window_is_equally_likely(spectra):
    few = spectra[:8]
    p = PairSource(few, device="cpu", noise="none").draw(80000, max_dfccd_in_mm=0.6, generator=torch_rng(0))
    gap = abs(few.fccd_in_mm[:, None] - few.fccd_in_mm[None])
    allowed = (gap > 0) & (gap <= 0.6)
    seen = torch.bincount(p.index1 * 8 + p.index2, minlength=64).reshape(8, 8).numpy()
    assert (seen[~allowed] == 0).all()
    want = 80000 / allowed.sum()
    assert (abs(seen[allowed] - want) < 5 * np.sqrt(want)).all()


def test_noise_is_poisson_at_the_exposure_of_the_measurement(spectra, source):
    i = torch.zeros(20000, dtype=torch.long)
    p = source.realise(i, i, torch_rng(1))
    mean = source.mean1[0].double()
    assert torch.allclose(mean, torch.as_tensor(spectra.counts[source.rows1[0]] / 3.0))
    assert ((p.counts1.double().mean(0) - mean).abs() < 6 * (mean / 20000).sqrt() + 1e-6).all()
    filled = mean > 1
    assert ((p.counts1.double().var(0) / mean)[filled] - 1).abs().max() < 0.06
    corr = np.corrcoef(p.counts1[:, 0], p.counts2[:, 0])[0, 1]
    assert abs(corr) < 0.03, "both spectra must have noise of their own"
    plain = PairSource(spectra, noise="none", device="cpu").draw(5, generator=torch_rng(0))
    assert torch.allclose(plain.counts1.double(), torch.as_tensor(spectra.counts[plain.index1] / 3.0), rtol=1e-6)


def test_impossible_pairs_are_refused(spectra):
    same = Spectra(spectra.counts[:3], EDGES, [1.0, 1.0, 1.0], [0.1, 0.2, 0.3])
    with pytest.raises(DataError, match="widen"):
        PairSource(same, device="cpu").draw(10)
    far = Spectra(spectra.counts[:2], EDGES, [0.5, 1.5], [0.1, 0.2])
    with pytest.raises(DataError, match="widen"):
        PairSource(far, far[:1], device="cpu").draw(10, max_dfccd_in_mm=0.1)
    with pytest.raises(DataError, match="labelled"):
        PairSource(Spectra(spectra.counts[:1], EDGES, [np.nan], [np.nan]), device="cpu")
    with pytest.raises(DataError, match="bins"):
        PairSource(spectra, spectra.rebin(2), device="cpu")


def test_batches_are_fresh_in_training_and_fixed_in_validation(source):
    fresh, fixed = PairBatches(source, 2, 8, seed=1), PairBatches(source, 2, 8, seed=1, fixed=True)
    for b, same in ((fresh, False), (fixed, True)):
        before = next(iter(b))[0]
        assert torch.equal(before, next(iter(b))[0])
        b.set_epoch(1)
        assert torch.equal(before, next(iter(b))[0]) is same


# inputs


def test_inputs_are_fitted_loaded_and_checked(source):
    step = PairInputs(40, InputConfig(list(CHANNELS), both_orders=False))
    p = source.draw(3000, generator=torch_rng(2))
    with pytest.raises(NotFittedError):
        step(p.counts1, p.counts2)
    x = step.fit(source)(p.counts1, p.counts2)
    assert x.shape == (3000, 5, 40)
    for name in ("difference", "log_difference", "ratio", "level"):
        assert x[:, CHANNELS.index(name)].std(0)[:20].sub(1).abs().max() < 0.2
    again = PairInputs(40, step.config)
    again.load_state_dict(step.state_dict())
    assert torch.equal(again(p.counts1, p.counts2), x)
    step.check_edges(EDGES)
    with pytest.raises(DataError, match="bins"):
        step.check_edges(EDGES + 1)


def test_pull_of_equal_spectra_has_unit_variance(source):
    i = torch.arange(100).repeat(100)
    p = source.realise(i, i, torch_rng(3))
    pull = PairInputs(40, InputConfig(["pull"], both_orders=False)).fit(source)(p.counts1, p.counts2)
    filled = source.mean1[:100].min(0).values > 20  # where few counts are expected the pull is a little narrower
    softened = (SOFTEN * torch.asinh(torch.randn(10**6) / SOFTEN)).std()
    assert abs(pull[:, 0, filled].std() - softened) < 0.01 and softened > 0.95


def test_unit_area_removes_the_scale(source):
    p = source.draw(100, generator=torch_rng(4))
    step = PairInputs(40, InputConfig(["difference"], unit_area=True)).fit(source)
    a, b = p.counts1 / p.counts1.sum(1, keepdim=True) * 1e4, p.counts2
    assert torch.allclose(step(a * 3, b), step(a, b), atol=1e-4)
    plain = PairInputs(40, InputConfig(["difference"])).fit(source)
    assert not torch.allclose(plain(a * 3, b), plain(a, b), atol=1e-2)


def test_separate_scalers(spectra):
    two = PairSource(spectra[:250], spectra[250:], device="cpu")
    one, each = (PairInputs(40, InputConfig(["difference"], scalers=s)).fit(two) for s in ("one", "per_set"))
    assert torch.equal(one.mean1, one.mean2) and not torch.equal(each.mean1, each.mean2)


# network


def test_the_published_architecture_to_the_last_parameter():
    assert count_parameters(PairNet(890, 1, published_config())) == 2_106_628
    assert count_parameters(PairNet(890, 1, published_config("fccd"))) == 2_105_857


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["scaled", "multiplicative", "cosine"])
@pytest.mark.parametrize("segment,embedding", [(1, 0), (7, 4), (40, 4)])
def test_network_shapes_and_batch_independence(mode, attention, segment, embedding):
    torch.manual_seed(0)
    net = PairNet(40, 2, small(mode=mode, attention=attention, segment=segment, embedding=embedding)).eval()
    x = torch.randn(5, 2, 40)
    raw, weight = net(x, return_attention=True)
    assert raw.shape == (5, MODES[mode]) and weight.shape == (5, -(-40 // segment))
    assert torch.allclose(weight.sum(1), torch.ones(5), atol=1e-5)
    assert torch.allclose(net(x[2:3]), raw[2:3], atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_exchanging_the_spectra_changes_the_sign_and_nothing_else(mode, source):
    step = PairInputs(40, InputConfig(list(CHANNELS))).fit(source)
    net = PairNet(40, 5, small(mode=mode)).eval()
    p = source.draw(50, generator=torch_rng(5))
    raw, attention = net(step(p.counts1, p.counts2), return_attention=True)
    swapped, same = net(step(p.counts2, p.counts1), return_attention=True)
    signs = 2 if mode == "signs" else 1
    assert torch.allclose(raw[:, :signs], -swapped[:, :signs], atol=1e-5) and raw[:, :signs].abs().min() > 0
    assert torch.allclose(attention, same, atol=1e-6) and raw.shape == (50, MODES[mode])
    if mode == "quantiles":
        assert not torch.allclose(raw[:, 1:], swapped[:, 1:]), "these belong to the first spectrum"


def test_segments_longer_than_the_spectrum_are_refused():
    with pytest.raises(ConfigError, match="segment"):
        PairNet(40, 2, PairNetConfig(segment=41))


def test_quantiles_never_cross_and_the_pinball_is_least_at_the_quantile():
    q = ordered_quantiles(20 * torch.randn(1000, 3), 2.0)
    assert (q.diff(dim=1) >= 0).all() and 0 <= q.min() and q.max() <= 1
    y = torch.rand(20001)
    for tau in (0.1, 0.5, 0.9):
        at, off = (pinball(y, torch.full((len(y), 1), tau + d), (tau,)) for d in (0, 0.05))
        assert at < off


def test_attention_looks_where_the_query_points():
    att = Attention(4, "cosine")
    states = torch.eye(4)[None] * 5
    assert att(states, torch.tensor([[0.0, 0, 1, 0]]))[1].argmax() == 2


def test_loss_of_a_sure_and_right_answer_is_small():
    labels = torch.tensor([[1.0, 0.5, 0.4, 1.0], [0.5, 1.0, 0.6, 1.0]])
    right = torch.tensor([[20.0, 0.4, 0.4, 0.4], [-20.0, 0.6, 0.6, 0.6]])
    loss = PairLoss("quantiles")
    assert loss(right, labels) < 1e-6 < 1 < loss(-right, labels)
    assert PairLoss("signs")(torch.tensor([[20.0, -20.0], [-20.0, -20.0]]), labels) < 1e-6


# config, split, training


def test_config_survives_the_round_trip_and_refuses_nonsense():
    config = Config(model=small(), data=DataConfig(spectra=["a"]))
    assert config_from_dict(Config, to_plain(config)) == config
    with pytest.raises(ConfigError, match="hiden"):
        config_from_dict(Config, {"model": {"hiden": 3}})
    for make in (lambda: PairConfig(batch_size=0), lambda: PairNetConfig(dropout=1), lambda: InputConfig(["pul"])):
        with pytest.raises(ConfigError):
            make()


def test_parts_share_no_spectrum(spectra):
    parts = split_spectra(spectra, Config().data.split)
    assert set(parts) == {"random_dlf", "dlf1"} and (parts["dlf1"]["test"].dlf == 1).all()
    assert sum(len(s) for p in parts.values() for s in p.values()) == len(spectra)
    for p in parts.values():
        names = {k: set(zip(s.fccd_in_mm, s.dlf, strict=True)) for k, s in p.items()}
        assert not names["train"] & names["test"] and not names["train"] & names["valid"]
    with pytest.raises(DataError, match="dlf1"):
        pair_source({"random_dlf": parts["random_dlf"]}, "train", PairConfig(), "cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory, spectra):
    config = Config(pairs=PairConfig(batch_size=64, batches_per_epoch=60, valid_batches=6, min_dfccd_in_mm=0.02),
                    model=small(), train=TrainConfig(epochs=4, lr=1e-2, progress=False))
    return train(config, tmp_path_factory.mktemp("runs") / "a", spectra=spectra, device="cpu")


def test_training_learns_and_is_loaded_again(run, spectra):
    assert run.history[-1]["fccd_accuracy"] > 0.75
    _, config, pipeline = load_run(run.path, "cpu")
    assert pipeline.net.band_scale != 1, "the DLF band has been calibrated"
    pairs = pair_source(split_spectra(spectra, config.data.split), "test", config.pairs, "cpu").draw(
        2000, generator=torch_rng(0))
    with torch.no_grad():
        raw = pipeline(pairs.counts1, pairs.counts2)
    right = ((raw[:, 0] > 0) == (pairs.labels[:, 0] > pairs.labels[:, 1])).float().mean()
    assert right > 0.8, "on spectra that the training never saw"
    assert (raw[:, 1:].diff(dim=1) >= 0).all()


def test_band_calibration_reaches_its_nominal_coverage(run, spectra):
    _, config, pipeline = load_run(run.path, "cpu")
    pipeline.net.band_scale.fill_(0.3)
    valid = pair_source(split_spectra(spectra, config.data.split), "valid", config.pairs, "cpu")
    calibrate_band(pipeline, PairBatches(valid, 6, 256, fixed=True))
    p = valid.draw(4000, generator=torch_rng(9))
    q = pipeline(p.counts1, p.counts2)[:, 1:]
    dlf = p.labels[:, 2]
    assert abs(((dlf > q[:, 0]) & (dlf < q[:, 2])).float().mean() - 0.8) < 0.04


def test_a_run_is_not_trained_over_by_accident(run, spectra):
    config = config_from_dict(Config, run.config)
    with pytest.raises(RunError, match="resume"):
        train(config, run.path, spectra=spectra, device="cpu")
    config.model.hidden = 16
    with pytest.raises(RunError, match="hidden"):
        train(config, run.path, spectra=spectra, device="cpu", resume=True)


# inference


class Oracle(torch.nn.Module):
    """Compares the sums of the low bins, which fall with FCCD at fixed DLF."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.02))
        self.config = PairNetConfig(segment=5)

    def forward(self, x, return_attention=False):
        raw = self.scale * (x[:, 1] - x[:, 0])[:, :20].sum(1, keepdim=True)
        raw = torch.cat([raw, torch.tensor([[0.9, 0.95, 1.0]]).expand(len(x), -1)], 1)
        return (raw, torch.full((len(x), 8), 1 / 8)) if return_attention else raw


class Stack(torch.nn.Module):
    def forward(self, a, b):
        return torch.stack([a, b], 1)


def test_inference_finds_a_known_depth_and_warns_of_a_wrong_monte_carlo():
    rng = np.random.default_rng(1)
    fccd = np.linspace(0.01, 2, 300)
    reference = Spectra(rng.poisson(30 * expected(fccd, np.ones(300))), EDGES, fccd, np.ones(300), 30.0)
    counts = rng.poisson(expected([1.2], [1.0]))
    pipeline = Pipeline(Stack(), Oracle()).eval()

    def measured(factor):
        return Spectra((counts * factor).astype(int), EDGES, [np.nan], [np.nan])

    found = infer_module.infer(pipeline, measured(1), reference, reference)
    assert abs(found.scan.best - 1.2) < 0.1
    (a, b), (c, d) = found.scan.intervals["68"], found.scan.intervals["90"]
    assert c <= a <= found.scan.best <= b <= d
    wrong = infer_module.infer(pipeline, measured(np.where(EDGES[:-1] > 250, 2, 1)), reference, reference)
    assert wrong.warnings and "keV" in wrong.warnings[0]
    with pytest.raises(DataError, match="bins"):
        infer_module.infer(pipeline, measured(1).rebin(2), reference, reference)
    with pytest.raises(DataError, match="counts"):
        infer_module.infer(pipeline, measured(0), reference, reference)


def test_scan_is_made_monotone_and_must_cross():
    x = np.linspace(0, 2, 401)
    p = 1 / (1 + np.exp((x - 0.7) / 0.02)) + np.random.default_rng(0).normal(0, 0.05, 401)
    scan = infer_module.summarise_scan(x[::-1], p[::-1])
    assert (np.diff(scan.falling) <= 1e-12).all() and abs(scan.best - 0.7) < 0.01
    for flat in (0.9, 0.1):
        with pytest.raises(DataError, match="references"):
            infer_module.summarise_scan(x, np.full(401, flat))


def test_temperature_is_recovered():
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 50000)
    truth = rng.random(50000) < 1 / (1 + np.exp(-logit))
    for t in (0.5, 1, 3):
        assert abs(infer_module.fit_temperature(t * logit, truth) / t - 1) < 0.05


def test_the_side_of_a_scan_without_crossing_is_named():
    x = np.linspace(0, 2, 11)
    for flat, side in ((0.9, "thicker"), (0.1, "thinner")):
        with pytest.raises(DataError, match=side):
            infer_module.summarise_scan(x, np.full(11, flat))


def test_scans_that_pin_nothing_down_are_doubted():
    x = np.linspace(0, 2, 401)
    sharp = infer_module.summarise_scan(x, 1 / (1 + np.exp((x - 1) / 0.01)))
    assert infer_module.scan_doubts(sharp) == []
    wide = infer_module.summarise_scan(x, 0.5 + 0.01 * (1 - x))
    assert len(infer_module.scan_doubts(wide)) == 2 and "bound" in infer_module.scan_doubts(wide)[0]
    p = 1 / (1 + np.exp((x - 1) / 0.01))
    uneven = infer_module.summarise_scan(x, np.clip(p + 0.8 * (abs(x - 1.5) < 0.02), 0, 1))
    assert any("steadily" in text for text in infer_module.scan_doubts(uneven))


def test_agreement_counts_the_noise_of_the_simulation():
    rng = np.random.default_rng(0)
    mean = np.full(400, 300.0)
    simulated = rng.poisson(0.5 * mean) / 0.5
    rows = infer_module.agreement(rng.poisson(mean), simulated, np.linspace(5, 450, 401), 0.5)
    share = sum(r["chi2"] for r in rows) / sum(r["bins"] for r in rows)
    assert abs(share - 1) < 0.25, "with the measurement's noise alone it would be 3"
