"""The limit: exact posteriors of the fixed test sets, their coverage, their speed, and a check against a sampler.

    python bench/bench_cres_limit.py

For `cca-8k` and `cca-24k`: RMS error of the posterior mean (the limit quoted in every table), RMS expected by the
posteriors, z-scores, coverage of central credible intervals, all with standard errors; the same by pitch angle, radius
and predicted sigma, and of the best 10 to 100 % of events ranked by it; events per second of this process.

The samplers do not share the short cuts of the posterior: their likelihood is that of the trap calculated at each
point, all lines up to order 8, both phases integrated over. Points drawn within the cells of an event are weighted by
it (importance sampling; events with one mode and with many), and `emcee` walks in energy, pitch angle and radius
(single-mode events alone, as its walkers hardly pass between modes; skipped if it is not installed).

With `--save FOLDER` the exact posteriors are written event by event: `limit_cca8k.csv` and `limit_cca24k.csv`, tables
of `cres.evaluate` for `--limit` and `--exact` of the other benchmarks, and `.npz` files of the same names with more.
A call that was stopped goes on from these files with `--resume`; it takes their word that the code is the same.

The parts (`--parts`), each with the machine it ran on in `environments`; a part that is not asked for keeps its last
result. `limit`: all of the above, with cells as fine as the likelihood (`RidgeConfig.exact`). `fast`: the same with the
default settings, and its RMS error over that of the exact posteriors of the same events, where `limit` has run in the
same call. `noise`: the distribution of the log evidence of noise alone, thresholds and detection efficiencies.
`speed`: events per CPU second at three lengths, the default settings beside the exact ones in turns, and peak memory.
`start`: tracks whose start is not known, beside the same with their start known. `sampler`: as above. Some twenty
minutes on one free core for 1,024 events of each set.
"""
import argparse
import json
import math
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from machine import about

from deadlayer_cres.core import atomic_path, write_json
from deadlayer_cres.cres.evaluate import Predictions, write_table
from deadlayer_cres.cres.fit import (
    LEVELS,
    Cells,
    Posterior,
    Ridge,
    RidgeConfig,
    detection_threshold,
    fisher,
    noise_evidence,
    summaries,
    unknown_start,
)
from deadlayer_cres.cres.simulate import (
    CHECKSUMS,
    TEST_SETS,
    ElectronConfig,
    ReceiverConfig,
    SimulateConfig,
    Simulator,
    TrackConfig,
    test_set,
)
from deadlayer_cres.cres.trap import axial_motion, comb

ROOT = Path(__file__).resolve().parents[1]
INTERVALS = (0.5, 0.68, 0.9)
PARTS = ("limit", "fast", "noise", "speed", "start", "sampler")
BEST = (0.1, 0.25, 0.5, 0.75, 1.0)


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def rms(x: np.ndarray) -> dict:
    "Root of the mean square with its standard error."
    square = np.asarray(x, float) ** 2
    value = math.sqrt(square.mean())
    error = square.std() / math.sqrt(len(square)) / (2 * value)
    return {"value": rounded(value), "error": rounded(error), "n": len(square)}


def share(x: np.ndarray) -> dict:
    p = float(np.mean(x))
    return {"value": rounded(p), "error": rounded(math.sqrt(max(p * (1 - p), 1e-9) / len(x))), "n": len(x)}


def merits(s: dict, truth: dict, name: str, mask=slice(None)) -> dict:
    "Figures of merit of posteriors of one quantity."
    error, sigma = (s[f"{name}_mean"] - truth[name])[mask], s[f"{name}_sigma"][mask]
    below = s[f"{name}_below"][mask]
    return {"rms": rms(error), "rms_expected": rounded(math.sqrt(np.mean(sigma**2))), "z_score_rms": rms(error / sigma),
            "median_abs_error": rounded(np.median(np.abs(error))), "bias": rounded(error.mean()),
            "coverage": {f"{q:g}": share(np.abs(below - 0.5) < q / 2) for q in INTERVALS}}


