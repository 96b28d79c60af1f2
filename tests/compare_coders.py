"""Do both range coders do the same with mutated streams? Equal bytes, equal symbols, equal classes of errors.

python tests/compare_coders.py --mutations 2000000 --seed 3
"""

from __future__ import annotations

import argparse
import collections
import time

import numpy as np
from fuzz import damaged

from hpcmref.errors import HpcmrefError
from hpcmref.format import rangecoder, rans_builtin, rans_compressai
from hpcmref.format.rangecoder import SymbolDecoder, SymbolEncoder, scale_table

CODERS = (rans_compressai, rans_builtin)


def use(coder: object) -> None:
    """Make `coder` the one that SymbolEncoder and SymbolDecoder take."""
    rangecoder._coder = lambda: coder


def encoded(symbols: np.ndarray, indexes: np.ndarray) -> bytes:
    """The payload, which both coders must write alike."""
    payloads = []
    for coder in CODERS:
        use(coder)
        encoder = SymbolEncoder()
        encoder.put(symbols, indexes)
        payloads.append(encoder.finish())
    assert payloads[0] == payloads[1]
    return payloads[0]


def outcome(payload: bytes, indexes: np.ndarray) -> bytes | str:
    """The symbols, or the class of the error."""
    try:
        decoder = SymbolDecoder(payload, indexes.size)
        parts = [decoder.get(part).tobytes() for part in np.array_split(indexes, 2)]
        return b"".join(parts) + bytes([decoder.is_whole])
    except HpcmrefError as error:
        return type(error).__name__


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
        payload = encoded(symbols, indexes)
        for _ in range(min(50, mutations - counts.total())):
            changed = damaged(random, payload, other, 0, len(payload))
            found = []
            for coder in CODERS:
                use(coder)
                found.append(outcome(changed, indexes))
            assert found[0] == found[1], f"{changed.hex()} with {indexes.tolist()}: {found}"
            counts[found[0] if isinstance(found[0], str) else "symbols"] += 1
        other = payload
    return counts


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rangecoder._BLOCK = 16  # several looks at what is left of each payload
    start = time.monotonic()
    counts = compare(arguments.mutations, arguments.seed)
    print(f"{counts.total()} mutated streams in {time.monotonic() - start:.0f} s, no difference between the coders")
    for name, count in counts.most_common():
        print(f"{count:9d}  {name}")


if __name__ == "__main__":
    main()
