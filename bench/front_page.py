"""Draw the figures of the front page into nbs/images: the flow of the data and one picture for each half.

    python bench/front_page.py

Spectra and events are simulated with fixed seeds; figures of merit come from bench/results.
"""

import json
from pathlib import Path

import numpy as np
import torch

from deadlayer_cres.cres.simulate import SimulateConfig, Simulator
from deadlayer_cres.cres.trap import default_trap, orbit
from deadlayer_cres.deadlayer.detector import linear_activeness
from deadlayer_cres.deadlayer.simulate import PUBLISHED_EDGES_KEV, simulate_hits, spectrum
from deadlayer_cres.plots import COLOURS, figure, save_png

RESULTS = Path(__file__).resolve().parent / "results"
OUT = RESULTS.parents[1] / "nbs" / "images"
FLOW = (
    ("physics", "detector\nBa-133 source", "trap, cavity\naxial motion"),
    ("simulate", "photons, hits\nspectra", "I/Q records\nscatters"),
    ("data", "LH5, histograms\nstore, splits", "Locust, PhyTS\nstore, splits"),
    ("prep", "pairs, noise\npull, level", "noise, spectra\nfolding"),
    ("model", "attention RNN\nquantiles", "fold, S4D, ...\nmixtures"),
    ("train", "runs that resume", "stream or files"),
    ("evaluate", "accuracy\nbeside the limit", "resolution\nbeside the limit"),
    ("fit", "peak ratio\nlikelihood", "exact posterior\nrefinement"),
    ("infer", "FCCD and DLF\nof a spectrum", "energies of\nevents, tracks"),
)


def data_flow():
    "Steps from physics to an answer, the two halves one above the other."
    with figure(width=11, height=2.9) as (fig, ax):
        ax.set(xlim=(-0.75, 9), ylim=(-0.75, 2.55))
        ax.axis("off")
        ax.grid(False)
        for y, name, colour in ((1, "dead layer", COLOURS[0]), (0, "CRES", COLOURS[1])):
            ax.text(-0.08, y + 0.3, name, ha="right", va="center", fontsize=10, weight="bold", color=colour)
        for k, (step, above, below) in enumerate(FLOW):
            ax.text(k + 0.45, 2.1, step, ha="center", va="center", fontsize=10, weight="bold")
            for y, text, colour in ((1, above, COLOURS[0]), (0, below, COLOURS[1])):
                ax.add_patch(_box(k, y, colour))
                ax.text(k + 0.45, y + 0.3, text, ha="center", va="center", fontsize=7.5)
                if k < len(FLOW) - 1:
                    ax.annotate(
                        "",
                        (k + 1.0, y + 0.3),
                        (k + 0.9, y + 0.3),
                        arrowprops={"arrowstyle": "-|>", "color": "0.3", "shrinkA": 0, "shrinkB": 0},
                    )
        ax.add_patch(_box(0, -0.62, "0.5", 8.9, 0.4))
        ax.text(
            4.45,
            -0.42,
            "ground floor: core · train · metrics · plots      programs: deadlayer · cres",
            ha="center",
            va="center",
            fontsize=9,
        )
        return fig


def _box(x, y, colour, width=0.9, height=0.6):
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=colour,
        alpha=0.16,
        edgecolor=colour,
        linewidth=1,
    )


def dead_layer():
    "What a dead layer is, what it does to a spectrum, and how well it can be told."
    hits, edges = simulate_hits(6_000_000, seed=1), PUBLISHED_EDGES_KEV[::2]
    metrics = json.loads((RESULTS / "deadlayer_accuracy.json").read_text())["metrics"]
    windows = ("0.01", "0.05", "0.1", "0.25", "0.5")
    with figure(1, 3, width=11, height=2.9) as (fig, (a, b, c)):
        depth = np.linspace(0, 1.5, 301)
        for dlf, style in ((1.0, "-"), (0.5, "--"), (0.1, ":")):
            a.plot(depth, linear_activeness(depth, 1.0, dlf), style, label=f"FCCD 1 mm, DLF {dlf:g}")
        a.set(xlabel="depth below the n+ surface [mm]", ylabel="share of the charge collected", title="a dead layer")
        a.legend()
        for fccd in (0.4, 1.0, 1.6):
            b.stairs(spectrum(hits, fccd, 0.5).reshape(-1, 2).sum(1), edges, label=f"FCCD {fccd:g} mm")
        b.set(
            yscale="log",
            xlim=(5, 450),
            ylim=(10, None),
            xlabel="energy [keV]",
            ylabel="counts per keV",
            title="in a Ba-133 spectrum",
        )
        b.legend(ncols=1)
        for place, label, marker in (
            ("poisson", "network", "o"),
            ("baseline", "PCA + regression", "s"),
            ("limit", "limit of statistics", "k_"),
        ):
            rows = metrics[place] if place == "poisson" else metrics[place]["poisson"]
            c.errorbar(
                [float(w) for w in windows],
                [rows[w]["accuracy"] for w in windows],
                [rows[w]["error"] for w in windows],
                fmt=marker,
                ms=12 if place == "limit" else 4,
                label=label,
            )
        c.set(
            xscale="log",
            xlabel="largest |FCCD1 - FCCD2| [mm]",
            ylabel="thicker one found",
            title="how often the answer is right",
        )
        c.set_xticks([0.01, 0.03, 0.1, 0.3], labels=["0.01", "0.03", "0.1", "0.3"])
        c.minorticks_off()
        c.legend()
        return fig


