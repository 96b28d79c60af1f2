"""Control whether freed memory is kept or returned to the system, and measure the memory of the process."""

import atexit
import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def keep_memory() -> None:
    """Ask glibc to keep up to half a gigabyte of freed memory instead of giving it back to the system.

    A network allocates megabytes for every operation and frees them at once. If they are returned to the system, each
    page costs a page fault when it is next written to. That is a tenth of the time of encoding a small photograph, and
    more for large ones. So large blocks are allocated from the heap too. This changes the whole process, so only
    programs call it (the command `hpcmref` and the measurements), and `import hpcmref` does not.
    """
    if not sys.platform.startswith("linux"):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # missing in other C libraries than glibc
    if set_option is not None:
        for option, size in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**29), (_TOP_PAD, 2**24)):
            set_option(option, size)


def end_without_search() -> None:
    """Leave out Python's last searches for garbage when the process ends: the system takes all memory back anyway.

    Importing torch makes hundreds of thousands of objects, and going through them takes a sixth of the time of encoding
    a small photograph. Everything else happens as usual at the end. This is for programs, as `keep_memory` is.
    """
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


@contextlib.contextmanager
def no_search() -> Iterator[None]:
    """Leave out Python's searches for garbage meanwhile: for importing torch and loading a model, which make none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def give_back() -> None:
    """Return freed memory to the system now, such as the memory that loading a model has used."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def peak_memory() -> int | None:
    """Return the peak memory of the process in bytes, including Python, torch and the weights; None on Windows."""
    try:
        return resident("VmHWM")
    except OSError:  # not Linux; there, ru_maxrss is not used, since it includes memory of the parent process
        try:
            import resource
        except ImportError:
            return None
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident(field: str) -> int:
    """Return the bytes of a field of /proc/self/status. Raises OSError on other systems than Linux, which lack it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
