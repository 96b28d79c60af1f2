"""The options of a search for better files (`--effort`), its progress bar, and the handling of Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

import typer

from hpcmref.arguments import METRICS


class OnInterrupt(str, Enum):
    """What Ctrl-C does to a search."""

    drop = "drop"
    keep = "keep"


EffortOption = Annotated[
    int,
    typer.Option(
        "--effort", min=0, max=9, help="How long to search for a smaller file with a better picture; 0 does not search."
    ),
]
MetricOption = Annotated[
    str,
    typer.Option("--metric", metavar="mse|ms-ssim", help="The error of the picture that the search reduces."),
]
MaxSecondsOption = Annotated[
    float | None,
    typer.Option("--max-seconds", metavar="N", help="End the search for each image after N seconds."),
]
OnInterruptOption = Annotated[
    OnInterrupt,
    typer.Option("--on-interrupt", help="On Ctrl-C during a search, drop the file, or keep the best one so far."),
]


@dataclass(frozen=True)
class Effort:
    """The settings of a search. It can be pickled for worker processes.

    keep: an interrupt ends the search, and its best file so far is used. shown: show a progress bar on stderr.
    """

    effort: int = 0
    metric: str = "mse"
    max_seconds: float | None = None
    keep: bool = False
    shown: bool = False

    @classmethod
    def of(
        cls,
        effort: int,
        metric: str,
        max_seconds: float | None,
        on_interrupt: OnInterrupt,
        *,
        spread: bool,
        alone: bool,
        quiet: bool,
    ) -> Effort:
        """Make the settings from the options of a command.

        spread: other processes do the work. alone: there is only one image. Raises typer.BadParameter if options are
        invalid or contradict each other.
        """
        keep = on_interrupt is OnInterrupt.keep
        if not effort and (max_seconds is not None or keep):
            raise typer.BadParameter("--effort 0 does not search: choose an --effort of 1 to 9.")
        if metric not in METRICS or (metric != METRICS[0] and not effort):
            raise typer.BadParameter(
                "it must be mse or ms-ssim, and needs an --effort of 1 to 9.", param_hint="--metric"
            )
        if max_seconds is not None and not 0 < max_seconds < float("inf"):
            raise typer.BadParameter("it must be a number above 0.", param_hint="--max-seconds")
        if keep and spread:
            raise typer.BadParameter(
                "keep works in one process only: leave out --jobs and --ray.", param_hint="--on-interrupt"
            )
        shown = alone and not spread and not quiet and sys.stderr is not None and sys.stderr.isatty()
        return cls(effort, metric, max_seconds, keep, shown)

    @contextlib.contextmanager
    def options(self) -> Iterator[dict[str, Any]]:
        """Yield the arguments of `Codec.encode` for a search, and handle Ctrl-C during one encoding."""
        if not self.effort:
            yield {}
            return
        with _bar(self.shown) as show, _interrupts(self.keep) as interrupted:

            def watch(done: float) -> bool:
                show(done)
                return interrupted()

            yield {"effort": self.effort, "metric": self.metric, "max_seconds": self.max_seconds, "watch": watch}
            if interrupted():
                warnings.warn("interrupted: this is the best file that the search had found", stacklevel=3)


@contextlib.contextmanager
def _bar(shown: bool) -> Iterator[Callable[[float], None]]:
    """Show a progress bar on stderr. Yields a function to be called with the finished share of the work, 0 to 1."""
    if not shown:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("searching"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda done: progress.update(task, completed=done)


@contextlib.contextmanager
def _interrupts(keep: bool) -> Iterator[Callable[[], bool]]:
    """Catch the first SIGINT, and yield a function that returns whether there was one. A second SIGINT acts as usual.

    Without `keep`, and in other threads than the main one, nothing is caught.
    """
    seen = False
    if not keep or threading.current_thread() is not threading.main_thread():
        yield lambda: seen
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: object) -> None:
        nonlocal seen
        seen = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, before)
