"""Do the functions of the package take every kind of image and file, and give back what they say?"""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA
from PIL import Image

import hpcmref
from hpcmref.errors import ConfigError, FormatError, ImageError

PHOTO = DATA / "sample.png"


@pytest.fixture(scope="module")
def small(sample: Image.Image) -> Image.Image:
    return sample.crop((100, 100, 190, 170))


@pytest.fixture(scope="module")
def data(small: Image.Image) -> bytes:
    return hpcmref.encode(small, 20, device="cpu")


def png_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_the_public_names() -> None:
    assert dir(hpcmref) == sorted(hpcmref.__all__)
    for name in ("encode", "decode", "encode_many", "decode_many", "info", "load", "Codec", "HpcmrefError", "FileInfo"):
        assert name in dir(hpcmref)
    assert all(getattr(hpcmref, name) is not None for name in hpcmref.__all__)
    with pytest.raises(AttributeError, match="encrypt"):
        hpcmref.encrypt  # noqa: B018


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, hpcmref; dir(hpcmref); print(*[name for name in ('torch', 'numpy') if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert (result.stdout, result.stderr) == ("\n", "")


# --- what an image may be given as -----------------------------------------------------------------------------------


class TestImages:
    @pytest.mark.parametrize("kind", ["str", "Path", "bytes", "bytearray", "memoryview", "BytesIO", "file", "pipe"])
    def test_files(self, small: Image.Image, data: bytes, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "small.png"
        content = png_of(small)
        path.write_bytes(content)

        class Pipe:  # has nothing but read, as streams that cannot be rewound
            def read(self) -> bytes:
                return content

        sources: dict[str, Any] = {
            "str": str(path),
            "Path": path,
            "bytes": content,
            "bytearray": bytearray(content),
            "memoryview": memoryview(content),
            "BytesIO": io.BytesIO(content),
            "file": path.open("rb"),
            "pipe": Pipe(),
        }
        assert hpcmref.encode(sources[kind], 20, device="cpu") == data
        sources["file"].close()

    def test_arrays_and_tensors(self, small: Image.Image, data: bytes) -> None:
        array = np.array(small)
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        for image in (array, array.astype(np.float32) / 255, array[:, ::-1][:, ::-1], tensor, tensor.float() / 255):
            assert hpcmref.encode(image, 20, device="cpu") == data
        wanted = hpcmref.encode(small.convert("L"), 20, device="cpu")
        grey = np.array(small.convert("L"))
        for image in (grey, grey[..., None], grey.astype(np.float64) / 255, torch.from_numpy(grey)[None]):
            assert hpcmref.encode(image, 20, device="cpu") == wanted
        with pytest.warns(UserWarning, match="16-bit"):
            sixteen = hpcmref.encode(grey.astype(np.uint16) * 257, 20, device="cpu")
        assert hpcmref.decode(sixteen, as_array=True).dtype == np.uint16

    @pytest.mark.parametrize("channels", [2, 4])
    def test_alpha_of_arrays_is_kept(self, channels: int) -> None:
        array = np.random.default_rng(0).integers(0, 256, (20, 30, channels), np.uint8)
        again = hpcmref.decode(hpcmref.encode(array, 20, device="cpu"), device="cpu", as_array=True)
        assert again.shape == array.shape
        assert np.array_equal(again[..., -1], array[..., -1])

    def test_tensors_that_need_gradients(self) -> None:
        tensor = torch.rand(3, 20, 30, requires_grad=True)
        assert hpcmref.info(hpcmref.encode(tensor, device="cpu")).width == 30


class TestOptions:
    def test_targets(self, small: Image.Image) -> None:
        pixels = small.width * small.height
        assert len(hpcmref.encode(small, size=900, device="cpu")) <= 900
        assert 8 * len(hpcmref.encode(small, bpp=1.5, device="cpu")) <= 1.5 * pixels
        good = hpcmref.decode(hpcmref.encode(small, psnr=36, device="cpu"), as_array=True)
        assert 10 * np.log10(255**2 / np.mean((good.astype(float) - np.array(small)) ** 2)) >= 36

    def test_strip(self, small: Image.Image) -> None:
        image = small.copy()
        image.info["xmp"] = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"
        exif = Image.Exif()
        exif[0x010F] = "maker"
        image.info["exif"] = exif.tobytes()

        def kept(**options: Any) -> tuple[str, ...]:
            return hpcmref.info(hpcmref.encode(image, 0, device="cpu", **options)).metadata

        assert kept() == ("exif", "xmp")
        assert kept(strip=True) == ()
        assert kept(strip=["exif"]) == kept(strip="exif") == ("xmp",)

    @pytest.mark.parametrize("lossless", [False, True])
    def test_verify(self, small: Image.Image, lossless: bool) -> None:
        data = hpcmref.encode(small, lossless=lossless, verify=True, device="cpu")
        assert data == hpcmref.encode(small, lossless=lossless, device="cpu")

    def test_verify_notices(self, small: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
        from hpcmref import lossless
        from hpcmref.errors import DecodeError

        monkeypatch.setattr(lossless, "unpack", lambda file: np.zeros((file.height, file.width, 3), np.uint8))
        with pytest.raises(DecodeError):
            hpcmref.encode(small, lossless=True, verify=True)

    @pytest.mark.parametrize("ways", [{"quality": 1, "size": 10}, {"bpp": 1, "psnr": 1}, {"size": 9, "lossless": True}])
    def test_one_thing_decides_the_quality(self, small: Image.Image, ways: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=" and ".join(ways)):
            hpcmref.encode(small, **ways)


# --- and back --------------------------------------------------------------------------------------------------------


class TestDecode:
    def test_files(self, data: bytes, tmp_path: Path) -> None:
        path = tmp_path / "a.bin"
        path.write_bytes(data)
        wanted = hpcmref.decode(data).tobytes()
        with path.open("rb") as file:
            for source in (str(path), path, bytearray(data), memoryview(data), io.BytesIO(data), file):
                assert hpcmref.decode(source).tobytes() == wanted

    def test_arrays(self, data: bytes) -> None:
        array = hpcmref.decode(data, as_array=True)
        assert (array.shape, array.dtype) == ((70, 90, 3), np.uint8)
        assert array.tobytes() == hpcmref.decode(data).tobytes()
        array[:] = 0  # is the caller's own
        for mode, shape, dtype in (
            ("1", (4, 5), np.bool_), ("L", (4, 5), np.uint8), ("LA", (4, 5, 2), np.uint8), ("RGBA", (4, 5, 4), np.uint8)
        ):  # fmt: skip
            found = hpcmref.decode(hpcmref.encode(Image.new(mode, (5, 4)), lossless=True), as_array=True)
            assert (found.shape, found.dtype) == (shape, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cmyk = hpcmref.encode(Image.new("CMYK", (5, 4), (0, 255, 255, 0)), device="cpu")
        assert hpcmref.decode(cmyk).mode == "CMYK"
        red = hpcmref.decode(cmyk, as_array=True)
        assert red.shape == (4, 5, 3)
        assert red[0, 0, 0] > 200 > 60 > red[0, 0, 1]

    def test_previews_and_parts(self, sample: Image.Image) -> None:
        data = hpcmref.encode(sample, 32, device="cpu")
        whole = hpcmref.decode(data)
        assert hpcmref.decode(data, upto=1).tobytes() != whole.tobytes()
        with pytest.raises(FormatError):
            hpcmref.decode(data[: len(data) * 3 // 4])
        assert hpcmref.decode(data[: len(data) * 3 // 4], partial=True).size == whole.size
        flipped = bytearray(data)
        flipped[-10] ^= 1
        assert hpcmref.decode(flipped, damaged=True).size == whole.size
        with pytest.raises(ImageError, match="max_pixels"):
            hpcmref.decode(data, max_pixels=1000)


def test_info(data: bytes, small: Image.Image, tmp_path: Path) -> None:
    found = hpcmref.info(data)
    assert (found.width, found.height, found.grey, found.alpha, found.metadata) == (90, 70, False, False, ())
    assert (found.version, found.coding, found.quality, found.model) == (2, "learned", 20, "nano-2")
    assert found.encoder == ".".join(hpcmref.__version__.split(".")[:2])
    assert found.size == len(data) == sum(found.parts.values())
    assert found.bits_per_pixel == 8 * len(data) / (90 * 70)
    assert found.fingerprint == hpcmref.load().fingerprint.hex()
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.width = 3  # type: ignore[misc]
    path = tmp_path / "a.bin"
    path.write_bytes(hpcmref.encode(small.convert("LA"), lossless=True))
    found = hpcmref.info(path)
    assert (found.grey, found.alpha, found.model, found.quality) == (True, True, None, None)
    assert found.coding in ("webp", "png")


# --- many ------------------------------------------------------------------------------------------------------------


class TestMany:
    def test_one_after_the_other_as_they_are_asked_for(self, small: Image.Image, data: bytes) -> None:
        taken: list[int] = []

        def images() -> Iterator[Any]:
            for number in range(3):
                taken.append(number)
                yield small if number != 1 else np.array(small)

        calls: list[tuple[int, int | None]] = []
        files = hpcmref.encode_many(images(), 20, device="cpu", progress=lambda *call: calls.append(call))
        assert taken == []
        assert next(files) == data
        assert (taken, calls) == ([0], [(1, None)])
        assert list(files) == [data, data]
        assert calls[-1] == (3, None)
        list(hpcmref.decode_many([data, data], progress=lambda *call: calls.append(call)))
        assert calls[-1] == (2, 2)

    def test_an_error_says_which(self, small: Image.Image, data: bytes) -> None:
        files = hpcmref.encode_many([small, b"no image"], lossless=True)
        next(files)
        with pytest.raises(ImageError, match="number 1: "):
            next(files)
        assert list(files) == []
        with pytest.raises(FormatError, match="number 0: "):
            list(hpcmref.decode_many([b"no file", data]))

    def test_several_processes(self, small: Image.Image, tmp_path: Path) -> None:
        """In order, with metadata and warnings, as in one process; and no process is left."""
        turned = small.copy()
        exif = Image.Exif()
        exif[0x0112] = 6
        exif[0x010F] = "maker"
        turned.info["exif"] = exif.tobytes()
        turned.save(tmp_path / "turned.tiff", exif=exif)
        palette = small.quantize(16)
        tensor = torch.from_numpy(np.array(small)).permute(2, 0, 1)
        sources = [turned, Image.open(tmp_path / "turned.tiff"), palette, tensor, png_of(small), PHOTO, np.array(small)]
        with pytest.warns(UserWarning, match="palette") as alone:
            wanted = list(hpcmref.encode_many(sources, lossless=True))
        with pytest.warns(UserWarning, match="palette") as spread:
            found = list(hpcmref.encode_many(sources, lossless=True, jobs=2))
        assert found == wanted
        assert [str(each.message) for each in spread] == [str(each.message) for each in alone]
        images = list(hpcmref.decode_many(found, jobs=2))
        assert [image.tobytes() for image in images] == [image.tobytes() for image in hpcmref.decode_many(wanted)]
        assert images[0].getexif()[0x010F] == "maker"
        assert multiprocessing.active_children() == []

    def test_an_error_in_a_process_comes_in_its_turn(self, small: Image.Image) -> None:
        with io.BytesIO() as closed:
            pass
        files = hpcmref.encode_many([small, small, closed, small], lossless=True, jobs=2)
        assert len([next(files), next(files)]) == 2
        with pytest.raises(ImageError, match="number 2: image cannot be read"):
            next(files)
        assert multiprocessing.active_children() == []

    @pytest.mark.parametrize("how", ["close", "progress"])
    def test_cancelling_leaves_nothing_behind(self, small: Image.Image, how: str) -> None:
        taken: list[int] = []

        def endless() -> Iterator[Image.Image]:
            while True:
                taken.append(1)
                yield small

        def stop(done: int, total: int | None) -> None:
            if how == "progress" and done == 2:
                raise KeyboardInterrupt

        files = hpcmref.encode_many(endless(), lossless=True, jobs=2, progress=stop)
        next(files)
        if how == "close":
            files.close()  # type: ignore[attr-defined]
        else:
            with pytest.raises(KeyboardInterrupt):
                next(files)
        assert list(files) == []
        assert len(taken) < 20
        assert multiprocessing.active_children() == []


def test_the_examples_of_the_documentation(tmp_path: Path, small: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of docs/python.md, in order, as one script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("KMP_BLOCKTIME", "0")
    (tmp_path / "photo.png").write_bytes(png_of(small))
    text = (Path(__file__).parent.parent / "docs" / "python.md").read_text()
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert names["array"].shape == (48, 64)
    assert names["found"].quality == 32
    assert isinstance(names["data"], bytes)
