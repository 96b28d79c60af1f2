"""Make threads sleep while they wait for each other, so that waiting does not use cores of a busy machine.

PyTorch computes in parallel regions of OpenMP, hundreds for one image. At the end of each, threads that are done wait
for the others. By default GNU's OpenMP spins for some milliseconds before it sleeps, and Intel's for 200. On an idle
machine that is harmless. Beside another busy process, a spinning thread takes the core that the last working thread
needs, and every region takes a slice of the scheduler's time: encoding takes many times as long.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SLEEP = {
    "OMP_WAIT_POLICY": "PASSIVE",  # GNU's OpenMP, which PyTorch's wheels bring for Linux, and LLVM's
    "KMP_BLOCKTIME": "0",  # Intel's and LLVM's: milliseconds to spin
}
"""The environment variables that make threads sleep at once."""

SETTINGS = (*SLEEP, "GOMP_SPINCOUNT")
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
