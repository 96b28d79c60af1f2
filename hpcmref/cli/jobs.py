"""Pair the inputs of a command line with outputs, and check that the outputs may be written.

`plan` makes the pairs, and `hpcmref.cli.batch` works on them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import typer

from hpcmref.cli.folders import STREAM, find, is_same_file, name_outputs
from hpcmref.errors import ConfigError, HpcmrefError
from hpcmref.runtime.files import atomic_write, descriptor_of, is_closed_pipe, is_special

ENCODED_SUFFIX = ".hpcm"  # the suffix of new files
ENCODED_SUFFIXES = (ENCODED_SUFFIX, ".bin")  # the suffixes of encoded files in folders


@dataclass(frozen=True)
class Job:
    """One input and its output. None means standard input and standard output.

    Arguments are kept as strings until a job is made, because a Path does not distinguish `-` from `./-`, and `out`
    from `out/`.
    """

    source: Path | None
    target: Path | None

    @property
    def name(self) -> str:
        """The name of the input for messages."""
        return "standard input" if self.source is None else str(self.source)

    @property
    def target_name(self) -> str:
        """The name of the output for messages."""
        return "standard output" if self.target is None else str(self.target)

    @property
    def is_stream(self) -> bool:
        """Whether the output is standard output, a pipe or a device, so that writing to it replaces no file."""
        return self.target is None or is_special(self.target)

    @property
    def target_exists(self) -> bool:
        """Whether the output exists as a file or folder. Raises HpcmrefError for an impossible name."""
        if self.target is None or self.is_stream:
            return False
        with _writing(self.target):
            return self.target.exists()

    def read(self) -> bytes:
        """Read all bytes of the input. Raises OSError, or HpcmrefError if standard input is closed."""
        if self.source is not None:
            return self.source.read_bytes()
        if sys.stdin is None:
            raise HpcmrefError("standard input is closed")
        return sys.stdin.buffer.read()

    def write(self, data: bytes, preserve: bool = False) -> None:
        """Write the output. A file appears completely or not at all.

        preserve: give it the time of modification of the input. Raises HpcmrefError if it cannot be written.
        """
        if self.target is None:
            try:
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            except OSError as error:
                if not is_closed_pipe(error):
                    raise
                # This is an error here, unlike for text, because data is lost.
                raise HpcmrefError("standard output was closed before everything was written") from None
        else:
            keep = preserve and self.source is not None and not is_special(self.source)
            atomic_write(self.target, data, self.source.stat().st_mtime_ns if keep and self.source else None)

    def check_room(self, force: bool) -> None:
        """Check before the work that the output can be written. force: it may replace an existing file, but no input.

        Raises HpcmrefError, or ConfigError for standard output that is closed or a terminal.
        """
        if self.target is None:
            if sys.stdout is None:
                raise ConfigError("standard output is closed")
            if sys.stdout.isatty():
                raise ConfigError("standard output is a terminal: redirect it, or name a file with -o")
            return
        if self.is_stream:
            return
        if self.source is not None and is_same_file(self.target, self.source):
            raise HpcmrefError(f"{self.target} is an input; name another output with -o")
        if not force and self.target_exists:
            raise HpcmrefError(f"{self.target} exists already (--force replaces it)")

    def make_room(self, force: bool) -> None:
        """Do the same as `check_room`, and make the folder of the output."""
        self.check_room(force)
        self.make_folder()

    def make_folder(self) -> None:
        """Make the folder of the output."""
        if self.target is not None and not self.is_stream:
            with _writing(self.target):
                try:
                    self.target.parent.mkdir(parents=True, exist_ok=True)
                except FileExistsError as error:
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error

    def check_source(self) -> None:
        """Raise HpcmrefError if the input does not exist. It is not opened."""
        if self.source is not None:
            try:
                self.source.stat()
            except (OSError, ValueError) as error:
                raise HpcmrefError(f"cannot read {self.name}: {getattr(error, 'strerror', None) or error}") from error


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn errors of the file system into an HpcmrefError that names the output."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise HpcmrefError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from error


@dataclass(frozen=True)
class Outputs:
    """How a command treats its outputs.

    force: replace existing files. preserve: copy the time of modification.
    is_there: with --resume, a function that returns whether the existing output of a job is complete and has the wanted
        settings. It raises HpcmrefError if the output is a file of another kind. None without --resume.
    check: raises the error of a job that the options do not allow.
    """

    force: bool = False
    preserve: bool = False
    is_there: Callable[[Job], bool] | None = None
    check: Callable[[Job], None] = lambda job: None

    def are_wanted(self, job: Job) -> bool:
        """Return whether a job has to be done. Raises HpcmrefError if it cannot be done. Writes nothing."""
        self.check(job)
        if self.is_there is None or not job.target_exists:
            job.check_room(self.force)
            return True
        try:
            return not self.is_there(job)
        except OSError as error:
            raise HpcmrefError(f"cannot read {error.filename or job.target}: {error.strerror or error}") from error

    def read_input(self, job: Job) -> bytes | None:
        """Make the folder of the output and read the input, or return None if nothing is to be done.

        Raises the errors of `are_wanted`.
        """
        if not self.are_wanted(job):
            return None
        job.make_folder()
        return job.read()


@dataclass
class Plan:
    """The jobs of a command.

    problems: an error for each input that has no job. skipped: a sentence about the files that were left out, or None.
    to_stdout: the output is written to standard output, so no text may be printed there.
    """

    jobs: list[Job]
    problems: list[HpcmrefError] = field(default_factory=list)
    skipped: str | None = None
    to_stdout: bool = False


def inputs(
    arguments: Sequence[str], suffixes: Collection[str], recursive: bool = True, without: str | None = None
) -> Plan:
    """Make a plan for a command that only reads. See `folders.find` for the arguments."""
    found = find(arguments, suffixes, recursive, without)
    return Plan([Job(source.path, None) for source in found.sources], found.problems, found.describe_skipped())


def plan(
    arguments: Sequence[str], output: str | None, suffixes: Collection[str], new_suffix: str, recursive: bool = True
) -> Plan:
    """Pair every input with its output. Nothing is written.

    arguments, suffixes, recursive: see `folders.find`.
    output: `-` for standard output, a file (only for one input that is not a folder), a folder, or None for a file next
        to the one input.
    new_suffix: the suffix of outputs that are named after their input.

    Raises typer.BadParameter if the arguments contradict each other.
    """
    if output is not None and descriptor_of(Path(output)) == 1:
        output = STREAM
    several = len(arguments) > 1 or os.path.isdir(arguments[0])
    if STREAM in arguments and several:
        raise typer.BadParameter("standard input (-) must be the only input.")
    if several and (output is None or output == STREAM or (os.path.exists(output) and not os.path.isdir(output))):
        raise typer.BadParameter("several inputs need a folder to write to, as in -o DIR.", param_hint="-o")
    if arguments == [STREAM] and _is_folder(output):
        raise typer.BadParameter("standard input has no name, so the output must be a file.", param_hint="-o")
    if "" in arguments or output == "":
        raise typer.BadParameter("the name of a file is empty.", param_hint="-o" if output == "" else None)

    if several or _is_folder(output):
        assert output is not None
        found = find(arguments, suffixes, recursive, output)
        named = name_outputs(found.sources, Path(output), new_suffix)
        problems = [*found.problems, *(each for each in named.values() if isinstance(each, HpcmrefError))]
        jobs = [Job(source.path, path) for source, path in named.items() if isinstance(path, Path)]
        return Plan(jobs, problems, found.describe_skipped())
    source = None if arguments[0] == STREAM else Path(arguments[0])
    if output == STREAM or (output is None and source is None):
        return Plan([Job(source, None)], to_stdout=True)
    if output is not None:
        target = Path(output)
    else:
        assert source is not None
        target = source.parent / (source.stem + new_suffix)
    if source is not None and not is_special(target) and is_same_file(target, source):
        return Plan([], [HpcmrefError(f"{target} is an input; name another output with -o")])
    return Plan([Job(source, target)])


def _is_folder(output: str | None) -> bool:
    separators = tuple(filter(None, (os.sep, os.altsep)))
    return output is not None and output != STREAM and (os.path.isdir(output) or output.endswith(separators))