def cres():
    "What an electron in a trap does, what is received, and how well its energy can be told."
    trap, f_lo = default_trap(), 25.9702e9
    table = {"energy_eV": [18_600.0], "pitch_angle_deg": [88.4], "radius_m": [3.4e-3]}
    simulator = Simulator(SimulateConfig(seed=5), table=table, device="cpu")
    noisy, clean = (simulator.events(1, noise=kind).ts[0] for kind in ("added", "none"))
    frequency = np.fft.fftshift(np.fft.fftfreq(8192, 1 / 403.0))
    with figure(1, 3, width=11, height=2.9) as (fig, (a, b, c)):
        z = torch.linspace(-0.08, 0.08, 321, dtype=torch.float64)
        a.plot(100 * z, 1e3 * (trap.field(0 * z, z) - 0.95901), color="k")
        for theta in (89.5, 89.0, 88.4):
            top = float(orbit(trap, [18_600.0], [theta], [0.0]).motion.z_max_m)
            height = 1e3 * float(trap.field(0.0, top) - 0.95901)
            a.plot([-100 * top, 100 * top], [height, height], "o-", label=f"{theta}°")
        a.set(xlabel="z [cm]", ylabel="field above 0.959 T [mT]", title="an electron in a trap")
        a.legend(title="pitch angle", loc="upper center")
        for x, style in (
            (noisy, {"lw": 0.6, "color": "0.65", "label": "as received"}),
            (clean, {"lw": 1.1, "label": "signal"}),
        ):
            b.plot(frequency, 1e3 * np.abs(np.fft.fftshift(np.fft.fft(x[0] + 1j * x[1]))) / 8192, **style)
        b.set(
            xlabel=f"frequency - {f_lo / 1e9} GHz [MHz]",
            ylabel="amplitude [mV]",
            xlim=(-105, -25),
            title="20 µs of it as a spectrum",
        )
        b.legend()
        names = {
            "mean": "predict the mean",
            "s4d_time": "S4D, time series",
            "lstm_spectrum": "LSTM, spectrum",
            "fold": "ours, folded spectrum",
            "refined": "ours, refined",
            "limit": "exact posterior",
        }
        for test_set, marker, label in (("cca-8k", "o", "20 µs"), ("cca-24k", "s", "61 µs")):
            rows = json.loads((RESULTS / "cres_compare.json").read_text())[test_set]["rows"]
            refined = json.loads((RESULTS / "cres_refine.json").read_text())[test_set]["network, refined"]["rms_eV"]
            points = {
                k: refined if k == "refined" else rows[k]["merit"]["energy_eV"]["all"]["rms"]
                for k in names
                if k == "refined" or k in rows
            }
            y = [list(names)[::-1].index(k) for k in points]
            c.errorbar(
                [p["value"] for p in points.values()],
                y,
                xerr=[p["error"] for p in points.values()],
                fmt=marker,
                label=label,
            )
        c.set(
            yticks=range(len(names)),
            yticklabels=list(names.values())[::-1],
            xlabel="RMS error of the energy [eV]",
            xlim=(0, None),
            title="how well the energy is found",
        )
        c.legend()
        return fig


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for name, draw in (("data_flow", data_flow), ("dead_layer", dead_layer), ("cres", cres)):
        save_png(OUT / f"{name}.png", draw(), dpi=110)
        print(OUT.name, name, (OUT / f"{name}.png").stat().st_size, "bytes")
