"""Does everything that is not colour survive, bounded, and does it get into the image files that are written?"""

from __future__ import annotations

import contextlib
import io
import lzma
import struct
import tracemalloc
import warnings
from pathlib import Path

import containers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, PngImagePlugin
from typer.testing import CliRunner

from hpcmref.cli import app
from hpcmref.errors import FormatError, ImageError
from hpcmref.format.container import Container, Tag, parse, write
from hpcmref.picture import exif
from hpcmref.picture.images import image_of, open_image, picture_of, save_image, strip_only
from hpcmref.picture.metadata import MAX_METADATA, RESTORED, Extras, extras_of, mode_of, pack_alpha, unpack_alpha
from hpcmref.picture.render import render

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (40, 60, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (40, 60), np.uint8)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description dc:title="\xc3\xa4"/></x:xmpmeta>'
FILTERS = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]


def packed(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_RAW, filters=FILTERS)


def container(
    chunks: tuple[tuple[int, bytes], ...], width: int = 60, height: int = 40, grey: bool = False
) -> Container:
    return containers.container(width=width, height=height, grey=grey, chunks=chunks)


def camera_exif(
    order: str = "<", orientation: int = 6, thumbnail: bytes = b"\xff\xd8 a small picture \xff\xd9"
) -> bytes:
    """What a camera writes: a maker, an orientation, a directory with a time, and a thumbnail after all that."""
    maker, time = b"Maker\0", b"2020:02:29 12:00:00\0"
    first, inner, second = 8, 50, 68
    texts = second + 2 + 2 * 12 + 4
    data = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", first)
    data += struct.pack(order + "H", 3)
    data += struct.pack(order + "HHII", 0x010F, 2, len(maker), texts)
    data += struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    data += struct.pack(order + "HHII", 0x8769, 4, 1, inner) + struct.pack(order + "I", second)
    data += struct.pack(order + "H", 1)
    data += struct.pack(order + "HHII", 0x9003, 2, len(time), texts + len(maker)) + struct.pack(order + "I", 0)
    data += struct.pack(order + "H", 2)
    data += struct.pack(order + "HHII", 0x0201, 4, 1, texts + len(maker) + len(time))
    data += struct.pack(order + "HHII", 0x0202, 4, 1, len(thumbnail)) + struct.pack(order + "I", 0)
    return data + maker + time + thumbnail


# EXIF with tags that would tell Pillow how to write the pixels of a TIFF: columns, compression, rows in a strip.
LAYOUT_EXIF = struct.pack("<4sIH", b"II*\0", 8, 3) + bytes(4).join(
    [b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in ((256, 9), (259, 7), (278, 0))), b""]
)


