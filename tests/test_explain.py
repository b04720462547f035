"""Attributions of networks whose reasons are known, planted causes, artefacts of position, variations, the program."""
import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from deadlayer_cres.core import ConfigError, DataError
from deadlayer_cres.deadlayer import explain as ex
from deadlayer_cres.deadlayer.data import Spectra, write_store
from deadlayer_cres.deadlayer.detector import exponential_linear_activeness
from deadlayer_cres.deadlayer.likelihood import fit_emulator, window_information
from deadlayer_cres.deadlayer.prep import PairSource
from deadlayer_cres.deadlayer.simulate import simulate_hits, spectrum

pytest.importorskip("captum")
EDGES = 5 + np.arange(891) * 0.5
CENTRES = (EDGES[1:] + EDGES[:-1]) / 2
GROUP = ex.window_of_bin(EDGES)
LINE = 8  # the window of 81 keV


def mean(fccd, dlf) -> np.ndarray:
    "Expected counts (n, 890): a continuum, and lines at 81 and 356 keV of which the first knows FCCD and DLF."
    f, d = np.atleast_1d(fccd)[:, None], np.atleast_1d(dlf)[:, None]
    out = 2000 * np.exp(-CENTRES / 150) * (1 + 0.2 * f * (1 - d))
    for e, area, slope in ((81, 2e5, 0.5), (356, 3e5, 0.05)):
        out = out + area * np.exp(-slope * f) * np.exp(-(((CENTRES - e) / 0.5) ** 2) / 2) / 2.5
    return out


def spectra(n=120, seed=0, exposure=2.0) -> Spectra:
    rng = np.random.default_rng(seed)
    f, d = rng.uniform(0.1, 1.9, n).round(4), rng.uniform(0, 1, n).round(4)
    return Spectra(rng.poisson(exposure * mean(f, d)), EDGES, f, d, exposure)


class Net(nn.Module):
    "A logit that is a known function of both spectra; attends to the first segment, or to where the counts differ."

    def __init__(self, function, attends="first"):
        super().__init__()
        self.function, self.attends, self.config = function, attends, SimpleNamespace(segment=50)
        self.attention = nn.Identity()
        self.dummy = nn.Parameter(torch.zeros(1))

    def forward(self, x, return_attention=False):
        raw = self.function(x[:, 0], x[:, 1])[:, None]
        size = nn.functional.pad((x[:, 0] - x[:, 1]).abs(), (0, 10)).reshape(len(x), 18, 50).sum(2)
        share = torch.softmax(size / 100, 1) if self.attends == "content" else torch.eye(18)[:1].expand(len(x), -1)
        return (raw, share) if return_attention else raw


class Known(nn.Module):
    def __init__(self, function, attends="first", unit_area=False):
        super().__init__()
        self.net, self.prep = Net(function, attends), Steps(unit_area)

    def forward(self, a, b):
        return self.net(self.prep(a, b))


class Steps(nn.Module):
    def __init__(self, unit_area):
        super().__init__()
        self.config = SimpleNamespace(unit_area=unit_area)

    def forward(self, a, b):
        if self.config.unit_area:
            a, b = (x / x.sum(1, keepdim=True) * 1e6 for x in (a, b))
        return torch.stack([a, b], 1)


def weights(windows) -> torch.Tensor:
    return torch.as_tensor(np.isin(GROUP, windows), dtype=torch.float32) * 1e-3


def linear(*windows):
    w = weights(windows)
    return Known(lambda a, b: ((a - b) * w).sum(1))


@pytest.fixture(scope="module")
def source():
    return PairSource(spectra(), device="cpu")


@pytest.fixture(scope="module")
def pairs(source):
    return ex.independent_pairs(source, 40, 0.5)


# --- windows and pairs ---


def test_windows_have_no_gaps_and_every_bin_has_one():
    assert all(a[1] == b[0] and a[0] < a[1] for a, b in zip(ex.WINDOWS, ex.WINDOWS[1:], strict=False))
    for k, (low, high, _) in enumerate(ex.WINDOWS):
        assert ((CENTRES > low) & (CENTRES < high) == (GROUP == k)).all()
    assert list(ex.window_of_bin(np.array([0.0, 2, 4, 448, 460]))) == [0, 0, 22, len(ex.WINDOWS) - 1]


