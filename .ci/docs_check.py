"""Check the documentation without rendering it: `python .ci/docs_check.py`, one line for each thing to mend."""
import json
import re
import runpy
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

import yaml

REPOSITORY = "https://github.com/deadlayer-cres/deadlayer_cres"
COLAB = "https://colab.research.google.com/github/deadlayer-cres/deadlayer_cres/blob/main/"
NO_PAGES = {"_proc", "_docs", ".ipynb_checkpoints"}
PROSE = ("tutorials/", "howto/", "explanations/", "start.")  # pages that export nothing


@dataclass
class Page:
    "One notebook or Quarto page."

    path: Path
    name: str  # relative to nbs
    cells: list[dict] = field(default_factory=list)  # of a notebook; a .qmd is one markdown cell

    @cached_property
    def prose(self) -> str:
        "All markdown, without code blocks."
        text = "\n\n".join(c["source"] for c in self.cells if c["cell_type"] == "markdown")
        return re.sub(r"^(```+|~~~+).*?^\1\s*$", "", text, flags=re.M | re.S)

    @cached_property
    def anchors(self) -> set[str]:
        heads = re.findall(r"^#+ +(.+?) *$", self.prose, re.M)
        explicit = re.findall(r"\{#([\w.:-]+)", self.prose)
        return {anchor(re.sub(r"\{.*\}", "", h)) for h in heads} | set(explicit)


def anchor(heading: str) -> str:
    "The anchor that Pandoc gives a heading."
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
    heading = re.sub(r"[^\w\s.-]", "", heading)
    return re.sub(r"^[\W\d_]+", "", re.sub(r"\s+", "-", heading.strip()))


def read_page(path: Path, nbs: Path) -> Page:
    name = path.relative_to(nbs).as_posix()
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [c | {"source": "".join(c["source"])} for c in json.loads(text)["cells"]]
    else:
        cells = [{"cell_type": "markdown", "source": text}]
    return Page(path, name, cells)


class Site:
    "What the checks look at."

    def __init__(self, root: Path):
        self.root, self.nbs = root, root / "nbs"
        self.config = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
        found = sorted(p for kind in ("*.ipynb", "*.qmd") for p in self.nbs.rglob(kind))
        self.pages = {p.name: p for f in found if not NO_PAGES & set(f.parts) for p in [read_page(f, self.nbs)]}

    def listed(self) -> tuple[list[str], list[str]]:
        "The pages of the sidebar in their order, then those of navbar and footer."
        site = self.config["website"]
        return hrefs(site["sidebar"]), hrefs([site.get("navbar", {}), site.get("page-footer", {})])


def hrefs(node) -> list[str]:
    if isinstance(node, str):
        return [node] if re.search(r"\.(ipynb|qmd)(#|$)", node) else []
    if isinstance(node, list):
        return [h for n in node for h in hrefs(n)]
    return [h for n in node.values() for h in hrefs(n)] if isinstance(node, dict) else []


# --- the checks: each returns a line for each thing to mend ---


def check_sidebar(site: Site) -> list[str]:
    "Every page of the sidebar exists, and every page, hence every module notebook, is on it once."
    side, other = site.listed()
    bad = [f"_quarto.yml: {h}: no such page" for h in [*side, *other] if h.split("#")[0] not in site.pages]
    bad += [f"_quarto.yml: {h}: twice on the sidebar" for h in sorted(set(side)) if side.count(h) > 1]
    for name, page in site.pages.items():
        if name not in side:
            kind = "module notebook" if any("#| default_exp" in c["source"] for c in page.cells) else "page"
            bad.append(f"nbs/{name}: {kind} not on the sidebar of _quarto.yml")
    return bad


def check_titles(site: Site) -> list[str]:
    "Each page has a title and one line below it."
    bad = []
    for name, page in site.pages.items():
        head = page.cells[0] if page.cells else {"cell_type": "", "source": ""}
        if name.endswith(".qmd"):
            front = re.match(r"---\n(.*?)\n---\n", head["source"], re.S)
            front = yaml.safe_load(front[1]) if front else {}
            good = all(isinstance(v := front.get(k), str) and v and "\n" not in v for k in ("title", "subtitle"))
        else:
            good = head["cell_type"] == "markdown" and re.fullmatch(r"# \S.*\n+> \S.*\s*", head["source"])
        if not good:
            bad.append(f"nbs/{name}: expected a title and a subtitle of one line")
    return bad


LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+(?:\([^()]*\))?)(?:\s+\"[^\"]*\")?\)")


IMAGE = re.compile(r"!\[([^\[\]]*)\]\(([^()\s]+)")


def check_links(site: Site) -> list[str]:
    "Links inside the site and the repository, anchors and references end somewhere."
    bad = []
    texts = [(f"nbs/{p.name}", p.path.parent, p) for p in site.pages.values()]
    texts += [(str(f.relative_to(site.root)), f.parent, Page(f, f.name, read_page(f, site.root).cells))
              for f in sorted([*site.root.glob("*.md"), *site.root.glob("howto/**/*.md")])]
    for name, folder, page in texts:
        prose = re.sub(r"\$\$.*?\$\$|`[^`]*`", "", page.prose, flags=re.S)
        targets = {target for _, _, target in LINK.findall(prose)} | {target for _, target in IMAGE.findall(prose)}
        for target in sorted(targets):
            bad += [f"{name}: {target}: {why}" for why in [dead_end(target, folder, page, site)] if why]
        labels = set(re.findall(r"\{#([\w-]+)", page.prose))
        labels |= {m for c in page.cells for m in re.findall(r"^#\| *label: *(\S+)", c["source"], re.M)}
        used = set(re.findall(r"(?<![\w@/.])@((?:fig|tbl|eq|sec)-[\w-]+)", prose))
        bad += [f"{name}: @{r}: no such label" for r in sorted(used - labels)]
        bad += [f"{name}: `{p}`: no such file" for p in sorted(named_files(page.prose, site.root))]
    return bad


