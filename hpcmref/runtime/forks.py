"""Compute safely in a process that was forked from one that had imported torch.

The threads of OpenMP do not exist in a forked child, and its first parallel region would wait for them for ever.
Therefore such a child computes with one thread. CUDA cannot be used in a forked child at all. docs/processes.md says
how to start processes instead.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from hpcmref.errors import HpcmrefError

_forked_with_torch = False


def watch_forks() -> None:
    """Make every child process that is forked from now on record whether its parent had imported torch.

    `safe_after_fork` uses this record. On systems without fork, nothing is done.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_remember)


def _remember() -> None:
    global _forked_with_torch
    _forked_with_torch |= "torch" in sys.modules


@contextlib.contextmanager
def safe_after_fork(device: str) -> Iterator[None]:
    """Limit torch to one thread in this context, if the process was forked from one that had imported torch.

    device: "cpu" or "cuda". Raises HpcmrefError for "cuda" in such a process.
    """
    if not _forked_with_torch:
        yield
        return
    import torch

    if device == "cuda":
        raise HpcmrefError(
            "CUDA cannot be used in a forked process: start processes with multiprocessing.get_context('spawn')"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
