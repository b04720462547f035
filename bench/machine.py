"""Where and with what the numbers of a benchmark were taken."""
import os
import re
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def about(*packages: str, **settings) -> dict:
    "Day, versions, also of `packages`, processor, load and settings, with the command but no paths of this machine."
    from deadlayer_cres.core import environment

    where = environment()
    where["argv"] = [Path(word).name if "/" in word else word for word in where["argv"]]
    where["packages"] |= {name: _version(name) for name in packages}
    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    return {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}", **where, "cpu": model[1].strip() if model else None,
            "cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg(), **settings}
