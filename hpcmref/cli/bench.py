"""The command `bench`: compare hpcmref with other codecs on the user's own images."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpcmref.cli.encode import IMAGE_SUFFIXES
from hpcmref.cli.jobs import inputs
from hpcmref.cli.options import Device, DeviceOption, QuietOption, RayOption, ThreadsOption, parse_jobs, use_threads
from hpcmref.errors import ConfigError, HpcmrefError
from hpcmref.runtime.signals import Stopped

if TYPE_CHECKING:
    from rich.console import Console

    from hpcmref.bench.codecs import Codec
    from hpcmref.bench.curves import Curve
    from hpcmref.bench.generations import Losses
    from hpcmref.bench.measure import Failure, Measurement, Setting
    from hpcmref.bench.output import Results
    from hpcmref.bench.run import Listener

# Option -> title, and name of the published results that were measured on the same images.
DATASETS = {
    "kodak": ("Kodak", "kodak"),
    "clic": ("CLIC 2020 professional (validation)", "clic-professional-valid"),
    "tecnick": ("Tecnick", "tecnick"),
}


def bench(
    folders: Annotated[
        list[str] | None, typer.Argument(metavar="[FOLDER]...", help="Folders of images, and images.")
    ] = None,
    codecs: Annotated[
        str | None,
        typer.Option(
            "--codecs",
            metavar="LIST",
            help="hpcmref, jpeg, webp, avif, jxl, with commas between; Pillow's save options may follow: "
            "avif:speed=0+subsampling=4:2:0. hpcmref always writes the learned stream; hpcmref:choose=1 may write a "
            "lossless one, as encode does. By default all that are installed.",
        ),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            "--models",
            metavar="LIST",
            help="Models of hpcmref, with commas between: names or .safetensors files; NAME=FILE gives another name, "
            "NAME=FILE+FILE+... makes one curve of models of one rate.",
        ),
    ] = None,
    qualities: Annotated[
        list[str] | None,
        typer.Option(
            "--qualities",
            metavar="[CODEC=]LIST",
            help="What to measure: 8,16,24 or 0:63:9, for hpcmref, or for another codec: jpeg=30,60,90. Repeatable.",
        ),
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            "--encoder",
            metavar="NAME=ENCODE|DECODE",
            help="Measure other programs too: 'NAME=cjxl {in} {out}.jxl -q {q}|djxl {out}.jxl {png}', with --qualities "
            "NAME=LIST. They are run without a shell; docs/bench.md has recipes. Repeatable.",
        ),
    ] = None,
    time_limit: Annotated[
        float,
        typer.Option("--time-limit", min=0.1, metavar="SECONDS", help="How long a command of --encoder may take."),
    ] = 600,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="bpp=LIST",
            help="Compare at equal size: for every image each codec uses the quality whose file comes nearest to these "
            "bits per pixel, as in bpp=0.25,0.5.",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            metavar="LIST",
            help="Which to measure besides PSNR: ms-ssim, ssimulacra2, cvvdp. By default all that are installed.",
        ),
    ] = None,
    generations: Annotated[
        int | None,
        typer.Option(
            "--generations",
            min=1,
            metavar="N",
            help="Encode and decode each image N times in a row, and compare the results with the original.",
        ),
    ] = None,
    results: Annotated[
        list[str] | None,
        typer.Option(
            "--results",
            metavar="NAME|FILE",
            help="Fixed results to compare with: kodak, clic-professional-valid, clic2020-professional, tecnick, "
            "or a JSON file (an earlier --json, for one). Repeatable.",
        ),
    ] = None,
    anchor: Annotated[
        str | None,
        typer.Option("--anchor", metavar="CODEC", help="What BD-rates are against. By default VTM, or else JPEG."),
    ] = None,
    limits: Annotated[
        str | None,
        typer.Option(
            "--range",
            metavar="LOW:HIGH",
            help="Restrict BD-rates to these bits per pixel: points outside are left out, and both curves are "
            "interpolated at the ends.",
        ),
    ] = None,
    kodak: Annotated[
        str | None,
        typer.Option("--kodak", metavar="DIR", help="The folder of the 24 Kodak images."),
    ] = None,
    clic: Annotated[
        str | None,
        typer.Option("--clic", metavar="DIR", help="The folder of the 41 images of CLIC professional validation."),
    ] = None,
    tecnick: Annotated[
        str | None, typer.Option("--tecnick", metavar="DIR", help="The folder of the 100 Tecnick images.")
    ] = None,
    device: DeviceOption = Device.auto,
    repeat: Annotated[
        int, typer.Option("--repeat", min=1, metavar="N", help="Measure every time N times, and report the median.")
    ] = 1,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            parser=parse_jobs,
            metavar="N|auto",
            help="The number of processes. With more than one, the measured times are longer.",
        ),
    ] = 1,
    threads: ThreadsOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Use the first N images.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="FILE",
            help="Append every measurement to FILE, and do not repeat those that it contains already.",
        ),
    ] = None,
    ray: RayOption = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write all results as JSON, which --results can read. - is standard output; tables then go to "
            "standard error.",
        ),
    ] = None,
    csv_file: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            metavar="FILE",
            help="Write averages and measurements, with tabs if FILE ends with .tsv; - is standard output, as above.",
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Measure how long each stage of hpcmref takes, on the first image or a generated one of 768x512. "
            "Here, a model may also be a preset without weights: base, large, phi, light.",
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="DIR", help="Write a page with curves, tables and a viewer, and PNG curves."),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Measure codecs side by side on your own images: size, quality, time, memory, BD-rate."""
    _check_outputs(json_file, csv_file, report, generations)
    if not 0 < time_limit <= 1e6:
        raise typer.BadParameter("it must be a number of seconds, at most a million.", param_hint="--time-limit")
    use_threads(threads)
    if profile:
        for model in models.split(",") if models is not None else [_default()]:
            _profile(model, _images(folders or [], quiet)[:1], device.value, repeat)
        return
    _need_extra()
    from hpcmref.bench import curves, output
    from hpcmref.bench import generations as lossy
    from hpcmref.bench import metrics as quality
    from hpcmref.bench.bdrate import LEAST_POINTS
    from hpcmref.bench.run import run
    from hpcmref.cli.tables import console_for, print_results

    shortcuts = {"kodak": kodak, "clic": clic, "tecnick": tecnick}
    asked = {name: folder for name, folder in shortcuts.items() if folder is not None}
    folders = [*(folders or []), *asked.values()]
    if not folders:
        raise typer.BadParameter("name a folder of images.")
    sources = dict.fromkeys([*(DATASETS[dataset][1] for dataset in asked), *(results or [])])
    fixed = {source: curves.read(source) for source in sources}
    images = _images(folders, quiet)[:limit]
    between = _range(limits) if limits is not None else None
    chosen = _codecs(codecs, models, encoder or [], qualities or [], time_limit, device.value)
    settings = _settings(qualities or [], target, chosen)
    optional = quality.chosen(metrics)
    title = " + ".join(DATASETS[dataset][0] for dataset in asked) or Path(folders[0]).resolve().name
    facts = output.settings(chosen, optional, repeat, jobs, ray)
    tables = None if quiet else console_for(stderr="-" in map(str, (json_file, csv_file)))
    if generations is not None:
        losses = _generations(images, chosen, settings, generations, optional, jobs, ray, threads, title, tables)
        _write(_as_text(lossy.as_json(losses, title, facts)), json_file)
        _write(lossy.as_csv(losses, _separator(csv_file)), csv_file)
        raise typer.Exit(1 if losses.failures else 0)
    others = _distinct(fixed, {codec.name for codec in chosen})
    name = _find(anchor, [*(codec.name for codec in chosen), *(curve.name for curve in others)])

    with _progress(len(images), quiet) as listener:
        outcome = run(images, chosen, settings, repeat, jobs, ray, resume, listener, optional, threads)
    measured, averaged = curves.averages(outcome.measurements)
    every = [*measured, *others]
    reference = next((curve for curve in every if curve.name == name), None)
    if target is not None and min(map(len, settings.values())) < LEAST_POINTS:
        reference = None  # the targets are compared in the table of averages; curves need more points
    comparisons = output.compare(every, reference, between, outcome.measurements, averaged) if reference else []
    found = output.Results(
        title=title,
        curves=every,
        images=averaged,
        outcome=outcome,
        anchor=name if reference else None,
        comparisons=comparisons,
        limits=between,
        settings=facts,
    )
    if tables is not None:
        print_results(found, tables)
    _write(_as_text(output.as_json(found)), json_file)
    _write(output.as_csv(found, _separator(csv_file)), csv_file)
    if report is not None:
        _report(found, images, chosen, report, tables)
    if outcome.failures:
        raise typer.Exit(1)


