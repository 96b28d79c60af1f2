"""How does an error become one line on stderr and an exit code? `exit_code` is the table; docs/exit-codes.md shows it.

A traceback is printed only if the environment variable HPCMREF_DEBUG is set.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import traceback
from typing import Any, TextIO

from typer.core import TyperGroup

from hpcmref.errors import ConfigError, HpcmrefError, near
from hpcmref.runtime.files import is_closed_pipe
from hpcmref.runtime.signals import Stopped, stoppable

OUT_OF_MEMORY = "not enough memory; try a smaller image"
OUT_OF_GPU_MEMORY = "not enough memory on the GPU; try --device cpu"
_OF_A_FULL_GPU = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""What torch says where not its own allocator, but CUDA or a library of it found no room."""


def exit_code(error: BaseException | None) -> int:
    """What a run ends with: 0 done, 1 failed, 2 wrong usage, 128 + the number of the signal that stopped it.

    error: what left the command; a run in which some files failed leaves typer.Exit(1), wrong options ClickException
    of Typer, which has the code 2.
    """
    if error is None:
        return 0
    if isinstance(error, Stopped):
        return error.exit_code
    return 2 if isinstance(error, ConfigError) else 1


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
    tell(f"hpcmref: {sentence}", sys.stderr)


def tell(line: str, stream: TextIO | None) -> None:
    """Print a line at once. If nobody reads the stream any more, this and all that follows is dropped: text that nobody
    wants is no error."""
    if stream is None:
        return
    try:
        print(line, file=stream, flush=True)
    except OSError as error:
        if not is_closed_pipe(error):
            raise
        _silence(stream)


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
            with stoppable():
                try:
                    return super().main(*args, **kwargs)
                finally:
                    _flush()  # here, because at interpreter exit a failure could only be "ignored"
        except Stopped as stopped:
            tell(f"hpcmref: {stopped}", sys.stderr)
            _drop_stdout()
            sys.exit(exit_code(stopped))
        except Exception as error:
            report(error)
            _drop_stdout()
            sys.exit(exit_code(error))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As click's; for an unknown command a near name is suggested, which not every version of Typer does."""
        try:
            return super().resolve_command(ctx, args)
        except Exception as error:  # a UsageError, of click or of the click in Typer
            message = getattr(error, "message", None)
            if isinstance(message, str) and "did you mean" not in message.lower():
                error.message = message.rstrip(".") + near(args[0], self.list_commands(ctx)) + "."  # type: ignore[attr-defined]
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run a command. What Typer would answer in its own way is answered here: a KeyboardInterrupt becomes Stopped,
        and text that nobody reads is no error."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Stopped(signal.SIGINT) from None
        except OSError as error:
            # What is left of the text tells whether EINVAL of Windows was about stdout.
            if not is_closed_pipe(error) or (_flush() and not isinstance(error, BrokenPipeError)):
                raise


def _flush() -> bool:
    """Write out what is left of the text on stdout; returns whether that worked, or False if nobody reads it."""
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError as error:
            if not is_closed_pipe(error):
                raise
            _silence(sys.stdout)
            return False
    return True


def _drop_stdout() -> None:
    """Point stdout at nothing if it cannot be written to, or the interpreter would complain while it shuts down."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _silence(sys.stdout)


def _silence(stream: TextIO) -> None:
    """Point a stream at nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
