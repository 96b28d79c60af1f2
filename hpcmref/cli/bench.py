"""The command `bench`: compare hpcmref with other codecs on the user's own images."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import math
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hpcmref.cli import bench_options, options
from hpcmref.cli.bench_progress import progress
from hpcmref.cli.encode import IMAGE_SUFFIXES
from hpcmref.cli.folders import is_same_file
from hpcmref.cli.jobs import inputs
from hpcmref.errors import ConfigError, HpcmrefError
from hpcmref.runtime.files import is_special

if TYPE_CHECKING:
    from rich.console import Console

    from hpcmref.bench.codecs import Codec
    from hpcmref.bench.curves import Curve
    from hpcmref.bench.measure import Setting
    from hpcmref.bench.output import Results
    from hpcmref.bench.run import Outcome

# Option -> title, and name of the published results that were measured on the same images.
DATASETS = {
    "kodak": ("Kodak", "kodak"),
    "clic": ("CLIC 2020 professional (validation)", "clic-professional-valid"),
    "tecnick": ("Tecnick", "tecnick"),
}


def bench(
    folders: bench_options.FoldersArgument = None,
    codecs: bench_options.CodecsOption = None,
    models: bench_options.ModelsOption = None,
    qualities: bench_options.QualitiesOption = None,
    encoder: bench_options.EncoderOption = None,
    time_limit: bench_options.TimeLimitOption = 600,
    target: bench_options.TargetOption = None,
    metrics: bench_options.MetricsOption = None,
    generations: bench_options.GenerationsOption = None,
    results: bench_options.ResultsOption = None,
    anchor: bench_options.AnchorOption = None,
    limits: bench_options.RangeOption = None,
    kodak: bench_options.KodakOption = None,
    clic: bench_options.ClicOption = None,
    tecnick: bench_options.TecnickOption = None,
    device: options.DeviceOption = options.Device.auto,
    repeat: bench_options.RepeatOption = 1,
    jobs: bench_options.JobsOption = 1,
    threads: options.ThreadsOption = None,
    limit: bench_options.LimitOption = None,
    resume: bench_options.ResumeOption = None,
    ray: options.RayOption = None,
    json_file: bench_options.JsonFileOption = None,
    csv_file: bench_options.CsvFileOption = None,
    profile: bench_options.ProfileOption = False,
    report: bench_options.ReportOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Measure codecs side by side on your own images: size, quality, time, memory, BD-rate."""
    outputs = _Outputs(json_file, csv_file, report, quiet)
    outputs.check(generations, resume)
    if not 0 < time_limit <= 1e6:
        raise typer.BadParameter("it must be a number of seconds, at most a million.", param_hint="--time-limit")
    options.use_threads(threads)
    if profile:
        for model in _models(models):
            _profile(model, _images(folders or [], quiet)[:1], device.value, repeat)
        return
    _need_extra()
    from hpcmref.bench.metrics import chosen

    shortcuts = {"kodak": kodak, "clic": clic, "tecnick": tecnick}
    asked = {name: folder for name, folder in shortcuts.items() if folder is not None}
    folders = [*(folders or []), *asked.values()]
    if not folders:
        raise typer.BadParameter("name a folder of images.")
    fixed = _fixed([DATASETS[dataset][1] for dataset in asked], results or [])
    images = _images(folders, quiet, report)[:limit]
    outputs.check_inputs(images)
    between = _range(limits) if limits is not None else None
    measured = _codecs(codecs, _models(models), encoder or [], qualities or [], time_limit, device.value)
    settings = _settings(qualities or [], target, measured)
    title = " + ".join(DATASETS[dataset][0] for dataset in asked) or Path(folders[0]).resolve().name
    plan = _Plan(title, images, measured, settings, chosen(metrics), repeat, jobs, ray, threads)
    if generations is not None:
        failed = _run_generations(plan, generations, outputs)
    else:
        failed = _run(plan, _Others.of(fixed, measured, anchor, between), resume, outputs)
    if failed:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Plan:
    """What is measured, and how.

    title: the name of the image set. settings: the settings by codec name. metrics: metrics besides PSNR. repeat: how
    often times are measured. jobs, ray, threads: see `hpcmref.runtime.executor.execute`.
    """

    title: str
    images: Sequence[Path]
    codecs: Sequence[Codec]
    settings: Mapping[str, Sequence[Setting]]
    metrics: frozenset[str]
    repeat: int
    jobs: int
    ray: str | None
    threads: int | None

    @property
    def facts(self) -> dict[str, Any]:
        """The settings and the machine, for the JSON output."""
        from hpcmref.bench import output

        return output.settings(self.codecs, self.metrics, self.repeat, self.jobs, self.ray)

    @property
    def makes_curves(self) -> bool:
        """Whether there are enough points for curves. A few targets are compared in the table of averages alone."""
        from hpcmref.bench.bdrate import LEAST_POINTS
        from hpcmref.bench.measure import Target

        return all(
            len(points) >= LEAST_POINTS or not isinstance(points[0], Target) for points in self.settings.values()
        )


