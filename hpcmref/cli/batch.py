"""What happens to each input of a command, and when one of them fails?

Every command that takes files is the same three steps: `hpcmref.cli.jobs.plan` pairs each input with an output,
`run_spread` works through the pairs, reports each, and goes on when one fails, and at the end it says what came of all.
The commands add only the work on one pair.
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
            ratio = f" ({self.read / self.written:.1f}:1)" if self.read > self.written else ""  # decoding has none
            parts.append(f"{_bytes(self.read)} to {_bytes(self.written)}{ratio}")
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
