"""How does an error become one line on stderr and an exit code?

0: done. 1: could not do it, and stderr has one line a failure. 2: wrong usage, shown by Typer. 130: interrupted.
A traceback is printed only if the environment variable HPCMREF_DEBUG is set.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import traceback
from typing import Any

from typer.core import TyperGroup

from hpcmref.errors import HpcmrefError

OUT_OF_MEMORY = "not enough memory; try a smaller image"
OUT_OF_GPU_MEMORY = "not enough memory on the GPU; try --device cpu"
_OF_A_FULL_GPU = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""What torch says where not its own allocator, but CUDA or a library of it found no room."""


def describe(error: BaseException) -> str:
    """What went wrong, as one line for a person."""
    text = " ".join(str(error).split("\n"))
    if isinstance(error, HpcmrefError):
        return text
    # torch has its own class for a GPU and a bare RuntimeError for a CPU; neither is worth importing torch for.
    if type(error).__name__ == "OutOfMemoryError" or any(part in text for part in _OF_A_FULL_GPU):
        return OUT_OF_GPU_MEMORY
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return OUT_OF_MEMORY
    if isinstance(error, OSError):
        reason = error.strerror or text
        return f"{error.filename}: {reason}" if error.filename else reason
    return f"unexpected {type(error).__name__}: {text} (HPCMREF_DEBUG=1 shows where)"


def report(error: BaseException, subject: str | None = None) -> None:
    """Print the one line about `error` that happened to `subject`, unless the sentence names it already."""
    if os.environ.get("HPCMREF_DEBUG"):
        traceback.print_exception(error)
    sentence = describe(error)
    if subject and not re.search(rf"(?<![\w./-]){re.escape(subject)}(?!\w)", sentence):
        sentence = f"{subject}: {sentence}"
    print(f"hpcmref: {sentence}", file=sys.stderr)


class GuardedGroup(TyperGroup):
    """The root command; whatever leaves a command below it as an exception ends here."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Parse and run; returns or raises SystemExit as click's `main` does, and never lets an error through."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A file name that stdout's encoding lacks must not fail a run that has done its work.
            sys.stdout.reconfigure(errors="backslashreplace")
        if sys.stderr is None:  # closed: print would write to stdout instead
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        try:
            try:
                return super().main(*args, **kwargs)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # here, because at interpreter exit a failure could only be "ignored"
        except Exception as error:
            # Typer answers EPIPE with a silent exit 1, so that `| head` is no error; the flush above does the same.
            if not (isinstance(error, OSError) and error.errno == errno.EPIPE):
                report(error)
            _drop_stdout()
            sys.exit(1)


def _drop_stdout() -> None:
    """Point stdout at nothing if it cannot be written to, or the interpreter would complain while it shuts down."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except AttributeError:  # there is no stdout
        pass