def webp(plane: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(plane).save(file, "WEBP", lossless=True)
    return file.getvalue()


# Alpha


def kinds_of_alpha() -> dict[str, np.ndarray]:
    rows, columns = np.mgrid[:40, :60]
    disc = ((rows - 20) ** 2 + (columns - 30) ** 2 < 300) * np.uint8(255)
    return {
        "opaque": np.full((40, 60), 255, np.uint8),
        "empty": np.zeros((40, 60), np.uint8),
        "half": np.full((40, 60), 128, np.uint8),
        "disc": disc,
        "ramp": (4 * columns).astype(np.uint8),
        "slope": (rows + 2 * columns).astype(np.uint8),
        "noise": ALPHA,
        "a row": ALPHA[:1],
        "a column": ALPHA[:, :1],
        "one pixel": ALPHA[:1, :1],
        "a row of bits": disc[20:21],
        "a column of bits": disc[:, 30:31],
    }


@pytest.mark.parametrize("name", kinds_of_alpha())
def test_alpha_is_lossless(name: str) -> None:
    alpha = kinds_of_alpha()[name]
    np.testing.assert_array_equal(unpack_alpha(pack_alpha(alpha), *alpha.shape), alpha)


@settings(deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(1, 40))
def test_any_alpha_is_lossless(data: st.DataObject, height: int, width: int) -> None:
    values = data.draw(st.sampled_from([[0, 255], [0, 1, 254, 255], range(256)]))
    alpha = np.random.default_rng(data.draw(st.integers(0, 99))).choice(values, (height, width)).astype(np.uint8)
    np.testing.assert_array_equal(unpack_alpha(pack_alpha(alpha), height, width), alpha)


def test_every_kind_of_alpha_takes_its_smallest_form() -> None:
    """A plane of one value is a byte; each kind of content is chosen where it is the smallest."""
    sizes = {name: (len(content), content[0]) for name, a in kinds_of_alpha().items() if (content := pack_alpha(a))}
    assert sizes["opaque"] == (1, 255)
    assert sizes["half"] == (1, 128)
    assert sizes["disc"][0] < 150
    assert sizes["disc"][1] == 4
    assert sizes["ramp"][0] < 40
    assert sizes["slope"] <= (50, 3)
    assert sizes["noise"][0] < ALPHA.size + 20
    noisy = (np.mgrid[:200, :300][1] // 8 * 8 + RNG.integers(0, 8, (200, 300))).astype(np.uint8)
    content = pack_alpha(noisy)
    assert content[0] == 5
    assert len(content) <= 1.1 * len(webp(noisy))
    np.testing.assert_array_equal(unpack_alpha(content, 200, 300), noisy)


def test_the_alpha_of_the_format_document_is_read() -> None:
    """The example of FORMAT.md: LZMA2 that stores bytes as they are."""
    stored = bytes.fromhex("01 0005") + bytes([10, 1, 1, 5, 0, 0]) + b"\0"
    assert unpack_alpha(b"\0" + stored, 2, 3).tolist() == [[10, 1, 1], [5, 0, 0]]
    assert unpack_alpha(b"\1" + stored, 2, 3).tolist() == [[10, 11, 12], [5, 5, 5]]
    assert unpack_alpha(b"\2" + stored, 2, 3).tolist() == [[10, 1, 1], [15, 1, 1]]
    assert unpack_alpha(b"\3" + stored, 2, 3).tolist() == [[10, 11, 12], [15, 16, 17]]
    bits = bytes.fromhex("01 0001 a0 40 00")
    assert unpack_alpha(b"\4" + bits, 2, 3).tolist() == [[255, 0, 255], [0, 255, 0]]
    assert unpack_alpha(b"\7", 1, 2).tolist() == [[7, 7]]


HOSTILE_ALPHA = {
    "nothing at all": b"",
    "a kind that does not exist": b"\6" + packed(bytes(6)),
    "no WebP": b"\5" + packed(bytes(6)),
    "WebP of another size": b"\5" + webp(np.zeros((3, 2), np.uint8)),
    "WebP without its end": b"\5" + webp(RNG.integers(0, 9, (2, 3), np.uint8))[:-6],
    "a kind and no stream": b"\0\0",
    "no LZMA2": b"\0" + b"\xff" * 20,
    "a pixel too few": b"\0" + packed(bytes(5)),
    "a pixel too many": b"\0" + packed(bytes(7)),
    "bits for too few rows": b"\4" + packed(bytes(1)),
    "bytes where bits should be": b"\4" + packed(bytes(6)),
    "a stream without its end": b"\0" + packed(bytes(6))[:-1],
    "a byte after the stream": b"\0" + packed(bytes(6)) + b"\0",
    "a gigabyte of zeros in 150 kB": b"\0" + packed(bytes(10**6)) * 150,
}


@pytest.mark.parametrize("content", HOSTILE_ALPHA.values(), ids=HOSTILE_ALPHA.keys())
def test_hostile_alpha_is_refused(content: bytes) -> None:
    with pytest.raises(FormatError):
        unpack_alpha(content, 2, 3)


# Metadata in chunks


def test_extras_survive_a_file() -> None:
    extras = Extras(alpha=ALPHA, icc=SRGB, exif=b"II*\0anything", xmp=XMP)
    file = parse(write(container(extras.chunks())))
    assert [tag for tag, _ in file.chunks] == [Tag.ICC, Tag.EXIF, Tag.XMP, Tag.ALPHA]
    again = extras_of(file)
    assert (again.icc, again.exif, again.xmp, again.mode) == (SRGB, b"II*\0anything", XMP, None)
    np.testing.assert_array_equal(again.alpha, ALPHA)
    assert Extras().chunks() == ()
    assert vars(extras_of(container(()))) == vars(Extras())


@settings(deadline=None, max_examples=30)
@given(*[st.none() | st.binary(min_size=1, max_size=5000)] * 3, st.none() | st.sampled_from(list(RESTORED)))
def test_any_extras_survive(icc: bytes | None, tags: bytes | None, xmp: bytes | None, mode: str | None) -> None:
    extras = Extras(icc=icc, exif=tags, xmp=xmp, mode=mode)
    assert vars(extras_of(container(extras.chunks(), grey=mode not in (None, "CMYK")))) == vars(extras)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("number", [None, *range(6)])
def test_a_mode_goes_with_its_channels(grey: bool, alpha: bool, number: int | None) -> None:
    chunks: tuple[tuple[int, bytes], ...] = ((Tag.ALPHA, b"\0"),) * alpha
    if number is not None:
        chunks += ((Tag.MODE, bytes([number])),)
    file = container(chunks, grey=grey)
    known = {
        (False, False, None): "RGB",
        (True, False, None): "L",
        (False, True, None): "RGBA",
        (True, True, None): "LA",
        (True, False, 1): "1",
        (True, False, 2): "I;16",
        (False, False, 3): "CMYK",
        (True, False, 4): "RGB",
        (True, True, 4): "RGBA",
    }
    if mode := known.get((grey, alpha, None if number in (0, 5) else number)):  # 0 and 5: of a later version
        assert mode_of(file) == mode
    else:
        with pytest.raises(FormatError, match="mode"):
            mode_of(file)


@pytest.mark.parametrize("content", [b"", b"\1\1", bytes(10**6)])
def test_a_mode_is_one_byte(content: bytes) -> None:
    with pytest.raises(FormatError, match="mode"):
        mode_of(container(((Tag.MODE, content),), grey=True))


@pytest.mark.parametrize("tag", [Tag.ICC, Tag.EXIF, Tag.XMP])
@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"\xff" * 9, packed(b"x") + b"x", packed(b"x" * 99)[:-1], packed(bytes(MAX_METADATA + 1))],
    ids=["nothing", "an empty stream", "no stream", "more after the stream", "no end", "a byte above the limit"],
)
def test_hostile_metadata_is_refused(tag: Tag, content: bytes) -> None:
    with pytest.raises(FormatError, match=tag.name):
        extras_of(container(((tag, content),)))


