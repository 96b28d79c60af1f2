"""How does a command search for better files? The options, the bar, and what an interrupt does."""

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
        "--effort", min=0, max=9, help="How long to search for a smaller file of a better picture: 0 is not at all."
    ),
]
MetricOption = Annotated[
    str,
    typer.Option("--metric", metavar="mse|ms-ssim", help="What the search takes for the error of a picture."),
]
MaxSecondsOption = Annotated[
    float | None,
    typer.Option("--max-seconds", metavar="N", help="End the search for each image after so many seconds."),
]
OnInterruptOption = Annotated[
    OnInterrupt,
    typer.Option("--on-interrupt", help="Ctrl-C during a search: drop it, or keep the best file so far."),
]


@dataclass(frozen=True)
class Effort:
    """How long to search; it can be sent to another process.

    keep: an interrupt ends the search and keeps its best file. shown: a bar on stderr says how far it is.
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
        """From the options of a command. spread: other processes do the work; alone: there is one image.

        Raises typer.BadParameter if they contradict each other.
        """
        keep = on_interrupt is OnInterrupt.keep
        if not effort and (max_seconds is not None or keep):
            raise typer.BadParameter("there is no search to end: choose an --effort of 1 to 9.")
        if metric not in METRICS or (metric != METRICS[0] and not effort):
            raise typer.BadParameter("it is mse or ms-ssim, and for an --effort of 1 to 9.", param_hint="--metric")
        if max_seconds is not None and not 0 < max_seconds < float("inf"):
            raise typer.BadParameter("it must be a number above 0.", param_hint="--max-seconds")
        if keep and spread:
            raise typer.BadParameter("it is for one process: leave out --jobs and --ray.", param_hint="--on-interrupt")
        shown = alone and not spread and not quiet and sys.stderr is not None and sys.stderr.isatty()
        return cls(effort, metric, max_seconds, keep, shown)

    @contextlib.contextmanager
    def options(self) -> Iterator[dict[str, Any]]:
        """What `Codec.encode` takes for it; for the time of one encoding."""
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
    """A bar with the time left on stderr; yields what to call with the part that is done."""
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
    """Whether there was an interrupt; the second one ends the program as usual. Not for threads."""
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
