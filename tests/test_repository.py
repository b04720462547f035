"""The rules of the house: who may import whom, what an import may cost, and what the repository may hold."""
import ast
import base64
import json
import os
import re
import subprocess
import sys
import sysconfig
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

import pytest

import deadlayer_cres

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = Path(deadlayer_cres.__file__).parent
MODULES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}
GROUND_FLOOR = {"core", "train", "metrics", "plots"}
WINGS = {"deadlayer", "cres"}
LIGHT = {"core", "detector", "trap", "simulate", "data", "prep", "s4d", "model"}
MAX_PNG_BYTES, MAX_CELL_LINES, MAX_LINE_LENGTH = 150_000, 60, 120


def tracked_files() -> list[Path]:
    "What git tracks, and what it would track once added."
    git = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=REPOSITORY, capture_output=True, text=True
    )
    if git.returncode:
        pytest.skip("not a git checkout")
    return [p for name in git.stdout.split("\0") if name and (p := REPOSITORY / name).is_file()]


NOTEBOOKS = {str(p.relative_to(REPOSITORY / "nbs")): p for p in sorted((REPOSITORY / "nbs").rglob("*.ipynb"))
             if ".ipynb_checkpoints" not in p.parts}
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS)


def read_cells(name: str) -> list[dict]:
    cells = json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))["cells"]
    return [c | {"source": "".join(c["source"])} for c in cells]


def exported_sources(name: str) -> list[str]:
    return [c["source"] for c in read_cells(name)
            if c["cell_type"] == "code" and re.match(r"#\|\s*exporti?\b", c["source"])]


def imported_names(module: str) -> set[str]:
    "Absolute names of all that `module` imports, at its top or inside functions."
    names = set()
    parts = ["deadlayer_cres", *module.split(".")]
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            names |= {f"{base}.{a.name}" for a in node.names}
    return names


def uses(names: set[str], package: str) -> list[str]:
    return sorted(n for n in names if n == package or n.startswith(package + "."))


# --- the package ---


def test_package_is_the_installed_one():
    if not os.environ.get("DEADLAYER_CRES_TEST_INSTALLED"):
        pytest.skip("a development install: make test runs this against the wheel")
    assert PACKAGE.parent == Path(sysconfig.get_path("purelib"))


def test_version_is_the_same_everywhere():
    settings = ConfigParser(delimiters=["="])
    settings.read(REPOSITORY / "settings.ini", encoding="utf-8")
    version = settings["DEFAULT"]["version"]
    assert deadlayer_cres.__version__ == version
    assert distribution("deadlayer_cres").version == version
    assert f"[{version}]" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")


def test_licence_is_apache_2():
    head = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")[:200]
    assert "Apache License" in head and "Version 2.0" in head
    metadata = distribution("deadlayer_cres").metadata
    assert "Apache-2.0" in (metadata.get("License-Expression") or metadata.get("License") or "")