def test_the_limit_itself_is_allowed() -> None:
    extras = Extras(icc=bytes(MAX_METADATA))
    assert extras_of(container(extras.chunks())).icc == extras.icc


def test_a_bomb_takes_no_more_memory_than_the_limit() -> None:
    bomb = packed(bytes(1 << 26))  # 10 kB
    tracemalloc.start()
    try:
        for file in (container(((Tag.XMP, bomb),)), container(((Tag.ALPHA, b"\0" + bomb),), 1000, 1000)):
            with pytest.raises(FormatError):
                extras_of(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * MAX_METADATA


def test_metadata_above_the_limit_is_left_out_with_a_warning() -> None:
    image = Image.new("RGB", (2, 2))
    image.info.update(xmp=bytes(MAX_METADATA + 1), icc_profile=SRGB)
    with pytest.warns(UserWarning, match="xmp is not kept"):
        extras = picture_of(image).extras
    assert (extras.xmp, extras.icc) == (None, SRGB)


# EXIF


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("prefix", [b"", exif.PREFIX, exif.PREFIX * 2])
def test_orientation_and_thumbnail_change_and_nothing_else(order: str, prefix: bytes) -> None:
    before = camera_exif(order)
    after = exif.upright(prefix + before)
    changed = {position for position, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}
    thumbnail = before.index(b"\xff\xd8")
    assert changed <= {*range(22, 34), *range(46, 50), *range(thumbnail, len(before))}
    tags = Image.Exif()
    tags.load(after)
    assert (tags[0x010F], tags[0x0112], tags.get_ifd(0x8769)[0x9003]) == ("Maker", 1, "2020:02:29 12:00:00")
    assert tags.get_ifd(ExifTags.IFD.IFD1) == {}
    assert after[thumbnail:] == bytes(len(after) - thumbnail)
    assert exif.upright(after) == after


def test_a_thumbnail_that_claims_the_directories_does_not_erase_them() -> None:
    data = bytearray(camera_exif())
    struct.pack_into("<I", data, 78, 0)  # where the thumbnail begins
    tags = Image.Exif()
    tags.load(exif.upright(bytes(data)))
    assert tags[0x010F] == "Maker"


@pytest.mark.parametrize("length", range(len(camera_exif()) - 50))
def test_truncated_exif_is_damaged_or_upright(length: int) -> None:
    try:
        after = exif.upright(camera_exif()[:length])
    except ValueError:
        return
    assert len(after) == length


@settings(deadline=None)
@given(st.binary(max_size=80), st.sampled_from([b"", b"II*\0", b"MM\0*", b"II*\0\x08\0\0\0\1\0"]))
def test_random_exif_raises_no_other_error(data: bytes, start: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert len(exif.upright(start + data)) <= len(start + data)


def test_exif_as_imagemagick_writes_it() -> None:
    """In hexadecimal, in a text chunk."""
    image = Image.fromarray(COLOUR)
    file = io.BytesIO()
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n  200\n" + (exif.PREFIX + camera_exif()).hex())
    image.save(file, "PNG", pnginfo=text)
    opened = open_image(file)
    before = dict(opened.getexif())
    picture = picture_of(opened)
    np.testing.assert_array_equal(picture.pixels, np.rot90(COLOUR, -1))
    tags = Image.Exif()
    assert picture.extras.exif is not None
    tags.load(picture.extras.exif)
    assert (tags[0x010F], tags.get(0x0112, 1)) == ("Maker", 1)
    assert tags.get_ifd(0x8769)[0x9003] == "2020:02:29 12:00:00"
    assert dict(opened.getexif()) == before  # the caller's image


def test_xmp_says_upright_too() -> None:
    for before, after in (
        (b'<a tiff:Orientation="6" b="6"/>', b'<a tiff:Orientation="1" b="6"/>'),
        (b"<a tiff:Orientation = '8'/>", b"<a tiff:Orientation = '1'/>"),
        (b"<tiff:Orientation>3</tiff:Orientation>", b"<tiff:Orientation>1</tiff:Orientation>"),
        (XMP, XMP),
    ):
        image = Image.new("RGB", (4, 2))
        image.info["xmp"] = before
        assert picture_of(image).extras.xmp == after


# Through whole image files


def photo(form: str) -> Image.Image:
    """An image file as a camera writes it, opened."""
    file = io.BytesIO()
    image = Image.fromarray(COLOUR)
    options = {"exif": exif.PREFIX + camera_exif(orientation=3), "icc_profile": SRGB}
    if form == "TIFF":
        tags = Image.Exif()
        tags.load(camera_exif(orientation=3))
        tags[0x02BC] = XMP
        options["exif"] = tags
    elif form != "PNG":
        options["xmp"] = XMP
    image.save(file, form, **options)
    file.seek(0)
    return open_image(file)


@pytest.mark.parametrize("source", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_metadata_from_every_format_to_every_format(tmp_path: Path, source: str, suffix: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = picture_of(photo(source))
        chunks = parse(write(container(picture.extras.chunks()))).chunks
        decoded = image_of(picture.pixels, picture.grey, extras_of(container(chunks)))
        save_image(decoded, tmp_path / f"image{suffix}")
        with Image.open(tmp_path / f"image{suffix}") as again:
            again.load()
            assert again.info["icc_profile"] == SRGB
            assert again.info.get("xmp") == (None if source == "PNG" else XMP)
            tags = again.getexif()
            assert (tags[0x010F], tags.get(0x0112, 1)) == ("Maker", 1)
            assert tags.get_ifd(0x8769)[0x9003] == "2020:02:29 12:00:00"
            assert again.size == (60, 40)
            if suffix != ".jpg" and source != "JPEG" and source != "WEBP":
                np.testing.assert_array_equal(np.asarray(again), COLOUR[::-1, ::-1])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", ".ppm"])
def test_every_mode_to_every_format(tmp_path: Path, mode: str, suffix: str) -> None:
    grey = mode in ("1", "L", "LA", "I;16")
    image = image_of(
        COLOUR, grey, Extras(mode=mode if mode in RESTORED else None, alpha=ALPHA if "A" in mode else None)
    )
    assert image.mode == mode
    has_alpha = suffix in (".png", ".tif", ".webp")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_image(image, tmp_path / f"image{suffix}")
    assert [("placed on white" in str(each.message)) for each in caught] == [True] * ("A" in mode and not has_alpha)
    with Image.open(tmp_path / f"image{suffix}") as again:
        again.load()
        if "A" in mode and has_alpha:
            assert "A" in again.mode
            np.testing.assert_array_equal(np.asarray(again)[..., -1], ALPHA)
            np.testing.assert_array_equal(np.asarray(again)[..., 0], np.asarray(image)[..., 0])
        elif suffix == ".tif" or (suffix == ".png" and mode != "CMYK"):
            assert again.mode == mode
            assert again.tobytes() == image.tobytes()
        elif mode == "I;16" and suffix != ".ppm":
            plain = np.asarray(image).astype(int) // 257
            assert np.abs(np.asarray(again.convert("L")).astype(int) - plain).max() <= (suffix == ".jpg") * 20


def test_transparent_becomes_white_where_there_is_no_alpha() -> None:
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    with pytest.warns(UserWarning, match="PPM has no transparency: the image is placed on white"):
        again = Image.open(io.BytesIO(render(image, "PPM")))
    assert [again.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (10, 20, 30)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Image.open(io.BytesIO(render(Image.new("LA", (2, 1), (9, 255)), "PPM"))).mode == "L"


def test_what_a_format_has_no_room_for_is_named(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 2))
    image.info.update(icc_profile=SRGB, exif=exif.PREFIX + camera_exif(thumbnail=bytes(70000)), xmp=b"<x>" * 30000)
    with pytest.warns(UserWarning, match="JPEG of mode RGB cannot store its EXIF data and XMP data"):
        save_image(image, tmp_path / "image.jpg")
    with Image.open(tmp_path / "image.jpg") as again:
        assert again.info["icc_profile"] == SRGB
        assert "exif" not in again.info
    with pytest.warns(UserWarning, match="PPM of mode RGB cannot store its ICC profile and EXIF data and XMP data"):
        save_image(image, tmp_path / "image.ppm")


def test_a_profile_of_other_colours_is_left_out() -> None:
    profile = SRGB[:16] + b"CMYK" + SRGB[20:]
    image = Image.new("CMYK", (2, 2))
    image.info["icc_profile"] = profile
    assert Image.open(io.BytesIO(render(image, "JPEG"))).info["icc_profile"] == profile
    with pytest.warns(UserWarning, match="PNG of mode RGB cannot store its ICC profile"):
        assert "icc_profile" not in Image.open(io.BytesIO(render(image, "PNG"))).info


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    "info",
    [
        {"exif": b"Exif\0\0garbage"},
        {"exif": b"Exif\0\0II*\0\x08\0\0\0\xff\xff"},
        {"exif": b"Exif\0\0" + LAYOUT_EXIF},
        {"xmp": b"\xff\xfe not text"},
        {"icc_profile": b"\0"},
    ],
    ids=["garbage", "no end", "TIFF tags", "XMP", "ICC"],
)
def test_hostile_metadata_does_not_cost_the_image(form: str, info: dict[str, bytes]) -> None:
    image = Image.fromarray(COLOUR)
    image.info.update(info)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = Image.open(io.BytesIO(render(image, form)))
        assert again.size == image.size
        pixels = np.asarray(again.convert("RGB"))
    if form != "JPEG":
        np.testing.assert_array_equal(pixels, COLOUR)


def test_one_damaged_item_costs_that_item_alone() -> None:
    """XMP in UTF-16 is legal and written to PNG as UTF-8; what is damaged is left out, and the rest is there."""
    image = Image.fromarray(COLOUR)
    tags = exif.PREFIX + camera_exif()
    for xmp in (XMP.decode().encode("utf-16"), XMP.decode().encode("utf-16-be"), XMP + b"\0"):
        image.info.update(icc_profile=SRGB, exif=tags, xmp=xmp)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = Image.open(io.BytesIO(render(image, "PNG")))
        assert (again.info["icc_profile"], again.info["xmp"]) == (SRGB, XMP)
        assert again.getexif()[0x010F] == "Maker"
    image.info["xmp"] = b"\xff\xfa no text"
    with pytest.warns(UserWarning, match="its XMP data is damaged and cannot be written to PNG"):
        again = Image.open(io.BytesIO(render(image, "PNG")))
    assert (again.info["icc_profile"], "xmp" in again.info) == (SRGB, False)
    assert again.getexif()[0x010F] == "Maker"


def test_one_damaged_tag_costs_that_tag_alone() -> None:
    """XResolution as text, which Pillow cannot write to TIFF."""
    image = Image.fromarray(COLOUR)
    entries = struct.pack("<HHI4s", 0x010F, 2, 4, b"abc\0") + struct.pack("<HHI4s", 0x011A, 2, 3, b"72\0\0")
    image.info.update(icc_profile=SRGB, exif=b"II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4))
    with pytest.warns(UserWarning, match="EXIF tags XResolution are damaged"):
        again = Image.open(io.BytesIO(render(image, "TIFF")))
    assert again.info["icc_profile"] == SRGB
    assert again.getexif()[0x010F] == "abc"


def overlapping(entries: int, length: int) -> bytes:
    """EXIF data whose entries all describe the same bytes, as fractions."""
    inner = struct.pack("<H", entries)
    for number in range(entries):
        inner += struct.pack("<HHII", 0x9000 + number, 5, length // 8, 26)
    data = b"II*\0" + struct.pack("<IH", 8, 1) + struct.pack("<HHII", 0x8769, 4, 1, 26) + bytes(4)
    return data + inner + bytes(4 + length)


def test_a_bomb_in_exif_is_left_out_with_one_warning() -> None:
    file = io.BytesIO()
    Image.fromarray(COLOUR).save(file, "JPEG", exif=exif.PREFIX + overlapping(250, 3000), icc_profile=SRGB)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        picture = picture_of(open_image(file))
    assert [str(each.message) for each in caught] == ["its EXIF data is damaged and not kept"]
    assert (picture.extras.exif, picture.extras.icc) == (None, SRGB)
    outside = b"II*\0" + struct.pack("<IH", 8, 1500) + struct.pack("<HHII", 0x9000, 5, 9, 1 << 30) * 1500
    file = io.BytesIO()
    Image.fromarray(COLOUR).save(file, "JPEG", exif=exif.PREFIX + outside + bytes(4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert picture_of(open_image(file)).extras.exif is None
    assert len(caught) == 1
    with pytest.raises(ImageError, match="more data than the file has"):
        open_image(io.BytesIO(overlapping(250, 3000)))
    assert exif.is_bounded(camera_exif())


def test_a_bomb_in_text_does_not_cost_the_picture() -> None:
    file = io.BytesIO()
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * (1 << 22), zip=True)
    Image.fromarray(COLOUR).save(file, "PNG", pnginfo=text)
    with pytest.warns(UserWarning, match="the text in .* is not kept"):
        np.testing.assert_array_equal(np.asarray(open_image(file)), COLOUR)


def test_cicp_is_kept_by_png_and_named_where_there_is_no_room() -> None:
    pq = bytes([9, 16, 0, 1])
    file = io.BytesIO()
    text = PngImagePlugin.PngInfo()
    text.add(b"cICP", pq)
    Image.fromarray(COLOUR).save(file, "PNG", pnginfo=text)
    picture = picture_of(open_image(file))
    extras = extras_of(parse(write(container(picture.extras.chunks()))))
    assert extras.cicp == pq
    image = image_of(picture.pixels, picture.grey, extras)
    assert picture_of(open_image(io.BytesIO(render(image, "PNG")))).extras.cicp == pq
    with pytest.warns(UserWarning, match="JPEG of mode RGB cannot store its cICP data"):
        render(image, "JPEG")
    with pytest.raises(FormatError, match="CICP"):
        extras_of(container(((Tag.CICP, pq[:3]),)))


def test_other_colour_spaces_are_not_dropped_in_silence() -> None:
    for gamma, quiet in ((100000, False), (45455, True)):
        file = io.BytesIO()
        text = PngImagePlugin.PngInfo()
        text.add(b"gAMA", struct.pack(">I", gamma))
        Image.fromarray(COLOUR).save(file, "PNG", pnginfo=text)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            open_image(file)
        assert [("gAMA" in str(each.message)) for each in caught] == [True] * (not quiet)


def test_only_the_location_is_left_out() -> None:
    """The GPS directory, the maker note and GPS in XMP go, bytes and all; camera and date stay."""
    tags = Image.Exif()
    tags[0x010F] = "Maker"
    tags._ifds[0x8825] = {1: "N", 2: (48.0, 51.0, 29.0), 29: "2020:02:29"}
    tags._ifds[0x8769] = {0x9003: "2020:02:29 12:00:00", 0x927C: b"a note of the maker: secret place"}
    file = io.BytesIO()
    xmp = (
        b'<x:xmpmeta><rdf:Description exif:GPSLatitude="48,51N" dc:title="t"><exif:GPSLongitude>2E</exif:GPSLongitude>'
    )
    Image.fromarray(COLOUR).save(file, "JPEG", exif=tags, xmp=xmp, icc_profile=SRGB)
    assert b"secret" in file.getvalue()
    extras = picture_of(strip_only(open_image(file), ["location"])).extras
    assert extras.exif is not None
    assert extras.xmp == b'<x:xmpmeta><rdf:Description dc:title="t">'
    assert extras.icc == SRGB
    assert not any(each in extras.exif for each in (b"secret", b"2020:02:29\0", b"\x25\x88", b"\x88\x25"))
    again = Image.Exif()
    again.load(extras.exif)
    assert (again[0x010F], again.get_ifd(0x8825)) == ("Maker", {})
    assert again.get_ifd(0x8769) == {0x9003: "2020:02:29 12:00:00"}
    gone = picture_of(strip_only(open_image(file), ["exif", "icc"])).extras
    assert (gone.exif, gone.icc, gone.xmp) == (None, None, xmp)
    image = Image.fromarray(COLOUR)
    image.info.update(xmp=xmp.decode().encode("utf-16"), exif=b"II*\0\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unsure = picture_of(strip_only(image, ["location"])).extras
    assert (unsure.xmp, unsure.exif) == (None, None)


def test_an_image_that_cannot_be_written_has_no_second_chance() -> None:
    image = Image.new("RGB", (20000, 1))
    image.info["xmp"] = XMP
    with pytest.raises(ImageError):
        render(image, "WEBP")


def test_the_command_line_keeps_or_strips(tmp_path: Path) -> None:
    """From a photograph on its side with everything to a PNG and a JPEG that have it, and to one that does not."""
    file = io.BytesIO()
    tags = exif.PREFIX + camera_exif()
    Image.fromarray(COLOUR).save(file, "JPEG", exif=tags, icc_profile=SRGB, xmp=XMP, quality=95)
    (tmp_path / "photo.jpg").write_bytes(file.getvalue())

    def run(*arguments: str) -> None:
        result = CliRunner().invoke(app, list(arguments))
        assert (result.exit_code, result.stderr) == (0, "")

    source, kept, stripped = (str(tmp_path / name) for name in ("photo.jpg", "kept.bin", "stripped.bin"))
    run("encode", source, "-o", kept, "--device", "cpu")
    run("encode", source, "-o", stripped, "--strip", "--device", "cpu")
    assert [tag for tag, _ in parse(Path(kept).read_bytes()).chunks] == [Tag.ICC, Tag.EXIF, Tag.XMP]
    assert parse(Path(stripped).read_bytes()).chunks == ()
    for suffix in (".png", ".jpg"):
        run("decode", kept, "-o", kept + suffix, "--device", "cpu")
        with Image.open(kept + suffix) as image:
            image.load()
            assert image.size == (40, 60)
            assert (image.info["icc_profile"], image.info["xmp"]) == (SRGB, XMP)
            assert image.getexif()[0x010F] == "Maker"
            assert image.getexif()[0x0112] == 1
        run("decode", stripped, "-o", stripped + suffix, "--device", "cpu")
        with Image.open(stripped + suffix) as image:
            image.load()
            assert image.size == (40, 60)
            assert not {"icc_profile", "exif", "xmp"} & set(image.info)
