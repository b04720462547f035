"""Write the page of the benchmarks, nbs/benchmarks/index.qmd with its figures, from bench/results/*.json.

    python bench/page.py

Each file of results is a section: what was measured (the first lines of its script), on what machine and when, tables
with errors, and a figure of the first table's first column. What a table holds is said in TABLES; a file that is not
there is shown by the figures of merit, or else the quantities with an error, that it holds.
"""
import ast
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import floor, isfinite, log10
from pathlib import Path

BENCH = Path(__file__).resolve().parent
PAGE = BENCH.parent / "nbs" / "benchmarks" / "index.qmd"
CODE = "https://github.com/deadlayer-cres/deadlayer_cres/blob/main/bench"
NAMED = ("accuracy", "ratio", "coverage", "flagged")  # numbers whose error stands beside them
MOST_COLUMNS = 8  # of a table that nobody has designed


@dataclass
class Table:
    "Rows are the nodes that a pattern finds; columns are paths below them."

    title: str
    rows: str | list[str | tuple]  # patterns such as cca-8k/rows/*, or keys one by one
    columns: dict[str, str | tuple]  # heading -> path or keys below a row; the first is drawn
    names: dict[str, str] | None = None  # of a row's path -> what to call it; else what the * stood for


MERIT = {"RMS [eV]": "merit/energy_eV/all/rms", "core σ [eV]": "merit/energy_eV/all/core_sigma",
         "median \\|r\\| [eV]": "merit/energy_eV/all/median_abs", "beyond 3 eV": "merit/energy_eV/all/tail_fraction",
         "RMS of best 25 % [eV]": "merit/energy_eV/resolution_at_efficiency/25/rms"}
REFINED = {"RMS [eV]": "rms_eV", "ratio to limit": "ratio_to_limit", "median \\|r\\| [eV]": "median_abs_error_eV",
           "RMS of best 25 % [eV]": "best_quarter", "inside 1 σ": "coverage_1_sigma"}
LIMIT = {"RMS [eV]": "energy_eV/rms", "RMS of best 25 % [eV]": "best/0.25/rms_eV", "beyond 3 eV": "tail_fraction",
         "68 % intervals hold": "energy_eV/coverage/0.68", "90 % intervals hold": "energy_eV/coverage/0.9"}
