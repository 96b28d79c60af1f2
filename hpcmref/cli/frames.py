"""A job for each frame of each input: `--all-frames`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import typer

from hpcmref.cli.jobs import Job


@dataclass(frozen=True)
class FrameJob(Job):
    """One frame of one input, counted from 1."""

    frame: int = 1

    @property
    def name(self) -> str:
        """The input and the frame, as messages call it."""
        return f"{super().name}, frame {self.frame}"


def each_frame(jobs: Sequence[Job]) -> list[Job]:
    """The jobs for all frames, whose outputs have their numbers in their names: name-0001.bin.

    An input that cannot be read keeps its one job, which will say so. Raises typer.BadParameter for standard input and
    output, which have no names.
    """
    from hpcmref.errors import HpcmrefError
    from hpcmref.picture.frames import frames_of
    from hpcmref.picture.images import opened

    found: list[Job] = []
    for job in jobs:
        if job.source is None or job.target is None:
            raise typer.BadParameter(
                "it reads and writes files, not standard input and output.", param_hint="--all-frames"
            )
        numbers: list[int] = []
        with contextlib.suppress(HpcmrefError), opened(job.source) as image:
            numbers = frames_of(image)
        for number in numbers:
            target = job.target.with_name(f"{job.target.stem}-{number:04}{job.target.suffix}")
            found.append(FrameJob(job.source, target, number))
        if not numbers:
            found.append(job)
    return found


def frame_of(job: Job, wanted: int | None) -> int | None:
    """Which frame a job is about: its own, or the one that `--frame` asks for; None is the first, with a warning."""
    return job.frame if isinstance(job, FrameJob) else wanted
