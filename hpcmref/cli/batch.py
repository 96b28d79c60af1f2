"""Process all inputs of a command, report each result, and continue when one input fails.

Every command that takes files has the same steps. `hpcmref.cli.jobs.plan` pairs each input with an output. `run_spread`
works on the pairs, reports each, continues after failures, and prints a summary. The commands add only the work on one
pair.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import typer

from hpcmref.cli.failures import describe, report, tell
from hpcmref.cli.jobs import Job, Outputs, Plan
from hpcmref.errors import CheckpointError, ConfigError, HpcmrefError
from hpcmref.runtime.signals import Stopped


@dataclass(frozen=True)
class Style:
    """How a command reports.

    quiet: errors only. json: one JSON object for each file. verbose: the seconds of every stage, too.
    """

    quiet: bool = False
    json: bool = False
    verbose: bool = False


@dataclass(frozen=True)
class Made:
    """The result of the work on one input: the bytes to write, facts to report, and the seconds of every stage."""

    data: bytes
    facts: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a worker returns: the result, the size of its input in bytes, and the texts of its warnings."""

    made: Made
    size: int
    warnings: list[str]


@dataclass(frozen=True)
class Done:
    """A finished job. line: the text to print. facts: the JSON object to print. size: the number of bytes written."""

    line: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    size: int = 0


@dataclass
class _Totals:
    """Counts of the jobs so far. kept: outputs that --resume left as they were. read, written: bytes."""

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
            ratio = f" ({self.read / self.written:.1f}:1)" if self.read > self.written else ""  # decoding has none
            parts.append(f"{_bytes(self.read)} to {_bytes(self.written)}{ratio}")
        parts.append(f"{time.perf_counter() - self.started:.1f} s")
        if self.kept:
            parts.append(f"{self.kept} kept")
        if self.failed:
            parts.append(f"{self.failed} failed")
        return ", ".join(parts)


def run(jobs: Sequence[Job], work: Callable[[Job], str | None], quiet: bool = False) -> None:
    """Do `work` on every job in this process, and print what it returns. For slow work, use `run_spread`."""
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
    read_input: Callable[[Job], bytes | None],
    work: Callable[[Job, bytes], Made],
    write_output: Callable[[Job, Outcome], Done],
    style: Style = Style(),
    processes: int = 1,
    ray: str | None = None,
    threads: int | None = None,
    totals: bool = True,
) -> None:
    """Do every job and report it. A failure is reported in one line on stderr, and the next job follows.

    read_input: reads the input of a job in this process; returns None if nothing is to be done.
    work: gets a job and the content of its input. It runs in one of `processes` processes or on a Ray cluster (see
        `hpcmref.runtime.executor.execute`), and must be picklable for that.
    write_output: writes the output of a job in this process.
    totals: print a summary after several files.

    CheckpointError and ConfigError end the run, because a bad model or setting makes every job fail. A signal ends it
    with Stopped, which says how many files were done. Raises typer.Exit(1) after the last job if any job failed.
    """
    from hpcmref.runtime.executor import execute

    count = _Totals(len(planned.jobs) + len(planned.problems))
    batch = _Batch(read_input, write_output, _Printer(style, planned.to_stdout), count)
    for problem in planned.problems:
        batch.fail(problem, None)
    processes = max(1, min(processes, len(planned.jobs)))
    try:
        with _progress(len(planned.jobs), style) as advance:
            results = execute(_Worker(work), batch.contents(planned.jobs, advance), processes, ray, threads)
            with contextlib.closing(results):
                for (job, _), result in results:
                    batch.finish(job, result)
                    advance()
    except (KeyboardInterrupt, Stopped) as error:
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        raise Stopped(number, f"after {count.finished} of {count.files} files" if count.files > 1 else "") from None
    if planned.skipped and not style.quiet:
        tell(f"hpcmref: {planned.skipped}", sys.stderr)
    if totals and count.files > 1:
        batch.printer.say(str(count))
    if count.failed:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Batch:
    """The reading and writing of a run, in this process. It reports and counts every job."""

    read_input: Callable[[Job], bytes | None]
    write_output: Callable[[Job, Outcome], Done]
    printer: _Printer
    count: _Totals

    def contents(self, jobs: Sequence[Job], advance: Callable[[], None]) -> Iterator[tuple[Job, bytes]]:
        """Read the inputs of the jobs. Those that fail, or of which nothing is to be done, are left out."""
        for job in jobs:
            try:
                content = self.read_input(job)
            except (CheckpointError, ConfigError):
                raise
            except Exception as error:
                self.fail(error, job)
            else:
                if content is not None:
                    yield job, content
                    continue
                self.count.kept += 1
            advance()

    def finish(self, job: Job, result: Outcome | Exception) -> None:
        """Write the output of a job, or report why there is none."""
        try:
            if isinstance(result, Exception):
                raise result
            self.printer.warnings(job, result.warnings)
            done = self.write_output(job, result)
        except (CheckpointError, ConfigError):
            raise
        except Exception as error:
            self.fail(error, job)
        else:
            self.printer.done(job, done, result)
            self.count.done += 1
            self.count.read += result.size
            self.count.written += done.size

    def fail(self, error: Exception, job: Job | None) -> None:
        """Report that a job failed, or an input that cannot be a job."""
        self.printer.failure(error, job)
        self.count.failed += 1


def dry_run(planned: Plan, outputs: Outputs, style: Style) -> None:
    """Print what would be written where, and write nothing.

    Raises typer.Exit(1) if an input does not exist or an output could not be written, and the errors that end a run.
    """
    printer = _Printer(style, to_stdout=False)
    failures: list[tuple[Exception, Job | None]] = [(problem, None) for problem in planned.problems]
    for job in planned.jobs:
        try:
            job.check_source()
            wanted = outputs.are_wanted(job)
            action = "keep" if not wanted else "replace" if job.target_exists else "write"
        except (CheckpointError, ConfigError):
            raise
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
    """Prints results on stdout (on stderr if stdout is used for data), and warnings and errors on stderr."""

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
    """Show a progress bar on stderr, if that is a terminal and there are several jobs.

    Yields a function to be called after each job.
    """
    if style.quiet or total < 2 or sys.stderr is None or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Rich prints text above the bar if it may redirect the stream. It may redirect stdout only if that is a terminal.
    same_terminal = sys.stdout is not None and sys.stdout.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=same_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def _bytes(count: int) -> str:
    """Format a number of bytes for people, in decimal units."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
