"""Does `hpcmref verify` name every bad file and write nothing, and does `--verify` look at what was encoded?"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import pytest
from containers import changed
from PIL import Image
from typer.testing import CliRunner, Result

from hpcmref import lossless
from hpcmref.cli import app
from hpcmref.codec import Codec
from hpcmref.errors import DecodeError, ModelChangedError
from hpcmref.format.container import parse, write


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: Codec) -> Path:
    """An archive: good files of both codings, and in `bad` one for each kind of damage."""
    monkeypatch.chdir(tmp_path)
    image = Image.radial_gradient("L").resize((70, 65)).convert("RGB")
    image.save("a.png")
    data = codec.encode(image)
    Path("archive/bad").mkdir(parents=True)
    Path("archive/good.hpcm").write_bytes(data)
    Path("archive/exact.hpcm").write_bytes(lossless.encode(image))
    flipped = bytearray(data)
    flipped[-9] ^= 1
    Path("archive/bad/flipped.hpcm").write_bytes(flipped)
    flipped[-4:] = zlib.crc32(flipped[4:-4]).to_bytes(4, "little")
    Path("archive/bad/forged.hpcm").write_bytes(flipped)  # its checksum fits: only decoding finds it
    Path("archive/bad/cut.hpcm").write_bytes(data[:-9])
    Path("archive/bad/foreign.bin").write_bytes(b"no file of ours")
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def tree() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


BAD = ["cut.hpcm", "flipped.hpcm", "foreign.bin", "forged.hpcm"]


@pytest.mark.parametrize("options", [[], ["--jobs", "2"]])
def test_an_archive(folder: Path, options: list[str]) -> None:
    before = tree()
    result = call("verify", "archive", *options)
    assert result.exit_code == 1
    lines = sorted(result.stderr.splitlines())
    assert [line.split(":")[1].strip() for line in lines] == [f"archive/bad/{name}" for name in BAD]
    assert "unexpected" not in result.stderr
    said = result.stdout.splitlines()
    assert sorted(said[:-1]) == ["archive/exact.hpcm: decodes", "archive/good.hpcm: decodes"]
    assert said[-1].startswith("2 files, ")
    assert said[-1].endswith(", 4 failed")
    assert tree() == before


def test_quick_compares_the_checksums_of_the_files_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcmref.codec.codec_for", None)  # nothing is decoded
    result = call("verify", "--quick", "archive")
    assert result.exit_code == 1
    named = [line.split(":")[1].strip() for line in result.stderr.splitlines()]
    assert named == [f"archive/bad/{name}" for name in BAD if name != "forged.hpcm"]


def test_good_files(folder: Path) -> None:
    shutil.rmtree("archive/bad")
    assert call("verify", "archive", "--quiet").output == ""
    result = call("verify", "archive", "--json")
    assert result.exit_code == 0
    assert [json.loads(line)["file"] for line in result.stdout.splitlines()] == [
        "archive/exact.hpcm",
        "archive/good.hpcm",
    ]
    data = Path("archive/good.hpcm").read_bytes()
    assert CliRunner().invoke(app, ["verify", "-"], input=data).stdout == "standard input: decodes\n"


def test_a_damaged_lossless_payload(folder: Path) -> None:
    file = parse(Path("archive/exact.hpcm").read_bytes())
    Path("x.hpcm").write_bytes(write(changed(file, payload=file.payload[:-40])))
    result = call("verify", "x.hpcm")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)


class TestEncodeVerify:
    def test_the_same_bytes(self, folder: Path) -> None:
        assert call("encode", "a.png", "-o", "b.hpcm", "--verify").exit_code == 0
        assert Path("b.hpcm").read_bytes() == Path("archive/good.hpcm").read_bytes()
        assert call("encode", "a.png", "-o", "c.hpcm", "--verify", "--lossless").exit_code == 0
        assert Path("c.hpcm").read_bytes() == Path("archive/exact.hpcm").read_bytes()

    def test_nothing_is_written_if_the_decoders_disagree(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def disagree(*_: object) -> None:
            raise ModelChangedError("a second decoder reads other latents than were encoded")

        monkeypatch.setattr("hpcmref.latents.LatentCodec.verify", disagree)
        result = call("encode", "a.png", "-o", "b.hpcm", "--verify")
        assert (result.exit_code, Path("b.hpcm").exists()) == (1, False)
        assert result.stderr == "hpcmref: a.png: a second decoder reads other latents than were encoded\n"

    def test_lossless_pixels_are_compared(self, folder: Path) -> None:
        image = Image.open("a.png")
        image.load()
        data = lossless.encode(image)
        lossless.verify(data, image)
        image.putpixel((0, 0), (1, 2, 3))
        with pytest.raises(DecodeError):
            lossless.verify(data, image)


class TestAllowDamaged:
    def test_a_flipped_bit(self, folder: Path, sample: Image.Image, codec: Codec) -> None:
        """The picture is shown as far as its scales verify, with a warning; without the option it is refused."""
        data = bytearray(codec.encode(sample))
        data[-9] ^= 1
        Path("x.hpcm").write_bytes(data)
        refused = call("decode", "x.hpcm", "-o", "x.png")
        assert (refused.exit_code, Path("x.png").exists()) == (1, False)
        shown = call("decode", "x.hpcm", "-o", "x.png", "--allow-damaged")
        assert shown.exit_code == 0
        assert shown.stderr == "hpcmref: x.hpcm: the file is damaged, and is decoded as far as its checksums match\n"
        assert Image.open("x.png").size == sample.size

    def test_a_good_file_is_not_warned_of(self, folder: Path) -> None:
        result = call("decode", "archive/good.hpcm", "-o", "x.png", "--allow-damaged")
        assert (result.exit_code, result.stderr) == (0, "")

    def test_a_file_of_which_nothing_verifies(self, folder: Path, codec: Codec) -> None:
        data = bytearray(Path("archive/good.hpcm").read_bytes())
        data[-12:-4] = bytes(8)
        data[40:60] = bytes(20)
        Path("x.hpcm").write_bytes(data)
        result = call("decode", "x.hpcm", "-o", "x.png", "--allow-damaged")
        assert (result.exit_code, Path("x.png").exists()) == (1, False)
        assert result.stderr.splitlines()[-1].startswith("hpcmref: x.hpcm: the file is damaged")
