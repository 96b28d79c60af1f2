"""Is every hostile file refused with a typed error, soon, and without more memory than an honest one takes?

The corpus has a sentence on each file. All of its files have a checksum that fits: the checksum finds accidents, and
whoever forges a file computes it. Files that go wrong before that are in `test_container.py`, chunks in
`test_metadata.py`, payloads in `test_rangecoder.py`.
"""

from __future__ import annotations

import io
import lzma
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from containers import changed, learned_of
from fuzz import fuzz, read_layers, reader_of, repaired, seeds_of, seeds_without_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpcmref.errors import FormatError, HpcmrefError, UnsupportedError
from hpcmref.format.container import MAGIC, Container, Tag, parse, write
from hpcmref.picture.metadata import mode_of, pack_alpha
from hpcmref.picture.render import render

if TYPE_CHECKING:
    from hpcmref.codec import Codec

SIDE = 64
FILTERS = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
BOMB = lzma.compress(bytes(1 << 25), lzma.FORMAT_RAW, filters=FILTERS)
LOWEST_STATE = (1 << 31).to_bytes(8, "little")
HIGHEST_STATE = ((1 << 63) - 1).to_bytes(8, "little")

Forge = Callable[[Container], Container]

# A sentence on what the file tries -> how it is made of an honest one, 64 x 64 RGBA.
CORPUS: dict[str, Forge] = {
    "announces 268 megapixels, the most that the format holds": lambda f: replace(f, width=1 << 14, height=1 << 14),
    "announces 134 megapixels, and has the payload of 64 x 64": lambda f: replace(f, width=1 << 14, height=1 << 13),
    "announces the longest row there may be": lambda f: replace(f, width=1 << 15, height=1),
    "announces the longest column there may be, and no payload": lambda f: replace(
        f, width=1, height=1 << 15, payload=b""
    ),
    "has no payload": lambda f: replace(f, payload=b""),
    "has a payload that ends after the first state": lambda f: replace(f, payload=f.payload[:8]),
    "has half of its payload": lambda f: replace(f, payload=f.payload[: len(f.payload) // 8 * 4]),
    "has a payload that is no whole number of words": lambda f: replace(f, payload=f.payload[:-1]),
    "begins with a state of 0, for which the coder would read without end": lambda f: replace(f, payload=bytes(1000)),
    "begins with the lowest state, so that every symbol is the first of its table": lambda f: replace(
        f, payload=LOWEST_STATE + bytes(4000)
    ),
    "begins with the highest state, and goes on with ones": lambda f: replace(
        f, payload=HIGHEST_STATE + b"\xff" * 4000
    ),
    "has a megabyte of random payload": lambda f: replace(
        f, payload=LOWEST_STATE + np.random.default_rng(0).bytes(1 << 20)
    ),
    "has its words in the other order": lambda f: replace(
        f, payload=np.frombuffer(f.payload, "<u4")[::-1].tobytes()[:-1] + b"\1"
    ),
    "is of another quality than it says": lambda f: changed(f, quality=(learned_of(f).quality + 20) % 64),
    "has a latent checksum of zero": lambda f: changed(f, latent_checksum=0),
    "has alpha for one column less": lambda f: chunked(f, (Tag.ALPHA, pack_alpha(np.eye(SIDE, SIDE - 1, dtype="u1")))),
    "has alpha that unpacks to 32 MB, where 4 kB are due": lambda f: chunked(f, (Tag.ALPHA, b"\0" + BOMB)),
    "has alpha of a kind that does not exist": lambda f: chunked(f, (Tag.ALPHA, b"\7" + BOMB)),
    "has no byte of alpha": lambda f: chunked(f, (Tag.ALPHA, b"")),
    "has ICC, EXIF and XMP that unpack to 32 MB each": lambda f: chunked(
        f, (Tag.ICC, BOMB), (Tag.EXIF, BOMB), (Tag.XMP, BOMB)
    ),
    "has an ICC profile that is not packed": lambda f: chunked(f, (Tag.ICC, b"\xff" * 500)),
    "has the mode of a grey image, and colours": lambda f: chunked(f, (Tag.MODE, b"\1")),
    "has a mode of a megabyte": lambda f: chunked(f, (Tag.MODE, bytes(1 << 20))),
    "is of an arithmetic that does not exist": lambda f: changed(f, arithmetic=200),
    "is of a model that does not exist": lambda f: changed(f, fingerprint=b"\0\0\0\0"),
}


def chunked(file: Container, *chunks: tuple[int, bytes]) -> Container:
    return replace(file, chunks=chunks)


@pytest.fixture(scope="module")
def honest(codec: Codec, sample: Image.Image) -> bytes:
    """A file of 64 x 64 pixels with alpha and a profile."""
    image = sample.crop((150, 60, 150 + SIDE, 60 + SIDE))
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.info["icc_profile"] = bytes(range(200))
    return codec.encode(image, 20)


@pytest.fixture(scope="module")
def header_bytes(honest: bytes) -> int:
    """Bytes from the beginning of the honest file to its first chunk."""
    return len(write(replace(parse(honest), chunks=(), payload=b""))) - 1 - 4


@pytest.mark.parametrize("partial", [False, True], ids=["", "partial"])
@pytest.mark.parametrize("sentence", CORPUS)
def test_the_corpus(codec: Codec, honest: bytes, sentence: str, partial: bool) -> None:
    data = write(CORPUS[sentence](parse(honest)))
    start = time.monotonic()
    with pytest.raises(HpcmrefError):
        codec.decode(data, partial=partial)
    assert time.monotonic() - start < 10


def test_what_the_corpus_is_made_of_is_no_hostile_file(codec: Codec, honest: bytes) -> None:
    assert codec.decode(honest).size == (SIDE, SIDE)
    assert codec.decode(write(parse(honest))).mode == "RGBA"


def test_every_truncation(codec: Codec, honest: bytes) -> None:
    """Refused at every length; and if it is asked for, shown or refused."""
    expected = codec.decode(honest)
    shown = 0
    for length in range(len(honest)):
        with pytest.raises(FormatError):
            codec.decode(honest[:length])
        if length % 11:
            continue
        try:
            image = codec.decode(honest[:length], partial=True)
        except HpcmrefError:
            continue
        shown += 1
        assert (image.size, image.mode) == (expected.size, expected.mode)
    assert shown > 2


def test_every_truncation_with_a_checksum_that_fits(codec: Codec, honest: bytes) -> None:
    for length in range(len(honest)):
        with pytest.raises(HpcmrefError):
            codec.decode(repaired(honest[:length] if length > 7 else honest[:4] + bytes(4)))


def test_every_flipped_bit_of_the_header(codec: Codec, honest: bytes, header_bytes: int) -> None:
    assert header_bytes == 26
    for bit in range(8 * header_bytes):
        damaged = bytearray(honest)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((FormatError, UnsupportedError)):
            codec.decode(bytes(damaged))


def test_every_flipped_bit_of_the_header_with_a_checksum_that_fits(
    codec: Codec, honest: bytes, header_bytes: int
) -> None:
    """A typed error, or what the changed header says: the same pixels, in another frame or mode."""
    expected = np.asarray(codec.decode(write(chunked(parse(honest)))))
    other = []
    for bit in range(8 * len(MAGIC), 8 * header_bytes):
        damaged = bytearray(honest)
        damaged[bit // 8] ^= 1 << bit % 8
        data = repaired(bytes(damaged))
        try:
            image = codec.decode(data)
        except HpcmrefError:
            continue
        file = parse(data)
        assert (image.size, image.mode) == ((file.width, file.height), mode_of(file))
        other.append(file)
    # Alpha and profile do not fit another frame, so what is left is the mode: grey, or (at most) a near quality; and
    # the encoder's version and effort, which decoders ignore: 16 bits, and 4 that give an effort below 10.
    told = [file for file in other if file.encoder != parse(honest).encoder]
    assert len(told) == 20
    assert all(np.array_equal(np.asarray(codec.decode(write(chunked(file)))), expected) for file in told)
    other = [file for file in other if file.encoder == parse(honest).encoder]
    assert len(other) <= 4
    for file in other:
        if learned_of(file).quality == learned_of(parse(honest)).quality:
            assert file.grey
            grey = np.asarray(codec.decode(write(chunked(file))))
            assert np.abs(grey - expected.mean(axis=2)).max() < 1


def test_twenty_thousand_mutations_without_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcmref.format.rangecoder._BLOCK", 512)  # these payloads would fit into one block
    outcomes, slowest = fuzz(read_layers, seeds_without_model(), seed=1, mutations=20_000)
    assert outcomes.total() == 20_000
    assert outcomes["sound"] > 3000
    assert {"FormatError", "TruncatedError", "UnsupportedError"} <= set(outcomes)
    assert slowest < 5


def test_mutations_of_whole_files(codec: Codec) -> None:
    outcomes, slowest = fuzz(reader_of(codec), seeds_of(codec), seed=2, mutations=300)
    assert outcomes.total() == 300
    assert {"FormatError", "TruncatedError", "DecodeError", "sound"} <= set(outcomes)
    assert slowest < 10


MEMORY = """
import resource, sys
from pathlib import Path
from hpcmref.codec import load
from hpcmref.errors import HpcmrefError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

honest, *hostile = sorted(Path(sys.argv[1]).iterdir())
codec = load(device="cpu")
codec.decode(honest.read_bytes())
before = peak()
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**29, size + 2**29))
for path in hostile:
    for partial in (False, True):
        try:
            codec.decode(path.read_bytes(), partial=partial)
        except HpcmrefError:
            pass
print(len(hostile), before, peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory as Linux has them")
def test_no_hostile_file_takes_twice_the_memory_of_the_honest_one(
    honest: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In a process that is not given half a gigabyte more than it had after the honest file."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "00").write_bytes(honest)
    for number, forge in enumerate(CORPUS.values(), 1):
        (folder / f"{number:02}").write_bytes(write(forge(parse(honest))))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder)], capture_output=True, env=environment, timeout=120, text=True
    )
    assert result.returncode == 0, result.stderr
    count, before, after = map(int, result.stdout.split())
    assert count == len(CORPUS)
    assert after < 2 * before


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "PPM"])
def test_metadata_of_a_forger_does_not_cost_the_image(codec: Codec, honest: bytes, form: str) -> None:
    """Metadata is opaque to the format. What a forger puts there meets Pillow when the image is written."""
    garbage = lzma.compress(b"II*\0\xff\xff\xff\x7f" + bytes(20), lzma.FORMAT_RAW, filters=FILTERS)
    file = chunked(parse(honest), (Tag.ICC, garbage), (Tag.EXIF, garbage), (Tag.XMP, garbage))
    image = codec.decode(write(file))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Image.open(io.BytesIO(render(image, form))).size == (SIDE, SIDE)


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 80),
    st.integers(1, 80),
    st.sampled_from(["1", "L", "LA", "RGB", "RGBA"]),
    st.integers(0, 63),
    st.none() | st.binary(min_size=1, max_size=100),
)
def test_any_small_image_survives(
    codec: Codec, sample: Image.Image, width: int, height: int, mode: str, quality: int, xmp: bytes | None
) -> None:
    image = sample.convert("RGB").crop((100, 100, 100 + width, 100 + height)).convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.radial_gradient("L").resize(image.size))
    if xmp is not None:
        image.info["xmp"] = xmp
    decoded = codec.decode(codec.encode(image, quality))
    assert (decoded.size, decoded.mode, decoded.info.get("xmp")) == (image.size, mode, xmp)
    if mode.endswith("A"):
        assert decoded.getchannel("A").tobytes() == image.getchannel("A").tobytes()
