"""Turn signals that end a program into an exception, so that files and processes are cleaned up before it ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stopped(BaseException):
    """A signal has asked the program to end. progress: how far the work is, in words, or "" if that is unknown."""

    def __init__(self, number: int, progress: str = "") -> None:
        super().__init__(number, progress)
        self.number = number
        self.progress = progress

    @property
    def exit_code(self) -> int:
        """The exit code that shells expect from a program that a signal has ended: 128 + its number."""
        return 128 + self.number

    def __str__(self) -> str:
        how = "interrupted" if self.number == signal.SIGINT else f"stopped by {signal.Signals(self.number).name}"
        return f"{how} {self.progress}".rstrip()


# SIGBREAK: Ctrl-Break of Windows, and a console window that is closed.
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """In this context, raise Stopped in the main thread when one of the signals in ENDING arrives.

    After the first, further signals are ignored until the context ends. Signals that the program was started to ignore
    (`nohup`, background jobs) stay ignored. Does nothing in other threads than the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in ENDING}
    mine = [number for number in ENDING if before[number] in usual]

    def stop(number: int, frame: FrameType | None) -> None:
        for each in mine:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    for number in mine:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, before[number])


@contextlib.contextmanager
def tidying() -> Iterator[None]:
    """In this context, raise SystemExit when a signal arrives that would otherwise end the process at once.

    Temporary folders and child processes are thus cleaned up. Signals that have a handler already are left alone. Does
    nothing in other threads than the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mine = [number for number in ENDING if signal.getsignal(number) == signal.SIG_DFL]

    def leave(number: int, frame: FrameType | None) -> None:
        for each in mine:
            signal.signal(each, signal.SIG_IGN)  # a second signal would interrupt the cleaning up
        raise SystemExit(128 + number)

    for number in mine:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