def _check_outputs(json_file: Path | None, csv_file: Path | None, report: Path | None, generations: int | None) -> None:
    if str(report) == "-":
        raise typer.BadParameter("a report is a folder; it cannot go to standard output.", param_hint="--report")
    if str(json_file) == str(csv_file) == "-":
        raise typer.BadParameter("only one of --json and --csv can go to standard output.", param_hint="--csv")
    for name, file in (("--json", json_file), ("--csv", csv_file)):
        if file is not None and str(file) != "-" and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise typer.BadParameter(f"{file} is a folder, or is in a folder that does not exist.", param_hint=name)
    if report is not None and generations is not None:
        raise typer.BadParameter("there is no page for --generations; use --json or --csv.", param_hint="--report")


def _codecs(
    names: str | None, models: str | None, encoders: Sequence[str], qualities: Sequence[str], limit: float, device: str
) -> list[Codec]:
    from hpcmref.bench import codecs
    from hpcmref.bench.external import externals

    asked = names.split(",") if names is not None else codecs.available()
    ours = codecs.codecs_of(asked, models.split(",") if models is not None else [_default()], device)
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


def _default() -> str:
    from hpcmref.checkpoints import DEFAULT_MODEL

    return DEFAULT_MODEL


def _images(folders: Sequence[str], quiet: bool) -> list[Path]:
    if "-" in folders:
        raise typer.BadParameter("standard input is not a folder of images.")
    planned = inputs(folders, IMAGE_SUFFIXES)
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


