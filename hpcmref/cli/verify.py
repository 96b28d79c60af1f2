"""The command `verify`: check that encoded files are complete and decode to what was encoded."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from hpcmref.cli.batch import Done, Made, Outcome, Style, run_spread
from hpcmref.cli.codecs import Codecs
from hpcmref.cli.jobs import ENCODED_SUFFIXES, Job, inputs
from hpcmref.cli.options import (
    Device,
    DeviceOption,
    JobsOption,
    JsonOption,
    ModelOption,
    QuietOption,
    RecursiveOption,
    ThreadsOption,
    VerboseOption,
    check_model,
    use_threads,
)

if TYPE_CHECKING:
    from hpcmref.format.container import Container


def verify(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE", help="Encoded files, folders of .hpcm and .bin files, or - for standard input."),
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="Compare the checksums of the files only, and decode nothing.")
    ] = False,
    model: ModelOption = None,
    device: DeviceOption = Device.auto,
    recursive: RecursiveOption = True,
    jobs: JobsOption = 1,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check encoded files: decode them, compare all checksums, name the bad ones, and write nothing."""

    def report(job: Job, outcome: Outcome) -> Done:
        return Done(f"{job.name}: {'intact' if quick else 'decodes'}", {**outcome.made.facts, "size": outcome.size})

    check_model(model)
    use_threads(threads)
    planned = inputs(files, ENCODED_SUFFIXES, recursive)
    run_spread(
        planned, Job.read, _Verifier(Codecs(model, device.value), quick), report, Style(quiet, as_json, verbose), jobs,
        threads=threads,
    )  # fmt: skip


@dataclass(frozen=True)
class _Verifier:
    """The work on one file. It can be pickled for worker processes."""

    codecs: Codecs
    quick: bool

    def __call__(self, job: Job, content: bytes) -> Made:
        from hpcmref.format.container import parse

        started = time.perf_counter()
        file = parse(content)
        parsed = time.perf_counter()
        if not self.quick:
            self._decode(file)
        stages = {"compare the checksum": parsed - started, "decode": time.perf_counter() - parsed}
        return Made(b"", {"width": file.width, "height": file.height, "decoded": not self.quick}, stages)

    def _decode(self, file: Container) -> None:
        if (codec := self.codecs.of(file)) is not None:
            codec.verify(file)
            return
        from hpcmref import lossless
        from hpcmref.format.container import MAX_PIXELS

        lossless.decode(file, MAX_PIXELS)
