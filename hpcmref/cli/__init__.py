"""The commands of the program `hpcmref`. Each has a file of its own, and none contains codec logic.

The file of a command is imported when the command is called, so that help, completion and small commands start fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer

from hpcmref._version import __version__
from hpcmref.cli.failures import GuardedGroup
from hpcmref.runtime.heap import end_without_search, keep_memory
from hpcmref.runtime.waiting import sleep_while_waiting

__all__ = ["COMMANDS", "app", "load"]

COMMANDS = {
    "encode": "Encode images to small files.",
    "decode": "Decode files back to images.",
    "verify": "Check encoded files: decode them, compare all checksums, name the bad ones, and write nothing.",
    "info": "Show what encoded files contain, without decoding them.",
    "compare": "Compare two images of one size: PSNR, MS-SSIM and, where it is installed, SSIMULACRA2.",
    "bench": "Measure codecs side by side on your own images: size, quality, time, memory, BD-rate.",
    "train": "Train a model and export it: DIR/PRESET.safetensors, for use with -m.",
    "selftest": "Check with known files whether this machine codes correctly.",
    "thumbnail": "Write a small PNG of an encoded file, for file managers.",
    "checkpoints": "List, add, remove and convert models.",
}
"""The first line of the help of each command. The module `hpcmref.cli.NAME` has a function NAME, or a Typer `app`."""


def load(name: str) -> Any:
    """Import the module of a command, and return the click command that Typer makes of its function or app."""
    module = import_module(f"hpcmref.cli.{name}")
    one = getattr(module, "app", None)
    if one is None:
        one = typer.Typer(add_completion=False)
        one.command(name)(getattr(module, name))
    command = typer.main.get_command(one)
    command.name = name
    return command


class LazyGroup(GuardedGroup):
    """A group of commands that knows only their names, and imports a command when it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return what click expects: the name of the command, the command, and the remaining arguments."""
        name, known, rest = super().resolve_command(ctx, args)
        return name, name and known and load(name), rest


app = typer.Typer(
    name="hpcmref",
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # GuardedGroup turns every error into one line
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _help in COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)  # a placeholder, which lists of commands show


def _print_version(context: typer.Context, wanted: bool) -> None:
    if wanted:
        from hpcmref.cli.versions import described

        print(described() if context.params.get("verbose") else f"hpcmref {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, help="Print the version and exit.")
    ] = False,
    # It is eager, so that its value is known when --version prints.
    verbose: Annotated[
        bool,
        typer.Option(
            "-v", "--verbose", is_eager=True, help="With --version: print the versions of Python and packages, too."
        ),
    ] = False,
) -> None:
    """A learned image codec: small files that decode to the same pixels on every machine."""
    keep_memory()
    end_without_search()
    sleep_while_waiting()
