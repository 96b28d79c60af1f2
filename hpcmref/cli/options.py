"""Which options do several commands share, and what do they mean?"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class Device(str, Enum):
    """Where the networks run; the files are the same."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def names_of_models() -> list[str]:
    """What may complete -m: names of models. Files are completed by the shell."""
    from hpcmref.checkpoints import available

    return [each.name for each in available()]


def names_of_added_models() -> list[str]:
    """What may complete `checkpoints remove`."""
    from hpcmref.runtime.folders import model_files

    return [path.stem for path in model_files()]


ModelOption = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        help="A name from `hpcmref checkpoints list`, or a .safetensors file.",
        autocompletion=names_of_models,
    ),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace outputs that exist already.")]
JobsOption = Annotated[
    int,
    typer.Option("--jobs", min=1, metavar="N", help="Processes at work: with many images, one for each core is best."),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Spread the images over a Ray cluster: host:port, auto, or local for one of --jobs workers here.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
