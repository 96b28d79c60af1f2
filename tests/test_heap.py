"""Does the process keep its memory when it is told to?"""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from hpcmref.runtime.heap import no_search

USES = """
import resource, sys
import numpy as np
from hpcmref.runtime.heap import keep_memory

if sys.argv[1] == "keep":
    keep_memory()
for use in range(12):
    if use == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    planes = [np.ones(2**22, np.uint8) for _ in range(6)]
    del planes
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Six planes of 4 MiB, again and again. Prints how many pages the system had to give after the first times."""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", USES, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc can be told")
def test_memory_is_not_asked_for_again() -> None:
    assert faults("keep") < 0.1 * faults("give back")


RELEASES = """
import numpy as np
from hpcmref.runtime.heap import give_back, keep_memory, resident

keep_memory()
planes = [np.ones(2**24, np.uint8) for _ in range(8)]
last = np.ones(2**20, np.uint8)
del planes
held = resident("VmRSS")
give_back()
print(held - resident("VmRSS"))
"""
"""Prints how many of 128 MiB that were kept for the process went back to the system."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc can be told")
def test_kept_memory_can_be_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", RELEASES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100 * 2**20


ENDS = """
import atexit, gc, sys

atexit.register(lambda: print(gc.get_freeze_count() > 1000, flush=True))  # called after what is registered later
from hpcmref.cli import app
app(["checkpoints", "list"], standalone_mode=False)
print("done", file=sys.stderr)
"""


def test_a_command_ends_without_a_search_for_garbage() -> None:
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True"
    assert done.stderr == "done\n"


@pytest.mark.parametrize("on", [True, False])
def test_searches_go_on_as_they_were(on: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with no_search():
            assert not gc.isenabled()
        assert gc.isenabled() == on
    finally:
        (gc.enable if before else gc.disable)()
