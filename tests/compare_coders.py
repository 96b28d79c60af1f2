"""Do both range coders do the same? Equal bytes, equal symbols, equal classes of errors.

python tests/compare_coders.py --mutations 2000000 --seed 18     mutated streams
python tests/compare_coders.py --files                           golden files, ten files cut at every byte, extremes
python tests/compare_coders.py --images FOLDER                   pictures at eight qualities, there and back
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import conformance
import numpy as np
from fuzz import damaged
from PIL import Image

from hpcmref import latents
from hpcmref.codec import load
from hpcmref.errors import HpcmrefError
from hpcmref.format import rangecoder, rans_builtin, rans_compressai
from hpcmref.format.rangecoder import SymbolDecoder, SymbolEncoder, scale_table

CODERS = (rans_compressai, rans_builtin)

Step = tuple[np.ndarray, np.ndarray]
"""Symbols and table indexes, as `SymbolEncoder.put` takes them."""


def use(coder: object) -> None:
    """Make `coder` the one that SymbolEncoder and SymbolDecoder take."""
    rangecoder._coder = lambda: coder


def encoded(steps: Sequence[Step]) -> bytes:
    """The payload, which both coders must write alike."""
    payloads = []
    for coder in CODERS:
        use(coder)
        encoder = SymbolEncoder()
        for symbols, indexes in steps:
            encoder.put(symbols, indexes)
        payloads.append(encoder.payload())
    assert payloads[0] == payloads[1]
    return payloads[0]


def decoded(payload: bytes, indexes: Sequence[np.ndarray]) -> bytes | str:
    """The symbols, or the class of the error, in which both coders must agree."""
    found: list[bytes | str] = []
    for coder in CODERS:
        use(coder)
        try:
            decoder = SymbolDecoder(payload, sum(part.size for part in indexes))
            parts = [decoder.get(part).tobytes() for part in indexes]
            found.append(b"".join(parts) + bytes([decoder.is_whole]))
        except HpcmrefError as error:
            found.append(type(error).__name__)
    assert found[0] == found[1], f"{payload.hex()} with {[part.tolist() for part in indexes]}: {found}"
    return found[0]


def there_and_back(steps: Sequence[Step]) -> bytes:
    """The payload of symbols, which both coders must write alike and decode to the symbols."""
    payload = encoded(steps)
    found = decoded(payload, [indexes for _, indexes in steps])
    assert isinstance(found, bytes)
    assert found[:-1] == b"".join(symbols.astype(np.int32).tobytes() for symbols, _ in steps)
    return payload


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[bytes, list[Step]]]]:
    """The payloads that LatentCodec reads or writes in this context, with their symbols and table indexes."""
    streams: list[tuple[bytes, list[Step]]] = []

    class Encoder(SymbolEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.steps: list[Step] = []

        def put(self, symbols: np.ndarray, indexes: np.ndarray) -> None:
            super().put(symbols, indexes)
            self.steps.append((symbols.copy(), indexes.copy()))

        def payload(self) -> bytes:
            streams.append((super().payload(), self.steps))
            return streams[-1][0]

    class Decoder(SymbolDecoder):
        def __init__(self, payload: bytes, count: int) -> None:
            super().__init__(payload, count)
            self.steps: list[Step] = []
            streams.append((payload, self.steps))

        def get(self, indexes: np.ndarray) -> np.ndarray:
            symbols = super().get(indexes)
            self.steps.append((symbols.copy(), indexes.copy()))
            return symbols

    latents.SymbolEncoder, latents.SymbolDecoder = Encoder, Decoder  # type: ignore[misc]
    try:
        yield streams
    finally:
        latents.SymbolEncoder, latents.SymbolDecoder = SymbolEncoder, SymbolDecoder  # type: ignore[misc]


def compare(mutations: int, seed: int) -> collections.Counter[str]:
    """How often each outcome was. Raises AssertionError with the payload where the coders differ."""
    random = np.random.default_rng(seed)
    counts: collections.Counter[str] = collections.Counter()
    other = random.bytes(64)
    while counts.total() < mutations:
        indexes = random.integers(0, 60, int(random.integers(1, 65)))
        spread = random.choice((0.3, 1, 1, 5))
        symbols = np.round(random.normal(size=indexes.size) * scale_table()[indexes] * spread).astype(np.int32)
        symbols[random.random(indexes.size) < 0.02] = random.integers(-(1 << 15), 1 << 15)
        payload = encoded([(symbols, indexes)])
        for _ in range(min(50, mutations - counts.total())):
            found = decoded(damaged(random, payload, other, 0, len(payload)), np.array_split(indexes, 2))
            counts[found if isinstance(found, str) else "symbols"] += 1
        other = payload
    return counts


def compare_golden() -> tuple[int, list[tuple[bytes, list[Step]]]]:
    """Their number, and their payloads with symbols; both coders must write those and decode them."""
    with recorded() as streams:
        for preset in json.loads(conformance.EXPECTED.read_text()):
            conformance.decoded(preset)
    for payload, steps in streams:
        assert there_and_back(steps) == payload
    return len(streams), streams


def compare_truncations(golden: Sequence[tuple[bytes, list[Step]]], files: int) -> collections.Counter[str]:
    """How often each outcome was, of golden payloads and those of small pictures, cut at every byte."""
    codec = load("nano", "cpu")
    with Image.open(conformance.FOLDER.parent / "sample.png") as sample, recorded() as streams:
        for number in range(files - len(golden)):
            place = 40 * number
            codec.encode(sample.crop((place, place, place + 64, place + 64)), 7 + 13 * number)
    counts: collections.Counter[str] = collections.Counter()
    for payload, steps in (*golden, *streams):
        for length in range(len(payload)):
            found = decoded(payload[:length], [indexes for _, indexes in steps])
            counts[found if isinstance(found, str) else "symbols"] += 1
    return counts


def compare_extremes() -> dict[str, int]:
    """Bytes of the payload of each."""
    random = np.random.default_rng(0)
    indexes = random.integers(0, 60, 20_000_000)
    many = np.round(random.normal(size=indexes.size) * scale_table()[indexes]).astype(np.int32)
    far = random.integers(-(1 << 15), 1 << 15, 1_000_000)
    nothing = np.zeros(0, np.int32)
    return {
        "no step": len(there_and_back([])),
        "three steps of no symbols": len(there_and_back([(nothing, nothing)] * 3)),
        "one symbol": len(there_and_back([(nothing, nothing), (np.array([5]), np.array([0]))])),
        "20 million symbols": len(there_and_back([(many, indexes)])),
        "a million symbols, nearly all of them escapes": len(there_and_back([(far, indexes[: far.size])])),
    }


def compare_images(folder: Path) -> tuple[int, int]:
    """Number of files and of symbols: all pictures of a folder at eight qualities, there and back."""
    codec, count, symbols = load("nano", "cpu"), 0, 0
    for path in sorted(folder.glob("*.png")):
        for quality in range(0, 64, 9):
            with recorded() as streams, Image.open(path) as image:
                codec.encode(image, quality)
            ((payload, steps),) = streams
            assert there_and_back(steps) == payload
            count, symbols = count + 1, symbols + sum(each.size for each, _ in steps)
    return count, symbols


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", action="store_true")
    parser.add_argument("--images", type=Path)
    arguments = parser.parse_args()
    if arguments.images:
        number, symbols = compare_images(arguments.images)
        print(f"{number} files of pictures with {symbols} symbols")
    if arguments.files:
        number, golden = compare_golden()
        print(f"{number} golden files")
        print("extremes, in bytes:", compare_extremes())
        rangecoder._BLOCK = 1024  # several looks at what is left of each payload
        counts = compare_truncations(golden, 10)
        print(f"{counts.total()} truncations of 10 files: {dict(counts.most_common())}")
    if arguments.mutations:
        rangecoder._BLOCK = 16
        start = time.monotonic()
        counts = compare(arguments.mutations, arguments.seed)
        print(f"{counts.total()} mutated streams in {time.monotonic() - start:.0f} s: {dict(counts.most_common())}")
    print("no difference between the coders")


if __name__ == "__main__":
    main()
