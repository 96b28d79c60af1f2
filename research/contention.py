"""How much slower is hpcmref beside another busy process? `python -m research.contention IMAGE...` prints ratios.

Every command runs alone and beside a process that computes without a pause: with OpenMP's own way of waiting ("spin"),
with that of the command line (`hpcmref.runtime.waiting`: "short", a short spin before sleep), and with those of --also.
All kinds take turns, so that a change of the machine's speed meets all alike; of each the median is taken. Seconds are
of whole processes. The machine should have nothing else to do; on more cores than --cores, all are held to that many.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hpcmref.runtime.waiting import SETTINGS, SLEEP

SPIN = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
"""The defaults of GNU's and Intel's OpenMP, said aloud so that `hpcmref` keeps to them."""

LIMIT_ALONE, LIMIT_BESIDE = 1.03, 2.2
"""What is aimed at: seconds alone against those with spinning, and beside one busy process against alone."""


@dataclass(frozen=True)
class Seconds:
    """Medians of one command with one way of waiting: alone, and beside a busy process."""

    alone: float
    beside: float

    def row(self, command: str, way: str, spin: Seconds) -> str:
        """One line of the table; spin: of the same command."""
        against, slowdown = self.alone / spin.alone, self.beside / self.alone
        within = "yes" if against <= LIMIT_ALONE and slowdown <= LIMIT_BESIDE else "no"
        return f"{command:14} {way:22} {self.alone:8.2f} {against:16.3f} {slowdown:13.2f}  {within}"


HEADING = f"{'command':14} {'threads':22} {'alone, s':>8} {'alone/spin alone':>16} {'beside/alone':>13}  within limits"


def commands(images: Sequence[Path], folder: Path) -> dict[str, list[str]]:
    """Name -> arguments of hpcmref. `folder` holds the files that `decode` needs, and gets what is written."""
    first, all_images = str(images[0]), [str(image) for image in images]
    encoded = str(folder / "encoded.bin")
    return {
        "encode": ["encode", first, "-o", str(folder / "out.bin"), "--force"],
        "decode": ["decode", encoded, "-o", str(folder / "out.png"), "--force"],
        "encode --jobs": ["encode", *all_images, "-o", str(folder / "many"), "--force", "--jobs", "2"],
        "bench": ["bench", first, "--codecs", "hpcmref", "--qualities", "32"],
        "train": ["train", *all_images, "-o", str(folder / "run"), "--steps", "6", "--crops", "4x128"],
    }


def _seconds(arguments: Sequence[str], environment: dict[str, str]) -> float:
    bare = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "OMP_NUM_THREADS")}
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "hpcmref", *arguments],
        env=bare | environment,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


@contextlib.contextmanager
def _busy(wanted: bool) -> Iterator[None]:
    """Another process that computes without a pause, for as long as the context lasts."""
    if not wanted:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def measure(
    arguments: Sequence[str], ways: Mapping[str, dict[str, str]], folder: Path, repeat: int
) -> dict[str, Seconds]:
    """Run one command in each of `ways` (name -> environment), alone and beside a busy process, `repeat` times."""
    seconds: dict[tuple[str, bool], list[float]] = {(way, beside): [] for way in ways for beside in (False, True)}
    for _ in range(repeat):
        for (way, beside), taken in seconds.items():
            with _busy(beside):
                taken.append(_seconds(arguments, ways[way]))
            _remove(folder / "run")  # or training would go on with its state
    medians = {kind: statistics.median(taken) for kind, taken in seconds.items()}
    return {way: Seconds(medians[way, False], medians[way, True]) for way in ways}


def _remove(folder: Path) -> None:
    if folder.is_dir():
        for path in folder.iterdir():
            path.unlink()


def main(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Photographs; 768x512 is usual.")],
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 5,
    only: Annotated[str | None, typer.Option(help="Names of commands, with commas between.")] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE[,...]", help="Another way to wait, such as GOMP_SPINCOUNT=1000."),
    ] = None,
    cores: Annotated[int, typer.Option(min=1, help="Cores that all processes share.")] = 2,
) -> None:
    """Print a table. Its ratios can be compared with those of another run; its seconds only with each other."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    ways = {"spin": SPIN, "short": SLEEP}
    ways |= {each: dict(pair.split("=", 1) for pair in each.split(",")) for each in also or []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        chosen = commands(images, folder)
        if only is not None:
            chosen = {name: chosen[name] for name in only.split(",")}
        _seconds(["encode", str(images[0]), "-o", str(folder / "encoded.bin")], SLEEP)
        print(f"{cores} cores, {repeat} runs of each kind, medians")
        print(HEADING)
        for name, arguments in chosen.items():
            found = measure(arguments, ways, folder, repeat)
            for way, seconds in found.items():
                print(seconds.row(name, way, found["spin"]), flush=True)


if __name__ == "__main__":
    typer.run(main)
