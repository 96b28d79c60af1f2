"""Which inputs become which outputs, and what happens when one of them fails?

Every command that takes files is the same three steps: `expand` names the inputs, `plan` pairs each with an output, and
`run` works through the pairs, reports each, and goes on when one fails. The commands add only the work on one pair.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from hpcmref.cli.failures import report
from hpcmref.errors import CheckpointError, ConfigError, HpcmrefError

STREAM = "-"
ENCODED_SUFFIX = ".bin"  # of files that are written
ENCODED_SUFFIXES = (ENCODED_SUFFIX, ".hpcm")  # of files that a folder is searched for


@dataclass(frozen=True)
class Job:
    """One input and its output. None is standard input, and standard output.

    Arguments are strings until they get here, because a Path cannot tell `-` from `./-` nor `out` from `out/`.
    """

    source: Path | None
    target: Path | None

    @property
    def name(self) -> str:
        """The input, as messages call it."""
        return "standard input" if self.source is None else str(self.source)

    @property
    def target_name(self) -> str:
        """The output, as messages call it."""
        return "standard output" if self.target is None else str(self.target)

    @property
    def is_stream(self) -> bool:
        """The output is standard output, a pipe or a device: nothing that exists is lost by writing to it."""
        return self.target is None or (self.target.exists() and not self.target.is_file())

    def read(self) -> bytes:
        """All bytes of the input."""
        if self.source is not None:
            return self.source.read_bytes()
        if sys.stdin is None:
            raise HpcmrefError("standard input is closed")
        return sys.stdin.buffer.read()

    def write(self, data: bytes) -> None:
        """Write the output whole: a file appears complete or not at all."""
        if self.target is None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            from hpcmref.runtime.files import atomic_write

            atomic_write(self.target, data)

    def make_room(self, force: bool) -> None:
        """Fail before the work rather than after it if the output cannot be written; make its folder."""
        if self.target is None:
            if sys.stdout is None:
                raise ConfigError("standard output is closed")
            if sys.stdout.isatty():
                raise ConfigError("standard output is a terminal: redirect it, or name a file with -o")
            return
        if self.is_stream:
            return
        if self.target.exists() and not force:
            raise HpcmrefError(f"{self.target} exists already (--force replaces it)")
        self.target.parent.mkdir(parents=True, exist_ok=True)


def expand(arguments: Sequence[str], suffixes: Collection[str]) -> list[Path | None]:
    """The inputs that the arguments name: a folder stands for the files in it whose suffix is one of `suffixes`,
    sorted by name; `-` stands for standard input (None).

    Raises HpcmrefError for a folder without such a file.
    """
    inputs: list[Path | None] = []
    for argument in arguments:
        if argument == STREAM:
            inputs.append(None)
        elif os.path.isdir(argument):
            inputs += _files_in(Path(argument), suffixes)
        else:
            inputs.append(Path(argument))
    return inputs


def _files_in(folder: Path, suffixes: Collection[str]) -> list[Path]:
    # Hidden files too are images by their suffix on disks that macOS has written to ("._photo.jpg"), but never in fact.
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise HpcmrefError(f"{folder}: no files here end with {', '.join(sorted(suffixes))}")
    return found


def plan(arguments: Sequence[str], output: str | None, suffixes: Collection[str], new_suffix: str) -> list[Job]:
    """Pair every input with its output; nothing is written.

    arguments, suffixes: see `expand`.
    output: `-`, a file (for one input that is not a folder), a folder, or None: next to the one input.
    new_suffix: of outputs that are named after their input.

    Raises typer.BadParameter if the arguments contradict each other, HpcmrefError if what they stand for does.
    """
    sources = expand(arguments, suffixes)
    several = len(arguments) > 1 or os.path.isdir(arguments[0])
    if None in sources and several:
        raise typer.BadParameter("standard input (-) must be the only input.")
    if several and (output is None or output == STREAM or os.path.isfile(output)):
        raise typer.BadParameter("several inputs need a folder to write to.", param_hint="-o")

    if several or _is_folder(output):
        assert output is not None
        if sources == [None]:
            raise typer.BadParameter("standard input has no name, so the output must be a file.", param_hint="-o")
        jobs = [Job(source, Path(output, source.stem + new_suffix)) for source in sources if source is not None]
    elif output is None:
        jobs = [Job(source, source and source.parent / (source.stem + new_suffix)) for source in sources]
    else:
        jobs = [Job(source, None if output == STREAM else Path(output)) for source in sources]
    _refuse_collisions(jobs)
    return jobs


def _is_folder(output: str | None) -> bool:
    separators = tuple(filter(None, (os.sep, os.altsep)))
    return output is not None and output != STREAM and (os.path.isdir(output) or output.endswith(separators))


def _refuse_collisions(jobs: Sequence[Job]) -> None:
    inputs = {job.source.resolve() for job in jobs if job.source is not None}
    writers: dict[Path, Job] = {}
    for job in jobs:
        if job.target is None:
            continue
        if job.target.resolve() in inputs:
            raise HpcmrefError(f"{job.target} is an input; name another output with -o")
        other = writers.setdefault(job.target, job)
        if other is not job:
            raise HpcmrefError(f"{other.name} and {job.name} would both be written to {job.target}")


def run(jobs: Sequence[Job], work: Callable[[Job], str | None], quiet: bool = False) -> None:
    """Do `work` on every job and print what it returns; a failure is one line on stderr and the next job follows.

    A bad model or setting fails every job alike: CheckpointError and ConfigError end the run.
    Raises typer.Exit(1) after the last job if any failed.
    """
    failed = False
    with _progress(len(jobs), quiet) as advance:
        for job in jobs:

            def done(job: Job = job) -> str | None:
                with _warnings_as_lines(job, quiet):
                    return work(job)

            failed |= not _succeeds(job, done, quiet)
            advance()
    if failed:
        raise typer.Exit(1)


def _succeeds(job: Job, work: Callable[[], str | None], quiet: bool) -> bool:
    """Do it and print what it returns; or print one line on stderr, unless the error ends the run."""
    try:
        outcome = work()
    except (CheckpointError, ConfigError, BrokenPipeError):
        raise
    except Exception as error:
        report(error, job.name)
        return False
    _print_outcome(job, outcome, quiet)
    return True


@dataclass(frozen=True)
class Made:
    """What comes of one input: bytes to write, and what there is to say of them."""

    data: bytes
    about: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a worker sends back: what it made, and the warnings on the way."""

    made: Made
    warnings: list[str]