@dataclass(frozen=True)
class _Others:
    """What the measured curves are compared with.

    curves: fixed results, under names that no measured curve has. anchor: the name of the curve that BD-rates are
    against. limits: the range of BD-rates in bits per pixel, or None.
    """

    curves: Sequence[Curve]
    anchor: str
    limits: tuple[float, float] | None

    @classmethod
    def of(
        cls,
        fixed: Mapping[str, Sequence[Curve]],
        measured: Sequence[Codec],
        anchor: str | None,
        limits: tuple[float, float] | None,
    ) -> _Others:
        """Name the curves and find the anchor. Raises ConfigError if --anchor is unknown or ambiguous."""
        names = [codec.name for codec in measured]
        curves = _distinct(fixed, set(names))
        return cls(curves, _find(anchor, [*names, *(curve.name for curve in curves)]), limits)


@dataclass(frozen=True)
class _Outputs:
    """Where results go: files, of which "-" is standard output, the folder of a report, and tables unless `quiet`."""

    json_file: Path | None
    csv_file: Path | None
    report: Path | None
    quiet: bool

    def check(self, generations: int | None, resume: Path | None) -> None:
        """Raise typer.BadParameter if results cannot be written there. resume: the journal, which must stay."""
        if str(self.report) == "-":
            raise typer.BadParameter("a report is a folder; it cannot go to standard output.", param_hint="--report")
        if str(self.json_file) == str(self.csv_file) == "-":
            raise typer.BadParameter("only one of --json and --csv can go to standard output.", param_hint="--csv")
        for name, file in self._files.items():
            if file.is_dir() or not file.absolute().parent.is_dir():
                raise typer.BadParameter(f"{file} is a folder, or is in a folder that does not exist.", param_hint=name)
            if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
                raise typer.BadParameter(f"{file} cannot be written.", param_hint=name)
        named = [*self._files.values(), *([] if resume is None else [resume])]
        if any(is_same_file(one, other) for one, other in itertools.combinations(named, 2)):
            raise typer.BadParameter("two of --json, --csv and --resume name one file.")
        if self.report is not None:
            existing = next(each for each in (self.report.absolute(), *self.report.absolute().parents) if each.exists())
            if not existing.is_dir() or not os.access(existing, os.W_OK):
                raise typer.BadParameter(f"the folder {self.report} cannot be made or written.", param_hint="--report")
        if self.report is not None and generations is not None:
            raise typer.BadParameter("there is no page for --generations; use --json or --csv.", param_hint="--report")

    def check_inputs(self, images: Sequence[Path]) -> None:
        """Raise typer.BadParameter if an output would replace one of the images that are measured."""
        for name, file in self._files.items():
            if any(is_same_file(file, image) for image in images):
                raise typer.BadParameter(f"{file} is one of the images.", param_hint=name)
        if self.report is not None and any(is_same_file(self.report, image.absolute().parent) for image in images):
            raise typer.BadParameter(f"{self.report} is the folder of an image; name another.", param_hint="--report")

    @property
    def _files(self) -> dict[str, Path]:
        """The option and the path of every result that goes to a file."""
        named = {"--json": self.json_file, "--csv": self.csv_file}
        return {
            name: file for name, file in named.items() if file is not None and not is_special(file) and str(file) != "-"
        }

    @functools.cached_property
    def tables(self) -> Console | None:
        """The console for tables: on standard error if a file goes to standard output. None if there are no tables."""
        from hpcmref.cli.tables import console_for

        return None if self.quiet else console_for(stderr="-" in map(str, (self.json_file, self.csv_file)))

    @property
    def separator(self) -> str:
        """What separates the columns of the CSV file."""
        return "\t" if self.csv_file is not None and self.csv_file.suffix.lower() == ".tsv" else ","

    def write(self, content: dict[str, Any], csv: str) -> None:
        """Write the results as JSON and as CSV, where each is wanted."""
        _write(json.dumps(content, indent=1) + "\n", self.json_file)
        _write(csv, self.csv_file)


