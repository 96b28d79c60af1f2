"""Write results as one self-contained HTML page, and their curves as PNG.

The page is `report.html` with the results inserted as JSON, and its own script draws them. Its content security policy
forbids it to load anything.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle, product
from pathlib import Path
from typing import Any

from hpcmref.bench.metrics import METRICS, Metric
from hpcmref.bench.output import Results, as_csv, as_json
from hpcmref.bench.viewer import CropSet
from hpcmref.runtime.files import atomic_write

_TEMPLATE = Path(__file__).parent / "report.html"
_DATA = "/*DATA*/null"


def write(results: Results, crop_sets: Sequence[CropSet], folder: Path) -> Path:
    """Write index.html, results.json, results.csv, and a figure for every metric (rd-psnr.png, ...) to a folder.

    crop_sets: crops to compare on the page. Returns the path of the page. Raises HpcmrefError if the folder cannot be
    written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = as_json(results)
    atomic_write(folder / "results.json", (json.dumps(content, indent=1) + "\n").encode())
    atomic_write(folder / "results.csv", as_csv(results).encode())
    for metric in METRICS:
        if any(getattr(point, metric.field) is not None for curve in results.curves for point in curve.points):
            atomic_write(folder / f"rd-{metric.option}.png", _png(results, metric))
    page = folder / "index.html"
    atomic_write(page, html(content, crop_sets).encode())
    return page


def html(content: dict[str, Any], crop_sets: Sequence[CropSet]) -> str:
    """Return the page. content: the result of `output.as_json`. crop_sets: crops to compare."""
    shown = {key: value for key, value in content.items() if key != "measurements"}
    metrics = [{"field": each.field, "title": each.title, "unit": each.unit} for each in METRICS]
    data = json.dumps({**shown, "metrics": metrics, "crop_sets": [asdict(each) for each in crop_sets]})
    # Inside a script element only "<" could end the data early.
    return _TEMPLATE.read_text(encoding="utf-8").replace(_DATA, data.replace("<", "\\u003c"))


def _png(results: Results, metric: Metric) -> bytes:
    """Draw the rate-distortion curves, up to the highest rate that was measured in this run."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    measured = [curve for curve in results.curves if curve.source is None]
    most = 1.05 * max((point.bpp for curve in measured or results.curves for point in curve.points), default=1)
    bright, muted = cycle(colormaps["tab10"].colors), colormaps["tab20b"].colors[::2]  # type: ignore[attr-defined]
    fixed = cycle(product(("--", ":", "-."), muted))  # a line style for every ten curves
    for curve in results.curves:
        points = [
            (point.bpp, value)
            for point in curve.points
            if (value := getattr(point, metric.field)) is not None and point.bpp <= most
        ]
        if not points:
            continue
        if curve.source is None:
            width = 2.5 if curve.name.startswith("hpcmref") else 1.5
            axes.plot(*zip(*points, strict=True), "o-", label=curve.name, color=next(bright), lw=width, markersize=4)
        else:
            style, colour = next(fixed)
            axes.plot(*zip(*points, strict=True), style, label=curve.name, color=colour, lw=1)
    axes.set_xlim(0, most)
    axes.set_xlabel("bits per pixel")
    axes.set_ylabel(f"{metric.title} ({metric.unit})" if metric.unit else metric.title)
    axes.set_title(f"{results.title}, mean of {len(results.images)} images")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize="small")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
