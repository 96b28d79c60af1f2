"""How close is a decoded image to its original? PSNR, MS-SSIM, SSIMULACRA2 and ColorVideoVDP of 8-bit RGB pixels.

PSNR and MS-SSIM are always here. SSIMULACRA2 needs the package `ssimulacra2` (in the `bench` extra), ColorVideoVDP the
package `cvvdp` (in the extra `bench-cvvdp`).
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
    """A measure of quality, the higher the better.

    field: its name in measurements, curves and files. option: its name on the command line. package: the module that
    computes it, None for our own. least: the span of values below which a BD-rate would say more of the ends of the
    curves than of the codecs.
    """

    field: str
    option: str
    title: str
    unit: str
    least: float
    package: str | None = None

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title} {self.unit}".rstrip()


METRICS = (
    Metric("psnr", "psnr", "PSNR", "dB", 1.0),
    Metric("ms_ssim_db", "ms-ssim", "MS-SSIM", "dB", 1.0),
    Metric("ssimulacra2", "ssimulacra2", "SSIMULACRA2", "", 5.0, "ssimulacra2"),
    Metric("cvvdp", "cvvdp", "ColorVideoVDP", "JOD", 0.3, "pycvvdp"),
)
BY_FIELD = {metric.field: metric for metric in METRICS}

OPTIONAL = ("ms-ssim", "ssimulacra2", "cvvdp")
"""What a run may leave out; PSNR is always measured."""


def chosen(text: str | None) -> frozenset[str]:
    """The optional metrics of a run. text: options with commas between; None for all that are here.

    Raises ConfigError for one that is unknown or whose package is missing.
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
            raise ConfigError(f"{metric.title} needs a package that is not here: pip install 'hpcmref[{extra}]'")
    return frozenset(asked) - {"psnr"}


def measured(original: Pixels, decoded: Pixels, optional: Collection[str]) -> dict[str, Any]:
    """The values of a decoded image: "psnr" in dB, "ms_ssim" in 0..1, "ssimulacra2", and "cvvdp" in JOD.

    original, decoded: (H, W, 3) uint8. optional: which of `OPTIONAL` to compute; the others, and what an image is too
    small for, are None.
    """
    return {
        "psnr": psnr(original, decoded),
        "ms_ssim": ms_ssim(original, decoded) if "ms-ssim" in optional else None,
        "ssimulacra2": ssimulacra2(original, decoded) if "ssimulacra2" in optional else None,
        "cvvdp": cvvdp(original, decoded) if "cvvdp" in optional else None,
    }


def psnr(original: Pixels, decoded: Pixels) -> float:
    """RGB PSNR in dB (peak 255, one mean over the three channels); inf for equal images. (H, W, 3) uint8 both."""
    difference = original.astype(np.int32) - decoded
    error = float(np.mean(np.square(difference), dtype=np.float64))
    return 10 * math.log10(255**2 / error) if error else math.inf


def ms_ssim(original: Pixels, decoded: Pixels) -> float | None:
    """MS-SSIM in 0..1 on RGB; None for images too small to have one. (H, W, 3) uint8 both."""
    import torch

    from hpcmref import similarity

    if min(original.shape[:2]) < similarity.MS_SSIM_LEAST_SIDE:
        return None
    x, y = (torch.from_numpy(np.array(each)).permute(2, 0, 1)[None].float() / 255 for each in (original, decoded))
    with torch.inference_mode():
        return float(similarity.ms_ssim(x, y))


def decibels(similarity: float | None) -> float | None:
    """MS-SSIM of 0..1 in dB, -10 log10(1 - x), the scale on which learned codecs report it; inf for 1."""
    if similarity is None:
        return None
    return -10 * math.log10(1 - similarity) if similarity < 1 else math.inf


SSIMULACRA2_LEAST_SIDE = 8


def ssimulacra2(original: Pixels, decoded: Pixels) -> float | None:
    """SSIMULACRA2 (100 is identical, 90 looks identical, 50 is medium quality); None for images below 8 x 8.

    By the Python package `ssimulacra2`, whose borders differ a little from those of the program of libjxl.
    """
    if min(original.shape[:2]) < SSIMULACRA2_LEAST_SIDE:
        return None
    from ssimulacra2 import compute_ssimulacra2

    return float(compute_ssimulacra2(_file_of(original), _file_of(decoded)))


def _file_of(pixels: Pixels) -> io.BytesIO:
    """The pixels as an uncompressed image file in memory, which is what the package reads."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PPM")
    file.seek(0)
    return file


def cvvdp(original: Pixels, decoded: Pixels) -> float:
    """ColorVideoVDP in JOD (10 is identical), as seen on the display "standard_4k" of the package `cvvdp`."""
    quality, _ = _cvvdp().predict(decoded, original, dim_order="HWC")
    return float(quality)


@functools.cache
def _cvvdp() -> Any:
    import pycvvdp

    return pycvvdp.cvvdp(display_name="standard_4k", quiet=True)
