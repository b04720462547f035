"""The explorers in a real browser: Voila serves their page, headless Chromium opens it. Run by `make test-browser`."""
import csv
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("voila")
sync_api = pytest.importorskip("playwright.sync_api")

from deadlayer_cres.cres.evaluate import Predictions, write_table  # noqa: E402
from deadlayer_cres.deadlayer.data import write_store  # noqa: E402
from deadlayer_cres.deadlayer.simulate import simulate_hits, spectra_of_hits  # noqa: E402
from deadlayer_cres.deadlayer.train import (  # noqa: E402
    Config,
    DataConfig,
    PairConfig,
    PairNetConfig,
    TrainConfig,
    train,
)

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOK = REPOSITORY / "nbs" / "tutorials" / "explorers.ipynb"
SHOTS = REPOSITORY / ".build" / "browser"
NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = os.environ.get("DEADLAYER_CRES_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
if BROWSER is None:
    pytest.skip("no Chromium", allow_module_level=True)
SECONDS = 120_000  # of patience, in ms: two cores may have other work


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A working folder: a store, a measured spectrum, a run trained in seconds, one that was broken off, predictions."
    at, rng = tmp_path_factory.mktemp("work"), np.random.default_rng(0)
    hits = simulate_hits(300_000, seed=1)
    labels = rng.uniform(0, 2, 300), np.where(np.arange(300) % 3, rng.uniform(0, 1, 300), 1.0)
    write_store(spectra_of_hits(hits, *labels), at / "mc.h5")
    one = spectra_of_hits(simulate_hits(300_000, seed=2), [1.0], [0.3])
    write_store(replace(one, fccd_in_mm=[np.nan], dlf=[np.nan]), at / "measured.h5")
    for name, lr in (("first", 5e-3), ("second", 1e-3)):
        config = Config(data=DataConfig(spectra=[str(at / "mc.h5")]),
                        pairs=PairConfig(batch_size=64, batches_per_epoch=40, valid_batches=2),
                        model=PairNetConfig(embedding=16, hidden=16, head=[32]),
                        train=TrainConfig(epochs=2, lr=lr, progress=False))
        train(config, at / "runs" / name, device="cpu")
    shutil.copytree(at / "runs" / "second", at / "runs" / "broken")
    (at / "runs" / "broken" / "environment.json").write_text("{")
    truth = rng.uniform(18_500, 18_700, 3000)
    mean = truth + rng.normal(size=3000) * np.where(truth > 18_600, 1, 4)
    write_table(at / "predictions.csv", Predictions(("energy_eV",), mean[:, None], truth={"energy_eV": truth}))
    return at


@pytest.fixture(scope="module")
def address(folder):
    "Voila on a free port."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "voila", os.fspath(NOTEBOOK), "--no-browser", f"--port={port}"]
    env = os.environ | {"DEADLAYER_CRES_RUNS": os.fspath(folder), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    SHOTS.mkdir(parents=True, exist_ok=True)
    with open(SHOTS / "voila.log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + 60
            while time.monotonic() < until and server.poll() is None:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/static/x", timeout=1)
                except urllib.error.HTTPError:
                    break
                except OSError:
                    time.sleep(0.3)
            assert server.poll() is None, (SHOTS / "voila.log").read_text()[-2000:]
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(20)


@pytest.fixture(scope="module")
def page(address):
    "The page with its figures."
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"] if root else [])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(SECONDS)
        page.goto(address, wait_until="commit")
        for name in ("spectrum", "cres", "runs", "selection"):
            image(page, name).wait_for()
        yield page
        browser.close()


def image(page, name: str):
    return page.locator(f"img.explorer-{name}")


def part(page, name: str):
    "The whole explorer around its figure."
    return page.locator(".widget-hbox").filter(has=image(page, name)).first


def control(page, name: str, label: str):
    "The control with this label."
    return part(page, name).locator(".widget-inline-hbox").filter(has=page.get_by_text(label, exact=True)).first


def shot(page, name: str, element=None) -> None:
    (element or page).screenshot(path=SHOTS / f"{name}.png", **({} if element else {"full_page": True}))


def numbers(page, name: str) -> dict[str, str]:
    "The table below the figure."
    rows = part(page, name).locator(".widget-html table tr").all()
    return {r.locator("th").inner_text(): r.locator("td").inner_text() for r in rows}


def after(page, name: str, act) -> float:
    "Do something and wait for another figure; the seconds that it took."
    before, start = image(page, name).get_attribute("src"), time.perf_counter()
    act()
    page.wait_for_function("([name, before]) => document.querySelector(`img.explorer-${name}`).src != before",
                           arg=[name, before])
    return time.perf_counter() - start


def settle(page, name: str, row: str) -> None:
    "Wait for a row of the table, and until the figure has not changed for a second: all stages are drawn."
    head = part(page, name).locator(".widget-html table th").filter(has_text=re.compile(f"^{row}$"))
    until, last, since = time.monotonic() + SECONDS / 1000, None, time.monotonic()
    while time.monotonic() < until:
        head.wait_for()
        if (now := image(page, name).get_attribute("src")) != last:
            last, since = now, time.monotonic()
        if time.monotonic() - since > 1:
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"{name} still changes")


def fill(page, name: str, label: str, text: str) -> None:
    box = control(page, name, label).locator("input")
    box.fill(text)
    box.press("Enter")


def say(page, name: str, words: str) -> str:
    "Wait until the line above the figure says this."
    line = part(page, name).locator('[role="status"]').filter(has_text=re.compile(words))
    line.wait_for()
    return line.inner_text()


def test_the_page_shows_all_explorers_and_no_code(page):
    assert page.title() and "Traceback" not in page.content()
    assert page.locator(".jp-InputArea-editor").count() == 0
    assert not page.locator(".jp-RenderedImage").count(), "no still figure beside a living one"
    assert set(numbers(page, "spectrum")) >= {"counts 1, 2", "expectations apart", "simulation"}
    shot(page, "1_first")


def test_a_slider_moves_figure_and_numbers(page):
    handle = control(page, "spectrum", "FCCD 1 [mm]").locator(".noUi-handle").first
    first, took = numbers(page, "spectrum"), []
    for key in ["ArrowRight"] * 6 + ["ArrowLeft"] * 3 + ["PageUp"]:
        took.append(after(page, "spectrum", lambda key=key: handle.press(key)))
    assert numbers(page, "spectrum") != first
    print(f"\nkey to figure in the browser: median {1e3 * np.median(took):.0f} ms")
    assert np.median(took) < 2, "far above what it takes, for a machine with other work"
    after(page, "spectrum", lambda: part(page, "spectrum").locator("input[type=checkbox]").first.check())
    once = numbers(page, "spectrum")
    after(page, "spectrum", lambda: part(page, "spectrum").get_by_text("Draw noise again").click())
    assert numbers(page, "spectrum")["χ² / bins"] != once["χ² / bins"]
    shot(page, "2_moved", part(page, "spectrum"))


def test_a_run_gives_its_verdict(page):
    after(page, "spectrum", lambda: fill(page, "spectrum", "run", "./runs/first"))
    found = numbers(page, "spectrum")
    assert found["network: thicker layer"] in ("spectrum 1", "spectrum 2")
    assert found["simulation"] == "that of the training" and "network: DLF of spectrum 1" in found
    shot(page, "3_verdict", part(page, "spectrum"))


def test_files_are_loaded_and_a_wrong_path_is_a_line(page):
    after(page, "spectrum", lambda: fill(page, "spectrum", "measured", "measured.h5"))
    legend = numbers(page, "spectrum")
    assert "network: thicker layer" in legend
    fill(page, "spectrum", "simulation", "mc.h5")
    part(page, "spectrum").locator("td").filter(has_text=re.compile(r"^mc\.h5$")).wait_for()
    shot(page, "4_measured", part(page, "spectrum"))
    before = image(page, "spectrum").get_attribute("src")
    fill(page, "spectrum", "measured", "nowhere.h5")
    line = say(page, "spectrum", "nowhere.h5")
    assert "expected" in line and "found" in line and "\n" not in line.strip()
    assert image(page, "spectrum").get_attribute("src") == before
    shot(page, "5_error", part(page, "spectrum"))
    after(page, "spectrum", lambda: fill(page, "spectrum", "measured", ""))


def test_saved_files_are_there(page, folder):
    fill(page, "spectrum", "save in", "kept")
    part(page, "spectrum").get_by_text("Save figure and values").click()
    assert "kept" in say(page, "spectrum", "saved")
    names = sorted(p.name for p in (folder / "kept").iterdir())
    assert names == ["spectrum-1.csv", "spectrum-1.json", "spectrum-1.png"]


def test_an_electron_is_moved_and_lost(page):
    first = numbers(page, "cres")
    handle = control(page, "cres", "pitch angle [°]").locator(".noUi-handle").first
    took = [after(page, "cres", lambda: handle.press("ArrowLeft")) for _ in range(4)]
    print(f"\nkey to figure in the browser: median {1e3 * np.median(took):.0f} ms")
    settle(page, "cres", "limit")
    assert numbers(page, "cres") != first and np.median(took) < 2
    after(page, "cres", lambda: control(page, "cres", "map").locator("select").select_option("Q-transform"))
    settle(page, "cres", "limit")
    shot(page, "9_electron", part(page, "cres"))
    fill(page, "cres", "file", "nowhere.egg")
    assert "nowhere.egg" in say(page, "cres", "nowhere")
    shot(page, "9_electron_error", part(page, "cres"))


def test_runs_are_browsed(page):
    text = page.locator("body").inner_text()
    assert "train.lr" in text and "runs/broken" in text and "environment.json" in text
    quantity = control(page, "runs", "quantity").locator("select")
    after(page, "runs", lambda: quantity.select_option("train_loss"))
    assert any("train_loss" in k for k in numbers(page, "runs"))
    shot(page, "6_runs", part(page, "runs"))


def test_a_brush_selects_events(page, folder):
    assert numbers(page, "selection")["selected"] == "3000 of 3000 events"
    handle = control(page, "selection", "x range").locator(".noUi-handle").first
    for _ in range(12):
        after(page, "selection", lambda: handle.press("PageUp"))
    n = int(numbers(page, "selection")["selected"].split()[0])
    assert 0 < n < 3000 and "±" in numbers(page, "selection")["mean energy_residual_eV, selected"]
    fill(page, "selection", "save in", "kept")
    part(page, "selection").get_by_text("Save figure, values and selected rows").click()
    say(page, "selection", "saved")
    with open(folder / "kept" / "selection-1.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == n and "energy_residual_eV" in rows[0]
    shot(page, "7_brush", part(page, "selection"))


@pytest.mark.parametrize("width", [420, 800, 1900])
def test_the_page_fits_its_window(page, width):
    page.set_viewport_size({"width": width, "height": 3400 if width < 600 else 2600})
    page.wait_for_timeout(500)
    shot(page, f"8_width_{width}")
    if width < 600:
        box = image(page, "spectrum").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width + 1, "the figure fits"
    assert page.evaluate("document.documentElement.scrollWidth") <= width + 1, "nothing sticks out"
