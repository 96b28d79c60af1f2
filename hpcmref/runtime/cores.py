"""The number of cores that this process may use, and the number of threads that it computes with."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """The cores that this process may use: by its affinity, and by the limits of its cgroups (containers)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota(_CGROUPS, Path("/proc/self/cgroup")))))


def compute_with(threads: int) -> None:
    """Let torch compute with so many threads, whether it is imported already or only later.

    For programs and worker processes: it sets OMP_NUM_THREADS, which OpenMP reads when it is loaded.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def keep_to_limits() -> None:
    """Do not use more threads than a container has cores; OpenMP knows of the affinity only. An OMP_NUM_THREADS that
    is set stays."""
    quota = _quota(_CGROUPS, Path("/proc/self/cgroup"))
    if "OMP_NUM_THREADS" not in os.environ and quota < (os.cpu_count() or 1):
        compute_with(available_cores())


def _quota(root: Path, membership: Path) -> float:
    """The least number of cores that a cgroup of this process, or one above it, may use; infinite without a limit."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    least = math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        folder = base / path.lstrip("/")
        for each in (folder, *folder.parents):
            if each == base or base in each.parents:
                least = min(least, _limit(each))
    return least


def _limit(folder: Path) -> float:
    """The cores that one cgroup allows: cpu.max of version 2, or the two files of version 1."""
    try:
        if (file := folder / "cpu.max").exists():
            quota, period = file.read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
