"""Does Pillow open and save files of ours like any other, without importing torch before it must?"""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import containers
import numpy as np
import pytest
from PIL import Image, ImageFile, ImageSequence, UnidentifiedImageError

import hpcmref
from hpcmref import plugin
from hpcmref.errors import ArgumentTypeError, ConfigError
from hpcmref.format.container import MAGIC, Tag, parse, write
from hpcmref.picture.images import open_image
from hpcmref.plugin import _MAGIC, HpcmImageFile

if TYPE_CHECKING:
    from hpcmref.codec import Codec


@pytest.fixture(scope="module")
def small(sample: Image.Image) -> Image.Image:
    """A part of the sample, 70 x 45, with alpha and metadata."""
    image = sample.crop((150, 60, 220, 105))
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    image.info.update(icc_profile=b"profile", exif=exif.tobytes(), xmp=b"<x/>")
    return image


@pytest.fixture(scope="module")
def data(codec: Codec, small: Image.Image) -> bytes:
    return codec.encode(small, 20)


@pytest.fixture
def file(data: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "image.bin"
    path.write_bytes(data)
    return path


def python(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, env=environment, timeout=120, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_magic_is_the_container_s() -> None:
    assert _MAGIC == MAGIC


def test_open_and_load(codec: Codec, file: Path, data: bytes, small: Image.Image) -> None:
    expected = codec.decode(data)
    with Image.open(file) as image:
        assert isinstance(image, HpcmImageFile)
        assert (image.format, image.size, image.mode) == ("HPCM", small.size, "RGBA")
        assert image.get_format_mimetype() == "image/x-hpcm"
        assert (image.info["icc_profile"], image.info["xmp"]) == (b"profile", b"<x/>")
        assert image.getexif()[0x010F] == "Maker"
        assert image.tobytes() == expected.tobytes()
        assert image.tobytes() == expected.tobytes()  # and once more, from memory
        np.testing.assert_array_equal(np.asarray(image)[..., 3], np.asarray(small)[..., 3])
        assert len(list(ImageSequence.Iterator(image))) == 1
    assert pickle.loads(pickle.dumps(expected)).tobytes() == expected.tobytes()


def test_threads_that_share_an_opened_image_decode_it_once(
    codec: Codec, file: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bool] = []
    inner, all_started = plugin._decoded, threading.Barrier(4)

    def counted(*arguments: Any) -> Image.Image:
        decoded.append(True)
        return inner(*arguments)

    def pixels(image: Image.Image) -> bytes:
        all_started.wait(60)
        return image.tobytes()

    monkeypatch.setattr(plugin, "_decoded", counted)
    with Image.open(file) as image, ThreadPoolExecutor(4) as threads:
        assert set(threads.map(pixels, [image] * 4)) == {codec.decode(data).tobytes()}
    assert len(decoded) == 1


@pytest.mark.parametrize("loaded", [False, True])
def test_an_opened_image_can_be_pickled_and_copied(codec: Codec, file: Path, data: bytes, loaded: bool) -> None:
    expected = codec.decode(data)
    duplicates: list[Callable[[Image.Image], Image.Image]] = [
        lambda image: pickle.loads(pickle.dumps(image)),
        copy.copy,
        copy.deepcopy,
        Image.Image.copy,
    ]
    for duplicate in duplicates:
        with Image.open(file) as image:
            if loaded:
                image.load()
            other = duplicate(image)
        assert other.tobytes() == expected.tobytes()
        assert (other.mode, other.size) == (expected.mode, expected.size)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.filterwarnings("ignore:CMYK", "ignore:16-bit")
def test_the_mode_is_known_before_the_pixels(codec: Codec, sample: Image.Image, mode: str) -> None:
    image = sample.resize((9, 7))
    image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16)) if mode == "I;16" else image.convert(mode)
    opened = Image.open(io.BytesIO(codec.encode(image, 0)))
    assert (opened.mode, opened.size) == (mode, image.size)
    opened.load()
    assert (opened.mode, opened.size) == (mode, image.size)
    assert opened.copy().mode == mode