ACCURACY = {f"\\|dFCCD\\| < {w} mm": w for w in ("0.01", "0.05", "0.1", "0.25", "0.5")} | {"any dFCCD": "none"}
BY_SET = {"cca-8k": "8,192 samples, `cca-8k`", "cca-24k": "24,576 samples, `cca-24k`"}
TABLES = {
    "apps": [Table("From a moved control to the first picture", "explorers/*/*",
                   {"a move [ms]": "move_ms", "90 % of moves below [ms]": "move_ms_90_percent",
                    "all stages [ms]": "all_stages_ms",
                    "the whole figure redrawn [ms]": "redraw_ms", "ratio": "ratio_to_redraw"})],
    "cres_compare": [Table(f"Networks, {text}", f"{name}/rows/*", MERIT | {"parameters": "parameters"})
                     for name, text in BY_SET.items()],
    "cres_comb": [Table(f"Combs without a trap, {text}", f"{name}/rows/*", MERIT)
                  for name, text in (BY_SET | {"bathtub": "another trap"}).items()],
    "cres_detect": [Table(f"Searches, {text}", f"{name}/rows/*", MERIT | {"events per s": "events_per_second"})
                    for name, text in BY_SET.items()],
    "cres_refine": [Table(f"Likelihood after a network, {text}",
                          [f"{name}/{k}" for k in ("blind", "network", "network, refined", "network modes, fitted",
                                                   "posterior, fitted", "limit")], REFINED)
                    for name, text in BY_SET.items()],
    "cres_limit": [Table("The exact posterior", ["cca-*"], LIMIT)],
    "cres_simulate": [Table("Events per second on the processor", "cpu/*/* threads",
                            {"events per s with noise": "noisy/events_per_second",
                             "events per s without": "clean/events_per_second"})],
    "cres_prep": [Table("Events per second", "events_per_second/*", {"events per s": ""}),
                  Table("Ratios", "ratios/*", {"times as fast": ""})],
    "cres_s4d": [Table(title, f"cpu/{task}/*", {"seconds": "seconds", "peak MB": "peak_MB"}) for title, task in (
        ("A kernel, forwards and backwards", "kernel"), ("A training step of six layers", "training"))],
    "deadlayer_accuracy": [
        Table("How often the sign is right, Poisson noise on both spectra",
              ["metrics/poisson", "metrics/baseline/poisson", "metrics/limit/poisson"], ACCURACY,
              {"metrics/poisson": "network", "metrics/baseline/poisson": "PCA + cubic regression",
               "metrics/limit/poisson": "limit of counting statistics"}),
        Table("The same without noise", ["metrics/shared", "metrics/baseline/shared", "metrics/published/*"], ACCURACY,
              {"metrics/shared": "network", "metrics/baseline/shared": "PCA + cubic regression",
               "metrics/published/restricted": "published, trained per window",
               "metrics/published/full": "published, trained on all"})],
    "deadlayer_answer": [Table("FCCD of V05268A by family of methods", "families/fccd_in_mm/*", {"FCCD [mm]": ""}),
                         Table("DLF of V05268A by family of methods", "families/dlf/*", {"DLF": ""})],
    "deadlayer_fit": [Table("FCCD from the whole likelihood, by window", "likelihood/windows/*",
                            {"FCCD [mm]": "parameters/fccd_in_mm",
                             "DLF": "parameters/dlf", "deviance": "deviance", "bins less parameters": "ndf"}),
                      Table("FCCD from the peak ratio at DLF = 1, by model of the peak", "peak_ratio/step/by_model/*",
                            {"FCCD [mm]": "fccd_in_mm", "ratio": "ratio"})],
    "deadlayer_posterior": [
        Table("Coverage of FCCD and DLF over pseudo-experiments", "*/coverage/*/intervals/*",
              {"coverage": "", "nominal": "nominal"}),
        Table("Half width of the 68 % interval of FCCD over the limit", "*/coverage/limit, *",
              {"width / limit": ("width / limit",), "limit [mm]": "mean_mm"}),
        Table("Bias of FCCD by a change of the measurement, over the quoted error", "*/bias/*",
              {"bias / quoted error": ("bias / quoted error",), "bias [mm]": "bias_mm"}),
        Table("Share of pseudo-experiments that the guard flags", "guard/power/*",
              {"flagged": "", "in the right window": "window named"})],
    "deadlayer_simulate": [
        Table("Counts over those of the published simulation, FCCD 1 mm, DLF 1", "published/1.00 mm, DLF 1.00/*",
              {"ratio": ""}),
        Table("Speed", ["speed"], {"decays per s of a core": "decays_per_cpu_second",
                                   "s of a core per million decays": "cpu_seconds_per_million"})],
    "deadlayer_speed": [Table("Pairs prepared", "pairs/*", {"pairs per s": "pairs_per_second", "peak MB": "peak_MB"}),
                        Table("Pairs trained on", "training/*",
                              {"pairs per s": "pairs_per_second", "parameters": "parameters"})],
}


# --- reading ---


def children(node) -> list[tuple[str, object]]:
    "What a node holds by key; the items of a list by their feature or number."
    if isinstance(node, list) and all(isinstance(item, dict) for item in node):
        return [(str(item.get("feature", k)), item) for k, item in enumerate(node)]
    return list(node.items()) if isinstance(node, dict) else []


def walk(node, keys: tuple = ()) -> Iterator[tuple[tuple, dict]]:
    "All dictionaries in `node`, itself too, with the keys that lead to them."
    if isinstance(node, dict):
        yield keys, node
    for key, value in children(node):
        yield from walk(value, (*keys, key))


def find(node, pattern: str | tuple) -> list[tuple[tuple, object]]:
    "What a pattern leads to, with its keys; * stands for one key, or a part of it."
    found = [((), node)]
    for part in filter(None, pattern.split("/") if isinstance(pattern, str) else pattern):
        found = [((*keys, k), v) for keys, n in found for k, v in children(n)
                 if (fnmatchcase(k, part) if isinstance(pattern, str) else k == part)]
    return found


def number(node) -> tuple[float, float, float] | None:
    "Value with its lower and upper end, of any way in which results are written; None for what is no number."
    if isinstance(node, dict):
        if "value" in node:
            value, error = node["value"], node.get("error") or node.get("sigma") or 0.0
        elif name := next((k for k in NAMED if k in node and "error" in node), None):
            value, error = node[name], node["error"]
        elif "median" in node:
            return node["median"], node.get("min", node["median"]), node.get("max", node["median"])
        else:
            return None
        return (value, value - error, value + error) if is_number(value) else None
    return (node, node, node) if is_number(node) else None


