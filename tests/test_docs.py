"""The checks of the documentation: each of them finds what it is for, and the pages of this repository pass all."""
import json
import re
import runpy
import shutil
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = runpy.run_path(str(REPOSITORY / ".ci" / "docs_check.py"))
PAGE = runpy.run_path(str(REPOSITORY / "bench" / "page.py"))
IMAGE = {"output_type": "display_data", "data": {"image/png": "aGVsbG8="}, "metadata": {}}


def notebook(path: Path, *cells) -> None:
    "Write a notebook of markdown (text) and code (text, outputs) cells."
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [{"cell_type": "markdown", "metadata": {}, "source": c} if isinstance(c, str) else
            {"cell_type": "code", "metadata": {}, "source": c[0], "outputs": c[1]} for c in cells]
    path.write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


def stream(text: str) -> list[dict]:
    return [{"output_type": "stream", "name": "stdout", "text": [text]}]


@pytest.fixture
def site(tmp_path):
    "A small site that passes every check."
    nbs = tmp_path / "nbs"
    notebook(nbs / "index.ipynb", "# Title\n\n> One line.", "## How to cite\n\n[a module](00_core.ipynb#laws-of-it)")
    notebook(nbs / "00_core.ipynb", "# core\n\n> Things.", ("#| default_exp core", []), "## Laws of `it`\n\nText.",
             ("#| fig-alt: \"A line.\"\nplot()", [IMAGE]))
    colab = f"[open]({DOCS['COLAB']}nbs/tutorials/one.ipynb)"
    notebook(nbs / "tutorials/one.ipynb", "# One\n\n> Two.", colab, ("print(1)", stream("1")))
    (tmp_path / "bench" / "results").mkdir(parents=True)
    shutil.copy(REPOSITORY / "bench" / "page.py", tmp_path / "bench")
    (tmp_path / "bench" / "results" / "cres_new.json").write_text('{"a": {"value": 1.25, "error": 0.5}}')
    (nbs / "benchmarks").mkdir()
    (nbs / "benchmarks" / "index.qmd").write_text(PAGE["render"](tmp_path / "bench" / "results"))
    (tmp_path / "README.md").write_text("# Title\n\nSee `bench/page.py` and [notebook](nbs/index.ipynb#how-to-cite).\n")
    (tmp_path / "_quarto.yml").write_text(
        "website:\n  navbar: {left: [{text: Start, href: index.ipynb}]}\n  page-footer: {right: [{text: a, href: "
        "index.ipynb#how-to-cite}]}\n  sidebar:\n    contents: [index.ipynb, {section: a, contents: [00_core.ipynb, "
        "tutorials/one.ipynb]}, benchmarks/index.qmd]\n")
    return tmp_path


def found(root: Path) -> list[str]:
    "Names of the checks that complain, and what they say."
    small = DOCS["Site"](root)
    return [f"{check.__name__}: {line}" for check in DOCS["CHECKS"] for line in check(small)]


def only(root: Path, check: str, *words: str) -> None:
    "`check` alone complains, once, and says `words`."
    lines = found(root)
    assert len(lines) == 1 and lines[0].startswith(f"check_{check}: ") and all(w in lines[0] for w in words), lines


def add(root: Path, *cells) -> None:
    "A page of its own on the sidebar."
    notebook(root / "nbs" / "page.ipynb", "# Page\n\n> It is.", *cells)
    config = root / "_quarto.yml"
    config.write_text(config.read_text().replace("contents: [index.ipynb", "contents: [index.ipynb, page.ipynb"))


def test_a_good_site_passes(site, capsys):
    add(site, "[out](https://example.org/x) $a_{[1]}(2)$\n\n```sh\n# | no [link](here)\n#| code\n```")
    assert found(site) == []
    assert DOCS["main"](site) == 0 and "5 pages" in capsys.readouterr().out


