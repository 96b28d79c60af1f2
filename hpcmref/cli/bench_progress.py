"""What `bench` shows on standard error while it runs: failures, and a progress bar with averages."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from hpcmref.runtime.signals import Stopped

if TYPE_CHECKING:
    from hpcmref.bench.measure import Failure, Measurement
    from hpcmref.bench.run import Listener


@contextlib.contextmanager
def progress(total: int, quiet: bool) -> Iterator[Listener]:
    """Yield a function to be called after every image.

    It prints failures on stderr. If stderr is a terminal, a progress bar also shows averages.
    """

    images: set[str] = set()

    def note(measured: Sequence[Measurement], failed: Sequence[Failure]) -> None:
        images.update(each.image for each in measured)
        images.update(each.image for each in failed)
        for each in failed:
            print(f"hpcmref: {each}", file=sys.stderr)

    try:
        if quiet or sys.stderr is None or not sys.stderr.isatty():
            yield note
        else:
            with _bar(total, images, note) as update:
                yield update
    except Stopped as stopped:
        raise Stopped(stopped.number, f"after {len(images)} of {total} images") from None


@contextlib.contextmanager
def _bar(total: int, images: Collection[str], note: Listener) -> Iterator[Listener]:
    """Yield a function to be called after every image. It calls `note` and updates a progress bar with averages."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    sums: dict[str, list[float]] = {}  # codec -> count, bpp, dB
    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)

        def update(measured: Sequence[Measurement], failed: Sequence[Failure]) -> None:
            note(measured, failed)
            for each in measured:
                line = sums.setdefault(each.codec, [0, 0, 0])
                for index, value in enumerate((1, each.bpp, each.psnr)):
                    line[index] += value
            text = "  ".join(f"{codec} {bpp / n:.2f} bpp {psnr / n:.1f} dB" for codec, (n, bpp, psnr) in sums.items())
            progress.update(task, completed=len(images), description=text)

        yield update
