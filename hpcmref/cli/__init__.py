"""Which commands does `hpcmref` have? Each lives in its own file; none of them contains codec logic."""

from __future__ import annotations

from typing import Annotated

import typer

from hpcmref._version import __version__
from hpcmref.cli import bench, checkpoints, decode, encode, info, train, versions
from hpcmref.cli.failures import GuardedGroup
from hpcmref.runtime.heap import keep_memory

__all__ = ["app"]

app = typer.Typer(
    name="hpcmref",
    cls=GuardedGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # GuardedGroup turns every error into one line
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(encode.encode)
app.command()(decode.decode)
app.command()(info.info)
app.command()(bench.bench)
app.command()(train.train)
app.add_typer(checkpoints.app, name="checkpoints")


def _print_version(context: typer.Context, wanted: bool) -> None:
    if wanted:
        print(versions.described() if context.params.get("verbose") else f"hpcmref {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, help="Print the version and exit.")
    ] = False,
    # Eager, so that it is known when --version prints.
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", is_eager=True, help="With --version: what hpcmref runs on as well.")
    ] = False,
) -> None:
    """A learned image codec: small files that decode to the same pixels on every machine."""
    keep_memory()