def test_missing_page_on_the_sidebar(site):
    (site / "nbs" / "tutorials" / "one.ipynb").unlink()
    only(site, "sidebar", "tutorials/one.ipynb", "no such page")
    assert DOCS["main"](site) == 1


def test_module_not_on_the_sidebar(site):
    notebook(site / "nbs" / "cres" / "50_new.ipynb", "# new\n\n> New.", ("#| default_exp cres.new", []))
    only(site, "sidebar", "cres/50_new.ipynb", "module notebook")


def test_page_twice_on_the_sidebar(site):
    config = site / "_quarto.yml"
    config.write_text(config.read_text().replace("[00_core.ipynb,", "[00_core.ipynb, 00_core.ipynb,"))
    only(site, "sidebar", "00_core.ipynb", "twice")


@pytest.mark.parametrize("head", ["# Page", "# Page\n\n> one\n> two", "Page\n\n> one"])
def test_title_and_subtitle(site, head):
    add(site)
    notebook(site / "nbs" / "page.ipynb", head)
    only(site, "titles", "page.ipynb")


def test_qmd_without_subtitle(site):
    add(site)
    (site / "nbs" / "page.ipynb").rename(site / "nbs" / "old")
    (site / "nbs" / "page.qmd").write_text("---\ntitle: Page\n---\n")
    config = site / "_quarto.yml"
    config.write_text(config.read_text().replace("page.ipynb", "page.qmd"))
    only(site, "titles", "page.qmd")


@pytest.mark.parametrize("link, why", [
    ("[x](nowhere.ipynb)", "no such file"),
    ("[x](00_core.ipynb#laws)", "no heading #laws"),
    ("[x](#nothing)", "no heading #nothing"),
    ("[x](https://github.com/deadlayer-cres/deadlayer_cres/blob/main/gone.py)", "not in the repository"),
    ("![alt](images/none.png)", "no such file"),
    ("[![alt](images/none.png)](index.ipynb)", "no such file"),
    ("see @fig-none", "no such label"),
    ("see `configs/none.yaml`", "no such file"),
])
def test_links_and_references(site, link, why):
    add(site, link)
    only(site, "links", why)


def test_links_of_the_readme(site):
    readme = site / "README.md"
    readme.write_text(readme.read_text().replace("how-to-cite", "how-to-quote"))
    only(site, "links", "README.md", "how-to-quote")


def test_directive_in_prose(site):
    add(site, "Text.\n\n#| hide\n")
    only(site, "directives", "page.ipynb")


def test_directive_below_the_top_of_a_cell(site):
    add(site, ("x = 1\n#| export\ny = 2", []))
    only(site, "directives", "below the top")


@pytest.mark.parametrize("output", [
    {"output_type": "error", "ename": "E", "evalue": "", "traceback": []},
    {"output_type": "stream", "name": "stderr", "text": ["Traceback (most recent call last):\n"]},
    {"output_type": "execute_result", "data": {"text/plain": ["Traceback (most recent call last):"]}},
])
def test_traceback_in_an_output(site, output):
    add(site, ("#| hide\nf()", [output]))
    only(site, "directives", "traceback")


@pytest.mark.parametrize("cell", ["![](index.ipynb)", "[![](index.ipynb)](index.ipynb)", '<img src="x.png">',
                                  ("plot()", [IMAGE]), ("#| fig-alt:\nplot()", [IMAGE])])
def test_image_without_words(site, cell):
    add(site, cell)
    only(site, "images", "page.ipynb")


def test_figure_of_a_page_without_a_caption(site):
    colab = f"[open]({DOCS['COLAB']}nbs/tutorials/one.ipynb)"
    for caption, good in (("", False), ('#| fig-cap: "A line, drawn."\n', True)):
        notebook(site / "nbs" / "tutorials" / "one.ipynb", "# One\n\n> Two.", colab,
                 (f'#| fig-alt: "A line."\n{caption}plot()', [IMAGE]))
        assert not found(site) if good else only(site, "images", "fig-cap", "A line.") is None