def is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and isfinite(x)


def in_words(node) -> str:
    "A number with its error to two digits, or with its range."
    found = number(node)
    if found is None:
        return "-"
    value, low, high = found
    if isinstance(node, dict) and "median" in node:
        return f"{short(value)} ({short(low)} to {short(high)})" if high > low else short(value)
    error = (high - low) / 2
    if not error:
        return short(value)
    digits = max(0, 1 - floor(log10(error)))
    return f"{value:,.{digits}f} ± {error:.{digits}f}"


def short(x: float) -> str:
    "Three digits, or all of a whole number."
    if x == 0 or isinstance(x, int) or 1000 <= abs(x) < 1e7:
        return f"{x:,.0f}"
    return f"{x:.3g}"


def machines(data: dict) -> list[str]:
    "Where and when, once for each day and version of the code; parts of a file may have been measured one by one."
    loads = {}
    for keys, node in walk(data):
        if not {"python", "platform", "packages"} <= set(node) or "trained_on" in keys:
            continue
        packages = ", ".join(f"{k} {v}" for k, v in node["packages"].items() if v and k in ("torch", "numpy", "fastai"))
        parts = [node.get("date", "no date noted"), node.get("cpu") or node.get("device"),
                 f"{node['cores']} cores" if node.get("cores") else None,
                 f"threads: {node['threads']}" if node.get("threads") else None, f"Python {node['python']}", packages,
                 f"commit `{node['git'][:8]}`" if node.get("git") else None]
        loads.setdefault(", ".join(p for p in parts if p), []).extend(node.get("load_average", [])[:1])
    return [f"{line}, load {min(x):.1f} to {max(x):.1f}" if len(x) > 1 else f"{line}, load {x[0]:.1f}" if x else line
            for line, x in loads.items()]


def purpose(name: str, folder: Path) -> str:
    "The first sentence of the script's docstring."
    script = folder / f"bench_{name}.py"
    doc = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) if script.exists() else None
    return " ".join(re.split(r"\.\s|\n\n", doc)[0].split()).rstrip(".") + "." if doc else ""


# --- tables ---


def make_table(table: Table, data: dict) -> list[tuple[str, list]]:
    "Rows as (name, nodes of the columns); empty if the file holds none."
    rows = []
    for pattern in [table.rows] if isinstance(table.rows, str) else table.rows:
        for keys, node in find(data, pattern):
            cells = [next(iter(find(node, c)), ((), None))[1] for c in table.columns.values()]
            if any(number(c) is not None for c in cells):
                words = pattern.split("/") if isinstance(pattern, str) else keys
                stars = [k for k, word in zip(keys, words, strict=True) if "*" in word]
                name = (table.names or {}).get("/".join(keys)) or (node.get("what") if isinstance(node, dict) else None)
                rows.append((name or ", ".join(stars) or (keys[-1] if keys else "all"), cells))
    return rows


def of_everything(data: dict) -> list[Table]:
    "Tables of a file that TABLES does not know: figures of merit if it holds them, else all quantities with an error."
    merits = sorted({keys[:-2] for keys, _ in walk(data) if keys[-1:] == ("merit",)})
    if merits:
        return [Table(", ".join(m), "/".join((*m, "*")), MERIT) for m in merits]
    groups = {}  # of what: row -> columns
    for keys, node in walk(data):
        if keys and number(node) is not None and ("error" in node or "min" in node):
            groups.setdefault(keys[:-2], {}).setdefault(keys[:-1], []).append(keys[-1])
    tables = []
    for group, rows in groups.items():
        columns = list(dict.fromkeys(c for found in rows.values() for c in found))[:MOST_COLUMNS]
        names = {"/".join(k): k[-1].replace("_", " ") for k in rows if k}
        heads = {c.replace("_", " "): (c,) for c in columns}
        tables.append(Table(", ".join(group) or "Measured", list(rows), heads, names))
    return tables


