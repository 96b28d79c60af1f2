"""The options of the command `decode`, in the order of its help. It shares others with `options`."""

from __future__ import annotations

from typing import Annotated

import typer

FilesArgument = Annotated[
    list[str],
    typer.Argument(metavar="FILE", help="Encoded files, folders of .hpcm and .bin files, or - for standard input."),
]
OutputOption = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="IMAGE|DIR|-",
        help="An image for one file (the suffix says the format), a folder for several (made if needed), - for "
        "standard output. By default a single file is written next to the input as PNG.",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="The format of the image: png, jpeg, webp, avif, jxl, tiff, bmp, ppm or npy. By default that of the "
        "suffix of -o, or else PNG.",
    ),
]
OutputQualityOption = Annotated[
    int | None,
    typer.Option(
        "--output-quality",
        min=1,
        max=100,
        metavar="1..100",
        help="The quality of JPEG, WebP, AVIF and JPEG XL outputs.",
    ),
]
BackgroundOption = Annotated[
    str | None,
    typer.Option(
        "--background",
        metavar="COLOUR",
        help="The colour behind transparent pixels in formats without transparency: a name, or #rrggbb.",
    ),
]
UptoOption = Annotated[
    int,
    typer.Option(
        "--upto", metavar="1|2|3", min=1, max=3, help="Decode a preview: read only scales 1 to N, predict the rest."
    ),
]
ThumbnailOption = Annotated[
    int | None,
    typer.Option(
        "--thumbnail",
        metavar="N",
        min=1,
        help="Decode a small picture of N pixels on its longer side. It is faster, and not exact.",
    ),
]
AllowPartialOption = Annotated[bool, typer.Option("--allow-partial", help="Decode a truncated file as far as it goes.")]
AllowDamagedOption = Annotated[
    bool, typer.Option("--allow-damaged", help="Decode a damaged file as far as its checksums match.")
]
MaxPixelsOption = Annotated[int, typer.Option("--max-pixels", metavar="N", min=1, help="Refuse larger images.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Skip files whose image exists and is complete.")]


def parse_format(text: str) -> str:
    """Return the format of a name or a suffix, such as "jpeg", "jpg" or "TIFF". Raises typer.BadParameter."""
    from hpcmref.errors import near
    from hpcmref.picture.images import FORMATS

    names = {suffix[1:]: form for form, suffixes in FORMATS.items() for suffix in suffixes}
    names |= {form.lower(): form for form in FORMATS}
    if (form := names.get(text.strip().lower().lstrip("."))) is None:
        hint = near(text, names)
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(FORMATS).lower()}{hint}.", param_hint="--format")
    return form


def parse_colour(text: str) -> tuple[int, int, int]:
    """Return red, green and blue of a colour's name or of #rrggbb. Raises typer.BadParameter."""
    from PIL import ImageColor

    from hpcmref.errors import near

    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError:
        hint = near(text, ImageColor.colormap)
        raise typer.BadParameter(
            f"{text!r} is not a colour; write it as in #ffffff{hint}.", param_hint="--background"
        ) from None
    return red, green, blue
