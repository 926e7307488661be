"""What a process takes."""

import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """The most bytes of memory that this process has held at once."""
    try:
        # Linux: ru_maxrss would start from the parent's peak, VmHWM belongs to this process.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
