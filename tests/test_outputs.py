"""What do encode and decode write and say: formats, backgrounds, measures, JSON, and what they warn of?"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from typer.testing import CliRunner, Result

import hpcmref
from hpcmref import lossless
from hpcmref.cli import app
from hpcmref.picture import plugins
from hpcmref.picture.images import FORMATS

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
COLOURS = np.add.outer(np.arange(30), np.arange(40)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a.hpcm is opaque, b.hpcm is half transparent; both decode exactly."""
    monkeypatch.chdir(tmp_path)
    image = Image.merge(
        "RGB", [Image.fromarray(COLOURS), Image.fromarray(COLOURS[::-1].copy()), Image.new("L", (40, 30))]
    )
    image.save("a.png")
    Path("a.hpcm").write_bytes(lossless.encode(image))
    image.putalpha(Image.new("L", image.size, 0))
    image.putpixel((0, 0), (1, 2, 3, 255))
    Path("b.hpcm").write_bytes(lossless.encode(image))
    return tmp_path


def call(*arguments: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


def here(form: str) -> bool:
    return plugins.register(form) and (form != "AVIF" or bool(features.check("avif")))


class TestFormats:
    @pytest.mark.parametrize("form", [form for form in FORMATS if form != "NPY" and here(form)])
    def test_every_suffix(self, folder: Path, form: str) -> None:
        for suffix in FORMATS[form]:
            assert call("decode", "a.hpcm", "-o", f"x{suffix}").exit_code == 0
            with Image.open(f"x{suffix}") as image, Image.open("a.png") as original:
                assert image.format == form
                difference = np.asarray(image.convert("RGB")).astype(int) - np.asarray(original)
            assert np.abs(difference).max() <= (30 if form in ("JPEG", "AVIF") else 0)

    def test_numpy(self, folder: Path) -> None:
        assert call("decode", "a.hpcm", "-o", "x.npy").exit_code == 0
        array = np.load("x.npy")
        assert (array.shape, array.dtype) == ((30, 40, 3), np.uint8)
        assert np.array_equal(array, np.asarray(Image.open("a.png")))

    @pytest.mark.parametrize(("name", "magic"), [("jpg", b"\xff\xd8"), ("bmp", b"BM"), ("NPY", b"\x93NUMPY")])
    def test_a_stream_of_any_format(self, folder: Path, name: str, magic: bytes) -> None:
        result = call("decode", "-", "-o", "-", "--format", name, stdin=Path("a.hpcm").read_bytes())
        assert result.exit_code == 0
        assert result.stdout_bytes.startswith(magic)

    def test_the_name_of_a_format_decides_before_the_suffix(self, folder: Path) -> None:
        assert call("decode", "a.hpcm", "-o", "x.dat", "--format", "webp").exit_code == 0
        assert Image.open("x.dat").format == "WEBP"

    @pytest.mark.parametrize("form", ["jpeg", "webp", "avif"])
    def test_quality(self, folder: Path, form: str) -> None:
        if not here(form.upper()):
            pytest.skip("this Pillow has no AVIF")
        sizes = []
        for quality in ("5", "95"):
            result = call("decode", "a.hpcm", "-o", f"{quality}.{form}", "--output-quality", quality)
            assert result.exit_code == 0
            sizes.append(Path(f"{quality}.{form}").stat().st_size)
        assert sizes[0] < sizes[1]

    @pytest.mark.parametrize("suffix", ["jpg", "bmp", "ppm"])
    def test_background(self, folder: Path, suffix: str) -> None:
        result = call("decode", "b.hpcm", "-o", f"x.{suffix}")
        assert "no transparency: the image is placed on white" in result.stderr
        assert np.asarray(Image.open(f"x.{suffix}"))[20, 20].min() >= 254
        result = call("decode", "b.hpcm", "-o", f"y.{suffix}", "--background", "#0000ff")
        assert (result.exit_code, result.stderr) == (0, "")
        red, green, blue = np.asarray(Image.open(f"y.{suffix}"))[20, 20]
        assert max(red, green) < 6
        assert blue > 250

    def test_a_format_whose_plugin_is_missing(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The sentence names the extra, before anything is decoded; the same for inputs."""
        monkeypatch.setattr(plugins, "register", lambda form: form not in ("JXL", "HEIF"))
        monkeypatch.setattr("hpcmref.lossless.decode", None)
        result = call("decode", "a.hpcm", "-o", "x.jxl")
        assert (result.exit_code, result.stderr) == (
            1, "hpcmref: a.hpcm: JPEG XL needs a plugin that is not installed: pip install 'hpcmref[formats]'\n"
        )  # fmt: skip
        Path("in.jxl").write_bytes(b"\xff\x0a" + bytes(50))
        Path("in.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
        result = call("encode", "in.jxl", "in.heic", "-o", "out")
        assert result.stderr.splitlines() == [
            "hpcmref: cannot read in.jxl: JPEG XL needs a plugin that is not installed: pip install 'hpcmref[formats]'",
            "hpcmref: cannot read in.heic: HEIC needs a plugin that is not installed: pip install 'hpcmref[formats]'",
        ]

    @pytest.mark.parametrize("form", ["JXL", "HEIF"])
    def test_plugins(self, folder: Path, form: str) -> None:
        if not plugins.register(form):
            pytest.skip("needs the extra hpcmref[formats]")
        suffix = {"JXL": "jxl", "HEIF": "heic"}[form]
        Image.open("a.png").save(f"in.{suffix}", form, quality=90)
        assert call("encode", f"in.{suffix}", "-o", "x.hpcm", "--lossless").exit_code == 0
        if form == "JXL":
            assert call("decode", "a.hpcm", "-o", "x.jxl").exit_code == 0
            assert np.array_equal(np.asarray(Image.open("x.jxl")), np.asarray(Image.open("a.png")))


def test_decode_says_when_a_file_is_truncated(folder: Path, sample: Image.Image) -> None:
    data = hpcmref.encode(sample.crop((0, 0, 128, 64)))
    Path("cut.hpcm").write_bytes(data[: len(data) * 3 // 4])
    result = call("decode", "cut.hpcm", "--allow-partial", "--json")
    said = "the file is truncated, and is decoded as far as it goes"
    assert json.loads(result.stdout)["warnings"] == [said]
    assert result.stderr == f"hpcmref: cut.hpcm: {said}\n"


class TestWhatEncodeSays:
    def test_a_file_that_is_larger_than_its_input(self, folder: Path) -> None:
        Image.new("L", (1, 1)).save("tiny.png")
        result = call("encode", "tiny.png", "-o", "tiny.hpcm")
        size = Path("tiny.hpcm").stat().st_size
        if size > Path("tiny.png").stat().st_size:
            assert "tiny.png: the encoded file is larger than the input" in result.stderr
        Path("small.pgm").write_bytes(b"P5 1 1 255 x")
        result = call("encode", "small.pgm", "--lossless")
        assert re.fullmatch(
            r"hpcmref: small\.pgm: the encoded file is larger than the input, \d+ against 12 bytes\n", result.stderr
        )

    def test_measure(self, folder: Path, sample: Image.Image) -> None:
        sample.crop((0, 0, 200, 130)).save("s.png")
        result = call("encode", "s.png", "--measure", "--json")
        facts = json.loads(result.stdout)
        compared = json.loads(call("compare", "s.png", "s.hpcm", "--json").stdout)
        assert facts["psnr"] == pytest.approx(compared["psnr"])
        assert facts.get("ssimulacra2") == compared["ssimulacra2"]
        assert 30 < facts["psnr"] < 36
        assert f"PSNR {facts['psnr']:.2f} dB" in call("encode", "s.png", "--measure", "--force").stdout

    def test_json_is_one_object_a_file(self, folder: Path) -> None:
        Path("bad.png").write_text("no image")
        result = call("encode", "a.png", "bad.png", "-o", "out", "--lossless", "--json")
        assert result.exit_code == 1
        good, bad = map(json.loads, result.stdout.splitlines())
        assert good["file"] == "a.png"
        assert good["size"] == Path(good["output"]).stat().st_size
        assert (good["width"], good["height"], good["quality"]) == (40, 30, None)
        assert bad["file"] == "bad.png"
        assert "is not an image" in bad["error"]
        exact = json.loads(call("encode", "a.png", "-o", "e.hpcm", "--lossless", "--measure", "--json").stdout)
        assert exact["psnr"] is None  # infinite, for which JSON has no number
        assert "PSNR infinite" in call("encode", "a.png", "-o", "f.hpcm", "--lossless", "--measure").stdout
        decoded = json.loads(call("decode", "a.hpcm", "-o", "x.png", "--json").stdout)
        assert (decoded["output"], decoded["width"], decoded["mode"]) == ("x.png", 40, "RGB")

    def test_stages(self, folder: Path) -> None:
        said = call("encode", "a.png", "-o", "x.hpcm", "--lossless", "-v").stderr
        assert re.fullmatch(r"hpcmref: a\.png: open \d\.\d{3} s, encode \d+\.\d{3} s\n", said)
        said = call("decode", "x.hpcm", "-o", "x.png", "-v").stderr
        assert "decode 0." in said
        assert "write the image 0." in said

    def test_threads(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        before = torch.get_num_threads()
        monkeypatch.setenv("OMP_NUM_THREADS", str(before))
        try:
            assert call("encode", "a.png", "-o", "x.hpcm", "--lossless", "--threads", "1").exit_code == 0
            assert torch.get_num_threads() == 1
            assert os.environ["OMP_NUM_THREADS"] == "1"
        finally:
            torch.set_num_threads(before)


class TestCompare:
    def test_equal_images(self, folder: Path) -> None:
        result = call("compare", "a.png", "a.hpcm")
        assert result.exit_code == 0
        assert result.stdout.startswith("PSNR:          infinite: the pixels are equal\n")
        facts = json.loads(call("compare", "a.png", "a.hpcm", "--json").stdout)
        assert facts["equal"]
        assert facts["psnr"] is None

    def test_standard_input(self, folder: Path) -> None:
        data = Path("a.hpcm").read_bytes()
        assert json.loads(call("compare", "a.png", "-", "--json", stdin=data).stdout)["equal"]
        assert call("compare", "-", "-", stdin=data).exit_code == 2

    def test_different_sizes(self, folder: Path) -> None:
        Image.new("RGB", (41, 30)).save("c.png")
        result = call("compare", "a.png", "c.png")
        assert (result.exit_code, result.stderr) == (
            1, "hpcmref: a.png and c.png have different sizes, 40x30 and 41x30\n"
        )  # fmt: skip

    def test_transparency_is_put_on_white(self, folder: Path) -> None:
        """The numbers are of what is seen there, but a picture with alpha does not equal one without."""
        call("decode", "b.hpcm", "-o", "b.bmp")
        facts = json.loads(call("compare", "b.hpcm", "b.bmp", "--json").stdout)
        assert (facts["psnr"], facts["equal"]) == (None, False)
        assert call("compare", "b.hpcm", "b.bmp").stdout.startswith("PSNR:          infinite on white; alpha differs\n")
        call("decode", "b.hpcm", "-o", "b.png")
        assert json.loads(call("compare", "b.hpcm", "b.png", "--json").stdout)["equal"]
        Image.new("RGBA", (8, 8), "white").save("white.png")
        Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save("clear.png")
        assert not json.loads(call("compare", "white.png", "clear.png", "--json").stdout)["equal"]
        Image.new("RGB", (8, 8), "white").save("opaque.png")
        assert json.loads(call("compare", "white.png", "opaque.png", "--json").stdout)["equal"]

    def test_transparent_pictures_are_upright(self, folder: Path) -> None:
        image = Image.open("a.png").convert("RGBA")
        image.putalpha(Image.fromarray(COLOURS))
        image.save("upright.png")
        turned = Image.Exif()
        turned[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=turned)
        assert json.loads(call("compare", "upright.png", "turned.png", "--json").stdout)["equal"]

    def test_equal_is_said_of_equal_pixels_alone(self, folder: Path) -> None:
        """One level in one pixel: MS-SSIM rounds to 1, and its decibels are infinite."""
        pixels = np.full((600, 600, 3), 128, np.uint8)
        Image.fromarray(pixels).save("one.png")
        pixels[300, 300, 1] += 1
        Image.fromarray(pixels).save("other.png")
        result = call("compare", "one.png", "other.png", "--metrics", "ms-ssim")
        assert "MS-SSIM:" in result.stdout
        assert "equal" not in result.stdout

    def test_warnings_name_the_picture(self, folder: Path) -> None:
        """As other commands do, and not the line of the code that warned."""
        first = Image.linear_gradient("L").resize((40, 30)).convert("P")
        first.save("pal.png")
        first.save("anim.gif", save_all=True, append_images=[first.transpose(Image.Transpose.ROTATE_180)])
        Image.fromarray(COLOURS.astype(np.uint16) * 257).save("wide.png")
        for name, texts in (
            ("anim.gif", ["only the first frame of anim.gif is used; 1 more are left out"]),
            ("pal.png", ["palette colours are converted to RGB"]),
            ("wide.png", ["16-bit grey is reduced to 8 bits"]),
        ):
            for order in ((name, "a.png"), ("a.png", name)):
                result = call("compare", *order, "--metrics", "psnr")
                assert result.exit_code == 0
                lines = result.stderr.splitlines()
                assert all(line.startswith(f"hpcmref: {name}: ") for line in lines), lines
                assert {f"hpcmref: {name}: {text}" for text in texts} <= set(lines)

    def test_errors_name_standard_input(self, folder: Path) -> None:
        result = call("compare", "a.png", "-", stdin=b"no image")
        assert result.exit_code == 1
        assert result.stderr.startswith("hpcmref: standard input is not an image in one of the supported formats")

    def test_a_metric_that_was_asked_for_is_never_silently_left_out(self, folder: Path) -> None:
        result = call("compare", "a.png", "a.hpcm", "--metrics", "ms-ssim")
        assert (result.exit_code, result.stdout) == (0, "PSNR:          infinite: the pixels are equal\n")
        assert result.stderr == "hpcmref: MS-SSIM needs sides of at least 161 pixels\n"
        assert call("compare", "a.png", "a.hpcm").stderr == ""
        result = call("compare", "a.png", "a.hpcm", "--metrics", "ms-ssim", "--json")
        assert json.loads(result.stdout)["ms_ssim"] is None
        assert "161" in result.stderr


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_a_batch_survives_the_death_of_a_worker(folder: Path, sample: Image.Image) -> None:
    """As the OOM killer does: the image in flight is tried once more, and everything is written."""
    Path("in").mkdir()
    for number in range(12):
        sample.crop((0, 0, 200, 150)).save(f"in/{number}.png")
    process = subprocess.Popen(
        [sys.executable, "-m", "hpcmref", "encode", "in", "-o", "out", "--jobs", "2", "--lossless"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not list(Path().glob("out/*.hpcm")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(max(workers_of(process.pid)), signal.SIGKILL)
        said, errors = process.communicate(timeout=90)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "")
    assert len(list(Path().glob("out/*.hpcm"))) == 12
    assert said.splitlines()[-1].startswith("12 files, ")


def workers_of(parent: int) -> list[int]:
    """The child processes that have been started with spawn."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == parent and b"spawn_main" in line:
            found.append(int(folder.name))
    return found


def test_standard_output_of_bytes_is_whole(folder: Path) -> None:
    """Two streams in one pipe: nothing but the file goes to standard output."""
    result = subprocess.run(
        [sys.executable, "-m", "hpcmref", "decode", "a.hpcm", "-o", "-", "--format", "ppm"],
        capture_output=True, env=ENVIRONMENT, timeout=60,
    )  # fmt: skip
    assert Image.open(io.BytesIO(result.stdout)).size == (40, 30)
    assert len(result.stdout) == 40 * 30 * 3 + len(b"P6\n40 30\n255\n")
