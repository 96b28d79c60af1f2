"""Is a file exactly the bytes of FORMAT.md, and is anything else refused?"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from dataclasses import replace

import containers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmref.errors import ConfigError, FormatError, HpcmrefError, UnsupportedError
from hpcmref.format.container import (
    MAGIC,
    MAX_PIXELS,
    MAX_SIDE,
    Checksums,
    Coding,
    Container,
    Encoder,
    Tag,
    parse,
    part_sizes,
    peek,
    write,
)

SMALL = containers.container(
    arithmetic=0,
    fingerprint=b"\xde\xad\xbe\xef",
    quality=32,
    width=768,
    height=5,
    grey=False,
    checksums=Checksums(0x0A0B, 0x0C0D, 0x01020304),
    encoder=Encoder(0, 2, 7),
    payload=b"payload",
)
SMALL_BODY = bytes.fromhex("02 00 00 8006 05 000207 00 deadbeef 20 0b0a 0d0c 04030201 07") + b"payload"

CHUNKED = containers.container(
    arithmetic=3,
    chunks=((100, b""), (127, b"x" * 200), (100, b"again")),
)
CHUNKS = b"".join(
    (bytes.fromhex("64 00"), bytes.fromhex("7f c801") + b"x" * 200, bytes.fromhex("64 05") + b"again", b"\0")
)
CHUNKED_BODY = bytes.fromhex("02 03 00 01 01 000000 03 61626364 00 0000 0000 00000000") + CHUNKS + b"\0"

LOSSLESS = Container(width=300, height=2, grey=True, learned=None, coding=Coding.PNG, payload=b"png")
LOSSLESS_BODY = bytes.fromhex("02 02 02 ac02 02 000000 03") + b"png"

VERSION_1 = {
    "small": (
        bytes.fromhex("01 00 00 deadbeef 20 8006 05 04030201 07") + b"payload",
        containers.changed(SMALL, checksums=Checksums(None, None, 0x01020304), encoder=Encoder(), version=1),
    ),
    "chunked": (
        bytes.fromhex("01 03 03 61626364 00 01 01 00000000") + CHUNKS + b"\0",
        containers.changed(CHUNKED, checksums=Checksums(None, None, 0), version=1),
    ),
}


def sealed(body: bytes) -> bytes:
    """A file with this body and a checksum that is right."""
    return b"\x89HPC" + body + struct.pack("<I", zlib.crc32(body))


def body(
    version: int = 2,
    flags: int = 0,
    coding: int = 0,
    quality: int = 0,
    width: bytes = b"\x01",
    height: bytes = b"\x01",
    rest: bytes = b"\x00",
) -> bytes:
    """The body of a file of one pixel, or of something near to one. rest: chunks, payload length and payload."""
    fixed = bytes([version, flags, coding]) + width + height + bytes(3)
    return fixed + b"\0abcd" + bytes([quality]) + bytes(8) + rest


@pytest.mark.parametrize(
    ("container", "expected"), [(SMALL, SMALL_BODY), (CHUNKED, CHUNKED_BODY), (LOSSLESS, LOSSLESS_BODY)]
)
def test_the_bytes_of_the_format_document_are_written_and_read(container: Container, expected: bytes) -> None:
    assert write(container) == sealed(expected)
    assert parse(sealed(expected)) == container


@pytest.mark.parametrize(("body", "expected"), VERSION_1.values(), ids=VERSION_1)
def test_version_1_is_read(body: bytes, expected: Container) -> None:
    assert parse(sealed(body)) == expected
    assert peek(io.BytesIO(sealed(body))) == replace(expected, payload=b"")
    with pytest.raises(ConfigError, match="version 2"):
        write(expected)


def test_a_lossless_file_needs_no_model() -> None:
    assert parse(write(LOSSLESS)).learned is None
    with pytest.raises(ConfigError):
        replace(LOSSLESS, coding=Coding.LEARNED)
    with pytest.raises(ConfigError):
        replace(SMALL, coding=Coding.WEBP)


def test_an_unknown_coding_is_named() -> None:
    with pytest.raises(UnsupportedError, match="coding 77"):
        parse(sealed(body(coding=77)))


def test_an_unknown_chunk_that_changes_the_pixels_is_refused() -> None:
    for tag in (128, 255):
        with pytest.raises(UnsupportedError, match=f"tag {tag}"):
            parse(sealed(body(flags=1, rest=bytes([tag, 0, 0, 0]))))
    assert parse(sealed(body(flags=1, rest=b"\x7f\0\0\0"))).chunks == ((127, b""),)


def test_a_damaged_file_is_read_only_if_it_is_asked_for() -> None:
    data = bytearray(write(SMALL))
    data[-6] ^= 1  # in the payload
    with pytest.raises(FormatError, match="checksum"):
        parse(bytes(data))
    file = parse(bytes(data), damaged=True)
    assert file.damaged
    assert not file.truncated
    assert file.payload != SMALL.payload
    with pytest.raises(ConfigError):
        write(file)
    assert not parse(write(SMALL), damaged=True).damaged


def test_the_fixed_part_of_a_photograph_is_small() -> None:
    photograph = containers.container(width=768, height=512, payload=bytes(4900))
    assert len(write(photograph)) - 4900 == 34
    largest = containers.container(width=1 << 14, height=1 << 14, payload=bytes(1 << 21))
    assert len(write(largest)) - (1 << 21) == 38


@pytest.mark.parametrize("container", [SMALL, CHUNKED])
def test_part_sizes_add_up_to_the_file(container: Container) -> None:
    sizes = part_sizes(write(container))
    assert list(sizes) == ["header", "chunks", "payload", "crc"]
    assert sum(sizes.values()) == len(write(container))
    assert sizes["payload"] == len(container.payload)
    assert bool(sizes["chunks"]) == bool(container.chunks)


dimensions = st.tuples(st.integers(1, MAX_SIDE), st.integers(1, MAX_SIDE)).filter(lambda s: s[0] * s[1] <= MAX_PIXELS)
any_containers = st.builds(
    lambda size, **fields: containers.container(width=size[0], height=size[1], **fields),
    dimensions,
    arithmetic=st.integers(0, 255),
    fingerprint=st.binary(min_size=4, max_size=4),
    quality=st.integers(0, 63),
    grey=st.booleans(),
    checksums=st.builds(Checksums, st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)),
    encoder=st.builds(Encoder, st.integers(0, 255), st.integers(0, 255), st.integers(0, 9)),
    payload=st.binary(max_size=300),
    chunks=st.lists(st.tuples(st.integers(100, 127), st.binary(max_size=200)), max_size=4).map(tuple),
)


@settings(deadline=None)
@given(any_containers)
def test_what_is_written_is_read(container: Container) -> None:
    assert parse(write(container)) == container


def test_a_glance_reads_the_header_and_the_small_chunks() -> None:
    chunks = ((Tag.ICC, b"profile"), (Tag.ALPHA, bytes(10**6)), (Tag.MODE, b"\1"))
    file = io.BytesIO(write(replace(SMALL, chunks=chunks, payload=bytes(10**6))))
    seen = peek(file)
    assert seen == replace(SMALL, chunks=((Tag.ICC, b"profile"), (Tag.ALPHA, b""), (Tag.MODE, b"\1")), payload=b"")
    assert file.tell() == 4 + 3 + 3 + 3 + 14 + (2 + 7) + (4 + 10**6) + (2 + 1) + 1  # the end of the chunks
    assert peek(io.BytesIO(write(SMALL)[:-11])) == replace(SMALL, payload=b"")


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_a_glance_raises_no_other_error(data: bytes) -> None:
    for hostile in (data, MAGIC + data, MAGIC + b"\x01\x01\x01abcd\x00" + data, MAGIC + b"\x02\x01\x00" + data):
        with contextlib.suppress(HpcmrefError):
            peek(io.BytesIO(hostile))


def test_a_chunk_is_found_by_its_tag() -> None:
    container = replace(SMALL, chunks=((200, b"x"), (Tag.XMP, b""), (Tag.ICC, b"y")))
    assert [container.chunk(tag) for tag in (Tag.ICC, Tag.EXIF, Tag.XMP)] == [b"y", None, b""]


@pytest.mark.parametrize("container", [SMALL, CHUNKED])
def test_every_truncation_is_refused(container: Container) -> None:
    data = write(container)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            parse(data[:length])


@pytest.mark.parametrize("container", [SMALL, CHUNKED])
def test_every_truncated_body_is_refused_though_its_checksum_is_right(container: Container) -> None:
    whole = write(container)[4:-4]
    for length in range(len(whole)):
        with pytest.raises(FormatError):
            parse(sealed(whole[:length]))


@pytest.mark.parametrize("container", [SMALL, CHUNKED])
def test_every_flipped_bit_is_refused(container: Container) -> None:
    data = write(container)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((FormatError, UnsupportedError)):
            parse(bytes(damaged))


@settings(deadline=None)
@given(st.data())
def test_a_forgery_is_refused_or_is_the_one_file_of_what_it_says(data: st.DataObject) -> None:
    forged = bytearray(data.draw(st.sampled_from([SMALL_BODY, CHUNKED_BODY])))
    for _ in range(data.draw(st.integers(1, 4))):
        forged[data.draw(st.integers(0, min(40, len(forged)) - 1))] = data.draw(st.integers(0, 255))
    try:
        container = parse(sealed(bytes(forged)))
    except HpcmrefError:
        return
    assert write(container) == sealed(bytes(forged))


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_random_bytes_raise_no_other_error(data: bytes) -> None:
    for hostile in (data, MAGIC + data, sealed(data)):
        with contextlib.suppress(HpcmrefError):
            parse(hostile)


HOSTILE = {
    "an empty file": b"",
    "half of the magic": b"\x89H",
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(40),
    "the magic after a transfer as text": b"\xef\xbf\xbdHPC" + SMALL_BODY,
    "only the magic": MAGIC,
    "the magic and a checksum of nothing": sealed(b""),
    "a checksum that also covers the magic": MAGIC + SMALL_BODY + struct.pack("<I", zlib.crc32(MAGIC + SMALL_BODY)),
    "a checksum in the other byte order": MAGIC + SMALL_BODY + struct.pack(">I", zlib.crc32(SMALL_BODY)),
    "a byte after the checksum": sealed(SMALL_BODY) + b"\0",
    "a byte after the payload": sealed(SMALL_BODY + b"\0"),
    "a version that never was": sealed(body(version=0)),
    "a quality above the highest": sealed(body(quality=64)),
    "no columns": sealed(body(width=b"\x00")),
    "no rows": sealed(body(height=b"\x00")),
    "a side one above the limit": sealed(body(width=b"\x81\x80\x02")),
    "the largest side a varint can say": sealed(body(width=b"\xff\xff\xff\xff\x0f")),
    "sides that are allowed with a product that is not": sealed(body(width=b"\x80\x80\x02", height=b"\x81\x40")),
    "a width that needs more than 32 bits": sealed(body(width=b"\x81\x80\x80\x80\x10")),
    "a width of six bytes": sealed(body(width=b"\x81\x80\x80\x80\x80\x00")),
    "a width that never ends": sealed(body(width=b"\xff" * 1000)),
    "a width of 1 in two bytes": sealed(body(width=b"\x81\x00")),
    "a width of 0 in two bytes": sealed(body(width=b"\x80\x00")),
    "a payload of 4 GiB in an empty file": sealed(body(rest=b"\xff\xff\xff\xff\x0f")),
    "a payload one byte longer than the file": sealed(body(rest=b"\x04abc")),
    "a payload one byte shorter than the file": sealed(body(rest=b"\x02abc")),
    "a payload length of 3 in two bytes": sealed(body(rest=b"\x83\x00abc")),
    "chunks announced, and none there": sealed(body(flags=1, rest=b"\x00\x00")),
    "chunks that never end": sealed(body(flags=1, rest=b"\x01\x00" * 50)),
    "a chunk of 4 GiB": sealed(body(flags=1, rest=b"\x01\xff\xff\xff\xff\x0f" + bytes(20))),
    "a chunk that swallows the end of the chunks": sealed(body(flags=1, rest=b"\x01\x02\x00\x00")),
    "two ICC profiles": sealed(body(flags=1, rest=b"\x01\x01a\x01\x01b\x00\x00")),
    "alpha twice, the same and not next to each other": sealed(body(flags=1, rest=b"\x04\x00\x64\x00\x04\x00\x00\x00")),
    "more chunks than there may be, of tags that nobody knows": sealed(
        body(flags=1, rest=b"\xc8\x00" * 65 + b"\x00\x00")
    ),
    "a million empty chunks, which would be 100 MB of tuples": sealed(body(flags=1, rest=b"\xc8\x00" * 10**6)),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse(data)


def test_the_near_miss_of_the_hostile_files_is_a_file() -> None:
    assert parse(sealed(body())).width == 1
    assert parse(sealed(body(width=b"\x80\x80\x02", height=b"\x80\x40"))).height == MAX_PIXELS // MAX_SIDE
    assert len(parse(sealed(body(flags=1, rest=b"\x64\x00" * 64 + b"\x00\x00"))).chunks) == 64


def test_a_newer_version_is_named() -> None:
    with pytest.raises(UnsupportedError, match="version 7"):
        parse(MAGIC + b"\x07whatever follows")


@pytest.mark.parametrize("flag", range(2, 8))
def test_an_unknown_flag_is_not_ignored(flag: int) -> None:
    with pytest.raises(UnsupportedError, match="feature"):
        parse(sealed(body(flags=1 << flag)))


def test_a_file_of_something_else_is_called_that() -> None:
    with pytest.raises(FormatError, match="not an hpcmref file"):
        parse(b"\xff\xd8\xff\xe0 JFIF")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 3},
        {"version": 1},
        {"version": 2, "checksums": Checksums(None, None, 0)},
        {"checksums": Checksums(1 << 16, 0, 0)},
        {"encoder": Encoder(0, 0, 10)},
        {"arithmetic": 256},
        {"fingerprint": b"abc"},
        {"quality": -1},
        {"width": 0},
        {"height": MAX_SIDE + 1},
        {"width": MAX_SIDE, "height": MAX_PIXELS // MAX_SIDE + 1},
        {"latent_checksum": 1 << 32},
        {"chunks": ((0, b""),)},
        {"chunks": ((256, b""),)},
        {"chunks": ((Tag.EXIF, b"a"), (Tag.ICC, b""), (Tag.EXIF, b"a"))},
        {"chunks": ((200, b""),) * 65},
    ],
    ids=str,
)
def test_a_container_that_the_format_cannot_hold_is_not_made(change: dict) -> None:
    with pytest.raises(ConfigError):
        containers.changed(SMALL, **change)