def test_pairs_share_no_spectrum(source):
    pairs = ex.independent_pairs(source, 50, 0.3, 0.4)
    names = [tuple(x) for x in torch.cat([pairs.labels[:, [0, 2]], pairs.labels[:, [1, 3]]]).tolist()]
    assert len(set(names)) == len(names) >= 20
    assert (pairs.labels[:, 0] - pairs.labels[:, 1]).abs().max() <= 0.3
    assert (pairs.labels[:, 2] - pairs.labels[:, 3]).abs().max() <= 0.4
    with pytest.raises(DataError, match="ten pairs"):
        ex.independent_pairs(PairSource(spectra(12), device="cpu"), 50)


# --- the methods ---


def test_both_methods_are_exact_for_a_linear_network(pairs):
    net, a, b = linear(LINE, 30), pairs.counts1, pairs.counts2
    exact = ((a - b) * weights([LINE, 30])).numpy()
    value, gap = ex.integrated_gradients(net, a, b)
    assert np.allclose(value.numpy(), exact, atol=1e-3) and gap.abs().max() < 1e-2
    by_window = np.eye(len(ex.WINDOWS))[GROUP]
    assert np.allclose(ex.occlusion(net, a, b, GROUP).numpy() @ by_window, exact @ by_window, atol=2e-2)


def test_incompleteness_is_reported_and_mended_by_more_steps(pairs):
    w = weights([LINE])
    net = Known(lambda a, b: 5 * torch.tanh(((a - b) * w).sum(1)) ** 3)
    a, b = pairs.counts1, pairs.counts2
    _, rough = ex.integrated_gradients(net, a, b, steps=2, most=2)
    value, gap = ex.integrated_gradients(net, a, b, steps=2)
    decided = ex.logit(net, a, b)
    assert rough.abs().max() > 0.1 and (gap.abs() <= 0.02 * decided.abs().clamp(min=1)).all()
    assert torch.allclose(value.sum(1), decided, atol=0.11)


def test_unit_area_takes_the_scale_out_of_the_difference(pairs):
    w = weights([LINE])
    net = Known(lambda a, b: ((a - b) * w).sum(1), unit_area=True)
    b = pairs.counts2
    assert ex.occlusion(net, 1.1 * b, b, GROUP).abs().max() < 1e-3
    assert ex.integrated_gradients(net, 1.1 * b, b)[0].abs().max() < 1e-3
    plain = Known(lambda a, b: ((a - b) * w).sum(1))
    assert ex.occlusion(plain, 1.1 * b, b, GROUP).abs().max() > 0.1


def test_corrected_attention_is_nothing_without_a_difference(pairs):
    net = Known(lambda a, b: (a - b).sum(1), attends="content")
    a, b = pairs.counts1, pairs.counts2
    assert np.allclose(ex.attention(net, a, b).sum(1), 1)
    assert abs(ex.attention(net, a, b, True).sum(1)).max() < 1e-6
    assert np.abs(ex.attention(net, b, b, True)).max() == 0 < np.abs(ex.attention(net, a, b, True)).max()


def test_a_missing_captum_names_the_extra(monkeypatch, pairs):
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(ConfigError, match=r"captum.*deadlayer_cres\[explain\]"):
        ex.occlusion(linear(LINE), pairs.counts1, pairs.counts2, GROUP)


# --- averages ---


def test_shares_point_towards_the_decision_with_the_right_errors():
    rng, n, names = np.random.default_rng(0), 400, len(ex.WINDOWS)
    errors, shares = [], []
    for _ in range(60):
        size, sign = rng.exponential(2, n) + 0.1, rng.choice([-1, 1], n)
        value = np.zeros((n, 890))
        value[:, 0] = sign * (0.3 * size + rng.normal(0, 1, n))
        value[:, 889] = sign * size - value[:, 0]
        found = ex.Explanation(EDGES, ex.WINDOWS, {"occlusion": value}, sign * size, np.zeros(n), np.ones((n, 4)))
        share, error = found.shares("occlusion")
        assert abs(share.sum() - 1) < 1e-9 and len(share) == names
        shares.append(share[0])
        errors.append(error[0])
    assert abs(np.mean(shares) - 0.3) < 4 * np.std(shares) / 60**0.5
    assert abs(np.std(shares) / np.mean(errors) - 1) < 0.3


