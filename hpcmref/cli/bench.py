"""How good is hpcmref on a user's own images, against the codecs they use today?"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpcmref.cli.batch import expand
from hpcmref.cli.encode import IMAGE_SUFFIXES
from hpcmref.cli.options import Device, DeviceOption, QuietOption, RayOption
from hpcmref.errors import ConfigError, HpcmrefError

if TYPE_CHECKING:
    from hpcmref.bench.codecs import Codec
    from hpcmref.bench.curves import Curve, Point
    from hpcmref.bench.measure import Failure, Measurement
    from hpcmref.bench.output import Comparison, Results
    from hpcmref.bench.run import Listener

# Option -> title and fixed results that were measured on the same images.
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
            "avif:speed=0+subsampling=4:2:0. By default all that are here.",
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
            help="Bits per pixel that BD-rates are restricted to: points outside are dropped, and both curves are "
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
        int, typer.Option("--repeat", min=1, metavar="N", help="Time everything N times; the median counts.")
    ] = 1,
    jobs: Annotated[
        int,
        typer.Option("--jobs", min=1, metavar="N", help="Processes at work; with more than one, seconds are longer."),
    ] = 1,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="The first N images only.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="FILE",
            help="Keep every measurement in FILE as it is made, and don't repeat those that are there.",
        ),
    ] = None,
    ray: RayOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything; it is also a file for --results.")
    ] = None,
    csv_file: Annotated[
        Path | None,
        typer.Option(
            "--csv", metavar="FILE", help="Write averages and measurements, with tabs if FILE ends with .tsv."
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Instead: where the time of hpcmref goes, on the first image (or a made-up one of 768x512). A model "
            "may also be a preset without weights: base, large, phi, light.",
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="DIR", help="Write a page with curves, tables and a viewer, and PNG curves."),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Measure codecs side by side on your own images: size, quality, time, memory, BD-rate."""
    if profile:
        for model in models.split(",") if models else [_default()]:
            _profile(model, _images(folders or [])[:1], device.value, repeat)
        return
    _need_extra()
    from hpcmref.bench import codecs as known
    from hpcmref.bench import curves, output
    from hpcmref.bench.run import run

    shortcuts = {"kodak": kodak, "clic": clic, "tecnick": tecnick}
    asked = {name: folder for name, folder in shortcuts.items() if folder is not None}
    folders = [*(folders or []), *asked.values()]
    if not folders:
        raise typer.BadParameter("name a folder of images.")
    sources = dict.fromkeys([*(DATASETS[dataset][1] for dataset in asked), *(results or [])])
    fixed = {source: curves.read(source) for source in sources}
    images = _images(folders)[:limit]
    between = _range(limits) if limits else None
    chosen = known.codecs_of(
        codecs.split(",") if codecs else known.available(), models.split(",") if models else [_default()], device.value
    )
    wanted = known.qualities_of(qualities or [], chosen)
    others = _distinct(fixed, {codec.name for codec in chosen})
    name = _find(anchor, [*(codec.name for codec in chosen), *(curve.name for curve in others)])

    with _progress(len(images), quiet) as listener:
        outcome = run(images, chosen, wanted, repeat, jobs, ray, resume, listener)
    measured, averaged = curves.averages(outcome.measurements)
    every = [*measured, *others]
    reference = next((curve for curve in every if curve.name == name), None)
    found = output.Results(
        title=" + ".join(DATASETS[dataset][0] for dataset in asked) or Path(folders[0]).resolve().name,
        curves=every,
        images=averaged,
        outcome=outcome,
        anchor=name if reference else None,
        comparisons=output.compare(every, reference, between) if reference else [],
        limits=between,
        settings=output.settings(chosen, repeat, jobs, ray),
    )
    if not quiet:
        _print(found)
    _write(found, json_file, csv_file)
    if report is not None:
        _report(found, images, chosen, report, quiet)
    if outcome.failures:
        raise typer.Exit(1)


def _need_extra() -> None:
    if importlib.util.find_spec("bjontegaard") is None:
        raise HpcmrefError("bench needs bjontegaard: pip install 'hpcmref[bench]'")


