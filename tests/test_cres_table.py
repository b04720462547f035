"""The table of all methods is what the results of the benchmarks say."""
import importlib.util
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
STORED = BENCH / "results" / "cres_table.json"
if not STORED.exists():
    pytest.skip("the results of the benchmarks are not here", allow_module_level=True)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("table_cres", BENCH / "table_cres.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(script):
    return script.table(script.read_results())


def same(a, b) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == (pytest.approx(b, rel=1e-9) if isinstance(a, float) else b)


def test_the_stored_table_is_that_of_the_stored_results(made):
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    assert same(made, stored), "run python bench/table_cres.py"


def test_every_row_is_measured_with_its_errors(script, made):
    for name, rows in made["sets"].items():
        for row, cells in rows.items():
            wanted = {"rms", "core_sigma", "median_abs", "tail_fraction", "events"}
            wanted |= set() if row in script.CONSTANT else {"best_quarter", "speed"}
            wanted |= set() if row == "limit" else {"ratio"}
            assert wanted <= cells.keys(), f"{name}, {row}: {sorted(wanted - cells.keys())}"
            assert all(cells[k]["error"] > 0 for k in wanted - {"events", "speed"}), f"{name}, {row}"
            assert cells["events"] >= 512, f"{name}, {row}"


def test_rows_agree_with_the_limit_of_its_own_benchmark(script, made):
    "The same first events: the two may differ by no more than their settings."
    results = script.read_results()
    for name, rows in made["sets"].items():
        exact = results["limit"][name]
        for row, entry in (("limit", exact), ("posterior", exact.get("fast"))):
            if entry is not None and entry["events"] == rows[row]["events"]:
                rms = entry["energy_eV"]["rms"]
                assert abs(rows[row]["rms"]["value"] - rms["value"]) < rms["error"] / 2, f"{name}, {row}"


def test_no_method_is_better_than_the_limit(made):
    for name, rows in made["sets"].items():
        for row, cells in rows.items():
            if row != "limit":
                assert cells["ratio"]["value"] > 1 - 3 * cells["ratio"]["error"], f"{name}, {row}"


def test_the_table_in_markdown_has_a_line_for_every_row(script, made):
    text = script.markdown(made)
    for rows in made["sets"].values():
        for cells in rows.values():
            line = next(k for k in text.splitlines() if k.startswith(f"| {cells['what']} |"))
            assert script.cell(cells["rms"]) in text and line.count("|") >= len(script.COLUMNS) + 2


def test_results_that_are_not_there_leave_dashes(script):
    made = script.table({k: {} for k in script.PARTS})
    assert all(cells.keys() == {"what", "source"} for rows in made["sets"].values() for cells in rows.values())
    assert "| limit: mean of the exact posterior |" + " - |" * len(script.COLUMNS) in script.markdown(made)
