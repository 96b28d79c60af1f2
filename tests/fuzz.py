"""Do hostile files do harm? Mutates files of ours and feeds them to everything that reads them.

    python tests/fuzz.py --mutations 1000000              the container, metadata, alpha and the range coder
    python tests/fuzz.py --mutations 5000 --codec         whole files through the shipped model
    python tests/fuzz.py --seconds 300 --seed 7 --block 64

Three of four mutations have a checksum that fits, so that they pass the first gate. Anything but a typed error or a
sound result ends the run with the file that did it, in hexadecimal. SECURITY.md has the figures of a long run.
"""

from __future__ import annotations

import argparse
import collections
import io
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import containers
import numpy as np

from hpcmref.errors import ConfigError, HpcmrefError
from hpcmref.format import rangecoder
from hpcmref.format.container import MAGIC, VERSION, Container, parse, peek, write
from hpcmref.format.rangecoder import SymbolDecoder, SymbolEncoder, scale_table
from hpcmref.picture.metadata import MAX_METADATA, Extras, extras_of, mode_of

if TYPE_CHECKING:
    from hpcmref.codec import Codec

MOST_SYMBOLS = 20_000

Read = Callable[[bytes, np.random.Generator], str]


def seeds_without_model() -> list[bytes]:
    """Small files with every kind of chunk, whose payloads hold random symbols."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:16, :20]
    planes = [(rows * columns).astype(np.uint8), ((rows + columns) % 2 * 255).astype(np.uint8), None]
    texts = [random.bytes(300), b"II*\0\x08\0\0\0" + bytes(90), b"<x:xmpmeta>" * 50, None]
    files = []
    for number in range(12):
        indexes = random.integers(0, 60, 400)
        symbols = np.round(random.normal(size=400) * scale_table()[indexes]).astype(np.int32)
        symbols[:: 50 + number] = 20_000
        encoder = SymbolEncoder()
        encoder.put(symbols, indexes)
        alpha = planes[number % 3]
        grey = number % 2 == 0
        mode = None if alpha is not None else ("1", "CMYK", "I;16", None)[number % 4]
        icc, exif, xmp = (texts[(number + shift) % 4] for shift in range(3))
        extras = Extras(alpha, mode, icc, exif, xmp)
        chunks = (*extras.chunks(), (100, b"unknown")) if number != 5 else ()
        fields = {"quality": number, "width": 20, "height": 16, "grey": grey, "chunks": chunks}
        files.append(write(containers.container(**fields, payload=encoder.payload())))
    return files


def mutated(random: np.random.Generator, seeds: Sequence[bytes]) -> bytes:
    """A changed seed: of four, one as it comes, one with a checksum that fits, and two with all of the frame intact."""
    seed, other = (seeds[random.integers(len(seeds))] for _ in range(2))
    if random.random() < 0.5:
        return forged(random, parse(seed), parse(other))
    # Half of the changes hit the header and the chunks, which are a small part of the bytes.
    data = damaged(random, seed, other, len(MAGIC), len(seed) if random.random() < 0.5 else min(len(seed), 60))
    return repaired(data) if random.random() < 0.5 else data


def damaged(random: np.random.Generator, data: bytes, other: bytes, first: int, last: int) -> bytes:
    """`data` with one to four changes that begin between `first` and `last`."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 5)):
        place = int(random.integers(first, max(last, first + 1)))
        length = int(random.integers(1, 9))
        kind = random.integers(8)
        if kind <= 1 and place < len(changed):
            changed[place] ^= 1 << int(random.integers(8))
        elif kind == 2:
            changed[place : place + 1] = bytes([random.choice((0, 1, 127, 128, 255, random.integers(256)))])
        elif kind == 3:
            changed[place : place + length] = random.bytes(length)
        elif kind == 4:
            del changed[place : place + length]
        elif kind == 5:
            changed[place:place] = random.bytes(length)
        elif kind == 6 and other:
            changed[place:] = other[int(random.integers(len(other))) :]
        else:
            del changed[place:]
    return bytes(changed)


def forged(random: np.random.Generator, file: Container, other: Container) -> bytes:
    """A file that parses, in which one field is damaged or another file's."""
    kind = random.integers(8)
    chunks = list(file.chunks)
    if kind <= 2 and chunks:
        place = int(random.integers(len(chunks)))
        tag, content = chunks[place]
        if random.random() < 0.2:
            tag = int(random.integers(1, 9))
        if random.random() < 0.9:
            content = damaged(random, content, other.payload, 0, min(len(content), 20))
        chunks[place] = (tag, content)
    changes: dict[str, Any] = {"chunks": tuple(chunks)}
    if kind == 3:
        changes["payload"] = damaged(random, file.payload, other.payload, 0, len(file.payload))
    elif kind == 4:
        changes["payload"] = other.payload
    elif kind == 5:
        sides = [int(2 ** random.uniform(0, 15)), int(2 ** random.uniform(0, 13))]
        changes["width"], changes["height"] = random.permutation(sides).tolist()
    elif kind == 6:
        changes["quality"] = int(random.integers(64))
    elif kind == 7:
        changes["grey"], changes["chunks"] = not file.grey, other.chunks
    try:
        return write(containers.changed(file, **changes))
    except ConfigError:  # two chunks of one kind
        return write(file)


def repaired(data: bytes) -> bytes:
    """The file with a checksum that fits."""
    body = data[len(MAGIC) : max(len(MAGIC), len(data) - 4)]
    return MAGIC + body + zlib.crc32(body).to_bytes(4, "little")


