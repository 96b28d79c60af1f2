"""The options of the command `encode`, in the order of its help. It shares others with `options`."""

from __future__ import annotations

import math
import re
from typing import Annotated

import typer

from hpcmref.errors import near

ImagesArgument = Annotated[
    list[str],
    typer.Argument(metavar="IMAGE", help="Images, folders of images, or - for standard input."),
]
OutputOption = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE|DIR|-",
        help="A file for one image, a folder for several (made if needed), - for standard output. "
        "By default a single image is written next to the input with the suffix .hpcm.",
    ),
]
QualityOption = Annotated[
    int | None,
    typer.Option(
        "-q", "--quality", min=0, max=63, help="0 is the smallest file, 63 the best image.", show_default="32"
    ),
]
BppOption = Annotated[
    float | None, typer.Option("--bpp", help="Instead of -q: the best image of at most this many bits per pixel.")
]
SizeOption = Annotated[
    str | None,
    typer.Option("--size", metavar="BYTES", help="Instead of -q: the best image of at most this size (40kB)."),
]
PsnrOption = Annotated[
    float | None, typer.Option("--psnr", help="Instead of -q: the smallest file with at least this PSNR in dB.")
]
FrameOption = Annotated[
    int | None, typer.Option("--frame", metavar="N", min=1, help="Encode this frame or page, counted from 1.")
]
AllFramesOption = Annotated[
    bool, typer.Option("--all-frames", help="Encode every frame or page to a file of its own: name-0001.hpcm.")
]
LosslessOption = Annotated[
    bool, typer.Option("--lossless", help="Instead of -q: keep every pixel exactly, also transparent ones.")
]
KeepInvisibleOption = Annotated[
    bool,
    typer.Option(
        "--keep-invisible", help="Keep the colours of fully transparent pixels, which are replaced otherwise."
    ),
]
StripOption = Annotated[
    bool, typer.Option("--strip", help="Leave out all metadata: ICC profile, EXIF, text and others.")
]
StripOnlyOption = Annotated[
    str | None,
    typer.Option("--strip-only", metavar="PARTS", help="Leave out some of: location,exif,xmp,icc,iptc,text."),
]
VerifyOption = Annotated[
    bool, typer.Option("--verify", help="Decode each file with a second decoder before it is written, and compare.")
]
MeasureOption = Annotated[
    bool, typer.Option("--measure", help="Decode each file, and show its PSNR and, if installed, SSIMULACRA2.")
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Skip images whose output exists, is complete, and has this model and quality."),
]


def target_of(
    quality: int | None, bpp: float | None, size: str | None, psnr: float | None, lossless: bool
) -> dict[str, float]:
    """Return the target of --bpp, --size (in bytes) or --psnr by name; it is empty if there is none.

    Raises typer.BadParameter if it is not above 0, or if several options decide the quality.
    """
    given = {"bpp": bpp, "size": None if size is None else parse_size(size), "psnr": psnr}
    target = {name: value for name, value in given.items() if value is not None}
    for name, value in target.items():
        if not 0 < value < math.inf:
            raise typer.BadParameter("it must be a number above 0.", param_hint=f"--{name}")
    if len(target) + (quality is not None) + lossless > 1:
        raise typer.BadParameter("only one of -q, --bpp, --size, --psnr and --lossless can decide the quality.")
    return target


def parse_parts(text: str) -> tuple[str, ...]:
    """Return the parts of metadata in a list such as "location,xmp". Raises typer.BadParameter."""
    from hpcmref.picture.privacy import PARTS

    parts = tuple(part.strip() for part in text.split(","))
    if wrong := sorted(set(parts) - set(PARTS)):
        hint = near(wrong[0], PARTS)
        raise typer.BadParameter(
            f"it takes {', '.join(PARTS)}, not {', '.join(map(repr, wrong))}{hint}.", param_hint="--strip-only"
        )
    return parts


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "40000", "40kB" or "1.5MB" (decimal units). Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([kMG]?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size; write it as in 40000, 40kB or 1.5MB.", param_hint="--size")
    return int(float(match[1]) * 1000 ** " kmg".index(match[2].lower() or " "))
