"""The options that several commands share."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class Device(str, Enum):
    """Where the networks run. Files can be decoded on either device."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def names_of_models() -> list[str]:
    """Return the names of models, with which the shell completes -m."""
    from hpcmref.checkpoints import available

    return [each.name for each in available()]


def names_of_added_models() -> list[str]:
    """Return the names with which the shell completes `checkpoints remove`."""
    from hpcmref.runtime.folders import model_files

    return [path.stem for path in model_files()]


def parse_jobs(text: str | int) -> int:
    """Return the number of processes for a value of --jobs; "auto" is one for each core. Raises typer.BadParameter."""
    from hpcmref.runtime.cores import available_cores

    if text == "auto":
        return available_cores()
    try:
        if (jobs := int(text)) >= 1:
            return jobs
    except ValueError:
        pass
    raise typer.BadParameter(f"{text!r} is neither a number of at least 1 nor auto.")


def use_threads(threads: int | None) -> None:
    """Set the number of threads of this process. None keeps OpenMP's choice, within the limits of a container.

    It must be called before torch is imported.
    """
    from hpcmref.runtime.cores import compute_with, keep_to_limits

    if threads is None:
        keep_to_limits()
    else:
        compute_with(threads)


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
PreserveOption = Annotated[
    bool, typer.Option("--preserve", help="Give each output the time of modification of its input.")
]
RecursiveOption = Annotated[
    bool, typer.Option("--recursive/--no-recursive", help="Whether the subfolders of folders are searched.")
]
JobsOption = Annotated[
    int,
    typer.Option(
        "--jobs",
        parser=parse_jobs,
        metavar="N|auto",
        help="The number of processes. For many images, auto (one for each core) is best.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        max=1024,
        metavar="N",
        help="The number of threads of each process. By default the available cores, divided among --jobs.",
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Use a Ray cluster: host:port, auto, or local for a new one with --jobs workers on this machine.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
VerboseOption = Annotated[
    bool, typer.Option("-v", "--verbose", help="Show how long each stage takes, on standard error.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object for each file on standard output, instead of text.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would be written where, and write nothing.")]


def check_model(model: str | None) -> None:
    """Raise CheckpointError if there is no model of this name or path, so that a run ends before its first file."""
    if model is not None:
        from hpcmref.checkpoints import find

        find(model)


def check_existing(force: bool, resume: bool) -> None:
    """Raise typer.BadParameter if --force and --resume are both given."""
    if force and resume:
        raise typer.BadParameter("--force replaces existing outputs, and --resume keeps them: use one of them.")
