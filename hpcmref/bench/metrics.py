"""Compare a decoded image with its original: PSNR, MS-SSIM, SSIMULACRA2 and ColorVideoVDP of 8-bit RGB pixels.

PSNR and MS-SSIM need nothing else. SSIMULACRA2 needs the package `ssimulacra2` (extra `bench`), and ColorVideoVDP needs
the package `cvvdp` (extra `bench-cvvdp`).
"""

from __future__ import annotations

import functools
import importlib.util
import io
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from hpcmref.errors import ConfigError, near

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Metric:
    """A measure of quality. Higher values are better.

    field: its name in measurements, curves and files. option: its name on the command line.
    least: the smallest common range of two curves for which a BD-rate is computed, see `bdrate.LEAST_SHARE`.
    package: the module that computes it, or None if hpcmref does.
    """

    field: str
    option: str
    title: str
    unit: str
    least: float
    package: str | None = None

    @property
    def heading(self) -> str:
        """The title and the unit, for the heading of a table."""
        return f"{self.title} {self.unit}".rstrip()


METRICS = (
    Metric("psnr", "psnr", "PSNR", "dB", 1.0),
    Metric("ms_ssim_db", "ms-ssim", "MS-SSIM", "dB", 1.0),
    Metric("ssimulacra2", "ssimulacra2", "SSIMULACRA2", "", 5.0, "ssimulacra2"),
    Metric("cvvdp", "cvvdp", "ColorVideoVDP", "JOD", 0.3, "pycvvdp"),
)
BY_FIELD = {metric.field: metric for metric in METRICS}

OPTIONAL = ("ms-ssim", "ssimulacra2", "cvvdp")
"""The metrics that a run may leave out. PSNR is always measured."""


def chosen(text: str | None) -> frozenset[str]:
    """Return the optional metrics of a run.

    text: the value of --metrics, or None for all that are installed. Raises ConfigError for a metric that is unknown or
    whose package is not installed.
    """
    here = [metric.option for metric in METRICS if metric.package is None or importlib.util.find_spec(metric.package)]
    if text is None:
        return frozenset(here) - {"psnr"}
    asked = [name.strip().lower() for name in text.split(",")]
    for name in asked:
        metric = next((metric for metric in METRICS if metric.option == name), None)
        if metric is None:
            options = [metric.option for metric in METRICS]
            raise ConfigError(f"there is no metric {name!r}; the metrics are {', '.join(options)}{near(name, options)}")
        if name not in here:
            extra = "bench" if name == "ssimulacra2" else "bench-cvvdp"
            raise ConfigError(f"{metric.title} needs a package that is not installed: pip install 'hpcmref[{extra}]'")
    return frozenset(asked) - {"psnr"}


def measured(original: Pixels, decoded: Pixels, optional: Collection[str]) -> dict[str, Any]:
    """Compute the metrics of a decoded image: "psnr" in dB, "ms_ssim" in 0..1, "ssimulacra2", and "cvvdp" in JOD.

    original, decoded: (H, W, 3) uint8. optional: the metrics of `OPTIONAL` to compute. The values of the others are
    None, and those of metrics for which the image is too small.
    """
    return {
        "psnr": psnr(original, decoded),
        "ms_ssim": ms_ssim(original, decoded) if "ms-ssim" in optional else None,
        "ssimulacra2": ssimulacra2(original, decoded) if "ssimulacra2" in optional else None,
        "cvvdp": cvvdp(original, decoded) if "cvvdp" in optional else None,
    }


def psnr(original: Pixels, decoded: Pixels) -> float:
    """Return the RGB PSNR in dB of two images (H, W, 3) uint8: peak 255, mean over all samples; inf if equal."""
    difference = original.astype(np.int32) - decoded
    error = float(np.mean(np.square(difference), dtype=np.float64))
    return 10 * math.log10(255**2 / error) if error else math.inf


def ms_ssim(original: Pixels, decoded: Pixels) -> float | None:
    """Return the MS-SSIM in 0..1 of two RGB images (H, W, 3) uint8, or None if they are too small for it."""
    import torch

    from hpcmref import similarity

    if min(original.shape[:2]) < similarity.MS_SSIM_LEAST_SIDE:
        return None
    x, y = (torch.from_numpy(np.array(each)).permute(2, 0, 1)[None].float() / 255 for each in (original, decoded))
    with torch.inference_mode():
        return float(similarity.ms_ssim(x, y))


def decibels(similarity: float | None) -> float | None:
    """Convert an MS-SSIM of 0..1 to dB, as learned codecs report it: -10 log10(1 - x); inf for 1, None for None."""
    if similarity is None:
        return None
    return -10 * math.log10(1 - similarity) if similarity < 1 else math.inf


SSIMULACRA2_LEAST_SIDE = 8


def ssimulacra2(original: Pixels, decoded: Pixels) -> float | None:
    """Return the SSIMULACRA2 of two images (H, W, 3) uint8, or None for sides below 8.

    100 means identical, 90 looks identical, and 50 is medium quality. The Python package `ssimulacra2` computes it,
    whose treatment of borders differs slightly from the program of libjxl.
    """
    if min(original.shape[:2]) < SSIMULACRA2_LEAST_SIDE:
        return None
    from ssimulacra2 import compute_ssimulacra2

    return float(compute_ssimulacra2(_file_of(original), _file_of(decoded)))


def _file_of(pixels: Pixels) -> io.BytesIO:
    """Return the pixels as an uncompressed image file in memory, since the package reads files."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PPM")
    file.seek(0)
    return file


def cvvdp(original: Pixels, decoded: Pixels) -> float:
    """Return the ColorVideoVDP of two images in JOD (10 is identical), for the display "standard_4k" of `cvvdp`."""
    quality, _ = _cvvdp().predict(decoded, original, dim_order="HWC")
    return float(quality)


@functools.cache
def _cvvdp() -> Any:
    import pycvvdp

    return pycvvdp.cvvdp(display_name="standard_4k", quiet=True)