def test_explanation_of_pairs_and_its_correlation(pairs):
    found = ex.explain_pairs(linear(LINE, 30), pairs, EDGES)
    share = found.shares("integrated gradients")[0]
    assert share[[LINE, 30]].sum() > 0.999 and share[LINE] > 3 * share[30] and found.right.n == len(pairs.labels)
    r = ex.rank_correlation(found, 20)
    assert r["occlusion"]["occlusion"][0] == pytest.approx(1)
    assert r["occlusion"]["integrated gradients"][0] > 0.9 > r["occlusion"]["attention"][0]
    header, rows = ex.window_rows(found)
    assert len(rows) == len(ex.WINDOWS) + 1 and len(header) == len(rows[0]) == 5


def test_information_adds_up_to_the_cramer_rao_limit():
    emulator = fit_emulator(spectra(200, 1, 20.0), (4, 2))
    bits = ex.information(emulator, [1.0, 0.6], [0.4, 0.7])
    for row, at in zip(bits, ((1.0, 0.4), (0.6, 0.7)), strict=True):
        full = window_information(emulator, at, np.ones(890, bool)) + np.diag([0, 12, 0])
        assert row.sum() == pytest.approx(1 / np.linalg.inv(full[:2, :2])[0, 0], rel=0.01)
        free = ex.information(emulator, [at[0]], [at[1]], scale_free=True)[0]
        assert free.sum() == pytest.approx(1 / np.linalg.inv(full)[0, 0], rel=0.01) and free.sum() < row.sum()
    assert bits[0, GROUP == LINE].sum() > 0.5 * bits[0].sum()


# --- a planted cause, and the ends ---


def test_a_planted_cause_is_found_where_the_network_looks(source):
    w = torch.as_tensor(np.random.default_rng(3).uniform(0.5, 1, 890) * 1e-3, dtype=torch.float32)
    everywhere = Known(lambda a, b: ((a - b) / (a + b + 1).sqrt() * w).sum(1))
    rows = ex.planted_cause(everywhere, source, EDGES, 30, detectors=2, n=1, null=40)
    rate = ex.hit_rates(rows)
    assert len(rows) == len(ex.WINDOWS) and rate["occlusion"].n == 2 * len(rows)
    assert rate["occlusion"].value > 0.9 and rate["integrated gradients"].value > 0.9
    assert rate["attention"].value < 0.2  # always the first segment
    blind = ex.planted_cause(linear(LINE), source, EDGES, 30, detectors=1, n=1, null=40)
    hits = {r["window"]: r["hits"]["occlusion"] for r in blind}
    assert hits.pop("77-84 lines 79.6+81") == 1 and sum(hits.values()) == 0
    assert len(ex.planted_rows(rows)[1]) == len(rows) + 1


def test_position_check_tells_position_from_content(source, pairs):
    fixed = ex.position_check(linear(LINE), pairs, source)
    assert fixed["constant"][0][0] == fixed["white noise"][0][0] == 1 and fixed["follows"]["position"] > 0.99
    free = ex.position_check(Known(lambda a, b: (a - b).sum(1), attends="content"), pairs, source)
    assert free["follows"]["content"] > 0.9 > free["follows"]["position"]
    rows = ex.ends_rows(ex.explain_pairs(linear(LINE), pairs, EDGES), fixed)[1]
    assert [r[0] for r in rows][-1] == "attention, no difference, mean query" and rows[0][1].startswith("0.00")


def test_end_states_attract_attention_and_the_mean_query_does_not():
    from deadlayer_cres.deadlayer.model import PairNet, PairNetConfig

    torch.manual_seed(0)
    net = PairNet(890, 2, PairNetConfig(attention="cosine", embedding=0, segment=10, hidden=16)).eval()
    pipeline, noise = SimpleNamespace(net=net), torch.randn(100, 2, 890)

    def ends():
        share = ex._segments(pipeline, noise).mean(0)
        return share[[0, -1]].mean() / share[10:-10].mean()

    before = ends()
    with ex.mean_query(pipeline):
        assert ends() < 1.1 < 1.3 < before
    assert ends() == before


