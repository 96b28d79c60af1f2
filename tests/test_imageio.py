"""Do images come in upright and unharmed, and do files go out whole or not at all?"""

from __future__ import annotations

import errno
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from hpcmref.errors import HpcmrefError, ImageError
from hpcmref.format.container import MAX_SIDE
from hpcmref.picture.images import (
    atomic_write,
    format_of,
    image_of,
    open_image,
    picture_of,
    pixels_of,
    save_image,
    strip,
)
from hpcmref.picture.metadata import Extras

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (4, 6, 3), np.uint8)
GREY = RNG.integers(0, 256, (4, 6), np.uint8)


def reopened(image: Image.Image, form: str, **options: object) -> Image.Image:
    """The image after a save in Pillow's format `form`."""
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return open_image(file)


def bare_png(width: int, height: int) -> io.BytesIO:
    """A PNG that announces a size and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def sixteen_bit_png() -> io.BytesIO:
    """Two pixels of three 16-bit channels."""
    file = bare_png(2, 1)
    row = b"\0" + struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0xFFFF, 0x00FF, 0x8000)
    content = zlib.compress(row)
    chunk = struct.pack(">I", len(content)) + b"IDAT" + content + struct.pack(">I", zlib.crc32(b"IDAT" + content))
    data = file.getvalue()
    header = data[:16] + struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    header += struct.pack(">I", zlib.crc32(header[12:]))
    return io.BytesIO(header + chunk + data[-12:])


def sixteen_bit_tiff() -> io.BytesIO:
    """The same as a TIFF."""
    pixels = struct.pack("<6H", 0x1234, 0x5678, 0x9ABC, 0xFFFF, 0x00FF, 0x8000)
    tags = [(256, 4, 1, 2), (257, 4, 1, 1), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, 14), (277, 3, 1, 3), (278, 4, 1, 1), (279, 4, 1, 12)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return io.BytesIO(b"II*\0" + struct.pack("<I", 26) + struct.pack("<3H", 16, 16, 16) + pixels + directory)


SIXTEEN_BITS = {"PNG": sixteen_bit_png, "TIFF": sixteen_bit_tiff}


# In


def test_colour_and_grey_come_in_unchanged_and_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        colour, is_grey = pixels_of(reopened(Image.fromarray(COLOUR), "PNG"))
        assert not is_grey
        grey, is_grey = pixels_of(reopened(Image.fromarray(GREY), "PNG"))
        assert is_grey
    np.testing.assert_array_equal(colour, COLOUR)
    np.testing.assert_array_equal(grey, GREY[..., None].repeat(3, axis=2))
    assert colour.dtype == grey.dtype == np.uint8
    assert colour.flags.writeable


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_in_upright(orientation: int, form: str) -> None:
    """Stored is what the camera saw; EXIF says which side of it the first row and the first column are."""
    upright = np.zeros((32, 64), np.uint8)
    upright[:16, :32] = 255  # white at the top left
    upright[16:, :32] = 128  # grey below it
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    pixels, _ = pixels_of(reopened(Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif))
    assert pixels.shape == (32, 64, 3)
    assert np.abs(pixels[..., 0].astype(int) - upright).mean() < 2


def test_damaged_exif_does_not_cost_the_image() -> None:
    with pytest.warns(UserWarning, match="EXIF data is damaged"):
        pixels, _ = pixels_of(reopened(Image.fromarray(COLOUR), "PNG", exif=b"Exif\0\0garbage"))
    np.testing.assert_array_equal(pixels, COLOUR)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_and_rounded(form: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], np.uint16)
    image = reopened(Image.fromarray(values), form)
    with pytest.warns(UserWarning, match="16-bit"):
        pixels, grey = pixels_of(image)
    assert grey
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]


def test_alpha_is_dropped_and_not_blended() -> None:
    alpha = np.full((4, 6, 1), 7, np.uint8)
    with pytest.warns(UserWarning, match="transparency"):
        pixels, grey = pixels_of(Image.fromarray(np.concatenate([COLOUR, alpha], axis=2)))
    assert not grey
    np.testing.assert_array_equal(pixels, COLOUR)
    with pytest.warns(UserWarning, match="transparency"):
        pixels, grey = pixels_of(Image.fromarray(np.concatenate([GREY[..., None], alpha], axis=2)))
    assert grey
    np.testing.assert_array_equal(pixels[..., 0], GREY)


def test_alpha_that_says_nothing_is_dropped_silently() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels, _ = pixels_of(Image.fromarray(COLOUR).convert("RGBA"))
    np.testing.assert_array_equal(pixels, COLOUR)


def test_palette() -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 2]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    with pytest.warns(UserWarning, match="palette"):
        pixels, grey = pixels_of(reopened(image, "PNG"))
    assert not grey
    assert pixels.tolist() == [[[10, 20, 30], [40, 50, 60]], [[40, 50, 60], [70, 80, 90]]]
    with pytest.warns(UserWarning, match="palette"):
        picture = picture_of(reopened(image, "PNG", transparency=b"\x00\x80\xff"), keep_invisible=True)
    np.testing.assert_array_equal(picture.pixels, pixels)
    assert picture.extras.alpha is not None
    assert picture.extras.alpha.tolist() == [[0, 128], [128, 255]]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV"])
def test_other_colours_are_converted_with_a_warning(mode: str) -> None:
    image = Image.new(mode, (6, 4))
    image.info["icc_profile"] = b"profile"
    with pytest.warns(UserWarning, match="is coded as RGB|colours are converted"):
        picture = picture_of(image)
    assert picture.pixels.shape == (4, 6, 3)
    assert (picture.extras.icc is not None) == (mode == "CMYK")  # a profile of colours that are no more says nothing


def test_floating_point_is_0_to_1_or_refused() -> None:
    with pytest.warns(UserWarning, match="reduced to 8 bits"):
        pixels, grey = pixels_of(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)))
    assert grey
    assert pixels[0, :, 0].tolist() == [0, 128, 255]
    for value in (-0.1, 1.5, np.nan, np.inf):
        with pytest.raises(ImageError, match=r"black and white is not known|not numbers"):
            pixels_of(Image.fromarray(np.array([[0, value]], np.float32)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_grey_in_rgb_is_coded_as_grey_and_comes_back_as_rgb(mode: str) -> None:
    image = Image.fromarray(GREY).convert(mode)
    picture = picture_of(image)
    assert picture.grey
    again = through(image)
    assert again.mode == mode
    assert again.tobytes() == image.tobytes()
    almost = np.asarray(Image.fromarray(GREY).convert("RGB")).copy()
    almost[2, 3, 1] ^= 1
    assert not picture_of(Image.fromarray(almost)).grey


def test_colours_that_nobody_sees_continue_the_others() -> None:
    """They are smooth, leave the visible ones alone, and can be kept."""
    rows, columns = np.mgrid[:40, :50]
    image = RNG.integers(0, 256, (40, 50, 4), np.uint8)
    visible = (rows - 20) ** 2 + (columns - 25) ** 2 < 150
    image[visible, :3] = (200, 100, 50)
    image[..., 3] = visible * np.uint8(255)
    pixels = picture_of(Image.fromarray(image)).pixels
    assert (pixels == (200, 100, 50)).all()
    np.testing.assert_array_equal(picture_of(Image.fromarray(image), keep_invisible=True).pixels, image[..., :3])
    ramp = np.stack([columns * 5] * 2 + [columns, visible * 255], axis=2).astype(np.uint8)
    pixels = picture_of(Image.fromarray(ramp)).pixels.astype(int)
    np.testing.assert_array_equal(pixels[visible], ramp[visible][:, :3])
    assert max(np.abs(np.diff(pixels, axis=axis)).max() for axis in (0, 1)) < 40  # no edge where alpha begins
    nothing = Image.new("RGBA", (5, 3), (9, 9, 9, 0))
    assert (picture_of(nothing).pixels == 0).all()


def png(width: int, depth: int, colour: int, row: bytes, key: bytes) -> io.BytesIO:
    """A PNG of one row with a tRNS chunk."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"tRNS", key) + chunk(b"IDAT", zlib.compress(b"\0" + row))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key", "alpha"),
    [
        (1, 0, b"\x40", (1,), [255, 0, 255, 255]),
        (2, 0, b"\x1b", (2,), [255, 255, 0, 255]),
        (4, 0, b"\x5a\x05", (5,), [0, 255, 255, 0]),
        (8, 0, b"\x05\x55\x06\x05", (5,), [0, 255, 255, 0]),
        (16, 0, struct.pack(">4H", 5, 5 << 8, 0x505, 5), (5,), [0, 255, 255, 0]),
        (8, 2, bytes(3) + b"\1\2\3" + bytes(6), (1, 2, 3), [255, 0, 255, 255]),
        (16, 2, struct.pack(">12H", 200, 100, 50, 0, 0, 0, 0, 0, 1, 256, 0, 0), (0, 0, 0), [255, 0, 255, 255]),
    ],
)  # fmt: skip
def test_the_colour_that_is_transparent_is_that_of_the_file(
    depth: int, colour: int, row: bytes, key: tuple[int, ...], alpha: list[int]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extras = picture_of(open_image(png(4, depth, colour, row, struct.pack(f">{len(key)}H", *key)))).extras
    assert extras.alpha is not None
    assert extras.alpha.tolist() == [alpha]


def wide_tiff(dtype: str, values: list[float], **tags: int | float) -> Image.Image:
    """A TIFF of one row of numbers with more than 8 bits, opened."""
    array = np.array([values], dtype)
    sample_format = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    entries = {256: (4, len(values)), 257: (4, 1), 258: (3, 8 * array.itemsize), 259: (3, 1), 262: (3, 1)}
    entries |= {273: (4, 8), 277: (3, 1), 278: (4, 1), 279: (4, array.nbytes), 339: (3, sample_format)}
    kind = {"u": 4, "i": 9, "f": 11}[array.dtype.kind]
    numbers = {"low": 340, "high": 341, "photometric": 262}
    entries |= {numbers[name]: (3 if name == "photometric" else kind, value) for name, value in tags.items()}
    letter = {3: "H", 4: "I", 9: "i", 11: "f"}
    directory = struct.pack("<H", len(entries))
    for tag, (form, value) in sorted(entries.items()):
        directory += struct.pack("<HHI", tag, form, 1) + struct.pack("<" + letter[form], value).ljust(4, b"\0")
    data = b"II*\0" + struct.pack("<I", 8 + array.nbytes) + array.tobytes() + directory + bytes(4)
    return open_image(io.BytesIO(data))


@pytest.mark.filterwarnings("ignore:16-bit")
def test_numbers_are_scaled_by_a_rule_or_refused() -> None:
    def grey(image: Image.Image) -> list[int]:
        return picture_of(image).pixels[0, :, 0].tolist()

    assert grey(wide_tiff("<i4", [0, 500000, 1000000], low=0, high=1000000)) == [0, 128, 255]
    assert grey(wide_tiff("<f4", [-1, 0, 1], low=-1, high=1)) == [0, 128, 255]
    assert grey(wide_tiff("<u2", [0, 257, 65535], photometric=0)) == [255, 254, 0]
    assert grey(wide_tiff("<u2", [0, 257, 65535])) == [0, 1, 255]
    for unknown in (wide_tiff("<i4", [0, 1000000]), wide_tiff("<i2", [-1, 5]), wide_tiff("<f4", [0, 255])):
        with pytest.raises(ImageError, match="black and white is not known"):
            picture_of(unknown)


def test_arrays_are_images() -> None:
    np.testing.assert_array_equal(picture_of(COLOUR).pixels, COLOUR)
    assert picture_of(GREY > 99).extras.mode == "1"
    assert picture_of((GREY / 255)[..., None]).pixels[..., 0].tolist() == GREY.tolist()
    with pytest.warns(UserWarning, match="16-bit grey"):
        assert picture_of(GREY.astype(np.uint16) * 257).pixels[..., 0].tolist() == GREY.tolist()
    with pytest.warns(UserWarning, match="16 bits a channel"):
        np.testing.assert_array_equal(picture_of(COLOUR.astype(np.uint16) * 257).pixels, COLOUR)
    for wrong in (GREY.astype(int), GREY / 100, COLOUR[0, 0], COLOUR[:, :, :0], np.array([["a"]])):
        with pytest.raises(ImageError, match="an image"):
            picture_of(wrong)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def test_no_image_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EPS is PostScript, which Pillow gives to Ghostscript: whatever the file is called, and whoever opened it."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen.__init__", started)
    (tmp_path / "beach.png").write_bytes(EPS)
    with pytest.raises(ImageError, match="not an image in one of the supported formats"):
        open_image(tmp_path / "beach.png")
    lazy = Image.open(io.BytesIO(EPS))
    for use in (picture_of, strip):
        with pytest.raises(ImageError, match="format EPS"):
            use(lazy)


