"""Which inputs become which outputs, and what happens when one of them fails?

Every command that takes files is the same three steps: `plan` pairs each input with an output, `run` works through the
pairs, reports each, and goes on when one fails, and at the end it says what came of all. The commands add only the work
on one pair.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from hpcmref.cli.failures import describe, report, tell
from hpcmref.cli.folders import STREAM, find, name_outputs
from hpcmref.errors import CheckpointError, ConfigError, HpcmrefError
from hpcmref.runtime.files import descriptor_of, is_special
from hpcmref.runtime.signals import Stopped

ENCODED_SUFFIX = ".hpcm"  # of files that are written
ENCODED_SUFFIXES = (ENCODED_SUFFIX, ".bin")  # of files that a folder is searched for


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
        return self.target is None or is_special(self.target)

    @property
    def target_exists(self) -> bool:
        """The output is there, and is a file or folder. Raises HpcmrefError for a name that there cannot be."""
        if self.target is None or self.is_stream:
            return False
        with _writing(self.target):
            return self.target.exists()

    def read(self) -> bytes:
        """All bytes of the input."""
        if self.source is not None:
            return self.source.read_bytes()
        if sys.stdin is None:
            raise HpcmrefError("standard input is closed")
        return sys.stdin.buffer.read()

    def write(self, data: bytes, preserve: bool = False) -> None:
        """Write the output whole: a file appears complete or not at all.

        preserve: with the time of modification of the input.
        """
        if self.target is None:
            try:
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            except BrokenPipeError:  # of text it would be no error, but here data is lost
                raise HpcmrefError("standard output was closed before everything was written") from None
        else:
            from hpcmref.runtime.files import atomic_write

            keep = preserve and self.source is not None and not is_special(self.source)
            atomic_write(self.target, data, self.source.stat().st_mtime_ns if keep and self.source else None)

    def check_room(self, force: bool) -> None:
        """Fail before the work rather than after it if the output cannot be written."""
        if self.target is None:
            if sys.stdout is None:
                raise ConfigError("standard output is closed")
            if sys.stdout.isatty():
                raise ConfigError("standard output is a terminal: redirect it, or name a file with -o")
            return
        if self.is_stream:
            return
        if not force and self.target_exists:
            raise HpcmrefError(f"{self.target} exists already (--force replaces it)")

    def make_room(self, force: bool) -> None:
        """As `check_room`, and make the folder of the output."""
        self.check_room(force)
        self.make_folder()

    def make_folder(self) -> None:
        """Make the folder of the output."""
        if self.target is not None and not self.is_stream:
            with _writing(self.target):
                self.target.parent.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Say of what goes wrong that it is about an output."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise HpcmrefError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from error


@dataclass(frozen=True)
class Outputs:
    """What happens to outputs that exist already, and what else a command does with outputs.

    is_there: with --resume, whether the output of a job is there, whole and as it was asked for; raises HpcmrefError
    for a file of another kind in its place. None without --resume.
    """

    force: bool = False
    preserve: bool = False
    is_there: Callable[[Job], bool] | None = None

    def are_wanted(self, job: Job) -> bool:
        """Whether there is anything to do for a job. Raises HpcmrefError if it cannot be done. Nothing is written."""
        if self.is_there is None or not job.target_exists:
            job.check_room(self.force)
            return True
        return not self.is_there(job)

    def prepare(self, job: Job) -> bytes | None:
        """The input, or None if there is nothing to do; makes the folder of the output. Raises as `are_wanted`."""
        if not self.are_wanted(job):
            return None
        job.make_folder()
        return job.read()


@dataclass
class Plan:
    """What there is to do.

    problems: what cannot be done, each a failure. skipped: what was left out, as a sentence. to_stdout: standard output
    is data, and nothing else may be printed there.
    """

    jobs: list[Job]
    problems: list[HpcmrefError] = field(default_factory=list)
    skipped: str | None = None
    to_stdout: bool = False


def inputs(arguments: Sequence[str], suffixes: Collection[str], recursive: bool = True) -> Plan:
    """A plan for commands that only read: see `folders.find`."""
    found = find(arguments, suffixes, recursive)
    return Plan([Job(source.path, None) for source in found.sources], found.problems, found.describe_skipped())


def plan(
    arguments: Sequence[str], output: str | None, suffixes: Collection[str], new_suffix: str, recursive: bool = True
) -> Plan:
    """Pair every input with its output; nothing is written.

    arguments, suffixes, recursive: see `folders.find`.
    output: `-`, a file (for one input that is not a folder), a folder, or None: next to the one input.
    new_suffix: of outputs that are named after their input.

    Raises typer.BadParameter if the arguments contradict each other.
    """
    if output is not None and descriptor_of(Path(output)) == 1:
        output = STREAM
    several = len(arguments) > 1 or os.path.isdir(arguments[0])
    if STREAM in arguments and several:
        raise typer.BadParameter("standard input (-) must be the only input.")
    if several and (output is None or output == STREAM or (os.path.exists(output) and not os.path.isdir(output))):
        raise typer.BadParameter("several inputs need a folder to write to.", param_hint="-o")
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
    if source is not None and not is_special(target) and target.resolve() == source.resolve():
        return Plan([], [HpcmrefError(f"{target} is an input; name another output with -o")])
    return Plan([Job(source, target)])


def _is_folder(output: str | None) -> bool:
    separators = tuple(filter(None, (os.sep, os.altsep)))
    return output is not None and output != STREAM and (os.path.isdir(output) or output.endswith(separators))


# --- work and its results -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """How a command reports: only errors, one JSON object a file, or with the seconds of every stage."""

    quiet: bool = False
    json: bool = False
    verbose: bool = False


@dataclass(frozen=True)
class Made:
    """What comes of one input: bytes to write, what there is to say of them, and the seconds of every stage."""

    data: bytes
    facts: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a worker sends back: what it made, the size of its input in bytes, and the warnings on the way."""

    made: Made
    size: int
    warnings: list[str]