def test_package_is_complete():
    source = REPOSITORY / "deadlayer_cres"
    expected = {p.relative_to(source) for p in tracked_files() if p.is_relative_to(source)} - {Path("ruff.toml")}
    installed = {p.relative_to(PACKAGE) for p in PACKAGE.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert not expected - installed, f"not in the installed package: {sorted(map(str, expected - installed))}"
    if os.environ.get("DEADLAYER_CRES_TEST_INSTALLED"):
        assert not installed - expected, f"only in the installed package: {sorted(map(str, installed - expected))}"


@pytest.mark.parametrize("module", MODULES)
def test_wings_and_ground_floor_do_not_mix(module):
    first = module.split(".")[0]
    forbidden = WINGS - {first} if first in WINGS else WINGS if module in GROUND_FLOOR else set()
    found = [n for wing in forbidden for n in uses(imported_names(module), f"deadlayer_cres.{wing}")]
    assert not found, f"{module} imports {found}"


@pytest.mark.parametrize("module", MODULES)
def test_only_train_imports_fastai(module):
    if module.split(".")[-1] != "train":
        assert not uses(imported_names(module), "fastai")


def test_light_modules_import_lightly():
    light = [m for m in MODULES if m.split(".")[-1] in LIGHT]
    assert "core" in light
    program = """
import importlib, json, sys
heavy = {}
for name in sys.argv[1:]:
    importlib.import_module(f"deadlayer_cres.{name}")
    heavy[name] = [h for h in ("fastai", "pandas", "matplotlib", "sklearn", "IPython") if h in sys.modules]
print(json.dumps(heavy))
"""
    run = subprocess.run([sys.executable, "-c", program, *light], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    heavy = {name: found for name, found in json.loads(run.stdout.splitlines()[-1]).items() if found}
    assert not heavy, f"loaded by or before: {heavy}"


# --- the repository ---

FORBIDDEN_TEXT = {
    "a registry host": r"\b(pypi|pythonhosted|registry\.npmjs|download\.pytorch|deb\.debian)\.(org|com)\b",
    "a machine path": r"(?<![\w.~:/])/(work|farm|root|tmp|home|Users|opt|mnt|data)/[\w.-]+",
    "an unfinished mark": r"\b(TO" r"DO|FIX" r"ME|X" r"XX)\b",
}


def without_images(notebook: str) -> str:
    "A notebook less its images: base64 holds every short word sooner or later."
    content = json.loads(notebook)
    for output in (o for c in content["cells"] for o in c.get("outputs", [])):
        output["data"] = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
    return json.dumps(content, ensure_ascii=False)


@pytest.mark.parametrize("what", FORBIDDEN_TEXT)
def test_no_file_holds(what):
    found = []
    for path in tracked_files():
        if path.suffix in {".png", ".h5", ".gz", ".safetensors"}:
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            text = without_images(text)
        found += [f"{path.relative_to(REPOSITORY)}: {m.group()}" for m in re.finditer(FORBIDDEN_TEXT[what], text)]
    assert not found, f"{what}: {found}"


@each_notebook
def test_notebook_opens_with_title_and_subtitle(notebook):
    first = read_cells(notebook)[0]
    lines = [line for line in first["source"].splitlines() if line.strip()]
    assert first["cell_type"] == "markdown" and len(lines) >= 2
    assert re.match(r"# \S", lines[0]) and re.match(r"> \S", lines[1])
    assert len(lines) == 2, "the first cell is the title and one line"


@each_notebook
def test_notebook_is_clean(notebook):
    content = json.loads(NOTEBOOKS[notebook].read_text(encoding="utf-8"))
    assert set(content["metadata"]) <= {"kernelspec"}
    assert content["metadata"].get("kernelspec", {}).get("name", "python3") == "python3"
    for cell in content["cells"]:
        assert set(cell["metadata"]) <= {"hide_input"}, cell["metadata"]
        assert cell.get("execution_count") is None
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", "".join(output.get("traceback", []))[:300]
            assert output.get("execution_count") is None
            assert not re.search(r"<[^<>]* at 0x[0-9a-fA-F]+>", json.dumps(output))


@each_notebook
def test_stored_images_are_small(notebook):
    for number, cell in enumerate(read_cells(notebook)):
        for output in cell.get("outputs", []):
            size = len(base64.b64decode("".join(output.get("data", {}).get("image/png", ""))))
            assert size < MAX_PNG_BYTES, f"cell {number}: {size} bytes"


@each_notebook
def test_exported_cells_are_short(notebook):
    for source in exported_sources(notebook):
        lines = [line for line in source.splitlines() if not line.startswith("#|")]
        assert len(lines) <= MAX_CELL_LINES, f"{len(lines)} lines from: {lines[0]}"
        wide = [line for line in lines if len(line) > MAX_LINE_LENGTH]
        assert not wide, wide
        assert not re.search(r"^\s*from\s+\S+\s+import\s+\*", source, re.M), "import names, not *"


def test_no_data_is_tracked():
    kinds = {".h5", ".hdf5", ".lh5", ".egg", ".root", ".pkl", ".gz", ".npz", ".npy", ".safetensors", ".pt"}
    found = [str(p.relative_to(REPOSITORY)) for p in tracked_files() if p.suffix in kinds]
    assert not found, f"data belongs elsewhere: {found}"
