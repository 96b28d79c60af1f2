"""Compute BD-rate and BD-PSNR of two curves, or the reason why the curves cannot be compared.

BD-rate is the mean difference of log rate over the qualities that both curves reach, and BD-PSNR is the mean difference
of dB over the rates that both have. Both use the `bjontegaard` library with piecewise cubic interpolation (pchip).

A range of rates is applied to both curves first. Points outside are dropped, and where a curve crosses an end of the
range, a point is interpolated (pchip of dB over log rate). The curves are then compared over what both reach inside.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hpcmref.bench.curves import Curve
from hpcmref.bench.metrics import BY_FIELD

LEAST_POINTS = 4
LEAST_OCTAVES = 0.5
LEAST_SHARE = 1 / 3
"""The least that two curves must have in common: LEAST_OCTAVES of rate (BD-PSNR) or `Metric.least` (BD-rate), and
LEAST_SHARE of the narrower curve. Over less, a comparison depends more on the ends of the curves than on the codecs."""

RESAMPLES = 2000
LEAST_IMAGES = 3


@dataclass(frozen=True)
class Delta:
    """A mean difference between two curves, or the reason why there is none.

    value: percent for BD-rate (negative: smaller files), dB for BD-PSNR (positive: better pictures), or None.
    low, high: the range of the comparison, in dB for BD-rate and in bits per pixel for BD-PSNR.
    share, anchor_share: the parts of the curve's and of the anchor's own range that were compared, 0 to 1.
    note: the reason if value is None, or else what was left out.
    """

    value: float | None
    low: float = math.nan
    high: float = math.nan
    share: float = 0.0
    anchor_share: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Spread:
    """The BD-rates of single images in percent, their mean, and the 95 % bootstrap interval of the mean.

    values: image -> BD-rate, for the images that have one. total: the number of all images. low, high: the interval,
    NaN for fewer than LEAST_IMAGES values.
    """

    values: Mapping[str, float]
    total: int
    mean: float
    low: float
    high: float

    @property
    def smaller(self) -> int:
        """The number of images whose files are smaller than the anchor's at equal quality."""
        return sum(value < 0 for value in self.values.values())


def spread(values: Mapping[str, float], total: int) -> Spread:
    """Return the mean BD-rate of images with its 95 % interval, from resampling the images (bootstrap).

    values: image -> BD-rate in percent. total: the number of all images.
    """
    found = np.array(list(values.values()))
    if len(found) < LEAST_IMAGES:
        return Spread(values, total, float(found.mean()) if len(found) else math.nan, math.nan, math.nan)
    chosen = np.random.default_rng(0).integers(0, len(found), (RESAMPLES, len(found)))
    low, high = np.percentile(found[chosen].mean(axis=1), (2.5, 97.5))
    return Spread(values, total, float(found.mean()), float(low), float(high))


def bd_rate(anchor: Curve, curve: Curve, metric: str = "psnr", limits: tuple[float, float] | None = None) -> Delta:
    """Return the BD-rate of `curve` against `anchor` in percent.

    metric: the `field` of one of METRICS. limits: the range of bits per pixel, or None for all.
    """
    return _delta(anchor, curve, metric, limits, over_rate=False)


def bd_psnr(anchor: Curve, curve: Curve, metric: str = "psnr", limits: tuple[float, float] | None = None) -> Delta:
    """Return the BD-PSNR of `curve` against `anchor` in dB.

    metric: the `field` of one of METRICS. limits: the range of bits per pixel, or None for all.
    """
    return _delta(anchor, curve, metric, limits, over_rate=True)


def _delta(anchor: Curve, curve: Curve, metric: str, limits: tuple[float, float] | None, *, over_rate: bool) -> Delta:
    notes: list[str] = []
    sides = []
    for each in (anchor, curve):
        points, left_out = _increasing(each, metric)
        if left_out:
            notes.append(f"{each.name}: {left_out} points left out that are no better than smaller files")
        if len(points) < LEAST_POINTS:
            return Delta(None, note=f"{each.name} has {len(points)} points; {LEAST_POINTS} are needed")
        if limits is not None:
            points = _cut(points, limits)
            if len(points) < 2:
                return Delta(None, note=f"{each.name} has nothing between {limits[0]:g} and {limits[1]:g} bpp")
        sides.append(points)

    spans = [(side[0][0], side[-1][0]) if over_rate else (side[0][1], side[-1][1]) for side in sides]
    low, high = max(span[0] for span in spans), min(span[1] for span in spans)
    lengths = [_length(*span, over_rate) for span in (*spans, (low, high))]
    anchor_share, share = lengths[2] / lengths[0], lengths[2] / lengths[1]
    least = LEAST_OCTAVES if over_rate else BY_FIELD[metric].least
    if lengths[2] < least or max(anchor_share, share) < LEAST_SHARE:
        return Delta(None, low, high, note=_refusal(low, high, "bpp" if over_rate else BY_FIELD[metric].unit))
    return Delta(_by_library(sides[0], sides[1], over_rate), low, high, share, anchor_share, "; ".join(notes))


def _increasing(curve: Curve, metric: str) -> tuple[list[tuple[float, float]], int]:
    """Return (bpp, dB) of the finite points that are better than all smaller ones, and the number of finite others."""
    finite = sorted(
        (point.bpp, value)
        for point in curve.points
        if (value := getattr(point, metric)) is not None and math.isfinite(value)
    )
    kept: list[tuple[float, float]] = []
    for bpp, value in finite:
        if not kept or (value > kept[-1][1] and bpp > kept[-1][0]):
            kept.append((bpp, value))
    return kept, len(finite) - len(kept)


def _cut(points: Sequence[tuple[float, float]], limits: tuple[float, float]) -> list[tuple[float, float]]:
    """Return the part of a curve between two rates, with interpolated points where it crosses them."""
    from scipy.interpolate import PchipInterpolator  # bjontegaard needs it too

    rates, values = np.array(points).T
    curve = PchipInterpolator(np.log(rates), values)
    inside = [(bpp, value) for bpp, value in points if limits[0] < bpp < limits[1]]
    ends = [(bpp, float(curve(math.log(bpp)))) for bpp in limits if rates[0] <= bpp <= rates[-1]]
    return sorted(inside + ends)


def _length(low: float, high: float, over_rate: bool) -> float:
    """Return the length of a range in octaves of rate, or in dB."""
    if high <= low:
        return 0.0
    return math.log2(high / low) if over_rate else high - low


def _refusal(low: float, high: float, unit: str) -> str:
    if high <= low:
        return "the curves do not overlap"
    return f"the curves share only {low:.3g} to {high:.3g} {unit}".rstrip() + ", too little to compare"


def _by_library(anchor: Sequence[tuple[float, float]], curve: Sequence[tuple[float, float]], over_rate: bool) -> float:
    import bjontegaard  # imports matplotlib

    compute: Callable[..., float] = bjontegaard.bd_psnr if over_rate else bjontegaard.bd_rate
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library warns of a small overlap, which `Delta` reports itself
        return float(
            compute(
                *np.array(anchor).T, *np.array(curve).T, method="pchip", require_matching_points=False, min_overlap=0
            )
        )