# --- what would change the answer ---


def test_nuisances_do_what_they_say():
    mu = mean(1.0, 0.5)[0]
    by_name = {v.name: v.ratio[0] for v in ex.nuisance_variations(mu, EDGES)}
    assert len(by_name) == 9 and np.allclose(by_name["scale +0.03"], 1.03)
    extra = mu * (by_name["background 25 /keV"] - 1)
    assert np.allclose(extra, 12.5, rtol=1e-6)
    near = (CENTRES > 353) & (CENTRES < 359)
    moved, wide, narrow = (mu * by_name[k] for k in ("shift +0.1 keV", "resolution +0.02", "resolution -0.02"))
    before, after = (np.average(CENTRES[near], weights=x[near]) for x in (mu, moved))
    assert after - before == pytest.approx(0.1, abs=0.02)
    assert wide[near].max() < mu[near].max() < narrow[near].max()


def test_transition_layer_is_that_of_the_exponential_tail():
    hits = [simulate_hits(150_000, seed=s) for s in (1, 2)]
    made = ex.transition_variations(hits, 1.0, 0.6, EDGES, (0.05, 0.2, 3.0))
    assert [v.name for v in made] == ["exponential tail 0.05 mm", "exponential tail 0.2 mm"]  # 3 mm does not fit
    plain = spectrum(hits[0], 1.0, 0.6, edges_keV=EDGES)
    tail = spectrum(hits[0], 1.0, 0.6, edges_keV=EDGES,
                    activeness=lambda x, f, d: exponential_linear_activeness(x, f, 0.4, 0.2))
    assert np.allclose((plain * made[1].ratio[0])[plain > 0], tail[plain > 0])
    assert made[1].ratio.shape == (2, 890) and tail.sum() > plain.sum()
    assert abs(made[0].ratio[0] - 1).sum() < abs(made[1].ratio[0] - 1).sum()


def counting():
    "A network that knows FCCD by the counts of the line at 81 keV, which fall by 0.5 per mm."
    w = weights([LINE]) * 1e3
    return Known(lambda a, b: 400 * torch.log((b * w).sum(1) / (a * w).sum(1)))


def test_answers_move_as_the_physics_says():
    reference = spectra(400, 2, 50.0)
    reference.dlf[:] = 1.0
    reference.counts = np.random.default_rng(1).poisson(50 * mean(reference.fccd_in_mm, reference.dlf))
    mu = mean(1.0, 1.0)[0]
    slope = np.log(mean(1.01, 1.0)[0][GROUP == LINE].sum() / mu[GROUP == LINE].sum()) / 0.01
    assert ex.scan_answer(counting(), mu, reference)[0] == pytest.approx(1.0, abs=0.01)
    variations = ex.nuisance_variations(mu, EDGES)[6:8]
    rows = ex.vary_pseudo(counting(), variations, mu, reference, n=4)
    for row, factor in zip(rows, (1.03, 0.97), strict=True):
        assert row["fccd_shift_mm"] == pytest.approx(np.log(factor) / slope, abs=0.005)
        assert row["fccd_error_mm"] < 0.005 and row["verdict"] == "wrong" and row["kind"] == "Monte-Carlo"
    measured = Spectra(np.random.default_rng(0).poisson(mu)[None], EDGES, [np.nan], [np.nan])
    simulated = spectra(300, 4, 50.0)
    found = ex.vary_measured(counting(), variations, measured, reference, simulated, n=3)
    for row, back in zip(found["variations"], rows, strict=True):
        assert row["fccd_shift_mm"] == pytest.approx(-back["fccd_shift_mm"], abs=0.01)
    nothing = ex.scan_answer(counting(), mu * 100, reference)
    far = [ex.Variation("far", "Monte-Carlo", np.full((1, 890), 100.0))]
    assert np.isnan(nothing).all()
    assert ex.vary_pseudo(counting(), far, mu, reference, n=2)[0]["verdict"] == "no answer"


