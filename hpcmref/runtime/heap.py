"""What does the process do with memory between two uses of it? Keeps it, for the next network to use again."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def keep_memory() -> None:
    """Ask glibc to keep up to half a gigabyte of freed memory instead of giving it back to the system.

    A network allocates megabytes for every operation and frees them at once. Given back, each page costs a fault when
    it is next written to: a tenth of the time of encoding a small photograph, and more of large ones. So large blocks
    come from the heap too. This changes the whole process, so it is for programs: `hpcmref` and the measurements, not
    for `import`.
    """
    if not sys.platform.startswith("linux"):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries than glibc do without
    if set_option is not None:
        for option, size in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**29), (_TOP_PAD, 2**24)):
            set_option(option, size)
