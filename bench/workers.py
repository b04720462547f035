"""Programs beside each other: each in a process of its own, so that its peak memory is its own, asked in turns."""
import contextlib
import multiprocessing
import os
import re
import statistics
import sys
import time
from pathlib import Path


def memory_peak_MB(reset: bool = False) -> float | None:
    "Peak resident memory of this process since the last reset, in MB; None where the system does not tell."
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return round(int(found[1]) / 1024, 1)
    except (OSError, TypeError):
        return None


def serve(connection, program: type, options) -> None:
    "Do in this process what the other end of `connection` asks for, one method of `program` at a time."
    with open(os.devnull, "w") as quiet:
        sys.stdout = sys.stderr = quiet  # progress bars
        worker, reply = None, None
        while (order := connection.recv()) is not None:
            name, arguments = order
            try:
                import torch

                torch.set_num_threads(options.threads)
                memory_peak_MB(reset=True)
                start = time.perf_counter()
                if worker is None:
                    torch.manual_seed(0)
                    worker = program(options)
                reply = getattr(worker, name)(**arguments)
                reply |= {"wall_seconds": time.perf_counter() - start, "peak_MB": memory_peak_MB()}
            except Exception as e:  # whatever the published code raises must reach the report, not a closed pipe
                reply = {"error": f"{type(e).__name__}: {e}"}
            connection.send(reply)


class Worker:
    "A process that runs one program."

    def __init__(self, name: str, program: type, options):
        context = multiprocessing.get_context("spawn")
        self.name, (self.connection, other) = name, context.Pipe()
        self.process = context.Process(target=serve, args=(other, program, options))  # it may have workers of its own
        self.process.start()
        other.close()

    def ask(self, method: str, **arguments) -> dict:
        try:
            self.connection.send((method, arguments))
            reply = self.connection.recv()
        except (EOFError, OSError):
            raise WorkerError(self, f"{method}: the process died (out of memory?)") from None
        if "error" in reply:
            raise WorkerError(self, f"{method}: {' '.join(reply['error'].split())}")
        return reply

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.terminate()


class WorkerError(Exception):
    "What went wrong in the process of a program."

    def __init__(self, worker: Worker, text: str):
        super().__init__(f"{worker.name}: {text}")
        self.worker = worker


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def summary(values: list[float]) -> dict:
    "Median, smallest and largest."
    return {k: rounded(f(values)) for k, f in (("median", statistics.median), ("min", min), ("max", max))}


def spread(row: dict) -> str:
    return f"{row['median']:g} ({row['min']:g} to {row['max']:g})"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
