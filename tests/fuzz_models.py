"""Do hostile model files do harm? Mutates small models and loads what comes out.

    python tests/fuzz_models.py --mutations 10000 --seed 7

Most mutations get a fingerprint and a SHA-256 that fit, as whoever forges a file computes them. Anything but a typed
error or a model that codes a picture ends the run with the file's mutation.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from fuzz import damaged, run
from models import STATE, TINY, model_of
from PIL import Image

from hpcmref import checkpoints
from hpcmref.codec import Codec
from hpcmref.errors import HpcmrefError
from hpcmref.format import tensorfile
from hpcmref.model.config import MEMORY_BANKS

CODED = 0.03
"""Part of the models that load with which a picture is coded."""


def _nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


HOSTILE: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 8, 32, 64, 255, 2**15, 2**24, 2**31, 2**63, 10**9, 10**30, -(10**9)),
    *(0.0, 0.5, 1.5, -1.0, 1e-30, 1e30, math.inf, math.nan),
    *(True, False, None, "", "8", "elu", "state", "x" * 5000, "\ud800", [], {}, [1], [3, 2], [1, 2, 3], [[1, 1]]),
    *([[48, 1]], [10**9] * 3, [1] * 2000, {"mode": "light"}, {"a": {}}, _nested(50), _nested(900)),
)
"""Values for any place in the JSON."""


@dataclass
class Model:
    """The parts of a model file."""

    metadata: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def sealed(self) -> Model:
        """With a fingerprint and a checksum that fit, as far as there can be any."""
        try:
            self.metadata["fingerprint"] = checkpoints._fingerprint(self.metadata["config"], self.arrays, 2).hex()
            self.metadata["sha256"] = checkpoints._checksum(self.metadata, self.arrays)
        except Exception:
            pass  # what cannot be hashed is refused for another reason
        return self

    def file(self) -> bytes:
        """The bytes, with tensors in the order of their names."""
        header: dict[str, Any] = {"__metadata__": {"hpcmref": json.dumps(self.metadata)}}
        data = bytearray()
        for name in sorted(self.arrays):
            array = np.asarray(self.arrays[name], order="C")
            kind = next((key for key, each in tensorfile.DTYPES.items() if np.dtype(each) == array.dtype), "F64")
            offsets = [len(data), len(data) + array.nbytes]
            header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
            data += array.tobytes()
        return packed(header, bytes(data))


def packed(header: Any, data: bytes) -> bytes:
    """A file with any header."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def seeds(folder: Path) -> list[bytes]:
    """Small models: with attention, with a state, and with memory banks."""
    small = {"M": 16, "N": 8, "context_width": 16, "stages": ((16, 1),), "synthesis": ((16, 1),)}
    configurations = [replace(TINY, **small), replace(STATE, **small)]
    for name in ("light", "linear", "cross"):
        memory = replace(MEMORY_BANKS[name], num_heads=4, value_resolution=3)
        configurations.append(replace(TINY, **small, memory=memory))
    made = []
    tile = Image.radial_gradient("L").convert("RGB").resize((64, 64))
    with patch("hpcmref.checkpoints.tiles", return_value=[tile]):
        for number, config in enumerate(configurations):
            path = folder / f"seed-{number}.safetensors"
            checkpoints.save(model_of(config), path, "", {})
            made.append(path.read_bytes())
    return made


def model_in(data: bytes, folder: Path) -> Model:
    """The parts of an honest file."""
    path = folder / "seed.safetensors"
    path.write_bytes(data)
    with tensorfile.opened(path) as file:
        return Model(checkpoints._metadata(file), file.read())


def mutated(random: np.random.Generator, data: bytes, model: Model, other: bytes) -> bytes:
    """A changed file: its bytes, its header, its configuration, its metadata or its tensors."""
    kind = random.integers(8)
    if kind == 0:
        length = int.from_bytes(data[:8], "little")
        return damaged(random, data, other, 0, len(data) if random.random() < 0.3 else length)
    if kind == 1:
        return _another_header(random, data)
    changed = Model(copy.deepcopy(model.metadata), dict(model.arrays))
    for _ in range(random.integers(1, 3)):
        _CHANGES[kind](random, changed)
    return (changed.sealed() if random.random() < 0.9 else changed).file()


