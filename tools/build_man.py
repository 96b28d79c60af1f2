"""Build the man page from the help of the commands: `python tools/build_man.py` rewrites contrib/hpcmref.1."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from hpcmref import __version__
from hpcmref.cli import COMMANDS, app, load

TARGET = Path(__file__).parent.parent / "contrib" / "hpcmref.1"

COMMON = """
.TP
\\fB\\-\\-install\\-completion\\fR
Install completion for the current shell: bash, zsh, fish or PowerShell.
.TP
\\fB\\-\\-show\\-completion\\fR
Show what would be installed.
.TP
\\fB\\-h\\fR, \\fB\\-\\-help\\fR
Show the help of hpcmref, or of a command, and exit.
"""

ENDING = """
.SH EXIT STATUS
.TP
.B 0
Everything was done.
.TP
.B 1
Something failed. Standard error has one line for each failure.
.TP
.B 2
The command line is wrong, and nothing was done.
.TP
.B 130
The command was interrupted.
.SH ENVIRONMENT
.TP
.B HPCMREF_MODELS
The folder of models that were added, instead of the default one.
.TP
.B HPCMREF_DEBUG
If set, a traceback is printed with each error.
.TP
.BR OMP_WAIT_POLICY ", " GOMP_SPINCOUNT ", " KMP_BLOCKTIME
How threads wait for each other. If none is set, they sleep, so that other programs can use the processor.
.TP
.B OMP_NUM_THREADS
The number of threads.
.SH EXAMPLES
.TP
.B hpcmref encode photo.png
Write photo.hpcm next to it.
.TP
.B hpcmref encode photos \\-o encoded \\-\\-jobs 2
Encode a folder.
.TP
.B hpcmref decode photo.hpcm \\-o photo.png
Decode it.
.TP
.B hpcmref decode \\- \\-o \\- < photo.hpcm | display
Use a pipe.
.SH SEE ALSO
.BR cjxl (1),
.BR avifenc (1),
.BR cwebp (1)
"""


def escaped(text: str) -> str:
    """Escape plain text for troff, and put it on one line."""
    text = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def paragraphs(text: str) -> str:
    """Convert a help text to troff. Its paragraphs are separated by empty lines."""
    return "\n.PP\n".join(escaped(each) for each in inspect.cleandoc(text).split("\n\n"))


def value_of(option: Any) -> str:
    """Return the placeholder of an option's value: its metavar, its choices, or its own name."""
    if option.metavar:
        return str(option.metavar)
    described: Any = getattr(option, "type_descriptor", None) or getattr(option, "type", None)  # newer and older Typer
    choices = getattr(described, "choices", None)
    if choices:
        return "|".join(str(each.value if isinstance(each, enum.Enum) else each) for each in choices)
    return str(max(option.opts, key=len)).lstrip("-").rpartition("-")[2].upper()


def default_of(option: Any) -> str:
    """Return a sentence about the default, or an empty text."""
    shown, default = option.show_default, option.default
    if isinstance(shown, str):
        return f" Default: {shown}."
    if not shown or option.is_flag or default in (None, (), []) or callable(default):
        return ""
    return f" Default: {default.value if isinstance(default, enum.Enum) else default}."


def argument_of(argument: Any) -> str:
    """Return the placeholder of an argument: its metavar or its name, with dots if it can be repeated."""
    name = str(argument.metavar or argument.name.upper())
    return name if argument.nargs == 1 or "..." in name else f"{name}..."


def entries(parameters: Any) -> Iterator[str]:
    """Return one entry for every argument and option that is not hidden."""
    for each in parameters:
        if getattr(each, "hidden", False):
            continue
        if each.param_type_name == "argument":
            yield f".TP\n.I {escaped(argument_of(each))}\n{escaped(each.help or '')}"
            continue
        names = ", ".join(f"\\fB{escaped(name)}\\fR" for name in (*each.opts, *each.secondary_opts))
        value = "" if each.is_flag else f" \\fI{escaped(value_of(each))}\\fR"
        yield f".TP\n{names}{value}\n{escaped((each.help or '') + default_of(each))}"


def heading(name: str, command: Any) -> str:
    """Return the heading of a command: its name and its arguments."""
    arguments = [argument_of(each) for each in command.params if each.param_type_name == "argument"]
    return f'.SS "{escaped(" ".join(["hpcmref", name, "[OPTION]...", *arguments]))}"'


def section(name: str, command: Any) -> Iterator[str]:
    """Return the section of a command, or of each command of a group."""
    if commands := getattr(command, "commands", None):
        for each in commands.values():
            yield from section(f"{name} {each.name}", each)
        return
    yield heading(name, command)
    yield paragraphs(command.help)
    yield from entries(command.params)


def page() -> str:
    """Return the whole page."""
    root: Any = typer.main.get_command(app)
    lines = [
        '.\\" Made by tools/build_man.py from the help of the commands. Do not edit.',
        f'.TH HPCMREF 1 "" "hpcmref {__version__}" "User Commands"',
        ".SH NAME",
        "hpcmref \\- a learned image codec",
        ".SH SYNOPSIS",
        ".B hpcmref",
        ".RI [ OPTION ]... \\ COMMAND \\ [ ARGUMENT ]...",
        ".SH DESCRIPTION",
        paragraphs(root.help),
        ".SH OPTIONS",
        *entries(each for each in root.params if "completion" not in each.name),  # Typer's own, worded by its version
        COMMON.strip(),
        ".SH COMMANDS",
    ]
    for name in COMMANDS:
        lines += section(name, load(name))
    return "\n".join(lines) + ENDING


if __name__ == "__main__":
    TARGET.write_text(page())