def test_tutorial_without_outputs(site):
    colab = f"[open]({DOCS['COLAB']}nbs/tutorials/one.ipynb)"
    notebook(site / "nbs" / "tutorials" / "one.ipynb", "# One\n\n> Two.", colab, ("print(1)", []))
    only(site, "tutorials", "no stored outputs")


def test_tutorial_without_colab(site):
    notebook(site / "nbs" / "tutorials" / "one.ipynb", "# One\n\n> Two.", ("print(1)", stream("1")))
    only(site, "tutorials", "colab")


@pytest.mark.parametrize("change", [
    lambda r: (r / "cres_new.json").write_text('{"a": {"value": 1.26, "error": 0.5}}'),
    lambda r: (r / "cres_other.json").write_text('{"a": 1}'),
    lambda r: (r / "cres_new.json").unlink(),
    lambda r: (r.parents[1] / "nbs/benchmarks/index.qmd").write_text("---\ntitle: a\nsubtitle: b\n---\n"),
])
def test_page_of_benchmarks_out_of_step(site, change):
    change(site / "bench" / "results")
    only(site, "benchmarks", "page.py")


def test_page_shows_what_it_does_not_know(site):
    results = site / "bench" / "results"
    (results / "deadlayer_new.json").write_text(json.dumps({
        "machine": {"date": "2026-01-02", "python": "3.11", "platform": "x", "packages": {}, "cpu": "a cpu"},
        "speed/ours": {"median": 12.0, "min": 10.0, "max": 15.0}, "b": {"rows": {"x": {"what": "a method", "merit": {
            "energy_eV": {"all": {"rms": {"value": 3.14159, "error": 0.12}}}}}}}}))
    text = PAGE["render"](results)
    assert "1.25 ± 0.50" in text and "2026-01-02, a cpu" in text
    assert "| a method | 3.14 ± 0.12 |" in text
    assert text.index("deadlayer_new") < text.index("cres_new")


@pytest.mark.parametrize("node, words", [
    ({"value": 0.12345, "error": 0.0067}, "0.1235 ± 0.0067"),
    ({"median": 12.0, "min": 10.0, "max": 15.0}, "12 (10 to 15)"),
    (16239, "16,239"), (0.000123, "0.000123"), (None, "-"), (True, "-"), (float("nan"), "-"), ("text", "-"),
    ({"value": 5.0, "error": 0.0}, "5"), ({"accuracy": 0.9, "error": 0.01}, "0.900 ± 0.010"),
])
def test_numbers_in_words(node, words):
    assert PAGE["in_words"](node) == words


def test_this_repository():
    assert found(REPOSITORY) == []


def test_every_figure_of_the_benchmarks_is_there():
    figures = REPOSITORY / "nbs" / "benchmarks" / "figures"
    wanted = {p.stem for p in (REPOSITORY / "bench" / "results").glob("*.json")
              if PAGE["drawn"](p.stem, PAGE["tables_of"](p.stem, json.loads(p.read_text(encoding="utf-8"))))}
    assert {p.stem for p in figures.glob("*.png")} == wanted


def test_citation_has_the_version():
    settings = ConfigParser(delimiters=["="])
    settings.read(REPOSITORY / "settings.ini", encoding="utf-8")
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == settings["DEFAULT"]["version"]


@pytest.mark.parametrize("workflow", sorted((REPOSITORY / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.name)
def test_workflows(workflow):
    "They are YAML, need no secrets, and call only targets that the Makefile has and checks that exist."
    text = workflow.read_text(encoding="utf-8")
    assert "secrets." not in text and {"name", "jobs"} <= set(yaml.safe_load(text))
    makefile, checks = ((REPOSITORY / p).read_text(encoding="utf-8") for p in ("Makefile", ".ci/checks"))
    for target in re.findall(r"\bmake ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for steps in re.findall(r'STEPS="([^"]+)"', text):
        assert all(f"step_{step}()" in checks for step in steps.split())