@dataclass(frozen=True)
class Done:
    """A job that is done: a line for people, facts for programs, and bytes read and written."""

    line: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    size: int = 0


@dataclass
class _Totals:
    """What has become of the jobs so far."""

    files: int
    started: float = field(default_factory=time.perf_counter)
    done: int = 0
    kept: int = 0
    failed: int = 0
    read: int = 0
    written: int = 0

    @property
    def finished(self) -> int:
        return self.done + self.kept + self.failed

    def __str__(self) -> str:
        parts = [f"{self.done} file{'s' * (self.done != 1)}"]
        if self.written and self.read:
            parts.append(f"{_bytes(self.read)} to {_bytes(self.written)} ({self.read / self.written:.1f}:1)")
        parts.append(f"{time.perf_counter() - self.started:.1f} s")
        if self.kept:
            parts.append(f"{self.kept} kept")
        if self.failed:
            parts.append(f"{self.failed} failed")
        return ", ".join(parts)


def run(jobs: Sequence[Job], work: Callable[[Job], str | None], quiet: bool = False) -> None:
    """Do `work` on every job in this process and print what it returns; see `run_spread`, which is for slower work."""
    run_spread(
        Plan(list(jobs)),
        lambda job: b"",
        lambda job, _: Made(b"", {"line": work(job)}),
        lambda job, outcome: Done(outcome.made.facts["line"]),
        Style(quiet),
        totals=False,
    )


