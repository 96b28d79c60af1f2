"""Write the results of a run as JSON (which is also a results file), CSV or TSV."""

from __future__ import annotations

import csv
import io
import math
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpcmref._version import __version__
from hpcmref.bench import bdrate, curves
from hpcmref.bench.bdrate import Delta, Spread
from hpcmref.bench.codecs import Codec
from hpcmref.bench.curves import CONVENTIONS, Curve, to_json
from hpcmref.bench.measure import Measurement
from hpcmref.bench.metrics import METRICS
from hpcmref.bench.run import Outcome


@dataclass(frozen=True)
class Comparison:
    """The comparison of one curve with the anchor.

    rates: BD-rates in percent, by the `field` of each metric that both have. psnr: BD-PSNR in dB. images: BD-rates
    (PSNR) of single images, or None unless both codecs were measured in this run.
    """

    name: str
    rates: Mapping[str, Delta]
    psnr: Delta
    images: Spread | None = None


@dataclass(frozen=True)
class Results:
    """All results of a run.

    title: the name of the image set. curves: all curves, measured ones first. images: the names of the averaged images.
    anchor: the name of the curve that others are compared with. limits: the range of BD-rates in bits per pixel.
    settings: what else the numbers depend on, see `settings`.
    """

    title: str
    curves: Sequence[Curve]
    images: Sequence[str]
    outcome: Outcome
    anchor: str | None
    comparisons: Sequence[Comparison]
    limits: tuple[float, float] | None
    settings: Mapping[str, Any]


def compare(
    every: Sequence[Curve],
    anchor: Curve,
    limits: tuple[float, float] | None,
    measurements: Sequence[Measurement] = (),
    images: Sequence[str] = (),
) -> list[Comparison]:
    """Compare every other curve of `every` with the anchor.

    limits: the range in bits per pixel. measurements, images: for BD-rates of single images.
    """
    by_image = {name: [each for each in measurements if each.image == name] for name in images}
    return [
        Comparison(
            curve.name,
            {metric: bdrate.bd_rate(anchor, curve, metric, limits) for metric in shared(anchor, curve)},
            bdrate.bd_psnr(anchor, curve, "psnr", limits),
            _of_images(by_image, anchor.name, curve.name, limits) if anchor.source is curve.source is None else None,
        )
        for curve in every
        if curve.name != anchor.name
    ]


def shared(*some: Curve) -> list[str]:
    """Return the fields of the metrics that all points of all curves have, and always PSNR."""
    return [
        metric.field
        for metric in METRICS
        if metric.field == "psnr"
        or all(getattr(point, metric.field) is not None for curve in some for point in curve.points)
    ]


def _of_images(
    by_image: Mapping[str, Sequence[Measurement]], anchor: str, name: str, limits: tuple[float, float] | None
) -> Spread | None:
    values = {}
    for image, measurements in by_image.items():
        sides = curves.of_image(measurements, anchor), curves.of_image(measurements, name)
        delta = bdrate.bd_rate(*sides, "psnr", limits)
        if delta.value is not None:
            values[image] = delta.value
    return bdrate.spread(values, len(by_image)) if values else None


def settings(
    codecs: Sequence[Codec], metrics: Collection[str], repeat: int, jobs: int, ray: str | None
) -> dict[str, Any]:
    """Return the settings of a run and a description of the machine, for the JSON output.

    metrics: the metrics besides PSNR. repeat: how often times were measured. jobs: the number of processes. ray: the
    address of a Ray cluster, or None.
    """
    return {
        "hpcmref": __version__,
        "codecs": {codec.name: codec.identity for codec in codecs},
        "devices": {codec.name: codec.device for codec in codecs},
        "metrics": ["psnr", *sorted(metrics)],
        "repeat": repeat,
        "jobs": jobs,
        "ray": ray is not None,
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system()},
    }


NEAR = 0.05
"""The relative difference between a mean size and its target above which a note is added."""


def notes(results: Results) -> list[str]:
    """Return notes on what limits the meaning of the results, one sentence each."""
    found = []
    for dataset, count in sorted({(curve.dataset or "", curve.images) for curve in results.curves if curve.images}):
        if count != len(results.images):
            found.append(
                f"Beware: the fixed results of {dataset} are of {count} images, and not of {len(results.images)}; "
                "BD-rates between them and the others mean little."
            )
    if results.settings["jobs"] > 1 or results.settings["ray"]:
        found.append("Several processes were at work, so the seconds are longer than those of one image alone.")
    for curve in results.curves:
        for point in curve.points:
            if point.target is not None and abs(point.bpp / point.target - 1) > NEAR:
                found.append(
                    f"{curve.name} comes no nearer to {point.target:g} bpp than {point.bpp:.3f} on average: compare "
                    "its quality there with care."
                )
    left_out = {each.image for each in results.outcome.measurements} - set(results.images)
    left_out |= {each.image for each in results.outcome.failures} - set(results.images)
    if left_out:
        found.append(f"Left out of the averages because something failed: {', '.join(sorted(left_out))}.")
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def as_json(results: Results) -> dict[str, Any]:
    """Return a results file (see `curves`) that also has all measurements and settings."""
    return {
        "dataset": results.title,
        "images": len(results.images),
        "conventions": CONVENTIONS,
        "notes": notes(results),
        "settings": results.settings,
        "curves": to_json(results.curves),
        "comparison": {
            "anchor": results.anchor,
            "bpp_range": results.limits,
            "curves": [_plain(asdict(each)) for each in results.comparisons],
        },
        "failures": [asdict(each) for each in results.outcome.failures],
        "measurements": [
            _plain({**asdict(each), "ms_ssim_db": each.ms_ssim_db}) for each in results.outcome.measurements
        ],
    }


def _plain(value: Any) -> Any:
    """Replace infinite numbers and NaN, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


COLUMNS = (
    "image", "codec", "quality", "width", "height", "bytes", "bpp", "psnr_db", "ms_ssim_db", "encode_seconds",
    "decode_seconds", "memory_bytes", "ssimulacra2", "cvvdp_jod", "target_bpp",
)  # fmt: skip


def as_csv(results: Results, separator: str = ",") -> str:
    """Return a table of the averages of all measured curves (image "(mean of N)"), followed by every measurement."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator, lineterminator="\n")
    writer.writerow(COLUMNS)
    mean = f"(mean of {len(results.images)})"
    for curve in results.curves:
        for point in curve.points if curve.source is None else ():
            writer.writerow(
                [mean, curve.name, _or_empty(point.quality), "", "", "",
                 *_numbers(point.bpp, point.psnr, point.ms_ssim_db, point.encode_seconds, point.decode_seconds),
                 _or_empty(point.memory), *_numbers(point.ssimulacra2, point.cvvdp, point.target)]
            )  # fmt: skip
    for each in results.outcome.measurements:
        writer.writerow(_row(each))
    return file.getvalue()


def _row(each: Measurement) -> list[Any]:
    return [
        each.image, each.codec, each.quality, each.width, each.height, each.size,
        *_numbers(each.bpp, each.psnr, each.ms_ssim_db, each.encode_seconds, each.decode_seconds),
        _or_empty(each.memory), *_numbers(each.ssimulacra2, each.cvvdp, each.target),
    ]  # fmt: skip


def _numbers(*values: float | None) -> list[str]:
    return ["" if value is None else f"{value:.4f}" for value in values]


def _or_empty(value: int | None) -> int | str:
    return "" if value is None else value
