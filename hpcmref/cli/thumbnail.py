"""The command `thumbnail`: write a small PNG of an encoded file, for file managers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def thumbnail(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An encoded file.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="PNG", help="The PNG file; an existing one is replaced.")
    ],
    size: Annotated[
        int, typer.Option("-s", "--size", metavar="N", min=1, max=4096, help="The most pixels of its longer side.")
    ] = 256,
    uri: Annotated[
        str | None, typer.Option("--uri", metavar="URI", help="The URI to store in the PNG. By default that of FILE.")
    ] = None,
) -> None:
    """Write a small PNG of an encoded file, for file managers."""
    import hpcmref
    from hpcmref.picture import thumbnail as pictures
    from hpcmref.runtime.files import atomic_write

    about = {
        "Thumb::URI": uri or file.resolve().as_uri(),
        "Thumb::MTime": str(int(file.stat().st_mtime)),
        "Thumb::Mimetype": "image/x-hpcm",
    }
    found = hpcmref.info(file)
    small = hpcmref.thumbnail(file, size)
    atomic_write(output, pictures.thumbnail(small, size, about, (found.width, found.height)))