def read_layers(data: bytes, random: np.random.Generator) -> str:
    """Everything but the networks; returns what happened. Raises AssertionError for a result that is not sound."""
    seen = _attempt(lambda: peek(io.BytesIO(data)))
    if isinstance(seen, Container):
        _attempt(lambda: mode_of(seen))
    partial = _attempt(lambda: parse(data, partial=True))
    file = _attempt(lambda: parse(data))
    if not isinstance(file, Container):
        file_of_some_kind, outcome = partial, file
    else:
        assert file.version < VERSION or write(file) == data
        assert isinstance(seen, Container)
        assert replace(seen, payload=file.payload, chunks=file.chunks) == file
        file_of_some_kind, outcome = file, "sound"
    if not isinstance(file_of_some_kind, Container):
        return str(outcome)
    for step in (lambda: _check_extras(file_of_some_kind), lambda: _check_symbols(file_of_some_kind, random)):
        result = _attempt(step)
        outcome = result if isinstance(result, str) and outcome == "sound" else outcome
    return str(outcome)


def reader_of(codec: Codec) -> Read:
    """Everything, with the networks of `codec`."""

    def read(data: bytes, random: np.random.Generator) -> str:
        partial = bool(random.random() < 0.1)
        image = _attempt(lambda: codec.decode(data, partial=partial))
        if isinstance(image, str):
            return image
        file = parse(data, partial)
        assert (image.width, image.height) == (file.width, file.height)
        assert image.mode == mode_of(file)
        assert len(image.tobytes()) >= image.width * image.height // 8
        return "sound"

    return read


def _attempt(action: Callable[[], object]) -> object:
    """What `action` returns, or the name of the typed error that it raised."""
    try:
        return action()
    except HpcmrefError as error:
        return type(error).__name__


def _check_extras(file: Container) -> None:
    extras = extras_of(file)
    assert extras.alpha is None or extras.alpha.shape == (file.height, file.width)
    assert all(data is None or 0 < len(data) <= MAX_METADATA for data in (extras.icc, extras.exif, extras.xmp))


def _check_symbols(file: Container, random: np.random.Generator) -> None:
    count = min(file.width * file.height, MOST_SYMBOLS)
    decoder = SymbolDecoder(file.payload, count)
    for part in np.array_split(random.integers(0, 60, count), 3):
        symbols = decoder.get(part)
        assert symbols.shape == part.shape
        assert symbols.size == 0 or -(1 << 15) <= symbols.min() <= symbols.max() < 1 << 15


def fuzz(
    read: Read, seeds: Sequence[bytes], seed: int, mutations: int, seconds: float = float("inf")
) -> tuple[collections.Counter[str], float]:
    """How often each outcome was, and the seconds that the slowest file took.

    Raises AssertionError with the file for any outcome that should not be.
    """
    random = np.random.default_rng(seed)
    outcomes: collections.Counter[str] = collections.Counter()
    slowest, start = 0.0, time.monotonic()
    for _ in range(mutations):
        data = mutated(random, seeds)
        begin = time.monotonic()
        try:
            outcomes[read(data, random)] += 1
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error} by the file {data.hex()}") from error
        end = time.monotonic()
        slowest = max(slowest, end - begin)
        if end - start > seconds:
            break
    return outcomes, slowest


def options(description: str | None) -> argparse.ArgumentParser:
    """The options that every fuzzer has: how many inputs, for how long, and the seed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    return parser


def report(inputs: str, outcomes: collections.Counter[str], slowest: float, seconds: float) -> None:
    """Print how many inputs there were, how long they took, and what came of them."""
    print(f"{outcomes.total()} {inputs} in {seconds:.0f} s, the slowest {1000 * slowest:.0f} ms")
    for outcome, count in outcomes.most_common():
        print(f"{count:9d}  {outcome}")


def run(description: str | None, inputs: str, fuzz: Callable[..., tuple[collections.Counter[str], float]]) -> None:
    """The command line of a fuzzer without options of its own. fuzz takes seed, mutations and seconds."""
    arguments = options(description).parse_args()
    start = time.monotonic()
    outcomes, slowest = fuzz(seed=arguments.seed, mutations=arguments.mutations, seconds=arguments.seconds)
    report(inputs, outcomes, slowest, time.monotonic() - start)


def main() -> None:
    """Run from the command line."""
    parser = options(__doc__)
    parser.add_argument("--block", type=int, help="symbols between two looks of the range decoder at its payload")
    parser.add_argument("--codec", action="store_true", help="decode with the shipped model")
    arguments = parser.parse_args()
    if arguments.block:
        rangecoder._BLOCK = arguments.block
    read: Read = read_layers
    seeds = seeds_without_model()
    if arguments.codec:
        from hpcmref.codec import load

        codec = load(device="cpu")
        read, seeds = reader_of(codec), seeds_of(codec)
    start = time.monotonic()
    outcomes, slowest = fuzz(read, seeds, arguments.seed, arguments.mutations, arguments.seconds)
    report("mutations", outcomes, slowest, time.monotonic() - start)


def seeds_of(codec: Codec) -> list[bytes]:
    """Honest files of 64 x 64 pixels and less, of every mode, some with metadata."""
    import warnings

    from PIL import Image

    gradient = Image.merge("RGB", [Image.radial_gradient("L"), Image.linear_gradient("L"), Image.radial_gradient("L")])
    seeds = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, mode in enumerate(("RGB", "L", "RGBA", "LA", "1", "CMYK", "I;16")):
            image = gradient.resize((64 - 9 * number, 64 - 5 * number))
            if mode == "I;16":
                image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
            else:
                image = image.convert(mode)
            if mode.endswith("A"):
                image.putalpha(Image.radial_gradient("L").resize(image.size))
            if number % 2:
                image.info.update(icc_profile=bytes(range(200)), xmp=b"<x:xmpmeta/>")
            seeds.append(codec.encode(image, 9 * number))
    return seeds


if __name__ == "__main__":
    main()
