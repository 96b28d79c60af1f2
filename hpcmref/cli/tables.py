"""Print the results of `hpcmref bench` as tables. In a pipe, each row is one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from hpcmref.bench.bdrate import Delta, Spread
    from hpcmref.bench.curves import Curve, Point
    from hpcmref.bench.generations import Losses
    from hpcmref.bench.output import Comparison, Results
    from hpcmref.bench.profile import Profile


def console_for(stderr: bool = False) -> Console:
    """Return a console on standard output or standard error. If that is not a terminal, lines are not wrapped."""
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=10_000)


def print_results(results: Results, console: Console) -> None:
    """Print the averages, the comparisons with the anchor, the sources of results that were not measured, and notes."""
    from rich.text import Text

    from hpcmref.bench.metrics import METRICS
    from hpcmref.bench.output import notes

    console.print(Text(f"{results.title}: averages over {len(results.images)} images; PSNR is the mean of RGB PSNRs"))
    console.print()
    curves = [curve for curve in results.curves if not curve.source]
    points = [point for curve in curves for point in curve.points]
    shown = [metric for metric in METRICS if any(getattr(point, metric.field) is not None for point in points)]
    setting = "target" if any(point.target is not None for point in points) else "quality"
    _show(
        console,
        ("codec", setting, "bpp", *(metric.heading for metric in shown), "encode s", "decode s", "memory MB"),
        [_point_cells(curve, point, [metric.field for metric in shown]) for curve in curves for point in curve.points],
    )
    if results.comparisons:
        within = f" between {results.limits[0]:g} and {results.limits[1]:g} bpp" if results.limits else ""
        console.print()
        console.print(Text(f"Against {results.anchor}{within} (negative BD-rate: smaller files)"))
        console.print()
        others = [metric for metric in METRICS[1:] if any(metric.field in each.rates for each in results.comparisons)]
        _show(
            console,
            ("codec", "BD-rate", "over dB", "of its range", "of the anchor's", "mean of images (95 %)", "smaller on",
             "BD-PSNR", *(f"BD-rate {metric.title}" for metric in others), "note"),
            [_comparison_cells(each, [metric.field for metric in others]) for each in results.comparisons],
        )  # fmt: skip
    console.print()
    if fixed := [curve for curve in results.curves if curve.source]:
        console.print(Text("Not measured here: " + "; ".join(f"{curve.name}: {curve.source}" for curve in fixed)))
    for note in notes(results):
        console.print(Text(note))


def _show(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _point_cells(curve: Curve, point: Point, metrics: Sequence[str]) -> list[str]:
    setting = "" if point.quality is None else str(point.quality)
    return [
        curve.name,
        setting if point.target is None else f"{point.target:g} bpp",
        f"{point.bpp:.4f}",
        *(_number(value, 3) for value in (*(getattr(point, name) for name in metrics), *_seconds(point))),
        "" if point.memory is None else f"{point.memory / 1e6:.0f}",
    ]


def _seconds(point: Point) -> tuple[float | None, float | None]:
    return point.encode_seconds, point.decode_seconds


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _comparison_cells(each: Comparison, others: Sequence[str]) -> list[str]:
    rate, psnr = each.rates["psnr"], each.psnr
    return [
        each.name,
        _percent(rate),
        "" if rate.value is None else f"{rate.low:.2f} to {rate.high:.2f}",
        "" if rate.value is None else f"{rate.share:.0%}",
        "" if rate.value is None else f"{rate.anchor_share:.0%}",
        *_spread_cells(each.images),
        "-" if psnr.value is None else f"{psnr.value:+.3f} dB",
        *(_percent(each.rates.get(metric)) for metric in others),
        rate.note,
    ]


def _percent(delta: Delta | None) -> str:
    return "-" if delta is None or delta.value is None else f"{delta.value:+.2f} %"


def _spread_cells(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["", ""]
    interval = "" if spread.low != spread.low else f" ({spread.low:+.2f} to {spread.high:+.2f})"
    return [f"{spread.mean:+.2f} %{interval}", f"{spread.smaller} of {len(spread.values)}"]


def print_generations(losses: Losses, title: str, console: Console) -> None:
    """Print the PSNR after each measured generation, and SSIMULACRA2 if it was measured."""
    from rich.text import Text

    from hpcmref.bench.generations import averages
    from hpcmref.bench.metrics import BY_FIELD

    rows = averages(losses)
    console.print(Text(f"{title}: quality against the original after encoding and decoding again and again"))
    numbers = [each.generation for each in rows[0][2]] if rows else []
    for name in ("psnr", "ssimulacra2"):
        if rows and getattr(rows[0][2][0], name) is not None:
            console.print()
            heading = BY_FIELD[name].heading
            _show(
                console,
                ("codec", "setting", "bpp, first", "bpp, last", *(f"{heading} {number}" for number in numbers)),
                [
                    [codec, setting, f"{means[0].bpp:.4f}", f"{means[-1].bpp:.4f}",
                     *(f"{getattr(mean, name):.3f}" for mean in means)]
                    for codec, setting, means in rows
                ],
            )  # fmt: skip


def print_profile(model: str, size: tuple[int, int], repeat: int, found: Profile, console: Console) -> None:
    """Print the time of each stage of encoding and decoding one image. size: (width, height). repeat: runs of each."""
    from dataclasses import astuple

    import torch
    from rich.table import Table

    from hpcmref.bench.profile import StageProfile

    rates = ", ".join(f"{2e-9 * rate:.0f} ({str(dtype)[6:]})" for dtype, rate in found.rates.items())
    console.print(
        f"{model}, {size[0]}x{size[1]}, {torch.get_num_threads()} threads, best of {repeat}. The best here: "
        f"10^9 operations a second {rates}, {1e-9 * found.bytes_per_second:.1f} GB/s (copy)."
    )
    for name, stages in (("encode", found.encode), ("decode", found.decode)):
        total = sum(stage.seconds for stage in stages.values())
        table = Table(name, "ms", "share", "MMAC", "GOP/s", "of the best", "MB moved", "GB/s", "of the best")
        for column in table.columns[1:]:
            column.justify = "right"
        whole: Any = StageProfile(*(sum(values) for values in zip(*map(astuple, stages.values()), strict=True)))
        for title, stage in (*stages.items(), ("all", whole)):
            macs, least, moved = (each / max(stage.seconds, 1e-9) for each in (stage.macs, stage.least, stage.moved))
            table.add_row(
                title, f"{1e3 * stage.seconds:.1f}", f"{stage.seconds / total:.1%}", f"{1e-6 * stage.macs:.0f}",
                f"{2e-9 * macs:.0f}", f"{least:.0%}", f"{1e-6 * stage.moved:.0f}",
                f"{1e-9 * moved:.1f}", f"{moved / found.bytes_per_second:.0%}",
            )  # fmt: skip
        console.print(table)
        networks = total - stages["pixels"].seconds
        seconds = found.plain_encode if name == "encode" else found.plain_decode
        console.print(
            f"The networks alone as plain PyTorch in float32, in another process: {1e3 * seconds:.1f} ms, "
            f"{seconds / networks:.2f} times what hpcmref takes without pixels.\n"
        )
