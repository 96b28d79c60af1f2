"""Does `info` say what metadata a file holds, in bytes and in words?"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import ExifTags, Image, PngImagePlugin
from typer.testing import CliRunner

import hpcmref
from hpcmref.cli import app
from hpcmref.format.container import Tag, parse, write
from hpcmref.picture.describe import described
from hpcmref.picture.metadata import Extras

GPS = {1: "N", 2: (52.0, 31.0, 12.0), 3: "E", 4: (13.0, 24.0, 18.0)}


def photograph() -> bytes:
    tags = Image.Exif()
    tags[ExifTags.Base.Make], tags[ExifTags.Base.Model] = "Maker", "Maker X100\n"
    tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2026:11:26 07:00:00"
    tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote] = b"\0\1" * 300
    tags.get_ifd(ExifTags.IFD.GPSInfo).update(GPS)
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "A tree")
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG", exif=tags, pnginfo=text, dpi=(300, 300), icc_profile=b"profile" * 20)
    return hpcmref.encode(file.getvalue())


def test_in_words_and_bytes() -> None:
    found = hpcmref.info(photograph())
    assert found.metadata == ("icc", "exif", "text", "resolution")
    assert found.metadata_sizes["resolution"] == 8
    assert sum(found.metadata_sizes.values()) < found.parts["chunks"] < sum(found.metadata_sizes.values()) + 20
    assert found.about == {
        "camera": "Maker X100",
        "date": "2026:11:26 07:00:00",
        "location": "yes",
        "resolution": "299.999 x 299.999 pixels per inch",
        "text Title": "A tree",
    }
    tags = dict(found.exif)
    assert tags["Exif.MakerNote"] == "600 bytes"
    assert tags["GPS.GPSLatitudeRef"] == "N"
    assert "location" not in hpcmref.info(hpcmref.encode(hpcmref.decode(photograph()), strip=["location"])).about
    assert hpcmref.info(hpcmref.encode(Image.new("L", (2, 2)))).about == {}


def test_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.hpcm").write_bytes(photograph())
    plain = CliRunner().invoke(app, ["info", str(tmp_path / "a.hpcm")]).stdout
    assert "  camera   Maker X100\n" in plain
    assert "  metadata icc " in plain
    assert "GPSLatitude" not in plain
    assert (
        "    GPS.GPSLatitude = (52.0, 31.0, 12.0)"
        in CliRunner().invoke(app, ["info", "--exif", str(tmp_path / "a.hpcm")]).stdout
    )
    (facts,) = json.loads(CliRunner().invoke(app, ["info", "--json", str(tmp_path / "a.hpcm")]).stdout)
    assert facts["about"]["location"] == "yes"
    assert facts["metadata"]["exif"] > 100
    assert facts["exif"]["Model"] == "Maker X100"


def test_no_file_is_no_line(tmp_path: Path) -> None:
    """Nothing is printed on standard output where nothing is described; as JSON it is an array without elements."""
    for missing in (tmp_path / "missing.hpcm", tmp_path):
        result = CliRunner().invoke(app, ["info", str(missing)])
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith(f"hpcmref: {missing}: ")
        assert CliRunner().invoke(app, ["info", "--json", str(missing)]).stdout == "[]\n"


@pytest.mark.parametrize("place", [{"xmp": b"<x exif:GPSLatitude='52'/>"}, {"iptc": b"\x1c\x02\x5a\x00\x01B"}])
def test_places_outside_of_exif(place: dict[str, bytes]) -> None:
    assert described(Extras(**place)) == {"location": "yes"}  # type: ignore[arg-type]


def test_damaged_metadata_is_said_and_hostile_text_is_one_line() -> None:
    file = parse(photograph())
    damaged = replace(file, chunks=((Tag.EXIF, b"no stream"),))
    assert "damaged" in hpcmref.info(write(damaged)).about["metadata"]
    tags = Image.Exif()
    tags[ExifTags.Base.Model] = "a\x1b[31m\nb" + "x" * 500
    (words,) = described(Extras(exif=tags.tobytes()[6:])).values()
    assert words.isprintable()
    assert len(words) < 210
    assert described(Extras(exif=b"II*\0\xff\xff\xff\xff")) == {}
