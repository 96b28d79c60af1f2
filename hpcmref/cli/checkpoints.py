"""Which models are at hand, and how does an official checkpoint become one?"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpcmref.cli.batch import Job, run
from hpcmref.cli.options import ForceOption

if TYPE_CHECKING:
    from hpcmref.checkpoints import CheckpointInfo

app = typer.Typer(no_args_is_help=True, help="List and convert models.")


class OfficialPreset(str, Enum):
    """The architectures that official checkpoints come in."""

    base = "base"
    large = "large"
    phi = "phi"


@app.command("list")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array with one object a model.")] = False,
) -> None:
    """List the models that -m knows by name."""
    from hpcmref.checkpoints import available

    models = available()
    if as_json:
        print(json.dumps([_facts(model) for model in models], indent=2))
    else:
        _print_table(models)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="OFFICIAL.pth.tar", help="A checkpoint of the official HPCM code.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE.safetensors", help="Where to write it.")],
    preset: Annotated[OfficialPreset, typer.Option("--preset", help="What the checkpoint was trained as.")],
    force: ForceOption = False,
) -> None:
    """Convert an official HPCM checkpoint; use the result with -m FILE.safetensors."""

    def work(job: Job) -> str:
        from hpcmref.checkpoints import convert_official

        assert job.source is not None
        assert job.target is not None
        job.make_room(force)
        made = convert_official(job.source, job.target, preset.value)
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


def _print_table(models: list[CheckpointInfo]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)  # no terminal to fit, so a line a model, whatever its length
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "preset", "parameters", "size", "fingerprint", "description"):
        table.add_column(heading, justify="right" if heading in ("parameters", "size") else "left")
    for model in models:
        cells = (
            f"{model.name} (default)" if model.default else model.name,
            model.preset,
            f"{model.parameters / 1e6:.2f} M",
            f"{model.size / 1e6:.1f} MB",
            model.fingerprint.hex(),
            model.description,
        )
        table.add_row(*map(Text, cells))  # Text, because a plain str would be read as markup
    console.print(table)