@contextlib.contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Listener]:
    """Yield a function to be called after every image.

    It prints failures on stderr. If stderr is a terminal, a progress bar also shows averages.
    """

    images: set[str] = set()

    def note(measured: Sequence[Measurement], failed: Sequence[Failure]) -> None:
        images.update(each.image for each in measured)
        images.update(each.image for each in failed)
        for each in failed:
            print(f"hpcmref: {each}", file=sys.stderr)

    try:
        if quiet or sys.stderr is None or not sys.stderr.isatty():
            yield note
        else:
            with _bar(total, images, note) as update:
                yield update
    except Stopped as stopped:
        raise Stopped(stopped.number, f"after {len(images)} of {total} images") from None


@contextlib.contextmanager
def _bar(total: int, images: Collection[str], note: Listener) -> Iterator[Listener]:
    """Yield a function to be called after every image. It calls `note` and updates a progress bar with averages."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    sums: dict[str, list[float]] = {}  # codec -> count, bpp, dB
    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)

        def update(measured: Sequence[Measurement], failed: Sequence[Failure]) -> None:
            note(measured, failed)
            for each in measured:
                line = sums.setdefault(each.codec, [0, 0, 0])
                for index, value in enumerate((1, each.bpp, each.psnr)):
                    line[index] += value
            text = "  ".join(f"{codec} {bpp / n:.2f} bpp {psnr / n:.1f} dB" for codec, (n, bpp, psnr) in sums.items())
            progress.update(task, completed=len(images), description=text)

        yield update


def _generations(
    images: Sequence[Path],
    chosen: Sequence[Codec],
    settings: Mapping[str, Sequence[Setting]],
    generations: int,
    optional: frozenset[str],
    jobs: int,
    ray: str | None,
    threads: int | None,
    title: str,
    tables: Console | None,
) -> Losses:
    from hpcmref.bench import generations as lossy
    from hpcmref.cli.tables import print_generations

    with _progress(len(images), tables is None) as listener:
        losses = lossy.run(
            images,
            chosen,
            settings,
            generations,
            optional,
            jobs,
            ray,
            lambda image, failed: listener([], failed),
            threads,
        )
    if tables is not None:
        print_generations(losses, title, tables)
    return losses


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


def _report(
    results: Results, images: Sequence[Path], codecs: Sequence[Codec], folder: Path, tables: Console | None
) -> None:
    from hpcmref.bench import viewer
    from hpcmref.bench.report import write
    from hpcmref.bench.run import names_of

    files = {name: path for path, name in names_of(images).items() if name in results.images}
    complete = {curve.name for curve in results.curves if curve.source is None}
    shown = [codec for codec in codecs if codec.name in complete]
    page = write(results, viewer.exhibits(files, shown, results.outcome.measurements) if shown else [], folder)
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


def _separator(file: Path | None) -> str:
    return "\t" if file is not None and file.suffix.lower() == ".tsv" else ","


def _as_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"
