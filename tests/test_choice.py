"""Is the lossless stream taken where it is better, and nowhere else? Does quality never fall when -q rises?"""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from models import psnr
from PIL import Image
from typer.testing import CliRunner

import hpcmref
from hpcmref import choice, lossless
from hpcmref.bench.codecs import codecs_of
from hpcmref.cli import app
from hpcmref.errors import ConfigError, HpcmrefError
from hpcmref.format.container import Coding, parse
from hpcmref.picture.images import picture_of
from research import hard_pictures, lossless_choice

if TYPE_CHECKING:
    from hpcmref.codec import Codec

KINDS = ("text", "screenshot", *hard_pictures.SYNTHETIC)
QUALITIES = (0, 15, 16, 31, 40, 48, 62, 63)


def drawn(kind: str, side: int = 80) -> Image.Image:
    if kind == "text":
        return hard_pictures.text(side)
    return hard_pictures.screenshot(side) if kind == "screenshot" else hard_pictures.synthetic(kind, side)


@pytest.mark.parametrize("kind", [*KINDS, "photograph"])
def test_quality_never_falls_and_the_best_is_at_least_30_db(codec: Codec, sample: Image.Image, kind: str) -> None:
    """Once lossless has been chosen it stays, and each quality is at least as close as the one below (but for 0.02 dB,
    which rounding to whole levels makes of a picture that is close already).
    """
    image = sample.crop((150, 60, 278, 156)) if kind == "photograph" else drawn(kind)
    files = [codec.encode(image, quality, choose=True) for quality in QUALITIES]
    codings = [parse(data).coding for data in files]
    is_lossless = [coding != Coding.LEARNED for coding in codings]
    assert is_lossless == sorted(is_lossless)
    with np.errstate(divide="ignore"):
        shown = [psnr(codec.decode(data), image) for data in files]
    assert all(after >= before - 0.02 for before, after in itertools.pairwise(shown)), shown
    assert shown[-1] >= 30
    assert all(np.isinf(each) for each, exact in zip(shown, is_lossless, strict=True) if exact)
    if kind in ("flat", "checker", "columns", "dither", "pixel art"):
        assert all(is_lossless)
    if kind == "photograph":
        assert not any(is_lossless)
    if kind == "noise":
        assert is_lossless == [quality == 63 for quality in QUALITIES]


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "1"])
@pytest.mark.parametrize("size", [(1, 1), (3, 70), (65, 64)])
def test_one_colour_comes_back_exactly(codec: Codec, mode: str, size: tuple[int, int]) -> None:
    image = Image.new("RGBA", size, (13, 200, 77, 99)).convert(mode)
    for quality in (0, 32, 63):
        again = codec.decode(codec.encode(image, quality, choose=True, verify=True))
        assert (again.mode, again.tobytes()) == (image.mode, image.tobytes())


@pytest.mark.parametrize("kind", KINDS)
def test_the_lossless_stream_is_near_the_best_of_webp_and_png(kind: str) -> None:
    image = drawn(kind, 128)
    sizes = []
    for form, options in (("PNG", {"optimize": True}), ("WEBP", {"lossless": True, "quality": 100, "method": 5})):
        file = io.BytesIO()
        image.save(file, form, **options)
        sizes.append(len(file.getvalue()))
    assert len(lossless.pack(picture_of(image))[1]) <= 1.05 * min(sizes)


def test_a_picture_that_is_too_wide_for_webp_becomes_a_png(codec: Codec) -> None:
    image = hard_pictures.synthetic("pixel art", 16).resize((16384, 4), Image.Resampling.NEAREST)
    data = codec.encode(image, 40, choose=True)
    assert parse(data).coding is Coding.PNG
    assert codec.decode(data).tobytes() == image.tobytes()


