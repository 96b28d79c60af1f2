"""Measure encoders that are separate programs, with a template of their command line.

    NAME=cjxl {in} {out} -q {q}|djxl {out} {png}

The part before the bar encodes, and the part after it decodes to a PNG file. Each part is one command, or several
joined by &&, which run one after the other. No shell is used. Words are separated as in a shell, quotes included, but
there are no variables, wildcards and pipes.

| placeholder | meaning |
| --- | --- |
| {in} | the image, a PNG file of 8 bits, RGB or grey, without metadata |
| {out} | the encoded file, whose size is measured; a suffix may follow: {out}.jxl |
| {q} | the quality, a whole number |
| {png} | the file to which the decoded image is written as PNG |
| {dir} | a folder for intermediate files, which is empty before each encoding and each decoding |
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image

from hpcmref.bench.codecs import numbers_of
from hpcmref.errors import ConfigError, HpcmrefError
from hpcmref.picture.images import open_image
from hpcmref.runtime.signals import tidying

Command = tuple[str, ...]
"""The absolute path of a program, and its arguments with placeholders."""

PROCESS = "process"
"""The `device` of a codec that consists of separate programs."""

LIMIT = 600.0
"""The default time limit of a command in seconds."""

_PLACEHOLDER = re.compile(r"\{(\w*)\}")
_KNOWN = {"in", "out", "q", "png", "dir"}


@dataclass(frozen=True)
class ExternalCodec:
    """A codec that consists of separate programs.

    encoding, decoding: the commands. suffix: that of {out}. seconds: the time limit of each command.
    """

    name: str
    encoding: tuple[Command, ...]
    decoding: tuple[Command, ...]
    suffix: str
    default_qualities: tuple[int, ...]
    seconds: float
    device = PROCESS
    rising = None

    @property
    def identity(self) -> str:
        """All commands, each with a digest of its program."""
        commands = [f"{shlex.join(command)} ({_digest(command[0])})" for command in (*self.encoding, *self.decoding)]
        return f"{self.name} {'; '.join(commands)}"

    @property
    def qualities(self) -> range:
        """All whole numbers from the lowest to the highest quality that is measured."""
        return range(min(self.default_qualities), max(self.default_qualities) + 1)

    def encode(self, image: Image.Image, quality: int) -> bytes:
        """Encode an image, and return the bytes of {out}.

        Raises HpcmrefError if a command fails, takes too long or writes no file.
        """
        with tidying(), _temporary_folder() as temporary:
            paths = self._paths(Path(temporary))
            image.save(paths["in"], "PNG", compress_level=1)
            self._run(self.encoding, {**paths, "q": str(quality)})
            return self._written(Path(paths["out"] + self.suffix), self.encoding)

    def decode(self, data: bytes) -> Image.Image:
        """Decode a file, and return the image in {png}. Raises as `encode` does, and ImageError for a bad image."""
        with tidying(), _temporary_folder() as temporary:
            paths = self._paths(Path(temporary))
            Path(paths["out"] + self.suffix).write_bytes(data)
            self._run(self.decoding, paths)
            self._written(Path(paths["png"]), self.decoding)
            return open_image(Path(paths["png"]))

    @staticmethod
    def _paths(folder: Path) -> dict[str, str]:
        between = folder / "between"
        between.mkdir()
        names = {"in": folder / "in.png", "out": folder / "out", "png": folder / "decoded.png", "dir": between}
        return {key: str(path) for key, path in names.items()}

    def _run(self, commands: Sequence[Command], values: Mapping[str, str]) -> None:
        for command in commands:
            arguments = [_PLACEHOLDER.sub(lambda found: values[found[1]], word) for word in command]
            _run_to_its_end(arguments, self.seconds, values["dir"])

    @staticmethod
    def _written(path: Path, commands: Sequence[Command]) -> bytes:
        try:
            data = path.read_bytes()
        except OSError:
            data = b""
        if not data:
            raise HpcmrefError(f"{Path(commands[-1][0]).name} wrote no file, or an empty one")
        return data


def externals(templates: Sequence[str], qualities: Sequence[str], seconds: float = LIMIT) -> list[ExternalCodec]:
    """Make the codecs of templates. qualities: "NAME=LIST", see `codecs.qualities_of`. Raises ConfigError."""
    codecs = []
    for text in templates:
        name = text.partition("=")[0].strip().lower()
        pairs = [each.rpartition("=") for each in qualities]
        lists = [numbers for key, _, numbers in pairs if key.strip().lower() == name]
        codecs.append(external(text, numbers_of(lists[-1]) if lists else (), seconds))
    return codecs


def external(text: str, qualities: Sequence[int], seconds: float = LIMIT) -> ExternalCodec:
    """Make the codec of a template.

    text: "NAME=ENCODE|DECODE", see the top of this module. qualities: those that are measured. seconds: the time limit
    of each command. Raises ConfigError for an invalid template, an unknown program, or if there are no qualities.
    """
    name, equals, template = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--encoder {text!r}: write NAME=ENCODE|DECODE")
    where = f"--encoder {name.strip()}"
    encoding, decoding = _split(template, where)
    if not decoding:
        raise ConfigError(f"{where}: a bar and the command that decodes must follow the command that encodes")
    sides = (
        ("encodes", encoding, {"in", "out", "q"}, {"png"}),
        ("decodes", decoding, {"out", "png"}, {"in", "q"}),
    )
    for side, commands, needed, forbidden in sides:
        found = {key for command in commands for word in command for key in _PLACEHOLDER.findall(word)}
        if unknown := sorted(found - _KNOWN):
            raise ConfigError(f"{where}: there is no placeholder {{{unknown[0]}}}")
        if missing := sorted(needed - found):
            raise ConfigError(f"{where}: the command that {side} needs {{{missing[0]}}}")
        if wrong := sorted(found & forbidden):
            raise ConfigError(f"{where}: the command that {side} cannot have {{{wrong[0]}}}")
    words = [word for command in (*encoding, *decoding) for word in command]
    suffixes = {suffix for word in words for suffix in re.findall(r"\{out\}((?:\.\w+)?)", word)}
    if len(suffixes) > 1:
        raise ConfigError(f"{where}: {{out}} must have the same suffix everywhere, or none")
    if not qualities:
        raise ConfigError(f"{where}: say which qualities to measure: --qualities '{name.strip()}=10,30,50'")
    first, second = (
        tuple((_program(command[0], where), *command[1:]) for command in commands) for commands in (encoding, decoding)
    )
    return ExternalCodec(name.strip(), first, second, suffixes.pop(), tuple(qualities), seconds)


def _split(template: str, where: str) -> tuple[list[Command], list[Command]]:
    """Return the commands before the bar and those after it. Without a bar, the latter are empty."""
    lexer: Any = shlex.shlex(template, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    if sys.platform == "win32":
        lexer.escape = ""  # the backslash parts folders there
    lexer.commenters = ""
    try:
        words = list(lexer)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}".lower()) from None
    sides: list[list[list[str]]] = [[[]]]
    for word in words:
        if word == "|":
            sides.append([[]])
        elif word == "&&":
            sides[-1].append([])
        elif word and set(word) <= set("|&;<>"):
            raise ConfigError(f"{where}: {word} needs a shell, and none is used; only && and one | are possible")
        else:
            sides[-1][-1].append(word)
    if len(sides) > 2:
        raise ConfigError(f"{where}: there may be only one bar, between encoding and decoding")
    if not all(command for side in sides for command in side):
        raise ConfigError(f"{where}: a command is empty")
    encoding = [tuple(command) for command in sides[0]]
    return encoding, [tuple(command) for side in sides[1:] for command in side]


def _program(name: str, where: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise ConfigError(f"{where}: there is no program {name!r} here")
    return os.path.abspath(found)


@functools.cache
def _digest(program: str) -> str:
    try:
        return hashlib.sha256(Path(program).read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise ConfigError(f"{program}: {error.strerror}") from error


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that is removed afterwards; on Windows, but for the files that a program left running has open."""
    return tempfile.TemporaryDirectory(prefix="hpcmref-", ignore_cleanup_errors=True)


def _run_to_its_end(arguments: Sequence[str], seconds: float, folder: str) -> None:
    """Run one command without input. Raises HpcmrefError if it fails or takes longer than `seconds`."""
    name = Path(arguments[0]).name
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=folder, start_new_session=True
            )
        except OSError as error:
            raise HpcmrefError(f"{name} cannot be started: {error.strerror}") from error
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise HpcmrefError(f"{name} took longer than {seconds:g} s") from None
        finally:
            _end(process)
        if code:
            raise HpcmrefError(f"{name} ended with exit code {code}{_last_line(said)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and the processes that it has started (on Windows only the command), also after a time-out."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _last_line(said: IO[bytes]) -> str:
    """Return the last line of a command's output, or the first with "error", to be appended to a message.

    Only the last 64 KiB are read.
    """
    said.seek(max(0, said.seek(0, os.SEEK_END) - 2**16))
    lines = said.read().decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if "error" in line.lower()]
    return f": {(errors or lines)[-1].strip()[:200]}" if lines else ""