def binned(s: dict, truth: dict, column: np.ndarray, edges) -> list[dict]:
    out = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        mask = (column >= low) & (column < high)
        if mask.sum() >= 10:
            m = merits(s, truth, "energy_eV", mask)
            out.append({"from": low, "to": high, "rms_eV": m["rms"], "rms_expected_eV": m["rms_expected"],
                        "median_sigma_eV": rounded(np.median(s["energy_eV_sigma"][mask])), "coverage": m["coverage"]})
    return out


def limit(name: str, n: int, save: Path | None, config: RidgeConfig, resume: bool = False) -> tuple[dict, dict]:
    "All about the posteriors of the first n events of a test set."
    ridge, events, out, wall, cpu, done = Ridge(Simulator(TEST_SETS[name]), config), test_set(name, n), [], 0.0, 0.0, 0
    truth = events.columns
    archive = None if save is None else save / f"limit_{name.replace('-', '')}"
    if resume and archive is not None and archive.with_suffix(".npz").exists():
        with np.load(archive.with_suffix(".npz")) as found:
            out.append({k: found[k][:n] for k in found.files if k != "levels"})
        done = len(out[0]["modes"])
    for a in range(done, n, 64):
        began = time.perf_counter(), time.process_time()
        out.append(summaries(ridge, events.ts[a:a + 64], {k: v[a:a + 64] for k, v in truth.items()}))
        wall, cpu = wall + time.perf_counter() - began[0], cpu + time.process_time() - began[1]
        if a % 512 == 0 or a + 64 >= n:
            s = {k: np.concatenate([row[k] for row in out]) for k in out[0]}
            print(f"{name}: {len(s['modes'])} events, {(len(s['modes']) - done) / cpu:.1f} per CPU second", flush=True)
            if archive is not None:
                save_events(archive, s, truth)
    s = {k: np.concatenate([row[k] for row in out]) for k in out[0]}
    error, sigma, one = s["energy_eV_mean"] - truth["energy_eV"], s["energy_eV_sigma"], s["single_mode"]
    order = np.argsort(sigma)
    inner = np.abs(s["main_mode_energy_eV"] - truth["energy_eV"]) / s["main_mode_sigma_eV"] / 0.6745
    bound = fisher(ridge.simulator, *(truth[k] for k in ("energy_eV", "pitch_angle_deg", "radius_m", "axial_phase",
                                                         "cyclotron_phase"))).bound()["energy_eV"].cpu().numpy()
    return s, {
        "events": n, "checksum": CHECKSUMS[name], "energy_eV": merits(s, truth, "energy_eV"),
        "pitch_angle_deg": merits(s, truth, "pitch_angle_deg"),
        "tail_fraction": share(np.abs(error) > 3),
        "best": {f"{q:g}": {"rms_eV": rms(error[order[:max(2, round(q * n))]]),
                            "median_abs_error_eV": rounded(np.median(np.abs(error[order[:max(2, round(q * n))]])))}
                 for q in BEST},
        "single_mode": {"share": share(one), "rms_eV": rms(error[one]),
                        "median_residual_over_main_mode_sigma": rounded(np.median(inner[one])),
                        "median_main_mode_sigma_over_bound": rounded(
                            np.median(s["main_mode_sigma_eV"][one] / bound[one]))},
        "median_sigma_over_bound_of_the_others": rounded(np.median((sigma / bound)[~one])),
        "not_converged": int((~s["converged"]).sum()), "log_evidence_above_10": share(s["log_evidence"] > 10),
        "by_pitch_angle_deg": binned(s, truth, truth["pitch_angle_deg"], (88, 88.1, 88.3, 88.6, 88.9, 89.2, 89.6, 90)),
        "by_radius_mm": binned(s, truth, 1e3 * truth["radius_m"], (0, 1, 2, 3, 4, 5, 6, 6.5)),
        "by_sigma_eV": binned(s, truth, sigma, (0, 0.1, 0.3, 1, 3, 10, 30, 100)),
        "speed": {"events": n - done, "threads": torch.get_num_threads(), "device": str(ridge.device)} | (
            {} if done == n else {"events_per_second": rounded((n - done) / wall),
                                  "events_per_cpu_second": rounded((n - done) / cpu)}),
    }


