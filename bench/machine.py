"""Where and with what the numbers of a benchmark were taken."""
import os
import re
from pathlib import Path


def about() -> dict:
    "Versions, processor, cores and load, with the command but no paths of this machine."
    from deadlayer_cres.core import environment

    where = environment()
    where["argv"] = [Path(word).name if "/" in word else word for word in where["argv"]]
    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    return where | {"cpu": model[1].strip() if model else None, "cores": len(os.sched_getaffinity(0)),
                    "load_average": os.getloadavg()}