def _another_header(random: np.random.Generator, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = _one_of(random, sorted(header))
    place = header[name]
    key = _one_of(random, sorted(place))
    value = place[key]
    if isinstance(value, list) and value and random.random() < 0.7:
        value[random.integers(len(value))] = _one_of(random, HOSTILE)
    elif random.random() < 0.3:
        header[str(_one_of(random, HOSTILE))[:100]] = place
    else:
        place[key] = _one_of(random, (*HOSTILE, "F64", "I64", "BOOL", "F8_E4M3"))
    return packed(header, data[8 + length :])


def _configuration(random: np.random.Generator, model: Model) -> None:
    config = model.metadata["config"]
    if isinstance(config, dict):
        _change(random, config, [*config, "memory", "unknown"])


def _memory(random: np.random.Generator, model: Model) -> None:
    memory = model.metadata["config"].get("memory")
    if isinstance(memory, dict):
        _change(random, memory, [*memory, "width", "unknown"])
    else:
        model.metadata["config"]["memory"] = _one_of(random, HOSTILE)


def _metadata(random: np.random.Generator, model: Model) -> None:
    _change(random, model.metadata, [*model.metadata, "unknown"])


def _numbers(random: np.random.Generator, model: Model) -> None:
    """Extreme numbers in one tensor."""
    name = _one_of(random, sorted(model.arrays))
    array = model.arrays[name].copy()
    if array.dtype.kind == "f":
        value = _one_of(random, (np.nan, np.inf, -np.inf, 6e4, -6e4, 1e-7, 0.0, 1.0))
    else:
        bounds = np.iinfo(array.dtype)
        value = _one_of(random, (bounds.min, bounds.max, 0, 1, -1, 40, 41, -40, bounds.max // 2))
    flat = array.reshape(-1)
    flat[random.integers(flat.size) if random.random() < 0.5 else slice(None)] = value
    model.arrays[name] = array


def _tensors(random: np.random.Generator, model: Model) -> None:
    """A tensor that is missing, new, of another name, shape or type."""
    names = sorted(model.arrays)
    name = _one_of(random, names)
    array, kind = model.arrays[name], random.integers(5)
    if kind == 0:
        del model.arrays[name]
    elif kind == 1:
        model.arrays[f"{name}.{random.integers(9)}"] = array
    elif kind == 2:
        model.arrays[name] = array.reshape(-1)[: array.size // 2]
    elif kind == 3:
        with np.errstate(all="ignore"):
            model.arrays[name] = array.astype(_one_of(random, ("i1", "i2", "i4", "f2", "f4", "f8")))
    else:
        model.arrays[name] = np.zeros((0,) if random.random() < 0.5 else (1, *array.shape), array.dtype)


def _swapped(random: np.random.Generator, model: Model) -> None:
    """Two tensors in each other's place."""
    one, other = (_one_of(random, sorted(model.arrays)) for _ in range(2))
    model.arrays[one], model.arrays[other] = model.arrays[other], model.arrays[one]


_CHANGES: dict[int, Callable[[np.random.Generator, Model], None]] = {
    2: _configuration,
    3: _memory,
    4: _metadata,
    5: _numbers,
    6: _tensors,
    7: _swapped,
}


def _change(random: np.random.Generator, place: dict[str, Any], names: Sequence[str]) -> None:
    name = _one_of(random, names)
    value = place.get(name)
    if isinstance(value, list) and value and random.random() < 0.6:
        value[random.integers(len(value))] = _one_of(random, HOSTILE)
    elif random.random() < 0.1:
        place.pop(name, None)
    else:
        place[name] = _one_of(random, HOSTILE)


def _one_of(random: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[random.integers(len(values))]


def read(path: Path, random: np.random.Generator) -> str:
    """Everything that reads a model file; returns what happened."""
    image = Image.linear_gradient("L").resize((40, 30))
    with contextlib.suppress(HpcmrefError):
        checkpoints.info(path)
    try:
        codec = Codec(checkpoints.load(path), "fuzzed", torch.device("cpu"))
        if random.random() > CODED:
            return "loaded"
        decoded = codec.decode(codec.encode(image))
    except HpcmrefError as error:
        return type(error).__name__
    assert decoded.size == image.size
    return "coded"


def fuzz(seed: int, mutations: int, seconds: float = float("inf")) -> tuple[collections.Counter[str], float]:
    """How often each outcome was, and the seconds of the processor that the slowest file took.

    Raises AssertionError for any outcome that should not be; the file stays in the folder that it names.
    """
    random = np.random.default_rng(seed)
    outcomes: collections.Counter[str] = collections.Counter()
    slowest, start = 0.0, time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="hpcmref-fuzz-"))
    files = seeds(folder)
    models = [model_in(data, folder) for data in files]
    path = folder / "mutated.safetensors"
    for model in models:
        path.write_bytes(model.sealed().file())
        assert read(path, random) in ("loaded", "coded")
    for number in range(mutations):
        index, other = random.integers(len(files), size=2)
        path.write_bytes(mutated(random, files[index], models[index], files[other]))
        begin = time.process_time()
        try:
            outcomes[read(path, random)] += 1
        except Exception as error:
            raise AssertionError(
                f"{type(error).__name__}: {error} by {path}, mutation {number} of seed {seed}"
            ) from error
        slowest = max(slowest, time.process_time() - begin)
        if time.monotonic() - start > seconds:
            break
    for each in folder.iterdir():
        each.unlink()
    folder.rmdir()
    return outcomes, slowest


if __name__ == "__main__":
    run(__doc__, "model files", fuzz)
