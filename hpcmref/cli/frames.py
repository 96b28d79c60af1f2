"""Make a job for each frame of each input (`--all-frames`)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import typer

from hpcmref.cli.jobs import Job


@dataclass(frozen=True)
class FrameJob(Job):
    """A job for one frame of an input. frame: its number, from 1."""

    frame: int = 1

    @property
    def name(self) -> str:
        """The name of the input and the number of the frame, for messages."""
        return f"{super().name}, frame {self.frame}"


def each_frame(jobs: Sequence[Job]) -> list[Job]:
    """Replace each job by one job for each frame. Outputs are named by number: name-0001.hpcm.

    An input that cannot be read keeps its job, which reports the error later. Raises typer.BadParameter for standard
    input and output, which have no names.
    """
    from hpcmref.errors import HpcmrefError
    from hpcmref.picture.frames import frames_of
    from hpcmref.picture.images import opened

    found: list[Job] = []
    for job in jobs:
        if job.source is None or job.target is None:
            raise typer.BadParameter("it cannot be used with standard input and output.", param_hint="--all-frames")
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
    """Return the number of the frame to encode: that of a FrameJob, or else `wanted`, the value of --frame.

    None means the first frame, with a warning if there are more.
    """
    return job.frame if isinstance(job, FrameJob) else wanted
