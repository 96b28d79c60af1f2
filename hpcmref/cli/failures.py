"""Turn every error into one line on stderr and an exit code (`exit_code`, documented in docs/exit-codes.md).

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
"""Parts of torch's messages when not its own allocator, but CUDA or one of its libraries, has run out of memory."""


def exit_code(error: BaseException | None) -> int:
    """Return the exit code of a run: 0 done, 1 failed, 2 wrong usage, or 128 + the number of the signal that ended it.

    error: the exception that has left the command, or None. Two cases do not come here, because Typer handles them: a
    run in which some files failed (typer.Exit(1)), and wrong options (its ClickException, code 2).
    """
    if error is None:
        return 0
    if isinstance(error, Stopped):
        return error.exit_code
    return 2 if isinstance(error, ConfigError) else 1


def describe(error: BaseException) -> str:
    """Describe an error in one line for a person."""
    text = " ".join(str(error).split("\n"))
    if isinstance(error, HpcmrefError):
        return text
    # torch raises a class of its own on a GPU, and a RuntimeError on a CPU. Names are compared, to avoid its import.
    if type(error).__name__ == "OutOfMemoryError" or any(part in text for part in _OF_A_FULL_GPU):
        return OUT_OF_GPU_MEMORY
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return OUT_OF_MEMORY
    if isinstance(error, OSError):
        reason = error.strerror or text
        return f"{error.filename}: {reason}" if error.filename else reason
    return f"unexpected {type(error).__name__}: {text} (HPCMREF_DEBUG=1 shows where)"


def report(error: BaseException, subject: str | None = None) -> None:
    """Print one line about an error on stderr. subject: the input that it is about, unless the message names it."""
    if os.environ.get("HPCMREF_DEBUG"):
        traceback.print_exception(error)
    sentence = describe(error)
    if subject and not re.search(rf"(?<![\w./-]){re.escape(subject)}(?!\w)", sentence):
        sentence = f"{subject}: {sentence}"
    tell(f"hpcmref: {sentence}", sys.stderr)


def tell(line: str, stream: TextIO | None) -> None:
    """Print a line and flush it. If the stream is a closed pipe, this line and all later ones are discarded."""
    if stream is None:
        return
    try:
        print(line, file=stream, flush=True)
    except OSError as error:
        if not is_closed_pipe(error):
            raise
        _silence(stream)


class GuardedGroup(TyperGroup):
    """The root command. It handles every exception that leaves a command."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the arguments and run the command.

        Returns or raises SystemExit as click's `main` does. All other exceptions are reported and end in SystemExit.
        """
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A file name that stdout's encoding cannot represent must not make a run fail.
            sys.stdout.reconfigure(errors="backslashreplace")
        if sys.stderr is None:  # it is closed, and print would write to stdout instead
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        try:
            with stoppable():
                try:
                    return super().main(*args, **kwargs)
                finally:
                    _flush()  # at the exit of the interpreter, an error could no longer be reported
        except Stopped as stopped:
            tell(f"hpcmref: {stopped}", sys.stderr)
            _drop_stdout()
            sys.exit(exit_code(stopped))
        except Exception as error:
            report(error)
            _drop_stdout()
            sys.exit(exit_code(error))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Do the same as click, and suggest a similar name for an unknown command. Some versions of Typer do not."""
        try:
            return super().resolve_command(ctx, args)
        except Exception as error:  # a UsageError, of click or of the click in Typer
            message = getattr(error, "message", None)
            if isinstance(message, str) and "did you mean" not in message.lower():
                error.message = message.rstrip(".") + near(args[0], self.list_commands(ctx)) + "."  # type: ignore[attr-defined]
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run a command, and handle two exceptions before Typer does.

        A KeyboardInterrupt becomes Stopped. A BrokenPipeError of text output is ignored.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Stopped(signal.SIGINT) from None
        except OSError as error:
            # What is left of the text tells whether EINVAL of Windows was about stdout.
            if not is_closed_pipe(error) or (_flush() and not isinstance(error, BrokenPipeError)):
                raise


def _flush() -> bool:
    """Flush stdout. If it is a closed pipe, discard the text."""
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
    """Redirect stdout to the null device if it cannot be written to, or Python would print an error at its exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _silence(sys.stdout)


def _silence(stream: TextIO) -> None:
    """Redirect a stream to the null device."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