def test_only_the_first_frame_is_used_and_the_user_is_told(tmp_path: Path) -> None:
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    for suffix in ("tif", "png", "webp"):
        path = tmp_path / f"frames.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
        with pytest.warns(UserWarning, match="first frame of .*frames"):
            pixels, _ = pixels_of(open_image(path))
        np.testing.assert_array_equal(pixels, COLOUR)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(pixels_of(open_image(path, 2))[0], 255 - COLOUR)
        with pytest.raises(ImageError, match="has 2 frames, and no frame 3"):
            open_image(path, 3)


def test_an_image_larger_than_pillow_would_allow_is_ours_to_judge() -> None:
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="cannot read"):  # it got as far as the missing pixels
            open_image(bare_png(MAX_SIDE, 6000))
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("size", [(MAX_SIDE + 1, 1), (1, MAX_SIDE + 1), (MAX_SIDE, 8193), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} pixels"):
        open_image(bare_png(*size))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    image = tmp_path / "photo.png"
    with pytest.raises(ImageError, match=r"photo\.png: No such file"):
        open_image(image)
    image.write_text("text")
    with pytest.raises(ImageError, match=r"photo\.png is not an image"):
        open_image(image)
    save_image(Image.fromarray(COLOUR), image)
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(ImageError, match=r"cannot read .*photo\.png"):
        open_image(image)
    with pytest.raises(ImageError, match="the image is not an image"):
        open_image(io.BytesIO(b""))
    with pytest.raises(ImageError):
        open_image(tmp_path)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_image_raises_no_other_error(data: st.DataObject) -> None:
    file = io.BytesIO()
    Image.fromarray(COLOUR).save(file, data.draw(st.sampled_from(["PNG", "JPEG", "TIFF", "WEBP", "GIF", "PPM"])))
    damaged = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels, _ = pixels_of(open_image(io.BytesIO(damaged)))
        except ImageError:
            return
    assert pixels.dtype == np.uint8


# Through: what `image_of` makes of what `picture_of` found


def through(image: Image.Image) -> Image.Image:
    """The image after coding, if coding lost nothing."""
    picture = picture_of(image, keep_invisible=True)
    return image_of(picture.pixels, picture.grey, picture.extras)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA"])
def test_modes_that_come_back_unchanged(mode: str) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (5, 7, 4), np.uint8)).convert(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = through(image)
    assert again.mode == mode
    assert again.tobytes() == image.tobytes()


def test_black_and_white_comes_back_from_a_blurred_image() -> None:
    grey = np.repeat(np.array([[0, 127, 128, 255]], np.uint8)[..., None], 3, axis=2)
    image = image_of(grey, True, Extras(mode="1"))
    assert image.mode == "1"
    assert [image.getpixel((x, 0)) for x in range(4)] == [0, 0, 255, 255]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_come_back_as_sixteen_bits_with_the_value_of_eight(mode: str) -> None:
    values = np.array([[0, 257, 300, 40000, 65535]], np.uint16)
    image = Image.frombytes("I;16", (5, 1), values.astype("<u2").tobytes())
    if mode != "I;16":
        image = Image.frombytes(mode, (5, 1), values.astype(">u2" if mode == "I;16B" else "<i4").tobytes())
    with pytest.warns(UserWarning, match="16-bit"):
        again = through(image)
    assert again.mode == "I;16"
    assert np.asarray(again).tolist() == [[0, 257, 257, 40092, 65535]]
    assert np.abs(np.asarray(again).astype(int) - values).max() <= 129


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_a_channel_are_reduced_with_a_warning(form: str) -> None:
    with pytest.warns(UserWarning, match="16 bits a channel"):
        image = open_image(SIXTEEN_BITS[form]())
    picture = picture_of(image)
    assert picture.pixels.tolist() == [[[0x12, 0x56, 0x9A], [0xFF, 0x00, 0x80]]]
    assert picture.extras.alpha is None
    assert picture.extras.mode is None


def test_cmyk_comes_back_with_the_same_colours_and_as_much_black_as_there_can_be() -> None:
    image = Image.frombytes("CMYK", (4, 1), bytes([0, 0, 0, 255, 0, 0, 0, 0, 255, 0, 255, 0, 40, 80, 120, 60]))
    with pytest.warns(UserWarning, match="CMYK"):
        again = through(image)
    assert again.mode == "CMYK"
    assert again.getpixel((0, 0)) == (0, 0, 0, 255)
    assert again.getpixel((1, 0)) == (0, 0, 0, 0)
    assert again.getpixel((2, 0)) == (255, 0, 255, 0)
    assert np.abs(np.asarray(again.convert("RGB")).astype(int) - np.asarray(image.convert("RGB"))).max() <= 1


@settings(deadline=None)
@given(st.binary(min_size=3, max_size=300))
def test_any_colour_survives_cmyk(data: bytes) -> None:
    pixels = np.frombuffer(data[: len(data) // 3 * 3], np.uint8).reshape(1, -1, 3)
    again = np.asarray(image_of(pixels, False, Extras(mode="CMYK")).convert("RGB"))
    assert np.abs(again.astype(int) - pixels).max() <= 1


def test_transparency_of_every_kind_becomes_alpha() -> None:
    """A colour that is transparent, in PNG: the pixels stay, and alpha says which they were."""
    rgb = reopened(Image.fromarray(COLOUR), "PNG", transparency=tuple(COLOUR[1, 2].tolist()))
    again = through(rgb)
    assert again.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(again)[..., :3], COLOUR)
    assert np.asarray(again)[1, 2, 3] == 0
    assert np.count_nonzero(np.asarray(again)[..., 3] == 0) == (COLOUR[1, 2] == COLOUR).all(axis=2).sum()
    assert through(reopened(Image.new("1", (4, 3)), "PNG", transparency=0)).mode == "LA"
    assert through(reopened(Image.fromarray(GREY), "PNG", transparency=int(GREY[0, 0]))).mode == "LA"


def test_alpha_is_turned_upright_with_the_image() -> None:
    pixels = RNG.integers(0, 256, (3, 5, 4), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    again = through(reopened(Image.fromarray(pixels), "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(again), np.rot90(pixels, -1))


def test_the_original_is_left_alone() -> None:
    image = reopened(Image.fromarray(COLOUR), "PNG", exif=b"Exif\0\0garbage", icc_profile=b"profile")
    info = dict(image.info)
    strip(image)
    with pytest.warns(UserWarning, match="EXIF"):
        picture_of(image)
    assert image.info == info


def test_strip_leaves_upright_pixels_and_nothing_else() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    image = reopened(Image.fromarray(COLOUR), "JPEG", exif=exif, icc_profile=b"profile", xmp=b"xmp", quality=100)
    picture = picture_of(strip(image))
    assert (picture.extras.icc, picture.extras.exif, picture.extras.xmp) == (None, None, None)
    np.testing.assert_array_equal(picture.pixels, np.asarray(image)[::-1, ::-1])
    palette = Image.fromarray(GREY).convert("P")
    palette.info["transparency"] = 7
    with pytest.warns(UserWarning, match="palette"):
        assert picture_of(strip(palette)).extras.alpha is not None


# Out


def test_image_of_is_the_inverse_of_pixels_of() -> None:
    for pixels, grey in (COLOUR, False), (GREY[..., None].repeat(3, axis=2), True):
        again, is_grey = pixels_of(image_of(pixels, grey))
        assert is_grey == grey
        np.testing.assert_array_equal(again, pixels)


def test_a_grey_image_is_the_rounded_mean_of_its_channels() -> None:
    pixels = np.array([[[0, 0, 1], [0, 1, 1], [255, 255, 255], [254, 255, 255]]], np.uint8)
    assert np.asarray(image_of(pixels, grey=True)).tolist() == [[0, 1, 255, 255]]


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".TIFF", ".ppm"])
@pytest.mark.parametrize("grey", [False, True])
def test_lossless_formats(tmp_path: Path, suffix: str, grey: bool) -> None:
    pixels = GREY[..., None].repeat(3, axis=2) if grey else COLOUR
    path = tmp_path / f"image{suffix}"
    save_image(image_of(pixels, grey), path)
    np.testing.assert_array_equal(pixels_of(open_image(path))[0], pixels)
    assert open_image(path).format == format_of(path)


def test_jpeg_keeps_the_colours_of_every_pixel(tmp_path: Path) -> None:
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, ::2] = (255, 0, 0)
    stripes[:, 1::2] = (0, 0, 255)
    save_image(Image.fromarray(stripes), tmp_path / "stripes.jpg")
    pixels, _ = pixels_of(open_image(tmp_path / "stripes.jpg"))
    assert np.abs(pixels.astype(int) - stripes).mean() < 10  # 4:2:0 would make them all purple


def test_an_unknown_suffix_names_the_known_ones(tmp_path: Path) -> None:
    for name in ("image.xyz", "image", ".png"):
        with pytest.raises(ImageError, match=r"\.png.*\.ppm"):
            save_image(Image.fromarray(COLOUR), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_image_that_its_format_cannot_hold_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="WEBP"):
        save_image(Image.new("L", (20000, 1)), tmp_path / "wide.webp")
    assert not list(tmp_path.iterdir())


def test_atomic_write_makes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"first", b"second", b""):
        atomic_write(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
def test_atomic_write_makes_an_ordinary_file_and_follows_links(tmp_path: Path) -> None:
    ordinary, link = tmp_path / "ordinary", tmp_path / "link"
    ordinary.write_bytes(b"old")
    link.symlink_to(ordinary)
    expected = ordinary.stat().st_mode
    atomic_write(link, b"new")
    assert link.is_symlink()
    assert ordinary.read_bytes() == b"new"
    assert ordinary.stat().st_mode == expected


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_atomic_write_writes_to_a_pipe_and_does_not_replace_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        atomic_write(pipe, b"data")
        assert os.read(reader, 10) == b"data"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_atomic_write_says_why_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HpcmrefError, match=r"cannot write .*image: No such file"):
        atomic_write(tmp_path / "missing" / "image", b"data")
    with pytest.raises(HpcmrefError, match=r"cannot write .*image: Not a directory"):
        atomic_write(tmp_path / "file" / "image", b"data")
    with pytest.raises(HpcmrefError, match=r"cannot write .*: Is a directory"):
        atomic_write(tmp_path, b"data")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_atomic_write_into_a_folder_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(HpcmrefError, match="Permission denied"):
        atomic_write(tmp_path / "file", b"data")


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_write_that_is_cut_short_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, fault: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fails(*_: object) -> None:
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, fails)
        with pytest.raises(HpcmrefError if isinstance(fault, OSError) else KeyboardInterrupt):
            save_image(Image.fromarray(COLOUR), path.with_suffix(".png"))
        with pytest.raises(HpcmrefError if isinstance(fault, OSError) else KeyboardInterrupt):
            atomic_write(path, b"new data")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