def run_spread(
    jobs: Sequence[Job],
    prepare: Callable[[Job], bytes],
    work: Callable[[Job, bytes], Made],
    finish: Callable[[Job, Made], str | None],
    quiet: bool = False,
    processes: int = 1,
    ray: str | None = None,
) -> None:
    """`run` for work that other processes or machines can do: only bytes travel.

    prepare and finish read and write files in this process. `work` gets a job and the content of its input, in one of
    `processes` or on a Ray cluster (see `hpcmref.runtime.executor.execute`); it must be picklable for that. Ends as
    `run` does.
    """
    from hpcmref.runtime.executor import execute

    failed = False
    with _progress(len(jobs), quiet) as advance:

        def inputs() -> Iterator[tuple[Job, bytes]]:
            nonlocal failed
            for job in jobs:
                try:
                    yield job, prepare(job)
                except (CheckpointError, ConfigError):
                    raise
                except Exception as error:
                    report(error, job.name)
                    failed = True
                    advance()

        for (job, _), result in execute(_Worker(work), inputs(), processes, ray):

            def finished(job: Job = job, result: Outcome | Exception = result) -> str | None:
                if isinstance(result, Exception):
                    raise result
                _print_warnings(job, result.warnings, quiet)
                return finish(job, result.made)

            failed |= not _succeeds(job, finished, quiet)
            advance()
    if failed:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Worker:
    work: Callable[[Job, bytes], Made]

    def __call__(self, item: tuple[Job, bytes]) -> Outcome:
        with warnings.catch_warnings(record=True) as caught:
            made = self.work(*item)
        return Outcome(made, [str(warning.message) for warning in caught])


@contextlib.contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Callable[[], None]]:
    """A bar on stderr for several jobs on a terminal; yields what to call after each job."""
    if quiet or total < 2 or sys.stderr is None or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Rich prints above the bar what goes to the streams that it takes over; stdout only if it is the same terminal.
    same_terminal = sys.stdout is not None and sys.stdout.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=same_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


@contextlib.contextmanager
def _warnings_as_lines(job: Job, quiet: bool) -> Iterator[None]:
    """Show Python warnings as sentences about the job, without the file and line that raised them."""
    with warnings.catch_warnings(record=True) as caught:
        try:
            yield
        finally:
            _print_warnings(job, [str(warning.message) for warning in caught], quiet)


def _print_warnings(job: Job, texts: Sequence[str], quiet: bool) -> None:
    if not quiet:
        for text in texts:
            print(f"hpcmref: {job.name}: {' '.join(text.split())}", file=sys.stderr)


def _print_outcome(job: Job, outcome: str | None, quiet: bool) -> None:
    if outcome and not quiet:
        # Where the output goes to stdout, that stream is data and nothing else.
        print(outcome, file=sys.stderr if job.target is None else sys.stdout)