def _default() -> str:
    from hpcmref.checkpoints import DEFAULT_MODEL

    return DEFAULT_MODEL


def _images(folders: Sequence[str]) -> list[Path]:
    images = [path for path in expand(folders, IMAGE_SUFFIXES) if path is not None]
    if "-" in folders:
        raise typer.BadParameter("standard input is not a folder of images.")
    return list(dict.fromkeys(images))


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(":"))
        if not 0 < low < high < math.inf:
            raise ValueError
    except ValueError:
        raise typer.BadParameter("write LOW:HIGH in bits per pixel, as in 0.1:1.2.", param_hint="--range") from None
    return low, high


def _distinct(fixed: Mapping[str, Sequence[Curve]], measured: Collection[str]) -> list[Curve]:
    """Fixed curves by results file, under names that no other curve has.

    Of a shipped file, a codec that is also measured is left out: its settings there are our defaults.
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
    """The name of the curve that BD-rates are against. Raises ConfigError."""
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
    """Yields what to call for every image; failures are lines on stderr, and on a terminal a bar has the averages."""

    def complain(failed: Sequence[Failure]) -> None:
        for each in failed:
            where = "" if each.codec is None else f" ({each.codec}, quality {each.quality})"
            print(f"hpcmref: {each.image}{where}: {each.message}", file=sys.stderr)

    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield lambda measured, failed: complain(failed)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    sums: dict[str, list[float]] = {}  # codec -> count, bpp, dB
    images: set[str] = set()
    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)

        def update(measured: Sequence[Measurement], failed: Sequence[Failure]) -> None:
            complain(failed)
            for each in measured:
                line = sums.setdefault(each.codec, [0, 0, 0])
                for index, value in enumerate((1, each.bpp, each.psnr)):
                    line[index] += value
            images.update(each.image for each in measured)
            images.update(each.image for each in failed)
            text = "  ".join(f"{codec} {bpp / n:.2f} bpp {psnr / n:.1f} dB" for codec, (n, bpp, psnr) in sums.items())
            progress.update(task, completed=len(images), description=text)

        yield update


def _print(results: Results) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hpcmref.bench.output import notes

    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)  # no terminal to fit, so a line a row, whatever its length

    def show(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, heading in enumerate(headings):
            table.add_column(heading, justify="right" if index else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)

    console.print(Text(f"{results.title}: averages over {len(results.images)} images; PSNR is the mean of RGB PSNRs"))
    console.print()
    show(
        ("codec", "quality", "bpp", "PSNR dB", "MS-SSIM dB", "encode s", "decode s", "memory MB"),
        [_point_cells(curve.name, point) for curve in results.curves if not curve.source for point in curve.points],
    )
    if results.comparisons:
        within = f" between {results.limits[0]:g} and {results.limits[1]:g} bpp" if results.limits else ""
        console.print()
        console.print(Text(f"Against {results.anchor}{within} (negative BD-rate: smaller files)"))
        console.print()
        show(
            ("codec", "BD-rate", "over dB", "of its range", "of the anchor's", "BD-PSNR", "BD-rate MS-SSIM", "note"),
            [_comparison_cells(each) for each in results.comparisons],
        )
    console.print()
    if fixed := [curve for curve in results.curves if curve.source]:
        console.print(Text("Not measured here: " + "; ".join(f"{curve.name}: {curve.source}" for curve in fixed)))
    for note in notes(results):
        console.print(Text(note))


def _point_cells(name: str, point: Point) -> list[str]:
    return [
        name,
        "" if point.quality is None else str(point.quality),
        f"{point.bpp:.4f}",
        f"{point.psnr:.3f}",
        *(
            "" if value is None else f"{value:.3f}"
            for value in (point.ms_ssim_db, point.encode_seconds, point.decode_seconds)
        ),
        "" if point.memory is None else f"{point.memory / 1e6:.0f}",
    ]


def _comparison_cells(each: Comparison) -> list[str]:
    rate, psnr, similar = each.rate, each.psnr, each.rate_ms_ssim
    return [
        each.name,
        "-" if rate.value is None else f"{rate.value:+.2f} %",
        "" if rate.value is None else f"{rate.low:.2f} to {rate.high:.2f}",
        "" if rate.value is None else f"{rate.share:.0%}",
        "" if rate.value is None else f"{rate.anchor_share:.0%}",
        "-" if psnr.value is None else f"{psnr.value:+.3f} dB",
        "-" if similar.value is None else f"{similar.value:+.2f} %",
        rate.note,
    ]


def _profile(model: str, images: Sequence[Path], device: str, repeat: int) -> None:
    from dataclasses import astuple

    import torch
    from rich.console import Console
    from rich.table import Table

    from hpcmref import checkpoints, codec
    from hpcmref.bench import profile
    from hpcmref.model import PRESETS
    from hpcmref.picture.images import open_image

    known = {each.name for each in checkpoints.available()}
    untrained = model in PRESETS and model not in known
    checkpoint = profile.untrained(model) if untrained else checkpoints.load(checkpoints.find(model))
    image = open_image(images[0]) if images else profile.photograph()
    found = profile.profile(checkpoint, codec.device_of(device), image, repeat=repeat)
    console = Console()
    rates = ", ".join(f"{2e-9 * rate:.0f} ({str(dtype)[6:]})" for dtype, rate in found.rates.items())
    console.print(
        f"{model}, {image.width}x{image.height}, {torch.get_num_threads()} threads, best of {repeat}. The best here: "
        f"10^9 operations a second {rates}, {1e-9 * found.bytes_per_second:.1f} GB/s (copy)."
    )
    for name, costs in (("encode", found.encode), ("decode", found.decode)):
        total = sum(cost.seconds for cost in costs.values())
        table = Table(name, "ms", "share", "MMAC", "GOP/s", "of the best", "MB moved", "GB/s", "of the best")
        for column in table.columns[1:]:
            column.justify = "right"
        whole = profile.Cost(*(sum(values) for values in zip(*map(astuple, costs.values()), strict=True)))
        for stage, cost in (*costs.items(), ("all", whole)):
            macs, least, moved = (each / max(cost.seconds, 1e-9) for each in (cost.macs, cost.least, cost.moved))
            table.add_row(
                stage, f"{1e3 * cost.seconds:.1f}", f"{cost.seconds / total:.1%}", f"{1e-6 * cost.macs:.0f}",
                f"{2e-9 * macs:.0f}", f"{least:.0%}", f"{1e-6 * cost.moved:.0f}",
                f"{1e-9 * moved:.1f}", f"{moved / found.bytes_per_second:.0%}",
            )  # fmt: skip
        console.print(table)
        networks = total - costs["pixels"].seconds
        seconds = found.plain_encode if name == "encode" else found.plain_decode
        console.print(
            f"The networks alone as plain PyTorch in float32, in another process: {1e3 * seconds:.1f} ms, "
            f"{seconds / networks:.2f} times what hpcmref takes without pixels.\n"
        )


def _report(results: Results, images: Sequence[Path], codecs: Sequence[Codec], folder: Path, quiet: bool) -> None:
    from hpcmref.bench import viewer
    from hpcmref.bench.report import write
    from hpcmref.bench.run import names_of

    files = {name: path for path, name in names_of(images).items() if name in results.images}
    complete = {curve.name for curve in results.curves if curve.source is None}
    shown = [codec for codec in codecs if codec.name in complete]
    page = write(results, viewer.exhibits(files, shown, results.outcome.measurements) if shown else [], folder)
    if not quiet:
        print(f"The report is {page}")


def _write(results: Results, json_file: Path | None, csv_file: Path | None) -> None:
    from hpcmref.bench.output import as_csv, as_json
    from hpcmref.runtime.files import atomic_write

    if json_file is not None:
        atomic_write(json_file, (json.dumps(as_json(results), indent=1) + "\n").encode())
    if csv_file is not None:
        separator = "\t" if csv_file.suffix.lower() == ".tsv" else ","
        atomic_write(csv_file, as_csv(results, separator).encode())
