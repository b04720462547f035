"""What all tests share: no windows, one thread, and where the real files are."""
import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The real files lie beside the checkout; tests look for them from wherever they run.
_data = [p / "shared" / "data" for p in Path(__file__).resolve().parents]
if found := [p for p in _data if p.is_dir()]:
    os.environ.setdefault("DEADLAYER_CRES_DATA", str(found[0]))
