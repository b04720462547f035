"""What all tests share: no windows, one thread, and where the real files are."""
import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The real files lie beside the checkout; tests look for them from wherever they run.
_data = [p / "shared" / "data" for p in Path(__file__).resolve().parents]
if found := [p for p in _data if p.is_dir()]:
    os.environ.setdefault("DEADLAYER_CRES_DATA", str(found[0]))


def in_child(work) -> int:
    "Run `work` in a forked process; the signal that ended it, or 0."
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