def _run(plan: _Plan, others: _Others, resume: Path | None, outputs: _Outputs) -> bool:
    """Measure the codecs, and write tables, files and the report. Return whether anything failed."""
    from hpcmref.bench import output
    from hpcmref.bench.run import run
    from hpcmref.cli.tables import print_results

    with progress(len(plan.images), outputs.quiet) as listener:
        outcome = run(
            plan.images, plan.codecs, plan.settings, plan.repeat, plan.jobs, plan.ray, resume, listener, plan.metrics,
            plan.threads,
        )  # fmt: skip
    found = _compared(plan, others, outcome)
    if outputs.tables is not None:
        print_results(found, outputs.tables)
    outputs.write(output.as_json(found), output.as_csv(found, outputs.separator))
    if outputs.report is not None:
        _report(found, plan, outputs.report, outputs.tables)
    return bool(outcome.failures)


def _compared(plan: _Plan, others: _Others, outcome: Outcome) -> Results:
    """Make curves of the measurements, and compare all curves with the anchor."""
    from hpcmref.bench import curves, output

    measured, averaged = curves.averages(outcome.measurements)
    every = [*measured, *others.curves]
    anchors = [curve for curve in every if curve.name == others.anchor and plan.makes_curves]
    comparisons = [
        comparison
        for anchor in anchors
        for comparison in output.compare(every, anchor, others.limits, outcome.measurements, averaged)
    ]
    return output.Results(
        title=plan.title,
        curves=every,
        images=averaged,
        outcome=outcome,
        anchor=others.anchor if anchors else None,
        comparisons=comparisons,
        limits=others.limits,
        settings=plan.facts,
    )


def _run_generations(plan: _Plan, generations: int, outputs: _Outputs) -> bool:
    """Measure the losses of repeated encoding, and write a table and files. Return whether anything failed."""
    from hpcmref.bench import generations as lossy
    from hpcmref.cli.tables import print_generations

    with progress(len(plan.images), outputs.quiet) as listener:
        losses = lossy.run(
            plan.images, plan.codecs, plan.settings, generations, plan.metrics, plan.jobs, plan.ray,
            lambda image, failed: listener([], failed), plan.threads,
        )  # fmt: skip
    if outputs.tables is not None:
        print_generations(losses, plan.title, outputs.tables)
    outputs.write(lossy.as_json(losses, plan.title, plan.facts), lossy.as_csv(losses, outputs.separator))
    return bool(losses.failures)


def _models(models: str | None) -> list[str]:
    """Return the models of --models, or the default model."""
    from hpcmref.checkpoints import DEFAULT_MODEL

    return models.split(",") if models is not None else [DEFAULT_MODEL]


def _fixed(published: Sequence[str], files: Sequence[str]) -> dict[str, list[Curve]]:
    """Return the fixed results by source: the published ones of known image sets, and those of --results."""
    from hpcmref.bench import curves

    return {source: curves.read(source) for source in dict.fromkeys([*published, *files])}


def _codecs(
    names: str | None,
    models: Sequence[str],
    encoders: Sequence[str],
    qualities: Sequence[str],
    limit: float,
    device: str,
) -> list[Codec]:
    from hpcmref.bench import codecs
    from hpcmref.bench.external import externals

    asked = names.split(",") if names is not None else codecs.available()
    ours = codecs.codecs_of(asked, models, device)
    return codecs.distinct([*ours, *externals(encoders, qualities, limit)])


def _settings(qualities: Sequence[str], target: str | None, chosen: Sequence[Codec]) -> Mapping[str, Sequence[Setting]]:
    """Return what to measure by codec name: the rates of --target if it is given, and qualities otherwise."""
    from hpcmref.bench.codecs import qualities_of
    from hpcmref.bench.measure import Target

    wanted = qualities_of(qualities, chosen)
    if target is None:
        return wanted
    key, _, numbers = target.partition("=")
    try:
        rates = sorted({float(number) for number in numbers.split(",")})
        if key.strip() != "bpp" or not all(0 < rate < math.inf for rate in rates):
            raise ValueError
    except ValueError:
        raise typer.BadParameter("write bpp=LIST, as in bpp=0.25,0.5.", param_hint="--target") from None
    return {codec.name: [Target(rate) for rate in rates] for codec in chosen}


