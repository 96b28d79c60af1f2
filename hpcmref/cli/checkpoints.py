"""The command `checkpoints`: list, add, remove and convert models."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpcmref.cli.batch import run
from hpcmref.cli.failures import report
from hpcmref.cli.jobs import Job
from hpcmref.cli.options import ForceOption, names_of_added_models
from hpcmref.errors import CheckpointError

if TYPE_CHECKING:
    from hpcmref.checkpoints import CheckpointInfo

app = typer.Typer(no_args_is_help=True, add_completion=False, help="List, add, remove and convert models.")


class OfficialPreset(str, Enum):
    """The architectures of official checkpoints."""

    base = "base"
    large = "large"
    phi = "phi"


@app.command("list")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array with one object a model.")] = False,
    check: Annotated[
        bool,
        typer.Option("--verify", help="Compare every model with its stored SHA-256; exit 1 if one is damaged."),
    ] = False,
) -> None:
    """List the models whose names the option -m accepts: those that ship with hpcmref, and those that were added."""
    from hpcmref.checkpoints import available, verify
    from hpcmref.models import unreadable

    models = available()
    damaged = list(unreadable().values())
    if check:
        damaged += _failures(verify, [model.path for model in models])
    for error in damaged:
        report(error)
    if as_json:
        print(json.dumps([_facts(model) for model in models], indent=2))
    else:
        rows = [
            (
                f"{model.name} (default)" if model.default else model.name,
                model.preset,
                f"{model.parameters / 1e6:.2f} M",
                f"{model.size / 1e6:.1f} MB",
                model.fingerprint.hex(),
                model.description,
            )
            for model in models
        ]
        _print_table(("name", "preset", "parameters", "size", "fingerprint", "description"), rows, numbers=(2, 3))
    if check and damaged:
        raise typer.Exit(1)


def _failures(check: Callable[[Path], None], paths: Sequence[Path]) -> list[CheckpointError]:
    found = []
    for path in paths:
        try:
            check(path)
        except CheckpointError as error:
            found.append(error)
    return found


@app.command("add")
def add_model(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors file of hpcmref.")],
    name: Annotated[str | None, typer.Option("--name", help="The name for -m. By default that of the file.")] = None,
    force: ForceOption = False,
) -> None:
    """Copy a model into your folder of models. -m then finds it by name, and its files decode without -m."""
    from hpcmref.models import add

    made = add(file, name, force)
    print(f"{made.name}: {made.path}, {made.size} bytes, fingerprint {made.fingerprint.hex()}")


@app.command("remove")
def remove_model(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A model that was added.", autocompletion=names_of_added_models)
    ],
) -> None:
    """Delete a model from your folder of models. Files that were made with it need it to be decoded."""
    from hpcmref.models import remove

    print(f"{remove(name)} is removed")


@app.command("presets")
def list_presets() -> None:
    """List the architectures with their number of parameters, and the kMAC per pixel of each part."""
    import torch

    from hpcmref.model import HPCM, PRESETS
    from hpcmref.model.macs import PARTS, macs_per_pixel

    rows = []
    for name, config in PRESETS.items():
        macs = macs_per_pixel(config)
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in HPCM(config).parameters())
        counts = (macs[part] / 1e3 for part in PARTS)
        rows.append(
            (name, f"{parameters / 1e6:.2f} M", *(f"{each:.1f}" for each in (*counts, sum(macs.values()) / 1e3)))
        )
    _print_table(("preset", "parameters", *PARTS, "kMAC/pixel"), rows, numbers=range(1, 8))


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="OFFICIAL.pth.tar of the official HPCM code, or an older FILE.safetensors of hpcmref.",
        ),
    ],
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE.safetensors", help="Where to write it.")],
    preset: Annotated[
        OfficialPreset | None, typer.Option("--preset", help="The architecture of an official checkpoint.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Convert an official HPCM checkpoint, or an older model file; use the result with -m FILE.safetensors."""
    if preset is None and not source.endswith(".safetensors"):
        raise typer.BadParameter("an official checkpoint needs --preset")

    def work(job: Job) -> str:
        from hpcmref import checkpoints

        assert job.source is not None
        assert job.target is not None
        job.make_room(force)
        if preset is None:
            made = checkpoints.convert(job.source, job.target)
        else:
            made = checkpoints.convert_official(job.source, job.target, preset.value)
        return (
            f"{job.name} -> {job.target_name}: {made.preset}, {made.parameters} parameters, "
            f"{made.size} bytes, fingerprint {made.fingerprint.hex()}"
        )

    run([Job(Path(source), Path(output))], work)


def _facts(model: CheckpointInfo) -> dict[str, Any]:
    return {
        "name": model.name,
        "preset": model.preset,
        "default": model.default,
        "parameters": model.parameters,
        "size": model.size,
        "fingerprint": model.fingerprint.hex(),
        "description": model.description,
        "path": str(model.path),
    }


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[int]) -> None:
    """Print a table. numbers: the indices of the columns that are aligned to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)  # in a pipe, each row must be one line of any length
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="right" if column in numbers else "left")
    for row in rows:
        table.add_row(*map(Text, row))  # Text, because a plain str would be read as markup
    console.print(table)