def test_save(codec: Codec, small: Image.Image, tmp_path: Path) -> None:
    small.save(tmp_path / "image.hpcm", quality=5, device="cpu")
    assert (tmp_path / "image.hpcm").read_bytes() == codec.encode(small, 5)
    small.save(tmp_path / "image.xyz", "HPCM", device="cpu")
    assert (tmp_path / "image.xyz").read_bytes() == codec.encode(small)
    small.save(tmp_path / "small.hpcm", size=1500, device="cpu")
    assert 1000 < (tmp_path / "small.hpcm").stat().st_size <= 1500


def test_save_takes_metadata_of_the_caller(small: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0110] = "Model"
    file = io.BytesIO()
    before = dict(small.info)
    small.save(file, "HPCM", exif=exif, xmp=None, quality=0)
    opened = Image.open(file)
    assert dict(opened.getexif()) == {0x0110: "Model"}
    assert set(opened.info) == {"icc_profile", "exif"}
    assert small.info == before


def test_none_leaves_out_exif_of_every_kind_and_turns_the_picture_once(small: Image.Image) -> None:
    tags = Image.Exif()
    tags[0x0112], tags[0x013B] = 6, "name"
    stored = small.convert("RGB").transpose(Image.Transpose.ROTATE_90)
    stored.info = {"Raw profile type exif": "\nexif\n  99\n" + (b"Exif\0\0" + tags.tobytes()[6:]).hex()}
    for options in ({"exif": None}, {}):
        file = io.BytesIO()
        stored.save(file, "HPCM", quality=30, **options)
        opened = Image.open(file)
        assert opened.size == small.size
        assert ("exif" in opened.info) == (not options)
        assert opened.getexif().get(0x0112, 1) == 1


def saved(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "HPCM", device="cpu", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 9, "effort": 1},
        {"bpp": 4.0, "keep_invisible": True, "verify": True},
        {"lossless": True, "strip": ["exif", "xmp"]},
    ],
)
def test_save_writes_the_same_file_as_encode(small: Image.Image, options: dict[str, Any]) -> None:
    assert saved(small, **options) == hpcmref.encode(small, device="cpu", **options)


def test_options_of_other_formats_are_ignored(small: Image.Image) -> None:
    assert saved(small, lossless=True, optimize=True, subsampling=0) == hpcmref.encode(small, lossless=True)


def test_strip_leaves_out_the_location_also_of_exif_that_the_caller_gives(small: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif.get_ifd(0x8825)[1] = "N"
    own = small.copy()
    own.info = {"exif": exif.tobytes()}
    cases: list[tuple[Image.Image, dict[str, Any]]] = [
        (own, {}),
        (small, {"exif": exif}),
        (small, {"exif": exif.tobytes()}),
    ]
    for image, options in cases:
        assert "location" in hpcmref.info(saved(image, quality=0, **options)).about
        without_location = hpcmref.info(saved(image, quality=0, strip=["location"], **options)).about
        assert "location" not in without_location
        assert without_location["camera"] == "Maker"
        assert hpcmref.info(saved(image, quality=0, strip=True, **options)).metadata == ()


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"quality": 40, "size": 1000}, ConfigError, "only one of quality and size"),
        ({"quality": 40, "lossless": True}, ConfigError, "only one of quality and lossless"),
        ({"psnr": 35, "lossless": True}, ConfigError, "only one of psnr and lossless"),
        ({"lossless": True, "effort": 3}, ConfigError, "leave out effort"),
        ({"max_seconds": 3}, ConfigError, "max_seconds"),
        ({"metric": "ms-ssim"}, ConfigError, "metric"),
        ({"effort": 10}, ConfigError, "effort is 10"),
        ({"strip": ["gps"]}, ConfigError, "strip has 'gps'"),
        ({"lossless": "no"}, ArgumentTypeError, "lossless is 'no'"),
        ({"keep_invisible": "no"}, ArgumentTypeError, "keep_invisible is 'no'"),
        ({"verify": 1}, ArgumentTypeError, "verify is 1"),
        ({"strip": 1}, ArgumentTypeError, "strip is 1"),
    ],
)
def test_save_refuses_what_encode_refuses(
    small: Image.Image, options: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    file = io.BytesIO()
    with pytest.raises(error, match=sentence):
        small.save(file, "HPCM", **options)
    with pytest.raises(error, match=sentence):
        hpcmref.encode(small, **options)
    assert not file.getvalue()


def test_several_frames_are_refused(small: Image.Image) -> None:
    with pytest.raises(hpcmref.HpcmrefError, match="one picture"):
        small.save(io.BytesIO(), "HPCM", save_all=True, append_images=[small])


def test_save_says_what_is_wrong(small: Image.Image) -> None:
    with pytest.raises(hpcmref.HpcmrefError, match="quality is 99"):
        small.save(io.BytesIO(), "HPCM", quality=99)
    with pytest.raises(hpcmref.HpcmrefError, match="black and white is not known"):
        Image.new("F", (2, 2), 7).save(io.BytesIO(), "HPCM")


def test_files_of_ours_are_images_to_the_command_line(codec: Codec, file: Path, data: bytes) -> None:
    image = open_image(file)
    assert image.tobytes() == codec.decode(data).tobytes()


def test_what_cannot_be_opened_is_an_os_error(data: bytes) -> None:
    for hostile in (MAGIC, MAGIC + b"\2", MAGIC + bytes(100), data[:30]):
        with pytest.raises(OSError, match="file"):
            Image.open(io.BytesIO(hostile))
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(b"\x89HP" + bytes(100)))


