"""All ways to the energy of a CRES event in one table, from the results that the benchmarks have written.

    python bench/table_cres.py

Reads `cres_compare.json`, `cres_detect.json`, `cres_refine.json`, `cres_comb.json`, `cres_limit.json` and
`cres_length.json` in bench/results, writes `cres_table.json` there and prints a table in Markdown for each test set.
All rows of a set are of its first events, as many as the row says. A figure that nobody has measured is a dash.
"""
import json
import math
import sys
from pathlib import Path

from deadlayer_cres.core import write_json

RESULTS = Path(__file__).resolve().parent / "results"
SETS = {"cca-8k": "8,192 samples, 18.5 to 18.7 keV", "cca-24k": "24,576 samples, 18.55 to 18.65 keV"}
PARTS = ("compare", "detect", "refine", "comb", "limit", "length")
ROWS = (  # name, what it is, (file, row in it)
    ("mean", "predict the mean", ("compare", "mean")), ("peak", "peak frequency", ("compare", "peak")),
    ("brightest_bin", "brightest bin", ("detect", "brightest_bin")),
    ("clusters", "threshold, DBSCAN, line fit", ("detect", "clusters")),
    ("matched_filter", "matched filter, best template", ("detect", "matched_filter")),
    ("matched_filter_mean", "matched filter, mean of the bank", ("detect", "matched_filter_mean")),
    ("posterior", "ridge posterior", ("refine", "posterior")),
    ("posterior_likelihood", "ridge + likelihood", ("refine", "posterior, fitted")),
    ("comb", "trap-agnostic comb + regression", ("comb", "comb")),
    ("network", "network (folded spectrum)", ("refine", "network")),
    ("network_likelihood", "network + likelihood", ("refine", "network, refined")),
    ("limit", "limit: mean of the exact posterior", ("refine", "limit")),
)
CONSTANT = {"mean", "peak", "brightest_bin"}  # say the same sigma of each event, so that none are the best
COLUMNS = {"rms": "RMS", "core_sigma": "core σ", "median_abs": r"median \|r\|", "tail_fraction": "beyond 3 eV",
           "best_quarter": "RMS of best 25 %", "ratio": "RMS / limit", "efficiency": "efficiency at 1e-3",
           "speed": "events per CPU second", "events": "events"}


def read_results(folder: Path = RESULTS) -> dict[str, dict]:
    "What the benchmarks have written; nothing for one that has not run."
    paths = {k: folder / f"cres_{k}.json" for k in PARTS}
    return {k: json.loads(p.read_text(encoding="utf-8")) if p.exists() else {} for k, p in paths.items()}


def figures(merit: dict, name: str) -> dict:
    "The columns that figures of merit of the energy give."
    found = {k: merit["all"][k] for k in ("rms", "core_sigma", "median_abs", "tail_fraction")}
    if name not in CONSTANT and "resolution_at_efficiency" in merit:
        found["best_quarter"] = merit["resolution_at_efficiency"]["25"]["rms"]
    if "limit" in merit and name != "limit":
        found["ratio"] = merit["limit"]["rms_ratio"]
    return found | {"events": merit["resolution_at_efficiency"]["100"]["events"]}


def speed(part: dict, row: dict, name: str) -> float | None:
    "Events per CPU second of one thread."
    if name == "comb":
        return 1 / (1 / part["fit_events_per_cpu_second"] + 1 / part["predict_events_per_cpu_second"])
    if "seconds_per_event" in row:
        return 1 / row["seconds_per_event"]
    return row.get("events_per_second") if name in ("brightest_bin", "clusters", "matched_filter",
                                                    "matched_filter_mean") else None


def row_of(results: dict, set_name: str, name: str, what: str, source: tuple[str, str]) -> dict:
    "A row of the table, of what there is."
    part = results[source[0]].get(set_name, {})
    row = part.get("rows", part).get(source[1], {})
    limit, merit = results["limit"].get(set_name, {}), row.get("merit")
    cells = {} if merit is None else figures(merit.get("energy_eV", merit), name)
    rate = speed(part, row, name) if cells else None
    if name in ("posterior", "limit"):  # measured by itself, with nothing else in the process
        samples, kind = (8192 if set_name == "cca-8k" else 24_576), "default" if name == "posterior" else "exact"
        pair = next((r for r in results["limit"].get("speed", []) if r["samples"] == samples), {})
        rate = (limit.get("fast", {}) if name == "posterior" else limit).get("speed", {}).get(
            "events_per_cpu_second", pair.get("events_per_cpu_second", {}).get(kind, rate))
    if rate is not None:
        cells["speed"] = {"value": rate}
    efficiency = row.get("efficiency", {}).get("0.001")
    if efficiency:
        error = (efficiency["high"] - efficiency["low"]) / 2
        cells["efficiency"] = {"value": efficiency["value"], "error": error}
    elif name == "posterior" and "false_alarm_0.001" in limit.get("noise", {}):
        cells["efficiency"] = limit["noise"]["false_alarm_0.001"]["efficiency"]
    return {"what": what, "source": f"cres_{source[0]}.json", **cells}


def by_length(results: dict) -> dict:
    "Of each length its number of events, and RMS, core and best quarter of each row."
    return {k: {"events": v["events"], "rows": {name: {"what": row["what"], **{
        c: figures(row["merit"], name)[c] for c in ("rms", "core_sigma", "best_quarter")
        if c in figures(row["merit"], name)}} for name, row in v["rows"].items()}}
        for k, v in results["length"].get("lengths", {}).items()}


def table(results: dict) -> dict:
    "The table, from what the benchmarks have written."
    sets = {s: {name: row_of(results, s, name, what, source) for name, what, source in ROWS} for s in SETS}
    return {"sets": sets, "lengths": by_length(results)}


def cell(entry) -> str:
    "A number with its error, to the digits that the error deserves."
    if entry is None:
        return "-"
    if isinstance(entry, int):
        return f"{entry:,}"
    value, error = entry["value"], entry.get("error") or 0.0
    if not error > 0:
        return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
    digits = min(3, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def markdown(made: dict) -> str:
    "The table in Markdown."
    lines = []
    for name, rows in made["sets"].items():
        lines += [f"`{name}` ({SETS[name]}), energies in eV:", "", "| | " + " | ".join(COLUMNS.values()) + " |",
                  "|---|" + "---|" * len(COLUMNS)]
        lines += [f"| {row['what']} | " + " | ".join(cell(row.get(k)) for k in COLUMNS) + " |" for row in rows.values()]
        lines.append("")
    lengths = made["lengths"]
    if lengths:
        names = dict.fromkeys(name for v in lengths.values() for name in v["rows"])
        what = {name: row["what"] for v in lengths.values() for name, row in v["rows"].items()}
        for column in ("rms", "core_sigma", "best_quarter"):
            lines += [f"Track length, energies of 100 eV: {COLUMNS[column]} in eV", "",
                      "| | " + " | ".join(f"{int(k):,}" for k in lengths) + " |", "|---|" + "---|" * len(lengths)]
            lines += [f"| {what[name]} | " + " | ".join(cell(v["rows"].get(name, {}).get(column))
                                                       for v in lengths.values()) + " |" for name in names]
            lines += ["| events | " + " | ".join(str(v["events"]) for v in lengths.values()) + " |", ""]
    return "\n".join(lines)


def main() -> None:
    made = table(read_results())
    write_json(RESULTS / "cres_table.json", made)
    sys.stdout.write(markdown(made))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    main()
