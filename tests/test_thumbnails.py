"""Are small pictures like the whole made small, and made of less than the whole?"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from models import psnr
from PIL import Image
from typer.testing import CliRunner

import hpcmref
from hpcmref import lossless
from hpcmref.cli import app
from hpcmref.errors import HpcmrefError, ImageError
from hpcmref.format.container import parse
from hpcmref.preview import LinearSynthesis, PreviewReader, interpolated
from research import thumbnail as research

if TYPE_CHECKING:
    from hpcmref.codec import Codec


@pytest.fixture(scope="module")
def data(codec: Codec, sample: Image.Image) -> bytes:
    return codec.encode(sample, 32)


def test_a_thumbnail_is_like_the_whole_made_small(codec: Codec, data: bytes) -> None:
    """An eighth of the size, for which all latents are read; a sixteenth, for which they are not; and larger ones."""
    whole = codec.decode(data)
    for side, least in ((56, 30), (37, 23), (28, 23)):
        small = codec.thumbnail(data, side)
        assert small.size == (side, round(330 * side / 450))
        assert psnr(small, whole.resize(small.size, Image.Resampling.LANCZOS)) > least
    assert psnr(codec.thumbnail(data, 200), codec.thumbnail(data, 201).resize((200, 147))) > 25
    assert codec.thumbnail(data, 9999).tobytes() == whole.tobytes()
    assert hpcmref.thumbnail(data, 56, "cpu").tobytes() == codec.thumbnail(data, 56).tobytes()


def test_it_reads_no_more_than_it_needs(codec: Codec, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[object] = []
    code = PreviewReader.code
    monkeypatch.setattr(PreviewReader, "code", lambda *args: (steps.append(args[1]), code(*args))[1])
    monkeypatch.setattr(codec.model.g_s, "forward", lambda x: pytest.fail("the synthesis network was called"))
    codec.thumbnail(data, 28)
    assert len(steps) == 8  # z, and seven of eleven


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.filterwarnings("ignore:CMYK", "ignore:16-bit")
@pytest.mark.parametrize("exact", [False, True])
def test_every_mode_has_a_thumbnail(codec: Codec, sample: Image.Image, mode: str, exact: bool) -> None:
    image = sample.crop((0, 0, 256, 128))
    image = (
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )
    if exact and mode in ("CMYK", "I;16"):
        return
    data = lossless.encode(image) if exact else codec.encode(image, 20)
    for side in (100, 30, 16):
        small = hpcmref.thumbnail(data, side, "cpu")
        assert (small.size, small.mode) == ((side, side // 2), "L" if mode == "1" else mode)
        found, expected = (each if mode == "I;16" else each.convert("RGB") for each in (small, image))
        assert abs(float(np.asarray(found, float).mean() / np.asarray(expected, float).mean()) - 1) < 0.1


def test_metadata_goes_along(codec: Codec, sample: Image.Image) -> None:
    image = sample.copy()
    image.info["xmp"] = b"<x/>"
    assert codec.thumbnail(codec.encode(image, 10), 20).info["xmp"] == b"<x/>"


def test_truncated_and_damaged_files(codec: Codec, data: bytes) -> None:
    whole = codec.thumbnail(data, 56)
    cut = data[: -len(parse(data).payload) // 2]
    small = codec.thumbnail(cut, 56, partial=True)
    assert psnr(small, whole) > 15
    assert codec.thumbnail(cut, 20, partial=True).size == (20, 15)
    with pytest.raises(HpcmrefError):
        codec.thumbnail(cut, 56)
    damaged = data[:-300] + bytes(296) + data[-4:]
    assert codec.thumbnail(damaged, 56, damaged=True).size == whole.size
    with pytest.raises(ImageError, match="max_pixels"):
        codec.thumbnail(data, 20, max_pixels=1000)


def test_pillow_s_draft_and_thumbnail(codec: Codec, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = codec.decode(data)
    image = Image.open(io.BytesIO(data))
    assert image.draft("RGB", (300, 300)) is None
    assert image.draft("L", (50, 40)) == ("RGB", (0, 0, 56.0, 41.0))
    image.load()
    assert (image.size, image.mode) == ((56, 41), "RGB")
    assert image.draft("L", (5, 4)) is None
    expected = whole.copy()
    expected.thumbnail((40, 40))
    monkeypatch.setattr(type(codec), "decode", lambda *args, **options: pytest.fail("all of it was decoded"))
    image = Image.open(io.BytesIO(data))
    image.thumbnail((40, 40))
    assert image.size == expected.size == (40, 29)
    assert psnr(image, expected) > 28


def test_the_command_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.hpcm").write_bytes(data)
    (tmp_path / "cut.hpcm").write_bytes(data[:-2000])
    said = f"hpcmref: {tmp_path / 'cut.hpcm'}: the file is truncated, and is decoded as far as it goes\n"
    for name, more, warning in (("a", [], ""), ("cut", ["--allow-partial"], said)):
        arguments = ["decode", str(tmp_path / f"{name}.hpcm"), "-o", str(tmp_path / f"{name}.png"), "--thumbnail", "48"]
        result = CliRunner().invoke(app, [*arguments, *more])
        assert (result.exit_code, result.stderr) == (0, warning)
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (48, 35)
    assert CliRunner().invoke(app, ["decode", "a.hpcm", "--thumbnail", "48", "--upto", "1"]).exit_code == 2


def test_interpolation_goes_along_edges(codec: Codec) -> None:
    import torch

    plane = torch.zeros(1, 4, 8, 8)
    plane[..., 4:] = 8
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    known = ((rows + columns) % 2 == 0).float().expand(1, 4, 8, 8)
    found = interpolated(plane * known, known)[0, 0]
    assert (found[1:-1, 1:-1] - plane[0, 0, 1:-1, 1:-1]).abs().max() < 0.2
    nothing = torch.zeros(1, 4, 3, 3)
    assert torch.equal(interpolated(nothing, nothing), nothing)
    with torch.inference_mode():
        flat = LinearSynthesis(codec.model)(torch.zeros(1, codec.model.config.M, 2, 3))
    assert flat.shape == (1, 3, 4, 6)
    assert flat.std((2, 3)).max() < 1e-3


def test_the_script_that_measures_thumbnails_runs(
    tmp_path: Path, sample: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    sample.save(tmp_path / "a.png")
    research.main(tmp_path, megapixels=0.1, sides="40,20", repeat=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].split()[0] == "40"
