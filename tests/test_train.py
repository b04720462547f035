"""deadlayer_cres.train: every promise of the page, and a training that is killed at any moment."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_child
from fastai.callback.core import Callback
from fastai.callback.schedule import combined_cos
from safetensors.torch import load_file, save_file
from torch import nn

from deadlayer_cres.core import ConfigError, DataError, FittedStep, NotFittedError, RunError, read_json, write_json
from deadlayer_cres.train import (
    AutocastBF16,
    Pipeline,
    Run,
    TrainConfig,
    as_dataloaders,
    build_learner,
    fit,
    lr_factor,
    param_groups,
    predict,
    prepare,
)

torch.set_num_threads(1)
mse = nn.functional.mse_loss


class Standardise(FittedStep):
    def __init__(self, features=2):
        super().__init__(mean=features, std=features)

    def fit(self, x):
        return self.set_statistics(mean=x.mean(0), std=x.std(0))

    def forward(self, x):
        return (x - self.mean) / self.std


class Noise(nn.Module):
    "A random step on top of a fitted one: fresh in training, absent in evaluation."

    def __init__(self):
        super().__init__()
        self.scale, self.seen = Standardise(), []

    def forward(self, x):
        self.seen.append((self.training, torch.is_grad_enabled(), x.dtype))
        x = self.scale(x)
        return x + 0.1 * torch.randn_like(x) if self.training else x


class Stream:
    "Batches that change from epoch to epoch."

    def __init__(self, seed, n=6, bs=8, pause=0.0):
        self.seed, self.n, self.bs, self.pause, self.epoch, self.told = seed, n, bs, pause, 0, []

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.told.append(epoch)

    def __len__(self):
        return self.n

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        for _ in range(self.n):
            time.sleep(self.pause)
            x = torch.tensor(rng.normal(2, 3, (self.bs, 2)), dtype=torch.float32)
            yield (x,), (x[:, :1] - x[:, 1:]) / 3


def pipeline(seed=0):
    torch.manual_seed(seed)
    prep = Noise()
    prep.scale.fit(torch.cat([x for (x,), _ in Stream(1)]))
    layers = nn.Linear(2, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 1)
    return Pipeline(prep, nn.Sequential(*layers))


def config(**kw):
    return TrainConfig(**{"epochs": 4, "lr": 1e-2, "progress": False} | kw)


def learner(conf=None, pipe=None, metrics=(), cbs=(), pause=0.0, loss=mse):
    dls = as_dataloaders(Stream(1, pause=pause), Stream(2, 2), device="cpu")
    return build_learner(pipe or pipeline(), dls, loss, conf or config(), metrics=metrics, cbs=cbs)


def new_run(path, conf=None):
    return Run.create(path, {"train": asdict(conf or config())}, data_checksum="abc")


def same(a: Run, b: Run):
    "The same bits in weights, optimiser and history (but for the seconds)."
    assert (a.path / "model.safetensors").read_bytes() == (b.path / "model.safetensors").read_bytes()
    one, two = load_file(a.path / "last.safetensors"), load_file(b.path / "last.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    strip = [[{k: v for k, v in row.items() if k != "seconds"} for row in run.history] for run in (a, b)]
    assert strip[0] == strip[1]


# Steps and pipeline


def test_unfitted_raises_and_loading_marks_fitted(tmp_path):
    step, x = Standardise(), torch.randn(20, 2)
    with pytest.raises(NotFittedError, match="Standardise"):
        step(x)
    save_file(step.fit(x).state_dict(), tmp_path / "a.safetensors")
    other = Standardise()
    other.load_state_dict(load_file(tmp_path / "a.safetensors"))
    assert torch.equal(other(x), step(x))
    nested = Pipeline(nn.Sequential(Standardise()), nn.Linear(2, 1))
    nested.load_state_dict(Pipeline(nn.Sequential(step), nn.Linear(2, 1)).state_dict())
    assert nested(x).shape == (20, 1)
    other.load_state_dict(Standardise().state_dict())
    with pytest.raises(NotFittedError):
        other(x)


def test_statistics_are_checked():
    for values in ({"mean": [0, 0, 0], "std": [1, 1]}, {"mean": [0, float("nan")], "std": [1, 1]}):
        step = Standardise()
        with pytest.raises(DataError, match="Standardise.mean"):
            step.set_statistics(**values)
        assert not step.fitted
    with pytest.raises(TypeError):
        Standardise().set_statistics(mean=[0, 0])


def test_prepare_is_pure_and_full_precision():
    class Probe(nn.Module):
        def forward(self, x):
            assert not torch.is_grad_enabled()
            return (x @ x).float(), x + 1

    x = torch.randn(4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = prepare(Probe(), [x])
    assert torch.equal(y, (x @ x).detach()) and torch.equal(z, x.detach() + 1)
    with pytest.raises(RuntimeError, match="in place"):
        prepare(nn.ReLU(inplace=True), [torch.randn(3)])
    assert prepare(None, [x])[0] is x


def test_steps_know_training_from_validation_and_spare_targets():
    pipe = pipeline()
    learn = learner(config(epochs=1, precision="bf16"), pipe)
    learn.fit(1)
    assert pipe.prep.seen == [(True, False, torch.float32)] * 6 + [(False, False, torch.float32)] * 2


def test_unfitted_step_stops_training():
    with pytest.raises(NotFittedError):
        learner(pipe=Pipeline(Standardise(), nn.Linear(2, 1))).fit(1)


# Batches


def test_batches():
    x, y = torch.zeros(3, 2), torch.zeros(3, 1)
    for batch, n_inp in (((x, y), 1), (((x, x), y), 2), ((x, x, y), 2), (((x,), (y, y)), 1), ((x, y, y), 1)):
        dls = as_dataloaders([batch], [batch], n_inp, "cpu")
        (flat,) = list(dls.train)
        assert dls.n_inp == n_inp and all(isinstance(t, torch.Tensor) for t in flat)
    for bad in ([], (b for b in [1])):
        with pytest.raises(DataError):
            as_dataloaders(bad, [(x, y)])
    with pytest.raises(DataError, match="batch 0"):
        list(as_dataloaders([(x,)], [(x, y)], device="cpu").train)


def test_several_inputs_and_targets():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(2, 1)

        def forward(self, a, b):
            return self.f(a), self.f(b)

    x = torch.randn(8, 2)
    dls = as_dataloaders([((x, 2 * x), x[:, :1], x[:, 1:])] * 3, [((x, 2 * x), x[:, :1], x[:, 1:])], 2, "cpu")
    pipe = Pipeline(None, Two())
    for precision in ("fp32", "bf16"):
        learn = build_learner(pipe, dls, lambda p, y, z: mse(p[0], y) + mse(p[1], z), config(precision=precision))
        learn.fit(1)
    p, q = predict(pipe, dls.valid, n_inp=2)
    assert p.shape == q.shape == (8, 1)


def test_epoch_is_told():
    learn = learner()
    learn.fit(3)
    assert learn.dls.train.items.told == [0, 1, 2] and learn.dls.valid.items.told == [0, 0, 0]


# Config, groups, schedules


@pytest.mark.parametrize("field, value", [
    ("epochs", 0), ("epochs", 1.5), ("epochs", None), ("lr", 0), ("lr", "fast"), ("lr", float("nan")), ("warmup", 1.0),
    ("schedule", "linear"), ("warmup_steps", 0),
    ("decay", 0), ("decay", 1.1), ("weight_decay", -1), ("beta1", 1), ("beta2", -0.1), ("eps", 0),
    ("grad_clip", 0), ("precision", "half"), ("early_stopping", 0), ("monitor", ""), ("monitor_mode", "low"),
    ("plateau_patience", 0), ("plateau_factor", 1), ("seed", -1), ("progress", 1), ("accumulate", True)])
def test_config_is_checked(field, value):
    with pytest.raises(ConfigError) as e:
        TrainConfig(**{field: value})
    assert e.value.row == field and repr(value) == e.value.found


def test_param_groups_keep_their_own_under_schedules():
    net = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.LSTM(4, 3, bidirectional=True))
    net.pole = nn.Parameter(torch.ones(4))
    net.pole._optim = {"lr": 1e-4}
    net.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    net.tied = net[0]
    groups = param_groups(net, config(lr=1e-2, weight_decay=0.1))
    sizes = {(g["lr"], g["weight_decay"]): len(g["params"]) for g in groups}
    assert sizes == {(1e-2, 0.1): 1 + 4, (1e-2, 0.0): 1 + 2 + 4, (1e-4, 0.0): 1}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.slow = nn.Linear(2, 1), nn.Parameter(torch.ones(1))
            self.slow._optim = {"lr": 1e-5, "weight_decay": 0.3}

        def forward(self, x):
            return self.f(x) * self.slow

    seen = []

    class Watch(Callback):
        def after_step(self):
            groups = self.learn.opt.opt.param_groups
            seen.append([(g["lr"], g["weight_decay"], g["betas"], g["eps"]) for g in groups])

    conf = config(schedule="cosine", warmup=0.5, lr=1e-2, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    learner(conf, Pipeline(None, Net()), cbs=[Watch()]).fit(2)
    for step, found in enumerate(seen):
        f = lr_factor(conf, step, 12)
        rest = ((0.8, 0.9), 1e-6)
        assert sorted(found) == sorted([(f * 1e-2, 0.1, *rest), (f * 1e-2, 0.0, *rest), (f * 1e-5, 0.3, *rest)])


def test_one_group_too():
    learn = learner(config(schedule="constant"), Pipeline(None, nn.Linear(2, 1, bias=False)))
    learn.fit(1)
    assert len(learn.opt.param_lists) == 1 and learn.opt.hypers[0]["lr"] == 1e-2


def test_schedules_against_formulas():
    one = config(warmup=0.3)
    theirs = combined_cos(0.3, 1 / 25, 1, 1e-5)
    assert max(abs(lr_factor(one, s, 97) - theirs(s / 97)) for s in range(97)) < 1e-6
    inv = config(schedule="inverse_sqrt", warmup_steps=50)
    for n in (1, 7, 50, 51, 300):
        assert lr_factor(inv, n - 1, 400) == pytest.approx(min(n**-0.5, n * 50**-1.5))
    cos = config(schedule="cosine", warmup=0.2)
    theirs = [(s + 1) / 20 if s < 20 else 0.5 * (1 + np.cos(np.pi * (s - 20) / 80)) for s in range(100)]
    assert np.allclose([lr_factor(cos, s, 100) for s in range(100)], theirs)
    assert lr_factor(config(schedule="plateau", plateau_factor=0.5), 9, 10, reductions=3) == 0.125
    assert lr_factor(config(schedule="constant"), 9, 10, reductions=3) == 1
    assert lr_factor(config(schedule="cosine", warmup=0), 0, 10) == 1
    exp = config(schedule="exponential", decay=0.75, epochs=5)
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.75)
    for step in range(5 * 7):
        assert lr_factor(exp, step, 5 * 7) == pytest.approx(theirs.get_last_lr()[0])
        if step % 7 == 6:
            optimiser.step()
            theirs.step()


def test_plateau_lowers_the_rate():
    conf = config(schedule="plateau", plateau_patience=2, plateau_factor=0.5, monitor="fake", epochs=7)
    learn = learner(conf, metrics=[scripted([5, 4, 4, 4, 4, 4, 3])])
    learn.fit(7)
    assert [r["lr"] / 1e-2 for r in learn.history.rows] == [1, 1, 1, 1, 0.5, 0.5, 0.25]


def test_accumulation_steps_at_the_end_of_an_epoch():
    steps = []

    class Count(Callback):
        def after_step(self):
            steps.append(self.learn.iter)

    learn = learner(config(accumulate=4), cbs=[Count()])
    learn.fit(2)
    assert steps == [3, 5, 3, 5]


# Training


def scripted(values):
    "A metric that takes `values`, one an epoch, whatever the prediction."
    from fastai.learner import ValueMetric

    seen = iter([v for v in values])
    return ValueMetric(lambda: next(seen), "fake")


def test_best_model_with_max_and_min(tmp_path):
    for mode, best in (("max", 1), ("min", 2)):
        conf = config(monitor="fake", monitor_mode=mode)
        run, kept = new_run(tmp_path / mode, conf), []

        class Keep(Callback):
            order = 40

            def after_epoch(self, kept=kept):
                kept.append({k: v.clone() for k, v in self.learn.pipeline.state_dict().items()})

        learn = learner(conf, metrics=[scripted([0.5, 0.9, 0.1, 0.6])], cbs=[Keep()])
        fit(learn, run, conf)
        weights = load_file(run.path / "model.safetensors")
        assert all(torch.equal(weights[k], kept[best][k]) for k in weights)
        assert not all(torch.equal(weights[k], kept[3][k]) for k in weights)
        now = learn.pipeline.state_dict()
        assert all(torch.equal(now[k], weights[k]) for k in weights)


def test_early_stopping(tmp_path):
    conf = config(monitor="fake", early_stopping=2, epochs=9)
    run = new_run(tmp_path / "a", conf)
    history = fit(learner(conf, metrics=[scripted([3, 2, float("nan"), 2, 1, 1])]), run)
    assert len(history) == 4 and np.isnan(history[2]["fake"]) and Run.open(run.path)


def test_unknown_monitor():
    with pytest.raises(ConfigError, match="valid_loss"):
        learner(config(monitor="accuracy")).fit(1)


def test_nan_loss_ends_with_an_error(tmp_path):
    run = new_run(tmp_path / "a")
    with pytest.raises(RunError, match="epoch 0.*lower lr"):
        fit(learner(loss=lambda p, y: p.sum() * float("nan")), run)


def test_grad_clip_clips():
    def norms(**kw):
        out = []

        class Norm(Callback):
            order = 90

            def before_step(self):
                out.append(sum((p.grad**2).sum() for p in self.learn.model.parameters()).sqrt().item())

        learner(config(**kw), cbs=[Norm()]).fit(1)
        return out

    assert max(norms()) > 0.1 and max(norms(grad_clip=0.01)) <= 0.01 * (1 + 1e-5)


def test_precisions():
    losses = {}
    for precision in ("fp32", "bf16"):
        learn = learner(config(precision=precision))
        learn.fit(2)
        losses[precision] = learn.history.rows[-1]["valid_loss"]
        assert all(p.dtype == torch.float32 for p in learn.model.parameters())
    assert losses["fp32"] == pytest.approx(losses["bf16"], abs=0.1) and losses["fp32"] != losses["bf16"]
    with pytest.raises(ConfigError, match="CUDA"):
        learner(config(precision="fp16"))


def test_autocast_ends_when_the_network_fails(tmp_path):
    conf = config(precision="bf16")
    learn = learner(conf, Pipeline(None, nn.Linear(3, 1)))
    with pytest.raises(RuntimeError):
        fit(learn, new_run(tmp_path / "a", conf))
    assert not torch.is_autocast_enabled("cpu") and isinstance(learn.autocast_bf16, AutocastBF16)


def test_history_is_the_mean_loss(tmp_path):
    conf = config(epochs=2, schedule="constant")
    seen = []

    class Keep(Callback):
        def after_batch(self):
            seen.append((self.learn.training, self.learn.loss.item()))

    history = fit(learner(conf, cbs=[Keep()]), new_run(tmp_path / "a", conf))
    last = seen[-8:]
    assert history[-1]["train_loss"] == pytest.approx(np.mean([v for t, v in last if t]))
    assert history[-1]["valid_loss"] == pytest.approx(np.mean([v for t, v in last if not t]))


def test_validate_afterwards_changes_nothing():
    learn = learner()
    learn.fit(2)
    rows, best = list(learn.history.rows), learn.tracker.best
    assert learn.validate()[0] == rows[-1]["valid_loss"]
    assert learn.history.rows == rows and learn.tracker.best == best


def test_predict():
    pipe = pipeline().train()
    x = [x for (x,), _ in Stream(3, 3)]
    p = predict(pipe, x, "cpu")
    assert p.shape == (24, 1) and pipe.training and pipe.net[1].training and not p.requires_grad
    assert torch.equal(p, predict(pipe, Stream(3, 3), n_inp=1))
    assert torch.equal(p, pipe.eval()(torch.cat(x)))
    with pytest.raises(DataError):
        predict(pipe, [])
    with pytest.raises(NotFittedError):
        predict(Pipeline(Standardise(), nn.Linear(2, 1)), x)


def test_log_has_one_line_an_epoch(tmp_path, capsys):
    conf = config(epochs=2, progress=True)
    fit(learner(conf), new_run(tmp_path / "a", conf))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].startswith("epoch 2/2, train_loss ")


# Runs


def test_run_folder(tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    run = new_run(tmp_path / "a")
    fit(learner(), run)
    run.write_metrics({"accuracy": 0.9, "bad": float("nan")})
    fig = plt.figure()
    assert run.save_figure("roc", fig) == run.path / "figures" / "roc.png"
    plt.close(fig)
    run.write_report("<p>done</p>")
    with pytest.raises(ConfigError):
        run.save_figure("../roc", fig)
    run = Run.open(run.path)
    assert run.metrics == {"accuracy": 0.9, "bad": None} and run.config == {"train": asdict(config())}
    about = run.environment
    assert about["seed"] == 0 and about["data_checksum"] == "abc" and about["packages"]["torch"]
    assert {p.name for p in run.path.iterdir()} == {
        "config.yaml", "environment.json", "model.safetensors", "last.safetensors", "history.csv", "metrics.json",
        "figures", "report.html"}
    other = run.load_weights(pipeline(seed=9))
    x = torch.randn(4, 2)
    assert torch.equal(predict(other, [x]), predict(run.load_weights(pipeline()), [x]))
    run.load_weights(pipeline(), "last")
    with pytest.raises(RunError, match="weights of this network"):
        run.load_weights(Pipeline(None, nn.Linear(2, 1)))


def test_create_refuses_and_overwrites(tmp_path):
    run = new_run(tmp_path / "a")
    (run.path / "mine.txt").write_text("old")
    with pytest.raises(RunError, match="overwrite"):
        new_run(run.path)
    Run.create(run.path, {}, overwrite=True)
    assert not (run.path / "mine.txt").exists() and run.config == {}
    (tmp_path / "b").mkdir()
    new_run(tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="other files"):
        Run.create(tmp_path / "c", {}, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_open_refuses(tmp_path):
    with pytest.raises(RunError, match="nothing"):
        Run.open(tmp_path / "none")
    run = new_run(tmp_path / "a")
    with pytest.raises(RunError, match="resume the training"):
        Run.open(run.path)
    assert Run.open(run.path, trained=False).path == run.path
    fit(learner(), run)
    about = read_json(run.path / "environment.json")
    write_json(run.path / "environment.json", about | {"format_version": 99})
    with pytest.raises(RunError, match="version 99.*train again"):
        Run.open(run.path)
    (run.path / "environment.json").write_text("{")
    with pytest.raises(RunError, match="format_version"):
        Run.open(run.path)
    write_json(run.path / "environment.json", about)
    Run.open(run.path)
    (run.path / "last.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunError, match="readable safetensors"):
        Run.open(run.path)
    (run.path / "last.safetensors").unlink()
    Run.open(run.path)
    (run.path / "config.yaml").unlink()
    with pytest.raises(RunError, match="no config.yaml"):
        Run.open(run.path)


def test_resume_refuses_other_settings(tmp_path, capsys):
    run = new_run(tmp_path / "a")
    fit(learner(), run)
    with pytest.raises(RunError, match="has not been trained"):
        fit(learner(), run)
    with pytest.raises(RunError, match=r"train\.lr"):
        fit(learner(config(lr=0.5)), run, resume=True)
    with pytest.raises(ConfigError):
        fit(learner(), run, config(lr=0.5), resume=True)
    run.check_same({"train": asdict(config(progress=True))}, "abc")
    with pytest.raises(RunError, match="data_checksum"):
        run.check_same({"train": asdict(config())}, "xyz")
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    learn = learner(config(progress=True))
    fit(learn, run, resume=True)
    assert "nothing to do" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    last = load_file(run.path / "model.safetensors")
    assert all(torch.equal(v, last[k]) for k, v in learn.pipeline.state_dict().items())


def test_open_completes_what_a_kill_left_behind(tmp_path):
    conf = config(monitor="fake")
    run = new_run(tmp_path / "a", conf)
    fit(learner(conf, metrics=[scripted([4, 3, 2, 1])]), run)
    paths = [run.path / "model.safetensors", run.path / "history.csv"]
    before = [p.read_bytes() for p in paths]
    for path in paths:
        path.unlink()
    Run.open(run.path)
    assert before == [p.read_bytes() for p in paths]


def test_early_stopping_and_plateau_survive_a_resume(tmp_path):
    class Bang(Callback):
        def before_batch(self):
            if self.learn.epoch == 3 and self.learn.iter == 2:
                raise KeyboardInterrupt

    conf = config(epochs=9, schedule="plateau", plateau_patience=1, early_stopping=4, monitor="mean_output",
                  monitor_mode="max", precision="bf16", accumulate=4, grad_clip=1.0)

    def mean_output(p, y):
        return p.mean()

    whole, broken = new_run(tmp_path / "whole", conf), new_run(tmp_path / "broken", conf)
    fit(learner(conf, metrics=[mean_output]), whole)
    with pytest.raises(KeyboardInterrupt):
        fit(learner(conf, metrics=[mean_output], cbs=[Bang()]), broken)
    fit(learner(conf, pipeline(seed=5), metrics=[mean_output]), broken, resume=True)
    same(whole, broken)


# Killed


def train_to_the_end(path, pause=0.0):
    "What a user's program does: make the run or open it, then fit. A resumed one starts from other weights."
    conf = config(epochs=3)
    run = Run.open(path, trained=False) if Path(path).exists() else new_run(path, conf)
    seed = 1 + time.time_ns() % 99 if run.checkpoint_state() else 0
    fit(learner(conf, pipeline(seed), pause=pause), run, resume=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_around_every_rename(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    train_to_the_end(whole)
    rename, count = os.replace, [0]

    def killer(n, after):
        def replace_(a, b):
            count[0] += 1
            if after:
                rename(a, b)
            if count[0] == n:
                os.kill(os.getpid(), signal.SIGKILL)
            if not after:
                rename(a, b)

        monkeypatch.setattr(os, "replace", replace_)

    for n in range(1, 100):
        path = tmp_path / f"{n}"
        killer(n, after=n % 2)
        died = in_child(lambda path=path: train_to_the_end(path))
        monkeypatch.setattr(os, "replace", rename)
        if not died:
            break
        in_child(lambda path=path: train_to_the_end(path))
        same(Run(whole), Run.open(path))
        assert not list(path.glob(".*"))
    assert n > 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments(tmp_path):
    train_to_the_end(tmp_path / "whole")
    rng, kills, path = random.Random(time.time_ns()), 0, tmp_path / "run"
    for attempt in range(50):
        pid = os.fork()
        if pid == 0:
            try:
                train_to_the_end(path, pause=0.02)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.01, 0.3) * 1.25**attempt)  # longer and longer, to get there on any machine
        os.kill(pid, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
            break
        kills += 1
    assert 1 <= kills < 50
    train_to_the_end(path)
    same(Run(tmp_path / "whole"), Run.open(path))


def test_killed_program(tmp_path):
    train_to_the_end(tmp_path / "whole")
    child = subprocess.Popen([sys.executable, __file__, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    time.sleep(1.0)
    child.send_signal(signal.SIGKILL)
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL
    with pytest.raises(RunError, match="resume the training"):
        Run.open(tmp_path / "run")
    train_to_the_end(tmp_path / "run")
    same(Run(tmp_path / "whole"), Run.open(tmp_path / "run"))


def test_seed_and_order_matter(tmp_path):
    "The comparisons above can fail: another seed gives other bits."
    for name, seed in (("a", 0), ("b", 1)):
        fit(learner(config(seed=seed)), new_run(tmp_path / name, replace(config(), seed=seed)))
    with pytest.raises(AssertionError):
        same(Run(tmp_path / "a"), Run(tmp_path / "b"))


if __name__ == "__main__":
    print("ready", flush=True)
    train_to_the_end(sys.argv[1], pause=0.1)