def run_spread(
    planned: Plan,
    prepare: Callable[[Job], bytes | None],
    work: Callable[[Job, bytes], Made],
    finish: Callable[[Job, Outcome], Done],
    style: Style = Style(),
    processes: int = 1,
    ray: str | None = None,
    threads: int | None = None,
    totals: bool = True,
) -> None:
    """Do every job and report it; a failure is one line on stderr and the next job follows. Only bytes travel.

    prepare and finish read and write files in this process; `prepare` returns None where there is nothing to do. `work`
    gets a job and the content of its input, in one of `processes` or on a Ray cluster (see
    `hpcmref.runtime.executor.execute`); it must be picklable for that.

    A bad model or setting fails every job alike: CheckpointError and ConfigError end the run. So do signals: Stopped
    says how far the work got. Raises typer.Exit(1) after the last job if any failed.
    """
    from hpcmref.runtime.executor import execute

    printer = _Printer(style, planned.to_stdout)
    count = _Totals(len(planned.jobs) + len(planned.problems))
    for problem in planned.problems:
        printer.failure(problem, None)
        count.failed += 1
    try:
        with _progress(len(planned.jobs), style) as advance:

            def contents() -> Iterator[tuple[Job, bytes]]:
                for job in planned.jobs:
                    try:
                        content = prepare(job)
                    except (CheckpointError, ConfigError):
                        raise
                    except Exception as error:
                        printer.failure(error, job)
                        count.failed += 1
                        advance()
                        continue
                    if content is not None:
                        yield job, content
                    else:
                        count.kept += 1
                        advance()

            processes = max(1, min(processes, len(planned.jobs)))
            results = execute(_Worker(work), contents(), processes, ray, threads)
            with contextlib.closing(results):
                for (job, _), result in results:
                    try:
                        if isinstance(result, Exception):
                            raise result
                        printer.warnings(job, result.warnings)
                        done = finish(job, result)
                    except (CheckpointError, ConfigError):
                        raise
                    except Exception as error:
                        printer.failure(error, job)
                        count.failed += 1
                    else:
                        printer.done(job, done, result)
                        count.done += 1
                        count.read += result.size
                        count.written += done.size
                    advance()
    except (KeyboardInterrupt, Stopped) as error:
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        raise Stopped(number, f"after {count.finished} of {count.files} files" if count.files > 1 else "") from None
    if planned.skipped and not style.quiet:
        tell(f"hpcmref: {planned.skipped}", sys.stderr)
    if totals and count.files > 1:
        printer.say(str(count))
    if count.failed:
        raise typer.Exit(1)


def dry_run(planned: Plan, outputs: Outputs, style: Style) -> None:
    """Say what would be written where; nothing is. Raises typer.Exit(1) if some of it cannot be."""
    printer = _Printer(style, to_stdout=False)
    failures: list[tuple[Exception, Job | None]] = [(problem, None) for problem in planned.problems]
    for job in planned.jobs:
        try:
            wanted = outputs.are_wanted(job)
            action = "keep" if not wanted else "replace" if job.target_exists else "write"
        except HpcmrefError as error:
            failures.append((error, job))
            continue
        if style.json:
            tell(json.dumps({"file": job.name, "output": job.target_name, "action": action}), sys.stdout)
        else:
            note = {"write": "", "keep": " (kept)", "replace": " (replaced)"}[action]
            printer.say(f"{job.name} -> {job.target_name}{note}")
    for failure, failed in failures:
        printer.failure(failure, failed)
    if planned.skipped and not style.quiet:
        tell(f"hpcmref: {planned.skipped}", sys.stderr)
    if failures:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Worker:
    work: Callable[[Job, bytes], Made]

    def __call__(self, item: tuple[Job, bytes]) -> Outcome:
        with warnings.catch_warnings(record=True) as caught:
            made = self.work(*item)
        return Outcome(made, len(item[1]), [str(warning.message) for warning in caught])


@dataclass(frozen=True)
class _Printer:
    """Says what became of each job: results on stdout, unless that is data; warnings and errors on stderr."""

    style: Style
    to_stdout: bool

    def done(self, job: Job, done: Done, outcome: Outcome) -> None:
        if self.style.verbose:
            stages = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in outcome.made.stages.items())
            tell(f"hpcmref: {job.name}: {stages}", sys.stderr)
        if self.style.json:
            facts = {"file": job.name, **done.facts, "warnings": outcome.warnings}
            tell(json.dumps(facts), sys.stdout)
        elif done.line:
            self.say(done.line)

    def say(self, line: str) -> None:
        if not self.style.quiet and not self.style.json:
            tell(line, sys.stderr if self.to_stdout else sys.stdout)

    def warnings(self, job: Job, texts: Sequence[str]) -> None:
        if not self.style.quiet:
            for text in texts:
                tell(f"hpcmref: {job.name}: {' '.join(text.split())}", sys.stderr)

    def failure(self, error: Exception, job: Job | None) -> None:
        report(error, None if job is None else job.name)
        if self.style.json:
            tell(json.dumps({"file": None if job is None else job.name, "error": describe(error)}), sys.stdout)


@contextlib.contextmanager
def _progress(total: int, style: Style) -> Iterator[Callable[[], None]]:
    """A bar on stderr for several jobs on a terminal; yields what to call after each job."""
    if style.quiet or total < 2 or sys.stderr is None or not sys.stderr.isatty():
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


def _bytes(count: int) -> str:
    """A size for people, in decimal units."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
