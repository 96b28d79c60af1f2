"""Do hostile image files and metadata do harm? Mutates small pictures of every format and encodes what comes out.

    python tests/fuzz_images.py --mutations 100000 --seed 7                images
    python tests/fuzz_images.py --mutations 100000 --seed 7 --metadata     EXIF, XMP and ICC data of sound images

The pictures go through all but the networks: opened, turned upright, split into colours, alpha and metadata, written
into a file and read from it, and rendered. Anything but a typed error or a picture ends the run.
"""

from __future__ import annotations

import collections
import io
import time
import warnings
import zlib
from dataclasses import replace
from typing import Any

import containers
import numpy as np
from fuzz import damaged, options, report
from PIL import Image, PngImagePlugin

from hpcmref.errors import HpcmrefError
from hpcmref.format.container import parse, write
from hpcmref.picture import exif, images
from hpcmref.picture.metadata import extras_of
from hpcmref.picture.privacy import without
from hpcmref.picture.render import render

FORMS = ("PNG", "JPEG", "WEBP", "TIFF", "PPM")
MOST_PIXELS = 1 << 20
"""Larger pictures are refused here, so that a changed width does not cost minutes."""


def tags() -> bytes:
    """EXIF data with a few directories."""
    made = Image.Exif()
    made[0x0112], made[0x010F] = 6, "maker"
    made.get_ifd(0x8769).update({0x9003: "2026:01:01 00:00:00", 0x829A: (1, 60)})
    made.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    return made.tobytes()


def seeds() -> list[bytes]:
    """Small files of many formats, modes and bit depths, most with metadata."""
    gradient = Image.merge("RGB", [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.linear_gradient("L")])
    colour = gradient.resize((24, 17))
    grey, clear = colour.convert("L"), colour.copy()
    clear.putalpha(Image.radial_gradient("L").resize(clear.size))
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "words " * 20, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta tiff:Orientation='6'/>")
    data: dict[str, Any] = {"exif": tags(), "icc_profile": bytes(range(200))}
    made: list[tuple[Image.Image, str, dict[str, Any]]] = [
        *((image, "PNG", {**data, "pnginfo": text}) for image in (colour, grey, clear, colour.convert("P"), sixteen)),
        (colour.convert("1"), "PNG", {}),
        (colour.convert("P"), "PNG", {"transparency": 3}),
        (colour, "JPEG", data),
        (colour, "JPEG", {"progressive": True, "subsampling": 0}),
        (colour.convert("CMYK"), "JPEG", {}),
        (clear, "WEBP", {**data, "lossless": True}),
        (colour, "WEBP", {"xmp": b"<x:xmpmeta/>"}),
        *((image, "TIFF", {"exif": tags()}) for image in (colour, clear, sixteen)),
        *((colour, "TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
        (Image.fromarray(np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10)), "TIFF", {}),
        *((colour, form, {}) for form in ("BMP", "DIB", "GIF", "ICO", "PCX", "PPM", "TGA", "JPEG2000", "AVIF", "QOI")),
    ]
    files = []
    for image, form, settings in made:
        file = io.BytesIO()
        try:
            image.save(file, form, **settings)
        except (KeyError, OSError):  # a format that this Pillow cannot write
            continue
        files.append(file.getvalue())
    return files


def with_checksums(png: bytes) -> bytes:
    """A PNG file whose chunks have the checksums that fit, as far as it has chunks."""
    out, place = bytearray(png[:8]), 8
    while place + 12 <= len(png):
        length = int.from_bytes(png[place : place + 4], "big")
        chunk = png[place + 4 : place + 8 + length]
        if len(chunk) < 4 + length:
            break
        out += png[place : place + 4] + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        place += 12 + length
    return bytes(out) + png[place:]


def image_of(random: np.random.Generator, files: list[bytes]) -> Image.Image:
    """A changed image file, opened. Raises HpcmrefError."""
    seed, other = (files[random.integers(len(files))] for _ in range(2))
    data = damaged(random, seed, other, 0, len(seed) if random.random() < 0.5 else min(len(seed), 80))
    if data.startswith(b"\x89PNG") and random.random() < 0.7:
        data = with_checksums(data)
    return images.open_image(io.BytesIO(data))


def image_with(random: np.random.Generator, parts: dict[str, bytes]) -> Image.Image:
    """A sound image with changed metadata. Raises HpcmrefError."""
    image = Image.linear_gradient("L").resize((9, 7))
    for name, content in parts.items():
        changed = damaged(random, content, parts["exif"], 0, len(content))
        if random.random() < 0.6:
            image.info[name] = changed
        if name == "exif":
            exif.is_bounded(changed)
            without(replace(_NO_EXTRAS, exif=changed), ("location",))
    return image


_NO_EXTRAS = extras_of(containers.container())


def read(image: Image.Image, random: np.random.Generator) -> None:
    """Everything that happens to an image but for the networks. Raises HpcmrefError."""
    picture = images.picture_of(image, keep_invisible=bool(random.random() < 0.5))
    height, width = picture.pixels.shape[:2]
    assert picture.pixels.dtype == np.uint8
    file = containers.container(width=width, height=height, grey=picture.grey, chunks=picture.extras.chunks())
    extras = extras_of(parse(write(file)))
    shown = images.image_of(picture.pixels, picture.grey, extras)
    assert shown.size == (width, height)
    form = FORMS[random.integers(len(FORMS))]
    with Image.open(io.BytesIO(render(shown, form))) as again:
        assert again.size == shown.size


def fuzz(
    seed: int, mutations: int, metadata: bool = False, seconds: float = float("inf")
) -> tuple[collections.Counter[str], float]:
    """How often each outcome was, and the seconds that the slowest took; AssertionError for one that should not be."""
    random = np.random.default_rng(seed)
    files = seeds()
    parts = {"exif": tags(), "xmp": b"<x:xmpmeta tiff:Orientation='6'/>" * 3, "icc_profile": bytes(range(250))}
    outcomes: collections.Counter[str] = collections.Counter()
    slowest, start = 0.0, time.monotonic()
    for number in range(mutations):
        begin, before = time.monotonic(), random.bit_generator.state
        try:
            image = image_with(random, parts) if metadata else image_of(random, files)
            if image.width * image.height > MOST_PIXELS:
                outcomes["too large to go on"] += 1
                continue
            read(image, random)
            outcomes["a picture"] += 1
        except HpcmrefError as error:
            outcomes[type(error).__name__] += 1
        except Exception as error:
            raise AssertionError(
                f"{type(error).__name__}: {error} by mutation {number} of {before['state']}"
            ) from error
        end = time.monotonic()
        slowest = max(slowest, end - begin)
        if end - start > seconds:
            break
    return outcomes, slowest


def main() -> None:
    """Run from the command line."""
    parser = options(__doc__)
    parser.add_argument("--metadata", action="store_true", help="of sound images, change EXIF, XMP and ICC data")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    images.MAX_PIXELS = MOST_PIXELS
    start = time.monotonic()
    outcomes, slowest = fuzz(arguments.seed, arguments.mutations, arguments.metadata, arguments.seconds)
    report("images", outcomes, slowest, time.monotonic() - start)


if __name__ == "__main__":
    main()
