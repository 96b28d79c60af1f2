"""Rate-distortion curves: averages of a run, and results files (shipped, of others, and those of `bench --json`).

A results file is a JSON object:

    {"dataset": "Kodak", "images": 24, "conventions": "...",
     "curves": {"VTM-9.1": {"bpp": [...], "psnr": [...], "source": "..."}, ...}}

with bits per pixel and dB. The files that `hpcmref bench --json` writes are such files too, and so is the form that
CompressAI publishes, {"name": "...", "results": {"bpp": [...], "psnr": [...]}}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from hpcmref.bench.measure import Measurement
from hpcmref.errors import ConfigError, near

CONVENTIONS = (
    "bpp is of the real files, averaged over the images; psnr is the mean of the per-image RGB PSNRs in dB (peak 255); "
    "ms_ssim_db is the mean of the per-image MS-SSIMs in dB, -10 log10(1 - MS-SSIM); ssimulacra2 and "
    "cvvdp (JOD) are means over the images; seconds are means of per-image "
    "medians after warm-up, without file input and output; memory is the largest working memory of an image in bytes"
)
SHIPPED = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Point:
    """The averages over all images of one codec at one quality, or at one target size.

    bpp, target: bits per pixel. psnr, ms_ssim_db: dB. cvvdp: JOD. memory: the largest of all images, in bytes.
    """

    bpp: float
    psnr: float
    ms_ssim_db: float | None = None
    quality: int | None = None
    encode_seconds: float | None = None
    decode_seconds: float | None = None
    memory: int | None = None
    ssimulacra2: float | None = None
    cvvdp: float | None = None
    target: float | None = None


@dataclass(frozen=True)
class Curve:
    """The points of one codec, in order of rate.

    source, dataset, images: for results that were not measured in this run, their origin, the set of images, and its
    number of images.
    """

    name: str
    points: tuple[Point, ...]
    source: str | None = None
    dataset: str | None = None
    images: int | None = None


def averages(measurements: Iterable[Measurement]) -> tuple[list[Curve], list[str]]:
    """Return the curve of every codec, averaged over the same images, and the names of these images.

    An image is left out of all averages if any codec has failed on it at any quality. Otherwise a codec that fails on
    difficult images would look better. A quality that failed on every image is left out itself.
    """
    table: dict[tuple[str, int | float], dict[str, Measurement]] = {}
    for each in measurements:
        table.setdefault((each.codec, each.quality if each.target is None else each.target), {})[each.image] = each
    if not table:
        return [], []
    images = sorted(set.intersection(*(set(row) for row in table.values())))
    curves = []
    if images:
        for codec in dict.fromkeys(codec for codec, _ in table):
            rows = [[row[image] for image in images] for (name, _), row in table.items() if name == codec]
            curves.append(Curve(codec, tuple(sorted(map(_point, rows), key=lambda point: point.bpp))))
    return curves, images


def of_image(measurements: Iterable[Measurement], codec: str) -> Curve:
    """Return the curve of one codec on one image. measurements: those of this image."""
    points = [_point([each]) for each in measurements if each.codec == codec]
    return Curve(codec, tuple(sorted(points, key=lambda point: point.bpp)))


def _point(row: Sequence[Measurement]) -> Point:
    memories = [each.memory for each in row if each.memory is not None]
    return Point(
        bpp=fmean(each.bpp for each in row),
        psnr=fmean(each.psnr for each in row),
        ms_ssim_db=_mean([each.ms_ssim_db for each in row]),
        quality=row[0].quality if row[0].target is None else None,
        encode_seconds=fmean(each.encode_seconds for each in row),
        decode_seconds=fmean(each.decode_seconds for each in row),
        memory=max(memories, default=None),
        ssimulacra2=_mean([each.ssimulacra2 for each in row]),
        cvvdp=_mean([each.cvvdp for each in row]),
        target=row[0].target,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if a value is missing."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


COLUMNS = tuple(field.name for field in fields(Point))


def to_json(curves: Iterable[Curve]) -> dict[str, dict[str, Any]]:
    """Return the item "curves" of a results file. Infinite numbers, which JSON does not have, become null."""
    written: dict[str, dict[str, Any]] = {}
    for curve in curves:
        columns = {name: [_finite(getattr(point, name)) for point in curve.points] for name in COLUMNS}
        kept = {name: column for name, column in columns.items() if any(value is not None for value in column)}
        written[curve.name] = {**kept, **({"source": curve.source} if curve.source else {})}
    return written


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def shipped() -> list[str]:
    """Return the names of the results files in the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def read(name: str) -> list[Curve]:
    """Read the curves of a results file. name: one of `shipped`, or a path. Raises ConfigError."""
    path = SHIPPED / f"{name}.json" if name in shipped() else Path(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = list(shipped())
        raise ConfigError(
            f"there are no results {name!r}: neither a file nor one of {', '.join(known)}{near(name, known)}"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    try:
        if "curves" in content:
            found = content["curves"]
        else:
            found = {content["name"]: {**content["results"], "source": content.get("description")}}
        facts = content.get("dataset"), content.get("images")
        return [_curve(label, columns, *facts, path) for label, columns in found.items()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not a results file: {type(error).__name__} {error}") from error


def _curve(name: str, columns: Mapping[str, Any], dataset: str | None, images: int | None, path: Path) -> Curve:
    psnrs = columns["psnr"] if "psnr" in columns else columns["psnr-rgb"]
    if len(psnrs) != len(columns["bpp"]):
        raise ValueError(f"{name} has {len(columns['bpp'])} rates and {len(psnrs)} PSNRs")
    extra = {name: columns.get(name) or [None] * len(psnrs) for name in COLUMNS[2:]}
    points = [
        Point(float(bpp), math.inf if psnr is None else float(psnr), *rest)
        for bpp, psnr, *rest in zip(columns["bpp"], psnrs, *extra.values(), strict=True)
    ]
    source = columns.get("source") or str(path)
    return Curve(name, tuple(sorted(points, key=lambda point: point.bpp)), source, dataset, images)