def test_what_cannot_be_loaded_is_an_os_error(file: Path, data: bytes) -> None:
    file.write_bytes(data[:-1])
    for _ in range(2):
        with Image.open(file) as image, pytest.raises(OSError, match="truncated"):
            image.load()
    with Image.open(file) as image, pytest.raises(OSError, match="truncated"):
        image.verify()
    file.write_bytes(data)
    with Image.open(file) as image:
        image.verify()
    other = parse(data)
    file.write_bytes(write(containers.changed(other, fingerprint=b"\xde\xad\xbe\xef")))
    with Image.open(file) as image, pytest.raises(OSError, match="deadbeef"):
        image.load()


def test_a_truncated_file_where_pillow_is_told_to_show_it(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.open(io.BytesIO(data[: -len(parse(data).payload) // 3]))
    with pytest.raises(OSError, match="truncated"):
        image.load()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    image.load()
    assert image.size == (70, 45)


def test_metadata_that_is_damaged_is_found_when_the_file_is_opened(data: bytes) -> None:
    other = parse(data)
    forged = write(containers.changed(other, chunks=((Tag.XMP, b"\xff\xff"),)))
    with pytest.raises(OSError, match="XMP"):
        Image.open(io.BytesIO(forged))


def test_pillow_s_limit_of_pixels_holds() -> None:
    """A file of 40 bytes that says it has 268 megapixels is refused, as Pillow refuses it of any other format."""
    bomb = write(containers.container(width=1 << 14, height=1 << 14, grey=False))
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(bomb))


def test_opening_imports_no_torch(file: Path) -> None:
    script = """
import sys, hpcmref
print(*sys.modules)
from PIL import Image
with Image.open(sys.argv[1]) as image:
    print(image.format, image.size, image.mode)
print(*sys.modules)
"""
    first, line, last = python(script, str(file)).splitlines()
    assert line == "HPCM (70, 45) RGBA"
    assert not {"torch", "numpy", "typer"} & set(first.split())
    assert "torch" not in last.split()


def test_the_package_is_enough(file: Path) -> None:
    """`import hpcmref` registers, whether Pillow was imported before or comes after, and whether it has been used."""
    for script in (
        "import hpcmref; from PIL import Image",
        "from PIL import Image; import hpcmref",
        "from PIL import Image; Image.init(); import hpcmref",
        "import hpcmref; from PIL import Image; Image.init()",
    ):
        print_it = "; import sys; print(Image.open(sys.argv[1]).format, Image.registered_extensions()['.hpcm'])"
        assert python(script + print_it, str(file)).split() == ["HPCM", "HPCM"]