def test_a_measured_spectrum_is_pulled_by_the_window_that_is_off(pairs):
    mu = mean(1.0, 0.5)[0]
    counts = np.round(np.where(GROUP == LINE, 0.97 * mu, mu)).astype(int)
    rows = ex.explain_measured(counting(), Spectra(counts[None], EDGES, [np.nan], [np.nan]), mu, n=8)
    assert rows[LINE]["thicker"] == pytest.approx(-400 * np.log(0.97), rel=0.03) and rows[LINE]["error"] > 0
    assert rows[LINE]["measured_over_expected"] == pytest.approx(0.97, abs=0.002)
    assert max(abs(r["thicker"]) for k, r in enumerate(rows) if k != LINE) < 1e-3


# --- the program ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from deadlayer_cres.deadlayer.prep import InputConfig, PairConfig
    from deadlayer_cres.deadlayer.train import Config, DataConfig, PairNetConfig, TrainConfig, train

    folder = tmp_path_factory.mktemp("explain")
    first, second = spectra(240, 5, 3.0), spectra(240, 6, 3.0)
    counts = np.random.default_rng(7).poisson(3 * mean(second.fccd_in_mm, 1.0))
    both = dataclasses.replace(first, counts=np.concatenate([first.counts, counts]), dlf=np.r_[first.dlf, np.ones(240)],
                               fccd_in_mm=np.r_[first.fccd_in_mm, second.fccd_in_mm])
    write_store(both, folder / "mc.h5")
    write_store(Spectra(np.random.default_rng(8).poisson(mean(1.0, 0.5)), EDGES, [np.nan], [np.nan]), folder / "m.h5")
    config = Config(data=DataConfig(spectra=[str(folder / "mc.h5")]), inputs=InputConfig(components=4),
                    pairs=PairConfig(batch_size=64, batches_per_epoch=60, valid_batches=2, min_dfccd_in_mm=0.01),
                    model=PairNetConfig(embedding=8, hidden=8, head=[16]), train=TrainConfig(epochs=3, lr=1e-2))
    train(config, folder / "run", device="cpu")
    return folder


def test_program_writes_a_report(run, capfd):
    from deadlayer_cres import cli

    argv = ["explain", run / "run", "--spectrum", run / "m.h5", "--out", run / "why", "--pairs", 20, "--detectors", 1,
            "--max_dfccd_in_mm", 0.3, "--decays", 20000, "--degrees", 4, 2]
    cli.deadlayer([str(x) for x in argv])
    out = capfd.readouterr().out
    assert "Planted causes found" in out and "report.html" in out
    answer = json.loads((run / "why" / "explanation.json").read_text())
    assert set(answer) >= {"shares", "rank_correlation", "hit_rates", "ends", "pseudo", "measured", "tension"}
    assert abs(sum(answer["shares"]["integrated gradients"]["share"]) - 1) < 0.05
    assert [r["name"] for r in answer["pseudo"]] == [r["name"] for r in answer["measured"]["variations"]]
    assert len(answer["pseudo"]) >= 9 and len(answer["tension"]) == len(ex.WINDOWS)
    figures = sorted(p.stem for p in (run / "why" / "figures").iterdir())
    assert figures == ["position", "tension", "variations", "windows"]
    page = (run / "why" / "report.html").read_text()
    assert "data:image/png" in page and "http" not in page.replace("http-equiv", "")


def test_program_refuses_what_it_cannot_use(run, capfd, monkeypatch):
    from deadlayer_cres import cli

    def refused(*words, say):
        with pytest.raises(SystemExit) as stop:
            cli.deadlayer([str(w) for w in words])
        message = capfd.readouterr().err
        assert stop.value.code == 2 and message.count("\n") == 1 and all(w in message for w in say), message

    refused("explain", run / "run", say=["out"])
    refused("explain", run / "run", "--out", run / "x", "--pairs", 0, say=["--pairs"])
    refused("explain", run / "nowhere", "--out", run / "x", say=["nowhere"])
    refused("explain", run / "run", "--out", run / "x", "--spectrum", run / "mc.h5", say=["--row"])
    monkeypatch.setitem(sys.modules, "captum", None)
    refused("explain", run / "run", "--out", run / "x", say=["captum", "explain"])
    assert not (run / "x").exists()