def dead_end(target: str, folder: Path, page: Page, site: Site) -> str | None:
    "Why a link leads nowhere, or None."
    inside = re.match(re.escape(REPOSITORY) + r"/(?:blob|tree)/main/([^#]*)", target)
    if target.startswith(COLAB):
        inside = re.match(r"(.*)", target[len(COLAB):])
    if inside:
        return None if (site.root / unquote(inside[1])).exists() else "not in the repository"
    if re.match(r"[a-z]+:", target):
        return None
    path, _, mark = unquote(target).partition("#")
    file = (folder / path).resolve() if path else page.path.resolve()
    if not file.exists():
        return "no such file"
    if mark:
        known = {p.path.resolve(): p for p in site.pages.values()}
        if not path or file in known or file.suffix == ".md":
            other = page if not path else known.get(file) or read_page(file, file.parent)
            return None if mark in other.anchors else f"no heading #{mark}"
    return None


def named_files(prose: str, root: Path) -> set[str]:
    "Files of the repository that the text names in backticks and that do not exist."
    folders, kinds = r"bench|configs|nbs|tests|howto|\.ci|\.github", "py|ipynb|qmd|json|ya?ml|md|sbatch"
    named = re.findall(rf"`((?:{folders})/[\w./-]+\.(?:{kinds}))`", prose)
    return {n for n in named if not (root / n).exists()}


def check_directives(site: Site) -> list[str]:
    "No directive of nbdev or Quarto can be seen in the prose, and no trouble hides in an output."
    bad = []
    for name, page in site.pages.items():
        if re.search(r"^\s*#\|", page.prose, re.M):
            bad.append(f"nbs/{name}: a directive #| in the prose")
        for cell in page.cells:
            lines = cell["source"].splitlines() if cell["cell_type"] == "code" else []
            first = next((k for k, line in enumerate(lines) if line.strip() and not line.startswith("#|")), len(lines))
            if any(re.match(r"\s*#\|", line) for line in lines[first:]):
                bad.append(f"nbs/{name}: a directive #| below the top of its cell: {lines[0]}")
            if any(o["output_type"] == "error" or "Traceback (most recent call last)" in output_text(o)
                   for o in cell.get("outputs", [])):
                bad.append(f"nbs/{name}: a traceback in the output of: {lines[0]}")
    return bad


def output_text(output: dict) -> str:
    data = output.get("data", {})
    return "".join(output.get("text", [])) + "".join("".join(data.get(k, [])) for k in ("text/plain", "text/html"))


def check_images(site: Site) -> list[str]:
    "Each image says in words what it shows, and those of pages that export nothing have a caption."
    bad = []
    for name, page in site.pages.items():
        bad += [f"nbs/{name}: {target}: image without alt text" for alt, target in IMAGE.findall(page.prose)
                if not alt.strip()]
        bad += [f"nbs/{name}: <img> without alt text" for tag in re.findall(r"<img\b[^>]*>", page.prose)
                if not re.search(r"\balt=\"[^\"]+\"", tag)]
        for cell in page.cells:
            if any(k.startswith("image/") for o in cell.get("outputs", []) for k in o.get("data", {})):
                if not re.search(r"^#\| *fig-alt: *\S", cell["source"], re.M) and "#| hide\n" not in cell["source"]:
                    line = next((s for s in cell["source"].splitlines() if s and not s.startswith("#|")), "")
                    bad.append(f"nbs/{name}: figure without `#| fig-alt:` in the cell: {line.strip()}")
        if name.startswith(PROSE):
            bad += [f"nbs/{name}: `#| fig-alt:` without `#| fig-cap:`: {found[1]}" for cell in page.cells
                    if (found := re.search(r"^#\| *fig-alt: *(.{1,60})", cell["source"], re.M))
                    and not re.search(r"^#\| *fig-cap: *\S", cell["source"], re.M)]
    return bad


def check_tutorials(site: Site) -> list[str]:
    "Tutorials, the start and how-tos hold their outputs; tutorials open in Colab."
    bad = []
    for name, page in site.pages.items():
        code = [c for c in page.cells if c["cell_type"] == "code"]
        if name.startswith(PROSE) and code:
            if not any(c.get("outputs") for c in code):
                bad.append(f"nbs/{name}: no stored outputs")
        if name.startswith("tutorials/") and f"({COLAB}nbs/{name})" not in page.prose:
            bad.append(f"nbs/{name}: expected a link to {COLAB}nbs/{name}")
    return bad


def check_benchmarks(site: Site) -> list[str]:
    "The page of the benchmarks is what bench/page.py makes of bench/results."
    script = runpy.run_path(str(site.root / "bench" / "page.py"))
    file = site.nbs / "benchmarks" / "index.qmd"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    if text != script["render"](site.root / "bench" / "results"):
        return ["nbs/benchmarks/index.qmd: not in step with bench/results; run python bench/page.py"]
    return []


CHECKS = (check_sidebar, check_titles, check_links, check_directives, check_images, check_tutorials, check_benchmarks)


def main(root: Path) -> int:
    site = Site(root)
    bad = [line for check in CHECKS for line in check(site)]
    print("\n".join(bad))
    side, _ = site.listed()
    print(f"{len(bad)} to mend" if bad else f"{len(side)} pages, all checks passed")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parents[1]))
