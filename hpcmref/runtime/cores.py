"""The number of cores that this process may use, and the number of threads that it computes with."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Return how many cores this process may use, by its CPU affinity and by the limits of its cgroups (containers)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota(_CGROUPS, Path("/proc/self/cgroup")))))


def compute_with(threads: int) -> None:
    """Set the number of threads that torch computes with, whether torch is imported already or only later.

    It sets OMP_NUM_THREADS, which OpenMP reads when it is loaded. This changes the whole process, so it is for programs
    and worker processes.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def keep_to_limits() -> None:
    """Limit the threads to the cores of a container, because OpenMP respects the CPU affinity only.

    If OMP_NUM_THREADS is set, nothing is changed.
    """
    quota = _quota(_CGROUPS, Path("/proc/self/cgroup"))
    if "OMP_NUM_THREADS" not in os.environ and quota < (os.cpu_count() or 1):
        compute_with(available_cores())


def _quota(root: Path, membership: Path) -> float:
    """Return the smallest core limit of the cgroups of this process and of their parents, or infinity without a limit.

    root: the mount point of cgroups. membership: the file that lists the cgroups of the process.
    """
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
    """Return the core limit of one cgroup, from cpu.max (version 2) or from the quota and period files (version 1)."""
    try:
        if (file := folder / "cpu.max").exists():
            quota, period = file.read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