def markdown(table: Table, rows: list[tuple[str, list]]) -> str:
    head = ["", *table.columns]
    lines = [head, ["---"] * len(head), *([name, *map(in_words, cells)] for name, cells in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables_of(name: str, data: dict) -> list[tuple[Table, list]]:
    "The tables of a file with their rows."
    for tables in (TABLES.get(name, []), of_everything(data)):
        if found := [(t, rows) for t in tables if (rows := make_table(t, data))]:
            return found
    return []


def drawn(name: str, tables: list[tuple[Table, list]]) -> tuple[str, list[tuple[str, tuple]]] | None:
    "Axis and points of a file's figure: the first column of its first table; None if there is nothing to compare."
    for table, rows in tables[:1]:
        points = [(row, p) for row, cells in rows if (p := number(cells[0]))]
        if len(points) > 1 and (name in TABLES or table.columns == MERIT):
            return next(iter(table.columns)).replace("\\", ""), points
    return None


def alt_text(axis: str, points: list) -> str:
    "What the figure shows, in words."
    return (f"Horizontal dot plot with error bars, {axis}. " +
            "; ".join(f"{row}: {short(p[0])}" for row, p in points)).replace('"', "'").replace("`", "") + "."


BASELINES = re.compile(r"^(predict the mean|peak frequency|published\b|blind$|PCA)")
LIMITS = re.compile(r"^(exact posterior|limit\b|the limit)")


def draw(axis: str, points: list, path: Path) -> None:
    "Write the figure of one file."
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows, values = [row.replace("`", "") for row, _ in points][::-1], [p for _, p in points][::-1]
    fig, ax = plt.subplots(figsize=(7.5, 0.7 + 0.27 * len(rows)), layout="constrained")
    for k, (row, (value, low, high)) in enumerate(zip(rows, values, strict=True)):
        colour = "C2" if LIMITS.search(row) else "0.5" if BASELINES.search(row) else "C0"
        ax.errorbar(value, k, xerr=[[value - low], [high - value]], fmt="o", ms=4, color=colour, capsize=2)
    ax.set(yticks=range(len(rows)), yticklabels=rows, xlabel=axis, ylim=(-0.6, len(rows) - 0.4))
    if min(v[0] for v in values) > 0 and max(v[0] for v in values) > 20 * min(v[0] for v in values):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(fig)


# --- the page ---

HEAD = """---
title: Benchmarks
subtitle: What was measured, on what machine and when, with the command and the errors.
---

<!-- Made by bench/page.py from bench/results: do not edit. -->

Every number here comes from a file in `bench/results`, written by the script that is named beside it. A value with ± is
a value with its statistical error; one with a range in brackets is the median of several turns with the least and the
largest. Times were taken on small shared machines: compare the rows of one table, which were measured side by side, and
not tables of different days. `make bench` takes all of them anew, and `python bench/page.py` writes this page.
"""


def section(path: Path) -> str:
    "One file of results as a section."
    name, text = path.stem, path.read_text(encoding="utf-8")
    data = json.loads(text)
    wing, _, rest = name.partition("_")
    title = f"{'CRES' if wing == 'cres' else 'Dead layer'}: {rest.replace('_', ' ')}" if rest else "Explorers"
    lines = [f"## {title} {{#{name}}}", "", purpose(name, path.parent.parent), ""]
    script = f"bench_{name}.py"
    if (path.parent.parent / script).exists():
        lines += [f"[`bench/{script}`]({CODE}/{script}), [`bench/results/{path.name}`]({CODE}/results/{path.name}), "
                  f"SHA-256 `{hashlib.sha256(text.encode()).hexdigest()[:16]}`.", ""]
    lines += [*(f"- {line}" for line in machines(data)), ""]
    tables = tables_of(name, data)
    figure = drawn(name, tables)
    if figure:
        axis, points = figure
        lines += [f"![{tables[0][0].title}: {axis}.](figures/{name}.png){{fig-alt=\"{alt_text(axis, points)}\"}}", ""]
    for table, rows in tables:
        lines += [f"**{table.title}**", "", markdown(table, rows), ""]
    return "\n".join(lines)


def render(results: Path) -> str:
    "The whole page as text."
    files = sorted(results.glob("*.json"), key=lambda p: (not p.name.startswith("deadlayer"), p.name))
    return "\n".join([HEAD, *map(section, files)])


def main() -> None:
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    for path in sorted((BENCH / "results").glob("*.json")):
        if figure := drawn(path.stem, tables_of(path.stem, json.loads(path.read_text(encoding="utf-8")))):
            draw(*figure, PAGE.parent / "figures" / f"{path.stem}.png")
    PAGE.write_text(render(BENCH / "results"), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(BENCH.parent)}")


if __name__ == "__main__":
    main()
