"""Small image files of every kind, each with what must come back: mode x depth x alpha x metadata x format.

    python tests/corpus.py [WORD]

runs all of them (those with WORD in their names) through the Python interface, the Pillow plugin and pipes of the
command line, and prints what differs. `tests/test_corpus.py` runs a sample. With ImageMagick (`convert`) its files
join, and its decoder says what they are.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin
from typer.testing import CliRunner

import hpcmref
from hpcmref.cli import app
from hpcmref.errors import ImageError
from hpcmref.picture import texts
from hpcmref.picture.render import render

HEIGHT, WIDTH = 10, 14
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><a/></x:xmpmeta>"
IPTC = b"\x1c\x02\x05\x00\x05Title"
DPI = (150.0, 150.0)

# Pillow's mode of the file -> Pillow's mode of what comes back, and whether a lossless file is refused.
MODES: dict[str, tuple[str, bool]] = {
    "1": ("1", False), "L": ("L", False), "LA": ("LA", False), "RGB": ("RGB", False), "RGBA": ("RGBA", False),
    "P": ("RGB", False), "P+key": ("RGBA", False), "L+key": ("LA", False), "RGB+key": ("RGBA", False),
    "I;16": ("I;16", True), "CMYK": ("CMYK", True), "F": ("I;16", True),
}  # fmt: skip
FORMATS: dict[str, tuple[str, ...]] = {
    "PNG": ("1", "L", "LA", "RGB", "RGBA", "P", "P+key", "L+key", "RGB+key", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "RGB", "RGBA", "P", "I;16", "CMYK", "F"),
    "AVIF": ("RGB", "RGBA"),
    "GIF": ("L", "P", "P+key"),
    "BMP": ("1", "L", "P", "RGB"),
    "TGA": ("L", "LA", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "PCX": ("1", "L", "P", "RGB"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA"),
    "QOI": ("RGB", "RGBA"),
    "ICO": ("RGBA",),
}
METADATA: dict[str, tuple[str, ...]] = {
    "PNG": ("icc", "exif", "turned", "xmp", "dpi", "text", "iptc", "all"),
    "JPEG": ("icc", "exif", "turned", "xmp", "dpi", "text", "iptc", "all"),
    "TIFF": ("icc", "exif", "turned", "xmp", "dpi", "iptc", "all"),
    "WEBP": ("icc", "exif", "turned", "xmp", "all"),
    "AVIF": ("icc", "exif", "xmp", "all"),
    "GIF": ("text",),
    "BMP": ("dpi",),
}
KEPT = {
    "icc": "icc_profile",
    "exif": "exif",
    "turned": "exif",
    "xmp": "xmp",
    "dpi": "dpi",
    "text": "text",
    "iptc": "iptc",
}
OUTPUTS = {
    "PNG": ("icc", "exif", "turned", "xmp", "dpi", "text", "iptc"),
    "TIFF": ("icc", "exif", "turned", "xmp", "dpi", "iptc"),
    "WEBP": ("icc", "exif", "turned", "xmp"),
    "JPEG": ("icc", "exif", "turned", "xmp", "dpi", "iptc"),
}


@dataclass(frozen=True, eq=False)
class Case:
    """One file and what is expected of it.

    expected: (H, W, 4) uint8, upright RGBA. mode: what decoding gives. exact: the pixels come back bit for bit from a
    lossless file; otherwise that is refused. kept: names of KEPT. output: an image format to write the picture to.
    """

    name: str
    content: bytes
    expected: np.ndarray
    mode: str
    exact: bool
    kept: tuple[str, ...]
    output: str


def cases() -> Iterator[Case]:
    """All of them; the same in every run."""
    number = 0
    outputs = list(OUTPUTS)
    for form, modes in FORMATS.items():
        for mode in modes:
            for grey in (False, True) if mode in ("RGB", "RGBA") else (False,):
                kinds = ("opaque", "soft", "hard") if mode in ("LA", "RGBA") else ("",)
                for alpha in kinds:
                    for metadata in ("none", *METADATA.get(form, ())):
                        yield _made(form, mode, grey, alpha, metadata, outputs[number % len(outputs)])
                        number += 1
    yield from _of_imagemagick()


def _made(form: str, mode: str, grey: bool, alpha: str, metadata: str, output: str) -> Case:
    image, expected = _drawn(mode, grey, alpha)
    kept = ("icc", "exif", "xmp", "dpi", "text", "iptc") if metadata == "all" else (metadata,)
    kept = tuple(each for each in kept if each in METADATA.get(form, ()))
    file = io.BytesIO()
    image.save(file, form, **_options(form, image, kept))
    if form in ("JPEG", "AVIF", "PCX") or (form == "ICO"):  # not exact, or palettes of their own: what Pillow reads
        with Image.open(io.BytesIO(file.getvalue())) as again:
            expected = np.asarray(again.convert("RGBA"))
    if "turned" in kept:
        expected = np.rot90(expected, -1)
    back, refused = MODES[mode]
    if form == "GIF" and mode == "L":
        back = "RGB" if _opened_mode(file) == "P" else "L"
    if form in ("WEBP", "AVIF"):  # which drop alpha where all is opaque
        back = _opened_mode(file)
    name = " ".join(filter(None, (form, mode, "equal channels" if grey else "", alpha, metadata)))
    return Case(name, file.getvalue(), expected, back, not refused, kept, output)


def _opened_mode(file: io.BytesIO) -> str:
    with Image.open(io.BytesIO(file.getvalue())) as image:
        return image.mode


def _drawn(mode: str, grey: bool, alpha: str) -> tuple[Image.Image, np.ndarray]:
    """An image of a mode, and the RGBA that it means."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    colours = np.stack([columns * 15 + 20, rows * 20 + 30, (rows + columns) * 8 + 10], axis=2).astype(np.uint8)
    if grey:
        colours[:] = colours[..., :1]
    opaque = np.full((HEIGHT, WIDTH), 255, np.uint8)
    level = colours[..., 0]
    if mode == "1":
        bits = (rows + columns) % 5 < 2
        return Image.fromarray(bits), _rgba(bits * np.uint8(255), opaque)
    if mode in ("P", "P+key"):
        palette = np.random.default_rng(0).integers(0, 256, (16, 3), np.uint8)
        indexes = ((rows // 2 + columns) % 16).astype(np.uint8)
        image = Image.fromarray(indexes, "L").convert("L")
        image.putpalette(palette.tobytes())
        hidden = indexes == 3
        if mode == "P+key":
            image.info["transparency"] = 3
        return image, _rgba(palette[indexes], np.where(hidden, 0, 255).astype(np.uint8) if mode == "P+key" else opaque)
    if mode == "L+key":
        image = Image.fromarray(level)
        image.info["transparency"] = int(level[0, 3])
        return image, _rgba(level, (level != level[0, 3]) * np.uint8(255))
    if mode == "RGB+key":
        image = Image.fromarray(colours)
        image.info["transparency"] = tuple(int(each) for each in colours[2, 3])
        return image, _rgba(colours, (colours != colours[2, 3]).any(axis=2) * np.uint8(255))
    if mode == "I;16":
        return Image.fromarray(level.astype(np.uint16) * 257), _rgba(level, opaque)
    if mode == "F":
        return Image.fromarray(level.astype(np.float32) / 255), _rgba(level, opaque)
    if mode == "CMYK":
        image = Image.fromarray(colours).convert("CMYK")
        return image, np.asarray(image.convert("RGB").convert("RGBA"))
    masks = {"soft": (rows * 25).astype(np.uint8), "hard": (columns > 4) * np.uint8(255)}
    mask = masks.get(alpha, opaque)
    image = Image.fromarray(level if mode in ("L", "LA") else colours)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(mask))
    return image, _rgba(level if mode in ("L", "LA") else colours, mask)


def _rgba(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    colours = np.repeat(colours[..., None], 3, axis=2) if colours.ndim == 2 else colours
    return np.concatenate([colours, alpha[..., None]], axis=2)


def _options(form: str, image: Image.Image, kept: tuple[str, ...]) -> dict[str, Any]:
    """Options of Pillow's save that write the metadata."""
    options: dict[str, Any] = {
        "JPEG": {"quality": 95}, "WEBP": {"lossless": True, "exact": True}, "AVIF": {"quality": 95},
        "JPEG2000": {"irreversible": False}, "ICO": {"sizes": [(WIDTH, HEIGHT)]},
    }.get(form, {})  # fmt: skip
    options = dict(options)
    if "transparency" in image.info:
        options["transparency"] = image.info["transparency"]
    if "icc" in kept:
        options["icc_profile"] = ICC
    tags = Image.Exif()
    if "exif" in kept or "turned" in kept:
        tags[0x010F] = "Maker"
        if "turned" in kept:
            tags[0x0112] = 6
    if form == "TIFF":
        if "xmp" in kept:
            tags[700] = XMP
        if "iptc" in kept:
            tags[33723] = IPTC
    if tags:
        options["exif"] = tags
    if "dpi" in kept:
        options["dpi"] = DPI
    if form == "PNG":
        info = options["pnginfo"] = PngImagePlugin.PngInfo()
        if "xmp" in kept:
            info.add_itxt("XML:com.adobe.xmp", XMP.decode())
        if "text" in kept:
            info.add_text("Comment", "Grüße")
        if "iptc" in kept:
            info.add_text(*texts.iptc_profile(IPTC), zip=True)
        return options
    if "xmp" in kept and form != "TIFF":
        options["xmp"] = XMP
    if "text" in kept:
        options["comment"] = "Grüße".encode()
    if "iptc" in kept and form == "JPEG":
        options["extra"] = texts.iptc_segment(IPTC)
    return options


def _of_imagemagick() -> Iterator[Case]:
    """Files of ImageMagick, with depths and layouts that Pillow does not write; it also says what their pixels are.

    None in TGA, since version 6 writes rows from the top and says that they are from the bottom.
    """
    if (convert := shutil.which("convert")) is None:
        return
    source = io.BytesIO()
    _drawn("RGBA", False, "hard")[0].save(source, "PNG")
    layouts = {
        "png": (["-depth", "16"], ["-colorspace", "Gray", "-depth", "2"], ["-interlace", "PNG"], ["-depth", "8"]),
        "tiff": (["-compress", "Zip"], ["-interlace", "plane"], ["-depth", "16"], ["-compress", "None"]),
        "bmp": (["-depth", "8"],),
        "webp": (["-define", "webp:lossless=true"],),
    }
    for suffix, many in layouts.items():
        for arguments in many:
            for background in ([], ["-background", "white", "-alpha", "remove", "-alpha", "off"]):
                made = _run(convert, source.getvalue(), ["png:-", *background, *arguments, f"{suffix}:-"])
                pixels = made and _run(convert, made, [f"{suffix}:-", "-depth", "8", "rgba:-"])
                if made and pixels and len(pixels) == HEIGHT * WIDTH * 4:
                    expected = np.frombuffer(pixels, np.uint8).reshape(HEIGHT, WIDTH, 4)
                    name = f"ImageMagick {suffix} {' '.join(arguments + background)}"
                    yield Case(name, made, expected, "", "16" not in arguments, (), "PNG")


def _run(convert: str, content: bytes, arguments: list[str]) -> bytes | None:
    done = subprocess.run([convert, *arguments], input=content, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


def of_api(content: bytes, **options: Any) -> Image.Image:
    """Through the Python interface."""
    return hpcmref.decode(hpcmref.encode(content, device="cpu", **options), "cpu")


def of_plugin(content: bytes, **options: Any) -> Image.Image:
    """Through the Pillow plugin."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(content)) as image:
        image.save(file, "HPCM", device="cpu", **options)
    image = Image.open(file)
    image.load()
    return image


def of_pipes(content: bytes, **options: Any) -> Image.Image:
    """Through standard input and output of the command line, to PNG and back."""
    arguments = ["--lossless"] if options.get("lossless") else ["-q", str(options["quality"])]
    encoded = CliRunner().invoke(app, ["encode", "-", "-o", "-", "--device", "cpu", *arguments], input=content)
    if encoded.exit_code:
        raise ImageError(encoded.stderr)
    decoded = CliRunner().invoke(app, ["decode", "-", "-o", "-", "--device", "cpu"], input=encoded.stdout_bytes)
    assert decoded.exit_code == 0, decoded.stderr
    image = Image.open(io.BytesIO(decoded.stdout_bytes))
    image.load()
    return image


WAYS: dict[str, Callable[..., Image.Image]] = {"api": of_api, "plugin": of_plugin, "pipes": of_pipes}


def problems(case: Case, way: str) -> list[str]:
    """What is not as it should be, as sentences."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return list(_problems(case, way))
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]


def _problems(case: Case, way: str) -> Iterator[str]:
    through = WAYS[way]
    if case.exact:
        image = through(case.content, lossless=True)
        if not np.array_equal(_shown(image), case.expected):
            yield f"lossless: other pixels, {image.mode}"
    elif case.mode:
        try:
            through(case.content, lossless=True)
            yield "lossless: not refused"
        except ImageError:
            pass
    image = through(case.content, quality=50)
    found = _shown(image)
    if case.mode and image.mode != case.mode and not (way == "pipes" and case.mode == "CMYK"):
        yield f"mode {image.mode} instead of {case.mode}"
    if not np.array_equal(found[..., 3], case.expected[..., 3]):
        yield "other alpha"
    seen = case.expected[..., 3] > 0
    error = np.square(found[seen].astype(float) - case.expected[seen]).mean() if seen.any() else 0
    if error > 255**2 / 10**2.6:
        yield f"the colours are {10 * np.log10(255**2 / error):.1f} dB from what they were"
    grey = (case.expected[seen][:, :1] == case.expected[seen][:, 1:3]).all()
    if grey and not (found[seen][:, :1] == found[seen][:, 1:3]).all():
        yield "grey has a tint"
    yield from _lost(case, image)


def _lost(case: Case, image: Image.Image) -> Iterator[str]:
    """Metadata that is not in the decoded image, or not in a file that it is written to."""
    if image.format != "PNG":  # of a pipe, which has gone through a file already
        for name in case.kept:
            if KEPT[name] not in image.info:
                yield f"{name} is lost"
    content = render(image, case.output)
    back = Image.open(io.BytesIO(content))
    back.load()
    for name in set(case.kept) & set(OUTPUTS[case.output]):
        if name == "icc" and (case.mode == "CMYK" and back.mode == "CMYK"):
            continue  # a profile of other colours
        if not _has(back, name):
            yield f"{name} is lost in {case.output}"
    if "turned" in case.kept and back.getexif().get(0x0112, 1) != 1:
        yield "turned twice"


def _has(image: Image.Image, name: str) -> bool:
    if name in ("exif", "turned"):
        return image.getexif().get(0x010F) == "Maker"
    if name == "icc":
        return image.info.get("icc_profile") == ICC
    if name == "xmp":
        return b"xmpmeta" in (image.info.get("xmp") or b"")
    if name == "dpi":
        return abs(float(image.info.get("dpi", (0, 0))[0]) - DPI[0]) < 0.05
    if name == "iptc":
        return texts.iptc_of(image) == IPTC
    return dict(texts.text_of(image)).get("Comment") == "Grüße"


def _shown(image: Image.Image) -> np.ndarray:
    """RGBA of a decoded image."""
    if image.mode == "I;16":
        return _rgba((np.asarray(image) // 257).astype(np.uint8), np.full(image.size[::-1], 255, np.uint8))
    return np.asarray(image.convert("RGBA"))


def main(word: str = "") -> int:
    """Run the files with a word in their names; the exit code is 1 if anything differs."""
    count = failed = 0
    for case in cases():
        if word not in case.name:
            continue
        count += 1
        for way in WAYS:
            for problem in problems(case, way):
                failed += 1
                print(f"{case.name} ({way}): {problem}", flush=True)
    print(f"{count} files in {len(WAYS)} ways, {failed} problems")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
