"""Make crops of a few images for the report, from every codec at the quality whose file is nearest to a given rate."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, features

from hpcmref.bench import metrics
from hpcmref.bench.codecs import Codec
from hpcmref.bench.measure import Measurement
from hpcmref.bench.search import nearest
from hpcmref.picture import images

IMAGES = 3
CROP = (576, 416)
"""Width and height of a crop in pixels. It is smaller if the image is."""


@dataclass(frozen=True)
class View:
    """The crop of one codec. bpp, psnr: bits per pixel and dB of the whole image. src: the crop as a data URI."""

    codec: str
    quality: int
    bpp: float
    psnr: float
    src: str


@dataclass(frozen=True)
class CropSet:
    """One image at one rate: the crop of the original, and that of every codec. bpp: the wanted rate."""

    image: str
    bpp: float
    width: int
    height: int
    original: str
    views: Sequence[View]


def crop_sets(
    images: Mapping[str, Path], codecs: Sequence[Codec], measurements: Sequence[Measurement], count: int = IMAGES
) -> list[CropSet]:
    """Make sets of crops of `count` images, evenly spread over all images, at a few rates each.

    images: name -> file, all of them measured with every codec. The rates are the targets of the run. Without targets,
    they are those of two points of the first codec, a sixth and three eighths up its curve, where differences are
    visible. The other codecs use the quality nearest to these rates.
    """
    names = list(images)
    spread = sorted({round(index * (len(names) - 1) / max(1, count - 1)) for index in range(count)}) if names else []
    return [
        crop_set
        for index in spread
        for crop_set in _of_image(
            names[index], images[names[index]], codecs, [each for each in measurements if each.image == names[index]]
        )
    ]


def _of_image(name: str, path: Path, codecs: Sequence[Codec], measurements: Sequence[Measurement]) -> list[CropSet]:
    pixels, grey = images.pixels_of(images.open_image(path))
    image = images.image_of(pixels, grey)
    box = _busiest(pixels)
    original = _uri(pixels, box)
    known = {
        codec.name: {each.quality: each.bpp for each in measurements if each.codec == codec.name} for codec in codecs
    }
    shown = []
    for rate in _rates(codecs[0].name, measurements):
        views = []
        for codec in codecs:
            quality = nearest(codec, image, rate, known[codec.name])
            data = codec.encode(image, quality)
            decoded, _ = images.pixels_of(codec.decode(data))
            bpp = 8 * len(data) / (image.width * image.height)
            views.append(View(codec.name, quality, bpp, metrics.psnr(pixels, decoded), _uri(decoded, box)))
        shown.append(CropSet(name, rate, box[2] - box[0], box[3] - box[1], original, views))
    return shown


def _rates(codec: str, measurements: Sequence[Measurement]) -> list[float]:
    """Return the rates at which an image is shown, in bits per pixel (see `crop_sets`)."""
    if targets := {each.target for each in measurements if each.target is not None}:
        return sorted(targets)
    rates = sorted(each.bpp for each in measurements if each.codec == codec)
    return sorted({rates[len(rates) // 6], rates[3 * len(rates) // 8]})


def _busiest(pixels: metrics.Pixels) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the crop with the most detail, among 5 x 5 positions."""
    height, width = pixels.shape[:2]
    across, down = min(CROP[0], width), min(CROP[1], height)
    grey = pixels.astype(np.int16).sum(axis=2)
    detail = np.zeros((height, width))
    detail[:, 1:] += np.abs(np.diff(grey, axis=1))
    detail[1:] += np.abs(np.diff(grey, axis=0))
    places = [
        (int(left), int(top)) for top in np.linspace(0, height - down, 5) for left in np.linspace(0, width - across, 5)
    ]
    left, top = max(places, key=lambda at: detail[at[1] : at[1] + down, at[0] : at[0] + across].sum())
    return left, top, left + across, top + down


def _uri(pixels: metrics.Pixels, box: tuple[int, int, int, int]) -> str:
    """Return a crop of pixels as a data URI, losslessly compressed. box: left, top, right, bottom."""
    file = io.BytesIO()
    crop = Image.fromarray(pixels).crop(box)
    if features.check("webp"):
        crop.save(file, "WEBP", lossless=True)
        kind = "webp"
    else:
        crop.save(file, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