def noise(name: str, n: int, s: dict) -> dict:
    "Log evidence of n records of noise, thresholds, and what part of the events of a set is above them."
    ridge, truth = Ridge(Simulator(TEST_SETS[name])), test_set(name, len(s["modes"])).columns
    x = noise_evidence(ridge, n)
    out = {"records": n, "mean_evidence": rms(x.div(2).exp().cpu().numpy()) | {"note": "root of the mean; 1 expected"},
           "quantiles": {str(q): rounded(float(x.quantile(q))) for q in (0.01, 0.16, 0.5, 0.84, 0.99, 0.999)}}
    for p in (0.1, 1e-2, 1e-3, 1e-4):
        t = detection_threshold(p, x)
        above = s["log_evidence"] > t.log_evidence
        r, a = 1e3 * truth["radius_m"], truth["pitch_angle_deg"]
        out[f"false_alarm_{p:g}"] = {
            "log_evidence": rounded(t.log_evidence), "error": rounded(t.error), "efficiency": share(above),
            "by_radius_mm": {f"{b:g}": share(above[(r >= b) & (r < b + 1)]) for b in range(7)},
            "by_pitch_angle_deg": {f"{b:g}": share(above[(a >= b) & (a < c)]) for b, c in (
                (88, 88.1), (88.1, 88.5), (88.5, 89), (89, 89.5), (89.5, 90))}}
    return out