def test_a_photograph_is_known_by_a_small_part(
    codec: Codec, sample: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is compressed without loss, and no quality but the one that is asked for is tried."""
    monkeypatch.setattr(lossless, "pack", lambda picture: pytest.fail("the lossless stream was made"))
    for quality in (0, 32, 62):
        assert codec.encode(sample, quality, choose=True) == codec.encode(sample, quality)
    assert hpcmref.encode(sample, 20, device="cpu") == codec.encode(sample, 20)


def test_what_is_invisible_costs_nothing_in_a_lossless_stream(codec: Codec) -> None:
    pixels = np.array(drawn("text").convert("RGBA"))
    pixels[30:, :, 3] = 0
    pixels[30:, :, :3] = np.random.default_rng(0).integers(0, 256, pixels[30:, :, :3].shape)
    data = codec.encode(Image.fromarray(pixels), 40, choose=True, verify=True)
    again = np.asarray(codec.decode(data))
    np.testing.assert_array_equal(again[:30], pixels[:30])
    np.testing.assert_array_equal(again[..., 3], pixels[..., 3])
    assert parse(data).coding is Coding.WEBP
    assert len(data) < len(codec.encode(Image.fromarray(pixels[:30]), 40, choose=True)) + 100


def test_targets_choose_between_exact_and_learned(codec: Codec, sample: Image.Image) -> None:
    """A size has the exact picture if that fits, or else the best one that does; every PSNR is reached."""
    text = drawn("text")
    exact = hpcmref.encode(text, lossless=True)
    assert codec.encode_to(text, size=len(exact), choose=True) == exact
    smaller = codec.encode_to(text, size=len(exact) - 1, choose=True)
    assert len(smaller) < len(exact)
    assert parse(smaller).coding is Coding.LEARNED
    assert codec.encode_to(text, psnr=70, choose=True) == exact
    small = sample.crop((150, 60, 278, 156))
    assert codec.encode_to(small, psnr=33, choose=True) == codec.encode_to(small, psnr=33)
    assert codec.encode_to(small, size=4000, choose=True) == codec.encode_to(small, size=4000)
    with pytest.raises(HpcmrefError, match="no quality"):
        codec.encode_to(small, psnr=70)
    again = codec.decode(codec.encode_to(small, psnr=70, choose=True))
    assert again.tobytes() == small.tobytes()
    flat = Image.new("RGB", (50, 50), "red")
    assert codec.decode(codec.encode_to(flat, bpp=0.3, choose=True)).tobytes() == flat.tobytes()


def test_a_target_that_metadata_alone_is_larger_than(codec: Codec, sample: Image.Image) -> None:
    image = sample.crop((0, 0, 64, 64))
    image.info["icc_profile"] = np.random.default_rng(0).bytes(3000)
    with pytest.raises(HpcmrefError, match=r"ICC data of 30\d\d bytes.*--strip"):
        codec.encode_to(image, size=1000, choose=True)
    assert len(codec.encode_to(image, size=4000, choose=True)) <= 4000


def of_every_kind(sample: Image.Image) -> dict[str, Image.Image]:
    small = sample.crop((150, 60, 214, 124))
    masked, heavy = small.copy(), small.copy()
    masked.putalpha(Image.radial_gradient("L").resize(masked.size))
    heavy.info["icc_profile"] = np.random.default_rng(0).bytes(2000)
    return {
        "one pixel": sample.crop((0, 0, 1, 1)),
        "tiny": sample.crop((50, 60, 53, 62)),
        "flat": Image.new("L", (64, 64), 9),
        "transparent": masked,
        "invisible": Image.new("RGBA", (20, 20)),
        "metadata": heavy,
    }


@pytest.mark.parametrize("kind", ["one pixel", "tiny", "flat", "transparent", "invisible", "metadata"])
def test_sizes_count_everything_in_the_file(codec: Codec, sample: Image.Image, kind: str) -> None:
    """The best file within the limit; one byte less than the smallest is refused."""
    image = of_every_kind(sample)[kind]
    smallest = min(len(codec.encode(image, 0, choose=True)), len(codec.encode(image, 0)))
    for size in (smallest, smallest + 40, smallest + 400):
        data = codec.encode_to(image, size=size, choose=True)
        assert len(data) <= size
        learned = parse(data).learned
        if learned is not None and learned.quality < 63:
            assert len(codec.encode(image, learned.quality + 1)) > size
    for limit in ({"size": smallest - 1}, {"bpp": 8 * (smallest - 1) / (image.width * image.height)}):
        with pytest.raises(HpcmrefError, match=r"no quality|alone"):
            codec.encode_to(image, **limit, choose=True)  # type: ignore[arg-type]
    for wanted in (30, 45):
        shown = np.asarray(codec.decode(codec.encode_to(image, psnr=wanted, choose=True)).convert("RGBA"), float)
        expected = np.asarray(image.convert("RGBA"), float)
        seen = expected[..., 3] > 0
        assert not seen.any() or np.square(shown[seen] - expected[seen])[:, :3].mean() <= 255**2 / 10 ** (wanted / 10)


def test_psnr_is_of_what_is_visible(codec: Codec, sample: Image.Image) -> None:
    pixels = np.array(sample.crop((150, 60, 278, 156)).convert("RGBA"))
    pixels[:, 64:] = np.random.default_rng(0).integers(0, 256, pixels[:, 64:].shape)
    pixels[:, 64:, 3] = 0
    image = Image.fromarray(pixels)
    for keep in (False, True):
        data = codec.encode_to(image, psnr=34, keep_invisible=keep)
        again = np.asarray(codec.decode(data), np.float64)
        seen = np.square(again[:, :64, :3] - pixels[:, :64, :3]).mean()
        assert 34 <= 10 * np.log10(255**2 / seen) < 34.6


def test_lambda_lies_between_the_anchors() -> None:
    assert [choice.lambda_of((0.001, 0.1), quality, 64) for quality in (0, 63)] == pytest.approx([0.001, 0.1])
    assert choice.lambda_of((0.001, 0.1), 1, 3) == pytest.approx(0.01)
    assert choice.lambda_of((), 0, 1) == 0


def test_bench_measures_the_learned_stream_alone_unless_told_otherwise() -> None:
    image = drawn("checker", 64)
    plain, chosen = codecs_of(["hpcmref", "hpcmref:choose=1"], ["nano"], "cpu")
    assert plain.name != chosen.name
    assert plain.identity != chosen.identity
    assert parse(plain.encode(image, 63)).coding is Coding.LEARNED
    data = chosen.encode(image, 63)
    assert chosen.decode(data).tobytes() == image.tobytes()
    with pytest.raises(ConfigError, match="has the options choose=1"):
        codecs_of(["hpcmref:speed=1"], ["nano"], "cpu")


def test_the_script_that_measures_the_choice_runs(
    tmp_path: Path, sample: Image.Image, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample.crop((150, 60, 214, 108)).save(tmp_path / "a.png")
    monkeypatch.setattr(lossless_choice, "pictures", lambda side: {"checker": drawn("checker", side)})
    monkeypatch.setattr(lossless_choice, "QUALITIES", (0, 63))
    lossless_choice.main(side=32, photographs=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("*") for line in lines[1:3]] == [2, 0]
    assert [line.split(":")[0] for line in lines[3:]] == [f"time at -q {quality}" for quality in (32, 62, 63)]


@pytest.mark.filterwarnings("ignore")
def test_measure_counts_what_is_visible(tmp_path: Path, sample: Image.Image) -> None:
    """A picture that is taken without loss is exact where it is seen, whatever lies under alpha 0."""
    pixels = np.array(drawn("text").convert("RGBA"))
    pixels[30:, :, 3] = 0
    pixels[30:, :, :3] = 77
    Image.fromarray(pixels).save(tmp_path / "a.png")
    arguments = ["encode", str(tmp_path / "a.png"), "-o", str(tmp_path / "a.hpcm"), "-q", "50", "--measure"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "PSNR infinite" in result.stdout


def test_resume_keeps_a_file_that_was_chosen_to_be_lossless(tmp_path: Path) -> None:
    drawn("checker").save(tmp_path / "a.png")
    arguments = ["encode", str(tmp_path / "a.png"), "-o", f"{tmp_path}/out/", "-q", "20"]

    def said(*more: str) -> str:
        result = CliRunner().invoke(app, [*arguments, *more])
        assert result.exit_code == 0
        return result.stdout

    assert "lossless" in said()
    written = (tmp_path / "out/a.hpcm").stat().st_mtime_ns
    said("--resume")
    assert (tmp_path / "out/a.hpcm").stat().st_mtime_ns == written
