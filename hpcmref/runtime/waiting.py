"""Make threads that wait for each other sleep soon, so that waiting does not use the cores of a busy machine.

PyTorch computes in parallel regions of OpenMP, hundreds for one image. At the end of each, threads that are done wait
for the others. By default GNU's OpenMP spins for some milliseconds before it sleeps, and Intel's for 200. On an idle
machine that is harmless. Beside another busy process, a spinning thread takes the core that the last working thread
needs, and every region takes a slice of the scheduler's time: encoding takes many times as long.

Sleeping at once is no better: waking a thread takes longer than most regions do. On two idle cores, encoding takes 1.5
times as long as with spinning. A short spin has both advantages: most waits end while it lasts, and a thread whose core
is needed elsewhere gives it up after some microseconds. `python -m research.contention` compares such settings.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SLEEP = {
    "GOMP_SPINCOUNT": "1000",  # GNU's OpenMP, which PyTorch's wheels bring for Linux: turns of a loop before sleep
    "OMP_WAIT_POLICY": "PASSIVE",  # what GNU's and LLVM's do otherwise
    "KMP_BLOCKTIME": "0",  # Intel's and LLVM's: milliseconds to spin
}
"""The environment variables that make threads sleep after a short spin, or at once where that cannot be said."""

SETTINGS = tuple(SLEEP)
"""All environment variables that control this. If the user has set one of them, none is changed."""


def sleep_while_waiting(environment: MutableMapping[str, str] | None = None) -> bool:
    """Set the variables of SLEEP in an environment, unless it has one of SETTINGS. Return whether they were set.

    environment: None means that of this process. OpenMP reads the variables once, when it is loaded, so this must
    happen before torch is imported. Worker processes inherit them. This changes the whole process, so only the command
    `hpcmref` calls it, and `import hpcmref` does not.
    """
    environment = os.environ if environment is None else environment
    if any(name in environment for name in SETTINGS):
        return False
    environment.update(SLEEP)
    return True
