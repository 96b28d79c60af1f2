"""The command `thumbnail`: write a small PNG of an encoded file, for file managers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpcmref.cli.batch import run
from hpcmref.cli.folders import STREAM
from hpcmref.cli.jobs import Job
from hpcmref.errors import HpcmrefError

_PNG = b"\x89PNG\r\n\x1a\n"


def thumbnail(
    file: Annotated[str, typer.Argument(metavar="FILE", help="An encoded file, or - for standard input.")],
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="PNG",
            help="The PNG file, or - for standard output. An existing PNG is replaced, and no other file.",
        ),
    ],
    size: Annotated[
        int, typer.Option("-s", "--size", metavar="N", min=1, max=4096, help="The most pixels of its longer side.")
    ] = 256,
    uri: Annotated[
        str | None,
        typer.Option("--uri", metavar="URI", help="The URI to store in the PNG. By default that of FILE; none for -."),
    ] = None,
) -> None:
    """Write a small PNG of an encoded file, for file managers."""

    def work(job: Job) -> None:
        import hpcmref
        from hpcmref.picture import thumbnail as pictures

        _check_target(job)
        data = job.read()
        found = hpcmref.info(data)
        small = hpcmref.thumbnail(data, size)
        job.write(pictures.thumbnail(small, size, _about(job, uri), (found.width, found.height)))

    if "" in (file, output):
        raise typer.BadParameter("the name of a file is empty.")
    source, target = (None if name == STREAM else Path(name) for name in (file, output))
    run([Job(source, target)], work)


def _check_target(job: Job) -> None:
    """Raise HpcmrefError if the output cannot be written, or is an existing file that is neither a PNG nor empty.

    File managers make an empty file before they ask for a thumbnail.
    """
    job.check_room(force=True)
    if job.target is None or not job.target_exists:
        return
    with job.target.open("rb") as existing:
        if existing.read(len(_PNG)) not in (b"", _PNG):
            raise HpcmrefError(f"{job.target} exists already, and is not a PNG; name another output with -o")


def _about(job: Job, uri: str | None) -> dict[str, str]:
    """Return the texts of the PNG. Standard input has neither a URI nor a time of modification."""
    about = {"Thumb::Mimetype": "image/x-hpcm"}
    if job.source is not None:
        uri = uri or job.source.resolve().as_uri()
        about["Thumb::MTime"] = str(int(job.source.stat().st_mtime))
    return about if uri is None else {"Thumb::URI": uri, **about}