def _need_extra() -> None:
    if importlib.util.find_spec("bjontegaard") is None:
        raise HpcmrefError("bench needs more packages: pip install 'hpcmref[bench]', or '.[bench]' in a checkout")


def _images(folders: Sequence[str], quiet: bool, without: Path | None = None) -> list[Path]:
    """The images of folders. without: a folder that is not searched, since the report goes there."""
    if "-" in folders:
        raise typer.BadParameter("standard input is not a folder of images.")
    planned = inputs(folders, IMAGE_SUFFIXES, without=None if without is None else str(without))
    if planned.problems:
        raise planned.problems[0]
    if planned.skipped and not quiet:
        print(f"hpcmref: {planned.skipped}", file=sys.stderr)
    return [job.source for job in planned.jobs if job.source is not None]


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(":"))
        if not 0 < low < high < math.inf:
            raise ValueError
    except ValueError:
        raise typer.BadParameter("write LOW:HIGH in bits per pixel, as in 0.1:1.2.", param_hint="--range") from None
    return low, high


def _distinct(fixed: Mapping[str, Sequence[Curve]], measured: Collection[str]) -> list[Curve]:
    """Return the curves of all results files under distinct names.

    A codec of a shipped file that is also measured is left out, because it was measured with the same settings.
    """
    from hpcmref.bench.curves import shipped

    distinct: list[Curve] = []
    taken = set(measured)
    for source, curves in fixed.items():
        for curve in curves:
            if source in shipped() and curve.name in measured:
                continue
            name = curve.name
            while name in taken:
                name += " (fixed)"
            taken.add(name)
            distinct.append(replace(curve, name=name))
    return distinct


def _find(anchor: str | None, names: Sequence[str]) -> str:
    """Return the name of the curve that BD-rates compare with. Raises ConfigError for an unknown or ambiguous name."""
    if anchor is None:
        preferred = [name for name in names if name.startswith("VTM")] + [name for name in names if name == "JPEG"]
        return [*preferred, *names][0]
    lowered = [name.lower() for name in names]
    if anchor.lower() in lowered:
        return names[lowered.index(anchor.lower())]
    meant = [name for name in names if name.lower().startswith(anchor.lower())]
    if len(meant) == 1:
        return meant[0]
    raise ConfigError(f"--anchor {anchor}: the curves of this run are {', '.join(names)}")


def _profile(model: str, images: Sequence[Path], device: str, repeat: int) -> None:
    from hpcmref import checkpoints, codec
    from hpcmref.bench import profile
    from hpcmref.cli.tables import console_for, print_profile
    from hpcmref.model import PRESETS
    from hpcmref.picture.images import open_image

    known = {each.name for each in checkpoints.available()}
    untrained = model in PRESETS and model not in known
    checkpoint = profile.untrained(model) if untrained else checkpoints.load(checkpoints.find(model))
    image = open_image(images[0]) if images else profile.photograph()
    found = profile.profile(checkpoint, codec.device_of(device), image, repeat=repeat)
    print_profile(model, image.size, repeat, found, console_for())


def _report(results: Results, plan: _Plan, folder: Path, tables: Console | None) -> None:
    from hpcmref.bench import viewer
    from hpcmref.bench.report import write
    from hpcmref.bench.run import names_of

    files = {name: path for path, name in names_of(plan.images).items() if name in results.images}
    complete = {curve.name for curve in results.curves if curve.source is None}
    shown = [codec for codec in plan.codecs if codec.name in complete]
    page = write(results, viewer.crop_sets(files, shown, results.outcome.measurements) if shown else [], folder)
    if tables is not None:
        print(f"The report is {page}", file=tables.file)


def _write(content: str, file: Path | None) -> None:
    """Write text to a file, or to standard output if the file is "-"."""
    from hpcmref.runtime.files import atomic_write

    if file is None:
        return
    if str(file) == "-":
        sys.stdout.write(content)
    else:
        atomic_write(file, content.encode())
