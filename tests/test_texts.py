"""Do text, comments, IPTC data and resolution come back in every format that has room for them?"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import containers
import numpy as np
import pytest
from PIL import Image, IptcImagePlugin, PngImagePlugin
from typer.testing import CliRunner

import hpcmref
from hpcmref.cli import app
from hpcmref.errors import FormatError
from hpcmref.format.container import Tag, parse
from hpcmref.picture import texts
from hpcmref.picture.images import open_image, picture_of, strip_only
from hpcmref.picture.metadata import metadata_of
from hpcmref.picture.render import render

IPTC = b"\x1c\x02\x05\x00\x05Title\x1c\x02\x5a\x00\x06Berlin"
PIXELS = np.arange(12 * 9 * 3, dtype=np.uint8).reshape(9, 12, 3)


def file_of(form: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, form, **options)
    file.seek(0)
    return file


def jpeg() -> io.BytesIO:
    return file_of("JPEG", dpi=(300, 300), comment="Grüße", extra=texts.iptc_segment(IPTC))


def png() -> io.BytesIO:
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "Hello")
    info.add_itxt("Ünï", "日本")
    info.add_text("Long", "x" * 3000, zip=True)
    info.add_text(*texts.iptc_profile(IPTC), zip=True)
    return file_of("PNG", pnginfo=info, dpi=(96, 96))


def again(file: io.BytesIO, form: str) -> Image.Image:
    """The image after encoding, decoding and a file of another format."""
    image = Image.open(io.BytesIO(render(hpcmref.decode(hpcmref.encode(file.getvalue(), lossless=True)), form)))
    image.load()
    return image


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("source", [jpeg, png])
@pytest.mark.filterwarnings("ignore")
def test_resolution_in_every_format(source: object, form: str) -> None:
    made = hpcmref.decode(hpcmref.encode(source().getvalue(), lossless=True))  # type: ignore[operator]
    other = hpcmref.decode(hpcmref.encode(render(made, form), lossless=True))
    expected = 300 if source is jpeg else 96
    assert other.info["dpi"] == pytest.approx((expected, expected), 1e-3)


def test_comments_and_iptc_of_a_jpeg() -> None:
    assert again(jpeg(), "JPEG").info["comment"].decode() == "Grüße"
    assert again(jpeg(), "PNG").text["Comment"] == "Grüße"  # type: ignore[attr-defined]
    assert IptcImagePlugin.getiptcinfo(again(jpeg(), "JPEG"))[2, 90] == b"Berlin"
    tiff = again(jpeg(), "TIFF")
    assert IptcImagePlugin.getiptcinfo(tiff)[2, 90] == b"Berlin"
    assert tiff.getexif()[270].encode("latin-1").decode() == "Grüße"
    for form in ("PNG", "TIFF", "JPEG"):  # and once more, from what was written
        file = io.BytesIO(render(hpcmref.decode(hpcmref.encode(jpeg().getvalue(), lossless=True)), form))
        assert texts.iptc_of(open_image(file)) == IPTC


def test_text_of_a_png() -> None:
    made = again(png(), "PNG")
    expected = {"Title": "Hello", "Ünï": "日本", "Long": "x" * 3000}
    found = dict(made.text)  # type: ignore[attr-defined]
    assert found.pop(texts._IPTC_PROFILE)
    assert found == expected
    with pytest.warns(UserWarning, match="cannot store its text"):
        again(png(), "JPEG")
    with pytest.warns(UserWarning, match="cannot store its text and IPTC data"):
        again(png(), "WEBP")


def test_nothing_is_made_up() -> None:
    """A JPEG file that says no resolution, and formats without one."""
    for file in (file_of("JPEG"), file_of("PNG"), file_of("WEBP"), file_of("PPM")):
        assert parse(hpcmref.encode(file.getvalue(), lossless=True)).chunks == ()


def test_what_exif_says_is_not_said_twice() -> None:
    tags = Image.Exif()
    tags[0x011A], tags[0x011B], tags[0x0128] = 300.0, 300.0, 2
    data = hpcmref.encode(file_of("JPEG", exif=tags, dpi=(300, 300)).getvalue(), lossless=True)
    assert [tag for tag, _ in parse(data).chunks] == [Tag.EXIF]
    assert hpcmref.decode(data).info["dpi"] == (300, 300)


def test_a_turned_picture_has_its_resolutions_turned() -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    data = hpcmref.encode(file_of("PNG", exif=tags, dpi=(100, 200)).getvalue(), lossless=True)
    assert hpcmref.decode(data).info["dpi"] == pytest.approx((200, 100), 1e-3)


def test_parts_are_left_out() -> None:
    image = open_image(jpeg())
    left = {part: set(strip_only(image, (part,)).info) for part in ("iptc", "text", "exif", "location")}
    assert left["iptc"] == {"text", "comment", "dpi"}
    assert left["text"] == {"iptc", "dpi"}
    assert left["exif"] == left["location"] == {"text", "comment", "dpi", "iptc"}
    without_place = strip_only(image, ("location",)).info["iptc"]
    assert without_place == IPTC[:10]
    image.info["photoshop"] = {0x0404: IPTC[:-1]}  # cut off: nothing can be proven of it
    assert "iptc" not in strip_only(image, ("location",)).info


def test_text_has_a_bound() -> None:
    image = Image.fromarray(PIXELS)
    for found in ({"a": "x" * (texts.MAX_TEXT + 1)}, {str(number): "x" for number in range(texts.MAX_ITEMS + 1)}):
        image.info["text"] = found
        with pytest.warns(UserWarning, match="its text is not kept"):
            assert picture_of(image).extras.text == ()


@pytest.mark.parametrize(
    ("tag", "content", "message"),
    [
        (Tag.TEXT, texts.text_bytes((("a", "b"),))[:-1], "text is cut off"),
        (Tag.TEXT, b"a\0", "text is cut off"),
        (Tag.TEXT, b"\xff\0b\0", "not UTF-8"),
        (Tag.TEXT, b"\0" * 2 * (texts.MAX_ITEMS + 1), "too many"),
        (Tag.RESOLUTION, bytes(8), "resolution"),
        (Tag.RESOLUTION, b"\1" * 9, "resolution"),
    ],
)
def test_hostile_chunks(tag: Tag, content: bytes, message: str) -> None:
    from hpcmref.picture.metadata import _pack

    with pytest.raises(FormatError, match=message):
        metadata_of(containers.container(chunks=((tag, _pack(content) if tag == Tag.TEXT else content),)))


def test_hostile_sources() -> None:
    image = Image.fromarray(PIXELS)
    for value in ((0, 0), (float("nan"), 1), ("a", "b"), 3, (1e300, 1), (-1, -1), None, (1, 2, 3)):
        image.info["dpi"] = value
        assert texts.resolution_of(image) is None
    image.info["iptc"] = b"no datasets"
    assert texts.iptc_of(image) is None
    image.info = {texts._IPTC_PROFILE: "\niptc\n 3\nzz"}
    assert texts.iptc_of(image) is None


def test_the_command_line_and_the_plugin(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg().getvalue())
    arguments = ["encode", str(tmp_path / "a.jpg"), "-o", str(tmp_path / "a.bin"), "--lossless"]
    result = CliRunner().invoke(app, [*arguments, "--strip-only", "text,location"])
    assert (result.exit_code, result.stderr) == (0, "")
    with Image.open(tmp_path / "a.bin") as image:
        assert image.info["dpi"] == (300, 300)
        assert "comment" not in image.info
    with Image.open(tmp_path / "a.jpg") as image, warnings.catch_warnings():
        warnings.simplefilter("error")
        image.save(tmp_path / "b.hpcm", lossless=True, dpi=(72, 75), comment=None)
        with Image.open(tmp_path / "b.hpcm") as other:
            assert other.info["dpi"] == (72, 75)
            assert {"comment", "text"}.isdisjoint(other.info)
            assert other.info["iptc"] == IPTC