def speed(samples: int, n: int) -> dict:
    "Events per CPU second with the default settings and with the exact ones, in turns on the same events."
    wide = samples == 8192
    config = SimulateConfig(seed=7, noise="added", receiver=ReceiverConfig(samples=samples),
                            electrons=ElectronConfig() if wide else TEST_SETS["cca-24k"].electrons)
    simulator = Simulator(config, device="cpu")
    fast = Ridge(simulator)
    slow, used = Ridge(simulator, RidgeConfig.exact(), fast.table), {"default": [0, 0.0], "exact": [0, 0.0]}
    fast(simulator.noise.counted(1, samples, 0))
    for a in range(0, n, 32):
        ts = simulator.events(min(32, n - a), first=a).ts
        for label, ridge in (("default", fast), ("exact", slow)):
            began = time.process_time()
            summaries(ridge, ts)
            used[label][0] += len(ts)
            used[label][1] += time.process_time() - began
    rate = {k: v[0] / v[1] for k, v in used.items()}
    return {"samples": samples, "events": n, "events_per_cpu_second": {k: rounded(v) for k, v in rate.items()},
            "ratio": rounded(rate["default"] / rate["exact"]), "threads": torch.get_num_threads(),
            "peak_memory_MB_of_the_process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}


def save_events(path: Path, s: dict, truth: dict) -> None:
    "A table that `--limit` of the other benchmarks reads, and an archive with more, of the events so far."
    names, n = ("energy_eV", "pitch_angle_deg"), len(s["modes"])
    of = [np.stack([s[f"{k}_{what}"] for k in names], 1) for what in ("mean", "sigma", "quantiles")]
    write_table(path.with_suffix(".csv"), Predictions(
        names, *of[:2], truth={k: v[:n] for k, v in truth.items()}, quantiles=of[2], levels=LEVELS,
        observables={k: s[k].astype(float) for k in ("log_evidence", "single_mode", "converged")}))
    with atomic_path(path.with_suffix(".npz")) as part, open(part, "wb") as file:
        np.savez(file, levels=LEVELS, **s)


class Likelihood:
    "Log posterior density of points (m, 3) of energy, pitch angle and radius, straight from the trap and the samples."

    def __init__(self, simulator: Simulator, ts: np.ndarray, block: int = 128):
        self.s, r = simulator, simulator.config.receiver
        self.rate, self.block, self.samples = r.sampling_rate_Hz, block, r.samples
        self.orders = list(range(-8, 9, 2))
        t = torch.arange(r.samples, dtype=torch.float64) / self.rate
        slope = comb(simulator.trap, simulator.config.cavity, [18_600.0], [89.0], [3e-3]).slope_Hz_per_s
        z = torch.complex(*torch.from_numpy(ts).double()) * torch.exp(-1j * math.pi * slope * t**2)
        self.z = z.view(-1, block)
        self.scale = r.amplitude_V / simulator.noise.sigma_V
        psi = torch.arange(128, dtype=torch.float64)[:, None] * 2 * math.pi / 128
        self.turn = torch.exp(1j * psi * torch.tensor(self.orders) / 2)  # (points, K)

    def sums(self, f: torch.Tensor) -> torch.Tensor:
        "Sum of z exp(-2 pi i f t) at any frequencies."
        inside = torch.arange(self.block, dtype=torch.float64) / self.rate
        starts = torch.arange(len(self.z), dtype=torch.float64) * self.block / self.rate
        part = torch.exp(-2j * math.pi * f[..., None] * inside) @ self.z.T
        return (part * torch.exp(-2j * math.pi * f[..., None] * starts)).sum(-1)

    def log_likelihood(self, x: np.ndarray) -> np.ndarray:
        "Log likelihood ratio against noise, both phases integrated over."
        made = comb(self.s.trap, self.s.config.cavity, *torch.from_numpy(x).T, orders=self.orders)
        f = made.frequency_Hz - self.s.config.receiver.lo_frequency_Hz
        a = self.scale * made.amplitude
        overlap = ((a.conj() * self.sums(f) / self.s.noise.sigma_V)[:, None] * self.turn.conj()).sum(2).abs()
        turns = (f[:, :, None] - f[:, None]) / self.rate
        kernel = torch.where(turns == 0, self.samples, torch.exp(1j * math.pi * turns * (self.samples - 1))
                             * torch.sin(math.pi * turns * self.samples) / torch.sin(math.pi * turns))
        gram = a[:, :, None] * a[:, None].conj() * kernel
        power = torch.einsum("qk,nkl,ql->nq", self.turn, gram, self.turn.conj()).real / 2
        value = torch.logsumexp(overlap + torch.special.i0e(overlap).log() - power, 1) - math.log(power.shape[1])
        return value.numpy()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        e = self.s.config.electrons
        low = (e.energy_low_eV, e.pitch_low_deg, 0.0)
        good = ((x > low) & (x < (e.energy_high_eV, e.pitch_high_deg, e.radius_max_m))).all(1)
        out = np.full(len(x), -np.inf)
        if good.any():
            energy, pitch, radius = torch.from_numpy(x[good]).T
            axial = axial_motion(self.s.trap, energy, pitch, radius).axial_frequency_Hz
            prior = torch.sin(2 * torch.deg2rad(pitch)) / axial * radius / self.norm(radius)
            out[good] = self.log_likelihood(x[good]) + prior.log().numpy()
        return out

    def norm(self, radius: torch.Tensor) -> torch.Tensor:
        "Integral of the pitch angles' density at a radius."
        if not hasattr(self, "table"):
            e = self.s.config.electrons
            r, p = torch.linspace(0, e.radius_max_m, 9).double(), self.s.law.pitch_deg.cpu()
            radii, angles = torch.meshgrid(r, p, indexing="ij")
            motion = axial_motion(self.s.trap, 18_600.0, angles.flatten(), radii.flatten())
            density = torch.sin(2 * torch.deg2rad(angles)) / motion.axial_frequency_Hz.view(radii.shape)
            self.table = r.numpy(), torch.trapezoid(density, p, dim=1).numpy()
        return torch.from_numpy(np.interp(radius.numpy(), *self.table))


def markov(density: "Likelihood", p: Posterior, steps: int, rng) -> dict:
    "Median and half of the central 68 % of the energy, from cells and from `emcee`; in eV from 18.6 keV."
    import emcee

    cells = torch.stack([p.energy_eV, p.pitch_angle_deg, p.radius_m], 1).numpy()
    start = cells[rng.choice(len(cells), 32, p=p.weight.numpy() / float(p.weight.sum()))]
    start = start + rng.normal(size=start.shape) * [1e-3, 1e-5, 1e-6]
    start[:, 1:] = np.clip(start[:, 1:], [88.0001, 1e-6], [89.9999, 6.4999e-3])
    chain = emcee.EnsembleSampler(32, 3, density, vectorize=True, moves=[
        (emcee.moves.DEMove(), 0.6), (emcee.moves.DESnookerMove(), 0.2), (emcee.moves.StretchMove(), 0.2)])
    chain._random = np.random.RandomState(int(rng.integers(2**31)))
    chain.run_mcmc(start, steps, skip_initial_state_check=True)
    draws = chain.get_chain(discard=steps // 4)[..., 0]
    length = float(chain.get_autocorr_time(discard=steps // 4, tol=0)[0])
    low, middle, high = p.quantiles((0.16, 0.5, 0.84))[0].tolist()
    a, m, b = np.quantile(draws, (0.16, 0.5, 0.84))
    return {"median_eV": [rounded(middle - 18_600), rounded(m - 18_600)],
            "half_width_eV": [rounded((high - low) / 2), rounded((b - a) / 2)],
            "independent_draws": round(draws.size / max(length, 1.0))}


def reweighted(density: "Likelihood", ridge: Ridge, ts: np.ndarray, draws: int, rng) -> dict:
    "Mean, sigma and log evidence from cells, and from points drawn evenly within cells and weighted by their density."
    D = ridge.spectrum(torch.from_numpy(ts)[None])  # of narrow cells
    c, _ = ridge.cells(D)
    value, energy, *_ = ridge.log_posterior(D, c)
    w = torch.softmax(value, 0)
    mean = float((w * energy).sum())
    sigma = math.sqrt(float((w * (energy - mean) ** 2).sum()))
    q = 0.5 * w + 0.5 * torch.softmax(value / 2, 0)
    i = torch.from_numpy(rng.choice(len(q), draws, p=(q / q.sum()).numpy()))
    u = torch.from_numpy(rng.random((3, draws)))
    chosen = c.pick(i)
    tiny = torch.full_like(chosen.x, 1e-3)  # points, Hz and rows: next to nothing
    points = Cells(chosen.event, chosen.x + (u[0] - 0.5) * chosen.width_x, chosen.w + (u[1] - 0.5) * chosen.width_w,
                   chosen.r + (u[2] - 0.5) * chosen.width_r, tiny, tiny, tiny)
    place = ridge.places(points)
    where = torch.stack([place.energy_eV, place.row[:, 2], points.r * ridge.table.radius_step_m], 1).numpy()
    parts = [density.log_likelihood(x) for x in np.array_split(where, 1 + draws // 64)]
    log_likelihood = torch.from_numpy(np.concatenate(parts))
    spread = (chosen.width_x * chosen.width_w * chosen.width_r).log() - q[i].log()
    log_weight = log_likelihood + place.log_prior + spread
    v = torch.softmax(log_weight, 0)
    again = float((v * place.energy_eV).sum())
    return {"mean_eV": [rounded(mean - 18_600), rounded(again - 18_600)],
            "sigma_eV": [rounded(sigma), rounded(math.sqrt(float((v * (place.energy_eV - again) ** 2).sum())))],
            "log_evidence": [rounded(float(torch.logsumexp(value, 0))),
                             rounded(float(torch.logsumexp(log_weight, 0)) - math.log(draws))],
            "effective_draws": round(float(1 / (v**2).sum()))}


def late(n: int = 256, starts: int = 25) -> dict:
    "Tracks that begin in the first half of a record, their start known and unknown, and what the bound says of it."
    T = 8192 / SimulateConfig().receiver.sampling_rate_Hz
    s = Simulator(SimulateConfig(seed=5, noise="added", tracks=TrackConfig(start_low_s=0.0, start_high_s=T / 2)),
                  device="cpu")
    events, ridge, grid, used, out = s.events(n), Ridge(s), np.linspace(0, T / 2, starts), [0.0, 0.0], {}
    true, begun = torch.from_numpy(events.columns["energy_eV"]), events.columns["start_time_s"]
    for a in range(0, n, 32):
        ts, clock = torch.from_numpy(events.ts[a:a + 32]), [time.process_time()]
        known = ridge(ts, begun[a:a + 32], T)
        clock.append(time.process_time())
        mixed, probable = unknown_start(ridge, ts, grid, T)
        clock.append(time.process_time())
        used = [u + b - c for u, b, c in zip(used, clock[1:], clock, strict=False)]
        for label, p in (("known", known), ("unknown", mixed)):
            row = torch.stack([p.mean(), p.sigma(), p.below(true[a:a + 32]), p.log_evidence], 1)
            out.setdefault(label, []).append(row.numpy())
        mean = (probable @ torch.from_numpy(grid)).numpy()
        square = (probable.numpy() * (grid - mean[:, None]) ** 2).sum(1) + grid[1] ** 2 / 12
        out.setdefault("start", []).append(np.stack([mean - begun[a:a + 32], np.sqrt(square)], 1))
    v = {k: np.concatenate(x) for k, x in out.items()}
    seen = v["known"][:, 3] > 10
    result = {"events": n, "starts": starts, "grid_us": rounded(1e6 * grid[1]),
              "cost_in_cpu_time": rounded(used[1] / used[0]), "log_evidence_above_10": share(seen)}
    for label in ("known", "unknown"):
        error = v[label][:, 0] - true.numpy()
        result[label] = {"rms_eV": rms(error), "median_sigma_eV": rounded(np.median(v[label][:, 1])), "coverage": {
            f"{q:g}": share(np.abs(v[label][:, 2] - 0.5) < q / 2) for q in INTERVALS}}
    result["ratio_of_sigmas"] = rounded(np.median(v["unknown"][:, 1] / v["known"][:, 1]))
    result["start_of_seen_us"] = {"rms": rms(1e6 * v["start"][seen, 0]),
                                  "median_sigma": rounded(1e6 * np.median(v["start"][seen, 1]))}
    whole = s.draw(256)
    F = fisher(s, *(whole[k] for k in ("energy_eV", "pitch_angle_deg", "radius_m")), start_time=True)
    prior = {"energy_eV": 58.0, "pitch_angle_deg": 0.5, "radius_m": 1.5e-3}
    base = F.bound(("start_time_s",), prior)["energy_eV"]
    costs = {t: F.bound(prior=prior | {"start_time_s": t})["energy_eV"] / base for t in (1e-7, 1e-6, 5e-6)}
    result["bound_with_the_start_unknown_over_known"] = {
        f"{1e6 * t:g} us": {f"{q:g}": rounded(float(v.quantile(q))) for q in (0.5, 0.9, 1.0)} for t, v in costs.items()}
    return result


def sampled(name: str, s: dict, n: int, steps: int, draws: int, seed: int = 0) -> dict:
    "The posteriors of n events, half of them single-mode ones, checked against samplers."
    rng, one = np.random.default_rng(seed), s["single_mode"]
    others = ~one & (s["log_evidence"] > 10)
    rows = np.concatenate([np.flatnonzero(one)[:n // 2], np.flatnonzero(others)[:n - n // 2]])
    simulator = Simulator(TEST_SETS[name], device="cpu")
    ridge, events, out = Ridge(simulator, RidgeConfig.exact()), test_set(name, int(rows.max()) + 1, device="cpu"), []
    try:
        import emcee  # noqa: F401
    except ImportError:
        steps = 0
        print("emcee is not installed: no Markov chains", file=sys.stderr)
    for row in rows.tolist():
        density = Likelihood(simulator, events.ts[row])
        out.append({"event": row, "single_mode": bool(one[row]),
                    "importance": reweighted(density, ridge, events.ts[row], draws, rng)})
        if steps and one[row]:
            out[-1]["emcee"] = markov(density, ridge(torch.from_numpy(events.ts[row:row + 1])), steps, rng)
        print(f"{name} {out[-1]}", flush=True)
    result = {"events": out, "steps": steps, "draws": draws}
    for kind, centre, width in (("importance", "mean_eV", "sigma_eV"), ("emcee", "median_eV", "half_width_eV")):
        both = [(*o[kind][centre], *o[kind][width]) for o in out if kind in o]
        if both:
            a, b, t, u = np.array(both).T
            result[kind] = {"difference_of_centres_in_sigma": rms((b - a) / t), "ratio_of_widths": {
                k: rounded(np.quantile(u / t, q)) for k, q in (("median", 0.5), ("low", 0.16), ("high", 0.84))}}
    return result


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--events", type=int, default=1024, help="of each test set, with the exact settings")
    p.add_argument("--fast", type=int, default=4096, help="of each test set, with the default settings")
    p.add_argument("--sets", nargs="*", default=list(TEST_SETS), choices=list(TEST_SETS))
    p.add_argument("--sampler", type=int, default=24, help="events of each set that are sampled, too")
    p.add_argument("--steps", type=int, default=600, help="of emcee")
    p.add_argument("--draws", type=int, default=2000, help="of importance sampling")
    p.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    p.add_argument("--noise", type=int, default=2048, help="records of noise alone")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--save", type=Path, help="folder for the posteriors' moments")
    p.add_argument("--resume", action="store_true", help="go on from the files in the folder of --save")
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cres_limit.json")
    options = p.parse_args()
    torch.set_num_threads(options.threads)
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    where = report.setdefault("environments", {})
    for name in options.sets:
        entry, s = report.setdefault(name, {}), {}
        if "limit" in options.parts:
            s["limit"], new = limit(name, options.events, options.save, RidgeConfig.exact(), options.resume)
            report[name] = entry = new | {k: v for k, v in entry.items() if k not in new}
            where["limit"] = about()
        if "fast" in options.parts:
            s["fast"], entry["fast"] = limit(name, options.fast, None, RidgeConfig())
            where["fast"] = about()
        for label in s:
            print(f"{name}, {label}: {brief(entry if label == 'limit' else entry['fast'])}", flush=True)
        if len(s) == 2:
            both = min(options.events, options.fast)
            true = test_set(name, both).columns["energy_eV"]
            pair = ({k: v[:both] for k, v in s[label].items()} for label in ("fast", "limit"))
            entry["fast"]["against_exact"] = agreement(*pair, true)
        if "noise" in options.parts:
            some = s.get("fast") or summaries(Ridge(Simulator(TEST_SETS[name])), test_set(name, options.fast).ts)
            entry["noise"], where["noise"] = noise(name, options.noise, some), about()
            print(f"{name}, noise: {entry['noise']}", flush=True)
        if "sampler" in options.parts and options.sampler:
            some = s.get("limit") or summaries(Ridge(Simulator(TEST_SETS[name])), test_set(name, 128).ts)
            entry["sampler"] = sampled(name, some, options.sampler, options.steps, options.draws)
            where["sampler"] = about()
        write_json(options.out, report)
    if "start" in options.parts:
        report["start"], where["start"] = late(), about()
        print(report["start"], flush=True)
        write_json(options.out, report)
    if "speed" in options.parts:
        report["speed"] = []
        for samples, n in ((8192, 96), (24_576, 96), (163_840, 32)):
            report["speed"].append(speed(samples, n))
            print(report["speed"][-1], flush=True)
        where["speed"] = about()
        write_json(options.out, report)


def brief(entry: dict) -> str:
    energy = entry["energy_eV"]
    return (f"{energy['rms']['value']} ± {energy['rms']['error']} eV, expected {energy['rms_expected']}; "
            f"z {energy['z_score_rms']['value']}; coverage { {q: v['value'] for q, v in energy['coverage'].items()} }; "
            f"{entry['speed']}")


def agreement(fast: dict, exact: dict, truth: np.ndarray) -> dict:
    "How the default settings compare with the exact ones, event by event."
    shift = (fast["energy_eV_mean"] - exact["energy_eV_mean"]) / exact["energy_eV_sigma"]
    widths, evidence = np.log(fast["energy_eV_sigma"] / exact["energy_eV_sigma"]), fast["log_evidence"]
    squares = [np.mean((v["energy_eV_mean"] - truth) ** 2) for v in (fast, exact)]
    return {"events": len(shift), "rms_over_exact": rounded(math.sqrt(squares[0] / squares[1])),
            "shift_of_means_in_sigma": rms(shift),
            "log_ratio_of_widths": {k: rounded(np.quantile(widths, q)) for k, q in (
                ("low", 0.16), ("median", 0.5), ("high", 0.84))},
            "shift_of_log_evidence": rms(evidence - exact["log_evidence"])}


if __name__ == "__main__":
    main()
