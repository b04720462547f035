"""Bad input at the command line: exit code 2, one line that names what is wrong, and nothing left behind."""
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

from deadlayer_cres import cli
from deadlayer_cres.deadlayer.data import Spectra, write_folder, write_store

VERBS = ("simulate", "prepare", "train", "evaluate", "fit", "infer", "explain", "compare", "demo")
NAME = "V05268A_FCCD1.0mm_DLF0.5_fracFCCDbore0.5.h5"
TINY = {
    "pairs": {"batch_size": 16, "batches_per_epoch": 2, "valid_batches": 1, "min_dfccd_in_mm": 0.05},
    "model": {"segment": 90, "embedding": 4, "hidden": 4, "head": [4]}, "train": {"epochs": 1, "progress": False},
}


def flags(settings: dict) -> list[str]:
    "Nested settings as options of `deadlayer train`."
    return [text for section, values in settings.items() for key, value in values.items()
            for text in (f"--{section}.{key}", json.dumps(value))]


def toy_spectra(n: int = 300, seed: int = 0) -> Spectra:
    "Falling spectra that get weaker with FCCD and DLF; the last third has DLF = 1."
    rng, b = np.random.default_rng(seed), np.arange(900)
    fccd, dlf = np.round(rng.uniform(0, 2, n), 4), np.round(rng.uniform(0, 0.99, n), 4)
    dlf[2 * n // 3:] = 1
    mean = 3000 * np.exp(-b / 300) * np.exp(-(0.3 + 0.2 * dlf[:, None]) * fccd[:, None] * np.exp(-b / 200))
    return Spectra(rng.poisson(mean), np.arange(901) * 0.5, fccd, dlf, 3.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder with a store, a folder of files, a measured spectrum and a trained run. Nobody may change it."
    home = tmp_path_factory.mktemp("made")
    mc = toy_spectra()
    write_store(mc, home / "mc.h5")
    write_folder(mc[:4], home / "files")
    middle = np.abs(mc.fccd_in_mm - 1).argmin()
    write_store(Spectra(mc.counts[[middle]] // 3, mc.edges_keV, [np.nan], [np.nan]), home / "measured.h5")
    longer = ["--pairs.batches_per_epoch", "60", "--train.lr", "0.02"]
    cli.deadlayer(["train", "--data.spectra", f"[{home / 'mc.h5'}]", "--run", f"{home / 'run'}", *flags(TINY), *longer])
    return home


@pytest.fixture
def world(made, tmp_path, monkeypatch):
    "An empty working directory beside a copy of all that was made."
    shutil.copytree(made, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    for p in Path("run").glob("config.yaml"):
        p.write_text(p.read_text().replace(str(made), str(tmp_path / "w")))
    return tmp_path / "w"


def everything(folder) -> dict:
    "Every file and folder below `folder`, hidden ones too, with its content."
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


def refused(capfd, argv, *words: str, code: int = 2, worked: bool = False) -> str:
    """Call the program; it must refuse in one line that holds all `words`, and leave the working directory as it was.

    Only where it has `worked` before may there be progress bars above that line.
    """
    before = everything(".")
    capfd.readouterr()
    with pytest.raises(SystemExit) as e:
        cli.deadlayer([str(a) for a in argv])
    out, err = capfd.readouterr()
    if worked:
        err = re.sub(r"(?m)^(.*\d+%\|.*|[ \t]*)?\n", "", err.replace("\r", "\n"))
    assert type(e.value.code) is int and e.value.code == code, err
    assert worked or not out
    assert err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err, err
    assert err.startswith(f"deadlayer {argv[0]}: "), err
    assert not [w for w in words if w not in err], err
    after = everything(".")
    assert {str(p) for p in after} == {str(p) for p in before}
    assert after == before
    return err


def spoil(source: Path, target: Path, change) -> Path:
    "Copy a published file to `target` and apply `change` to it."
    target.parent.mkdir(exist_ok=True)
    shutil.copy(source, target)
    with h5py.File(target, "r+") as f:
        change(f)
    return target


def counts(values):
    "A change that puts `values` in place of the counts."
    def change(f):
        del f["energy_hist/block0_values"]
        f["energy_hist/block0_values"] = np.asarray(values)
    return change


def one_bad(value, kind=float):
    column = np.ones((900, 1), kind)
    column[7] = value
    return counts(column)


def nothing(f):
    pass


# ---- files ---------------------------------------------------------------------------------------------------------

BAD_FILES = {  # name of the file, what is done to it, what the message must say
    "missing key": (NAME, lambda f: f.move("energy_hist", "other"), ("energy_hist", "other")),
    "too few bins": (NAME, counts(np.ones((800, 1), int)), ("900 bins", "(800, 1)")),
    "two columns": (NAME, counts(np.ones((900, 2), int)), ("one column", "(900, 2)")),
    "NaN": (NAME, one_bad(np.nan), ("counts >= 0", "nan in bin 7")),
    "infinity": (NAME, one_bad(np.inf), ("counts >= 0", "inf in bin 7")),
    "negative": (NAME, one_bad(-1), ("counts >= 0", "-1.0 in bin 7")),
    "negative integers": (NAME, one_bad(-1, int), ("counts >= 0", "-1 in bin 7")),
    "scaled counts": (NAME, one_bad(0.3), ("whole counts", "0.3 in bin 7")),
    "unparsable FCCD": ("V_FCCDthickmm_DLF0.5_fracFCCDbore0.5.h5", nothing, ("file name", "FCCDthickmm")),
    "no labels": ("spectrum.h5", nothing, ("file name", "spectrum.h5")),
    "negative FCCD": ("V_FCCD-0.1mm_DLF0.5_fracFCCDbore0.5.h5", nothing, ("FCCD >= 0", "-0.1")),
    "DLF above 1": ("V_FCCD1.0mm_DLF1.5_fracFCCDbore0.5.h5", nothing, ("DLF in [0, 1]", "1.5")),
    "DLF below 0": ("V_FCCD1.0mm_DLF-0.5_fracFCCDbore0.5.h5", nothing, ("DLF in [0, 1]", "-0.5")),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_prepare_refuses_a_folder_with_one_bad_file(world, capfd, case):
    name, change, words = BAD_FILES[case]
    good = sorted(Path("files").iterdir())[0]
    spoil(good, world / "files" / name, change)
    refused(capfd, ["prepare", "files", "--out", "new/o.h5"], name, *words)


READERS = {
    "prepare": ["prepare", "BAD", "--out", "o.h5"], "train": ["train", "--data.spectra", "[BAD]", "--run", "r"],
    "evaluate": ["evaluate", "run", "--data", "BAD"], "infer": ["infer", "run", "--spectrum", "BAD"],
    "infer, reference": ["infer", "run", "--spectrum", "measured.h5", "--reference", "BAD"],
    "fit": ["fit", "BAD", "--data", "mc.h5", "--out", "a"],
    "fit, data": ["fit", "measured.h5", "--data", "BAD", "--out", "a"],
}


@pytest.mark.parametrize("verb", READERS)
def test_every_verb_that_reads_spectra_refuses_bad_ones(world, capfd, verb):
    Path("empty").mkdir()
    Path("text.h5").write_text("energy,counts\n")
    Path("nothing.h5").write_bytes(b"")
    Path("short.h5").write_bytes(Path("mc.h5").read_bytes()[:3000])
    Path("wrong.txt").write_text("energy,counts\n")
    with h5py.File("other.h5", "w") as f:
        f["histogram"] = np.ones(900)
    bad = {"missing": "no such file", "empty": "found none", "text.h5": "HDF5", "nothing.h5": "HDF5",
           "short.h5": "truncated", "wrong.txt": ".txt", "other.h5": "histogram"}
    for name, word in bad.items():
        refused(capfd, [a.replace("BAD", name) for a in READERS[verb]], name, word)


def test_prepare_refuses_a_damaged_or_foreign_store(world, capfd):
    def damaged(key, value):
        shutil.copy("mc.h5", "bad.h5")
        with h5py.File("bad.h5", "r+") as f:
            if key in f.attrs:
                f.attrs[key] = value
            else:
                f[key][3] = value

    for key, value, word in (("version", 99, "version 99"), ("counts", 5, "checksum"), ("fccd_in_mm", -1.0, "row 3"),
                             ("dlf", 1.5, "row 3"), ("edges_keV", np.nan, "edges")):
        damaged(key, value)
        refused(capfd, ["prepare", "bad.h5", "--out", "o.h5"], "bad.h5", word)


@pytest.mark.parametrize(("options", "words"), [
    (["--rebin", "7"], ["rebin", "890"]), (["--rebin", "0"], ["rebin"]), (["--rebin", "1.5"], ["rebin", "1.5"]),
    (["--low_keV", "500"], ["500"]), (["--low_keV", "nan"], ["low_keV"]), (["--exposure", "-1"], ["exposure", "-1"]),
    (["--bins", "3"], ["bins"]),
])
def test_prepare_refuses_bad_options(world, capfd, options, words):
    refused(capfd, ["prepare", "mc.h5", "--out", "new/o.h5", *options], *words)


def test_prepare_does_not_replace_what_is_there(world, capfd):
    refused(capfd, ["prepare", "files", "--out", "mc.h5"], "mc.h5", "existing file")
    refused(capfd, ["prepare", "files", "--out", "files"], "files", "existing folder")
    refused(capfd, ["prepare", "files", "--out", "mc.h5/o.h5"], "mc.h5")
    refused(capfd, ["prepare", "files"], "out")
    refused(capfd, ["prepare", "--out", "o.h5"], "sources")


# ---- configs -------------------------------------------------------------------------------------------------------

BAD_CONFIGS = {  # text of the file, what the message must say
    "unknown key": ("model: {hiden: 8}", ["hiden"]),
    "unknown section": ("modle: {hidden: 8}", ["modle"]),
    "wrong type": ("model: {hidden: many}", ["model.hidden", "many"]),
    "fraction for a whole number": ("train: {epochs: 1.5}", ["train.epochs", "1.5"]),
    "out of range": ("model: {hidden: -1}", ["hidden", "-1"]),
    "unknown choice": ("model: {mode: guess}", ["model.mode", "guess"]),
    "unknown channel": ("inputs: {channels: [sum]}", ["channels", "sum"]),
    "split of too much": ("data: {split: {valid: 2}}", ["split", "2"]),
    "negative rate": ("train: {lr: -1}", ["lr", "-1"]),
    "a list": ("- 1\n- 2\n", []),
    "a word": ("hello", ["hello"]),
    "not YAML": ("model: [1, 2\n", []),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_train_refuses_a_bad_config(world, capfd, case):
    text, words = BAD_CONFIGS[case]
    Path("bad.yaml").write_text(text)
    refused(capfd, ["train", "-c", "bad.yaml", "--data.spectra", "[mc.h5]", "--run", "r"], *words)


@pytest.mark.parametrize("path", ["missing.yaml", "files"])
def test_train_refuses_a_config_that_is_not_there(world, capfd, path):
    refused(capfd, ["train", "-c", path, "--data.spectra", "[mc.h5]", "--run", "r"], path)


@pytest.mark.parametrize(("options", "words"), [
    (["--model.hiden", "8"], ["hiden"]), (["--model.hidden", "many"], ["model.hidden", "many"]),
    (["--pairs.first", "dlf2"], ["pairs.first"]), (["--data.split.valid", "0"], ["valid"]),
    (["--data.low_keV", "500"], ["500"]), (["--data.rebin", "7"], ["rebin"]),
])
def test_train_refuses_bad_options(world, capfd, options, words):
    refused(capfd, ["train", "--data.spectra", "[mc.h5]", "--run", "r", *flags(TINY), *options], *words)


def test_train_needs_spectra_and_a_run(world, capfd):
    refused(capfd, ["train", "--run", "r"], "data.spectra")
    refused(capfd, ["train", "--data.spectra", "[mc.h5]"], "--run")
    refused(capfd, ["train", "--data.spectra", "[measured.h5]", "--run", "r"], "FCCD")
    refused(capfd, ["train", "--data.spectra", "[files]", "--run", "r"], "dlf1")


def test_train_touches_no_other_folder(world, capfd):
    data = ["train", "--data.spectra", "[mc.h5]", *flags(TINY)]
    refused(capfd, [*data, "--run", "run"], "run", "overwrite")
    refused(capfd, [*data, "--run", "files", "--overwrite"], "files", "other files")
    refused(capfd, [*data, "--run", "mc.h5", "--overwrite"], "mc.h5", "other files")
    refused(capfd, [*data, "--run", "mc.h5/r"], "mc.h5")
    refused(capfd, [*data, "--run", "nowhere", "--resume"], "nowhere", "run folder")


def test_train_resumes_with_the_same_settings_only(world, capfd):
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    config["model"]["hidden"] = 8
    Path("other.yaml").write_text(yaml.safe_dump(config))
    refused(capfd, ["train", "-c", "other.yaml", "--run", "run", "--resume"], "run", "model.hidden", "4", "8")


@pytest.mark.parametrize(("options", "word"), [
    (["--train.precision", "fp16"], "precision"), (["--train.monitor", "luck"], "monitor"),
    (["--pairs.max_dfccd_in_mm", "1e-9"], "pairs"), (["--pairs.max_ddlf", "1e-9"], "pairs"),
], ids=lambda v: v[0] if isinstance(v, list) else "")
def test_train_finds_out_before_it_touches_the_run(world, capfd, options, word):
    train = ["train", "--data.spectra", "[mc.h5]", *flags(TINY), *options]
    refused(capfd, [*train, "--run", "r"], word)
    refused(capfd, [*train, "--run", "run", "--overwrite"], word)  # the trained run must survive


# ---- runs ----------------------------------------------------------------------------------------------------------


def rewrite(name, old, new):
    def change(run):
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new))
    return change


def truncate(run):
    (run / "last.safetensors").unlink()
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:2000])


def unfinish(run):
    for name in ("model.safetensors", "last.safetensors"):
        (run / name).unlink()


BAD_RUNS = {
    "another version": (rewrite("environment.json", '"format_version": 1', '"format_version": 99'), ["version 99"]),
    "no version": (lambda run: (run / "environment.json").write_text("{}"), ["format_version"]),
    "broken environment": (lambda run: (run / "environment.json").write_text("{"), ["environment.json"]),
    "no config": (lambda run: (run / "config.yaml").unlink(), ["config.yaml"]),
    "broken config": (lambda run: (run / "config.yaml").write_text("model: ["), ["config.yaml"]),
    "unknown key": (rewrite("config.yaml", "hidden: 4", "hiden: 4"), ["hiden"]),
    "wrong type": (rewrite("config.yaml", "hidden: 4", "hidden: many"), ["hidden", "many"]),
    "empty section": (lambda run: (run / "config.yaml").write_text("model: null\n"), ["model"]),
    "a list": (lambda run: (run / "config.yaml").write_text("- 1\n"), ["config.yaml"]),
    "other network": (rewrite("config.yaml", "hidden: 4", "hidden: 5"), ["model.safetensors", "weights"]),
    "not trained": (unfinish, ["finished training"]),
    "truncated weights": (truncate, ["model.safetensors"]),
    "no run": (shutil.rmtree, ["run folder"]),
    "a file": (lambda run: (shutil.rmtree(run), run.write_text("x")), ["run folder"]),
    "spectra gone": (lambda run: (run.parent / "mc.h5").unlink(), ["mc.h5"]),
}
@pytest.mark.parametrize("case", BAD_RUNS)
def test_a_bad_run_is_refused(world, capfd, case):
    change, words = BAD_RUNS[case]
    change(world / "run")
    for argv in (["infer", "run", "--spectrum", "measured.h5"], ["evaluate", "run", "--pairs", "16"]):
        refused(capfd, argv, *words)


def test_infer_refuses_spectra_that_do_not_fit(world, capfd):
    mc = toy_spectra(2)
    write_store(mc[:1].rebin(2), "coarse.h5")
    write_store(Spectra(np.zeros((1, 900), int), mc.edges_keV, [np.nan], [np.nan]), "zero.h5")
    infer = ["infer", "run", "--spectrum"]
    refused(capfd, [*infer, "coarse.h5"], "890 bins", "445 bins")
    refused(capfd, [*infer, "zero.h5"], "counts")
    refused(capfd, [*infer, "mc.h5", "--row", "300"], "row", "0 to 299", "300")
    refused(capfd, [*infer, "mc.h5", "--row", "-1"], "row", "-1")
    refused(capfd, [*infer, "measured.h5", "--reference", "files"], "spectr")
    refused(capfd, [*infer, "measured.h5", "--out", "mc.h5"], "mc.h5", worked=True)


def test_infer_asks_all_methods(world, capfd):
    refused(capfd, ["infer", "run", "--spectrum", "measured.h5", "--robust", "nowhere"], "nowhere")
    cli.deadlayer(["infer", "run", "--spectrum", "measured.h5", "--robust", "run", "--out", "all"])
    printed, found = capfd.readouterr().out, json.loads(Path("all/answer/answer.json").read_text())
    methods = {e["method"]: e for e in found["estimates"]}
    assert {"network", "robust network", "loop of the network", "likelihood, whole"} <= set(methods)
    assert [m for m, e in methods.items() if e["family"] == "network" and e["counts"]] == ["robust network"]
    assert "All methods" in printed and found["sentences"][0] in " ".join(printed.split())
    assert "Does a simulation describe it?, robust network" in Path("all/answer/report.html").read_text()


@pytest.mark.parametrize("name", ["coarse.h5", "zero.h5", "files"])
def test_infer_names_the_spectrum_that_does_not_fit(world, capfd, name):
    mc = toy_spectra(2)
    write_store(mc[:1].rebin(2), "coarse.h5")
    write_store(Spectra(np.zeros((1, 900), int), mc.edges_keV, [np.nan], [np.nan]), "zero.h5")
    measured = ["measured.h5", "--reference", "files"] if name == "files" else [name]
    refused(capfd, ["infer", "run", "--spectrum", *measured], name)


def test_evaluate_and_compare_refuse_what_they_cannot_use(world, capfd):
    refused(capfd, ["evaluate", "run", "--pairs", "many"], "pairs", "many")
    refused(capfd, ["evaluate", "run", "--data", "measured.h5"], "FCCD")
    refused(capfd, ["evaluate", "run", "--data", "files"], "spectra")
    refused(capfd, ["compare", "run", "--out", "c"], "run", "evaluate")
    refused(capfd, ["compare", "nowhere", "--out", "c"], "nowhere")
    refused(capfd, ["compare", "run", "--protocol", "luck"], "luck")


def test_evaluate_refuses_a_wrong_number_of_pairs(world, capfd):
    refused(capfd, ["evaluate", "run", "--pairs", "0"], "pairs", "0")


SIMULATE = ["simulate", "--random", "2", "--dlf1", "1", "--decays", "2000"]


@pytest.mark.parametrize(("options", "words"), [
    ([], ["--out", "--folder"]), (["--out", "o.h5", "--random", "-1"], ["--random", "-1"]),
    (["--out", "o.h5", "--random", "0", "--dlf1", "0"], ["at least one"]),
    (["--out", "o.h5", "--decays", "0"], ["decays", "0"]), (["--out", "o.h5", "--decays", "lots"], ["decays", "lots"]),
    (["--out", "o.h5", "--max_fccd_in_mm", "-1"], ["max_fccd_in_mm"]),
    (["--out", "o.h5", "--max_fccd_in_mm", "60"], ["--max_fccd_in_mm", "for this crystal", "60 mm"]),
], ids=lambda v: " ".join(v))
def test_simulate_refuses(world, capfd, options, words):
    refused(capfd, [*SIMULATE, *options], *words)


@pytest.mark.parametrize("target", ["--out mc.h5", "--folder files", "--folder mc.h5", "--out mc.h5/o.h5"])
def test_simulate_looks_at_the_target_first(world, capfd, target):
    refused(capfd, [*SIMULATE, *target.split()], target.split()[1])


# ---- a full disk, an interrupt -------------------------------------------------------------------------------------

WRITERS = {
    "prepare": ["prepare", "mc.h5", "--out", "o.h5"],
    "prepare over": ["prepare", "files", "--out", "mc.h5", "--overwrite"],
    "train": ["train", "--data.spectra", "[mc.h5]", "--run", "r", *flags(TINY)],
    "train over": ["train", "--data.spectra", "[mc.h5]", "--run", "run", "--overwrite", *flags(TINY)],
    "infer": ["infer", "run", "--spectrum", "measured.h5", "--out", "answer"],
    "evaluate": ["evaluate", "run", "--pairs", "16"],
    "simulate": [*SIMULATE, "--out", "o.h5"],
    "simulate folder": [*SIMULATE, "--folder", "o"],
}


WORKED = {"infer", "simulate", "simulate folder", "evaluate"}


@pytest.fixture
def full_disk(monkeypatch):
    "Every file that is written is a file too much."
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(Path, "write_bytes", full)


@pytest.mark.parametrize("case", WRITERS)
def test_a_full_disk_leaves_nothing_behind(world, capfd, full_disk, monkeypatch, case):
    monkeypatch.setattr("deadlayer_cres.deadlayer.evaluate.yardsticks", lambda *_, **__: ({}, None))  # slow
    refused(capfd, WRITERS[case], os.strerror(errno.ENOSPC), worked=case in WORKED)


def test_a_disk_that_fills_up_during_training_leaves_a_run_to_resume(world, capfd, monkeypatch):
    import deadlayer_cres.train as ground

    saved, room = ground.save_file, [1]

    def save(tensors, path, **kwargs):
        if not room.pop() if room else True:
            Path(path).write_bytes(b"part of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
        saved(tensors, path, **kwargs)

    monkeypatch.setattr(ground, "save_file", save)
    train = ["train", "--data.spectra", "[mc.h5]", "--run", "r", *flags(TINY)]
    with pytest.raises(SystemExit) as e:
        cli.deadlayer(train)
    err = capfd.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and os.strerror(errno.ENOSPC) in err
    assert not [p for p in Path("r").rglob("*") if p.suffix == ".part"]
    monkeypatch.setattr(ground, "save_file", saved)
    cli.deadlayer([*train, "--resume"])
    assert Path("r/model.safetensors").exists()


@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_an_interrupt_ends_with_130_and_leaves_nothing(world, capfd, monkeypatch, verb):
    import deadlayer_cres.deadlayer.data as data

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "concatenate", interrupt)
    monkeypatch.setattr("deadlayer_cres.deadlayer.train.concatenate", interrupt)
    refused(capfd, WRITERS[verb], "interrupted", code=130)


def test_an_interrupt_while_writing_leaves_nothing(world, capfd, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    refused(capfd, WRITERS["prepare"], "interrupted", code=130)


def test_our_own_errors_keep_their_traceback(world, monkeypatch):
    def bug(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("deadlayer_cres.deadlayer.data.prepare", bug)
    with pytest.raises(ZeroDivisionError):
        cli.deadlayer(WRITERS["prepare"])


# ---- the program ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(capsys, verb):
    with pytest.raises(SystemExit) as e:
        cli.deadlayer([verb, "--help"])
    out, err = capsys.readouterr()
    assert type(e.value.code) is int and e.value.code == 0 and not err
    assert f"deadlayer {verb}" in out and "Example: deadlayer" in " ".join(out.split())


def test_help_and_version_of_the_program(capsys):
    for argv in (["--help"], ["-h"], []):
        cli.deadlayer(argv)
        out = capsys.readouterr().out
        assert not [v for v in VERBS if f"  {v}" not in out]
    cli.deadlayer(["--version"])
    assert capsys.readouterr().out.startswith("deadlayer_cres ")


@pytest.mark.parametrize("argv", [["paint"], [""], ["--luck"], ["train", "extra"], ["train", "--run"], ["infer"],
                                  ["evaluate"], ["compare"], ["simulate", "--decays"], ["demo", "--luck", "1"]],
                         ids=lambda v: " ".join(v))
def test_nonsense_is_refused(world, capsys, argv):
    with pytest.raises(SystemExit) as e:
        cli.deadlayer(argv)
    err = capsys.readouterr().err
    assert type(e.value.code) is int and e.value.code == 2
    assert err.count("\n") == 1 and err.startswith("deadlayer") and ": error: " in err and "Traceback" not in err


def test_as_a_program(world):
    "What the shell sees: the exit code, and one line although nobody catches warnings here."
    def run(*argv):
        code = "from deadlayer_cres.cli import deadlayer; deadlayer()"
        return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)

    done = run("prepare", "missing", "--out", "o.h5")
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1 and "missing" in done.stderr
    assert not Path("o.h5").exists()
