"""Golden files of exact arithmetic: for every preset a file, and what its y_hat is, for ever.

    python tests/conformance.py nano-2      writes the golden file of a new shipped model
    python tests/conformance.py light ...   writes others again, which is a break of the format

The files of shipped models are pictures, coded with their weights. The other presets have the weights of `weights_of`,
which follow from their names alone, and stored grids; their files hold made-up latents. So nothing in them depends on
the floating point of the machine that wrote them.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from containers import learned_of
from PIL import Image
from torch import Tensor

from hpcmref import checkpoints
from hpcmref.codec import load
from hpcmref.exact import attach, calibrate
from hpcmref.exact.convert import Grids
from hpcmref.format import container
from hpcmref.latents import ARITHMETIC, LatentCodec, thresholds
from hpcmref.model import PRESETS, HPCMConfig
from hpcmref.model.coders import SymbolWriter
from hpcmref.model.hpcm import EntropyPath
from research.exactness_matrix import latents_of

FOLDER = Path(__file__).parent / "data" / "conformance"
EXPECTED = FOLDER / "expected.json"
_LIGHT = dataclasses.replace(
    PRESETS["light"], M=192, N=128, context_width=384, prior_s1_s2=(2, 1), prior_s3=(2, 1), heads=16, memory=None
)
SHIPPED = tuple(info.name for info in checkpoints.shipped())
CONFIGS = {**PRESETS, "light": _LIGHT}
"""The shapes that the golden files were written with; the preset light has another one now."""
SIZES = {"light": (2, 3), "base": (1, 2), "large": (1, 2), "phi": (1, 2)}
"""Rows and columns of z. With (1, 2) attention has windows that reach over the edge."""


def decoded(preset: str) -> dict[str, str]:
    """What the golden file of a shipped model or a preset decodes to: CRC-32 of symbols and of the bits of y_hat."""
    file = (FOLDER / f"{preset}.bin").read_bytes()
    if preset in SHIPPED:
        codec = load(preset, "cpu").latents
    else:
        codec, made = made_up_codec(preset)
        assert learned_of(container.parse(file)).fingerprint == made, "weights_of has changed"
    ((symbols, y_hat),) = latents_of(codec, [file])
    return {"symbols": f"{symbols:08x}", "y_hat": f"{y_hat:08x}"}


@lru_cache(maxsize=1)  # the presets are large, and one is used at a time
def made_up_codec(preset: str) -> tuple[LatentCodec, bytes]:
    """The latent codec of a preset's made-up weights, and their fingerprint."""
    path = weights_of(CONFIGS[preset])
    return exact_codec(preset, path), fingerprint(path)


def exact_codec(preset: str, path: EntropyPath) -> LatentCodec:
    """The latent codec of made-up weights with their stored grids."""
    return LatentCodec(attach(path, stored_grids(preset, path)), torch.device("cpu"))


def noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers from -1 to 1 that depend on a name: the legacy MT19937 stream, frozen by NumPy's policy."""
    return 2 * np.random.RandomState(zlib.crc32(name.encode())).random_sample(shape) - 1


def weights_of(config: HPCMConfig) -> EntropyPath:
    """An entropy path whose weights are + - * / and sqrt of `noise`, in float64, rounded to float32."""
    with torch.device("meta"):
        path = EntropyPath(config)
    state = {name: _parameter(name, tuple(tensor.shape), config) for name, tensor in path.state_dict().items()}
    path.load_state_dict(state, assign=True)
    return path.eval()


def _parameter(name: str, shape: tuple[int, ...], config: HPCMConfig) -> Tensor:
    values = noise(name, shape)
    layer, kind = name.rsplit(".", 1)
    is_head = re.fullmatch(r"context\.prior_s\w+\.branch_2\.\d+", layer) is not None
    if kind == "weight":
        transposed = layer.startswith("h_s.") and layer.count(".") == 1
        fan_in = shape[0] if transposed else shape[1] * shape[2] * shape[3]
        gain = 0.1 if layer.endswith("project") else 0.5
        values = values * np.sqrt(3 * gain / fan_in)
    elif kind == "bias":
        values = 0.1 * values
        if is_head:
            values[: config.M] = 2 + 15 * values[: config.M]  # scales from 0.5 to 3.5, before what depends on the input
    elif "quant_steps" in name:
        values = 1 + 0.2 * values
    elif "scales_hyper" in name:
        values = 1.5 + values
    return torch.from_numpy(values.astype(np.float32))


def fingerprint(path: EntropyPath) -> bytes:
    """CRC-32 of all weights, in the order of their names."""
    crc = 0
    for _, tensor in sorted(path.state_dict().items()):
        crc = zlib.crc32(tensor.numpy().astype("<f4", copy=False).tobytes(), crc)
    return crc.to_bytes(4, "big")


def latents(preset: str, config: HPCMConfig) -> tuple[Tensor, Tensor]:
    """Made-up y and z."""
    rows, columns = SIZES[preset]
    y = 8 * noise(f"{preset} y", (1, config.M, 4 * rows, 4 * columns)) ** 3
    z = 4 * noise(f"{preset} z", (1, config.N, rows, columns)) ** 3
    return torch.from_numpy(y.astype(np.float32)), torch.from_numpy(z.astype(np.float32))


def stored_grids(preset: str, path: EntropyPath) -> Grids:
    """The grids that `store_grids` wrote: all exponents in one array and all limits in another."""
    with np.load(FOLDER / f"{preset}.grids.npz") as arrays:
        exponents, limits = (torch.from_numpy(arrays[name]) for name in ("exponents", "limits"))
    grids: Grids = {}
    for module, names in _sizes(path).items():
        *sizes, limit_size = names.values()
        parts = exponents.split([*sizes, len(exponents) - sum(sizes)])
        exponents, here, limits = parts[-1], limits[:limit_size], limits[limit_size:]
        grids[module] = dict(zip(names, (*parts[:-1], here.squeeze() if limit_size == 1 else here), strict=True))
    return grids


def store_grids(preset: str, path: EntropyPath, grids: Grids) -> None:
    """See `stored_grids`."""
    names = [(module, name) for module, each in _sizes(path).items() for name in each]
    exponents = [grids[module][name].numpy() for module, name in names if not name.startswith("limit")]
    limits = [grids[module][name].numpy().reshape(-1) for module, name in names if name.startswith("limit")]
    np.savez_compressed(
        FOLDER / f"{preset}.grids.npz", exponents=np.concatenate(exponents), limits=np.concatenate(limits)
    )


def _sizes(path: EntropyPath) -> dict[str, dict[str, int]]:
    """Module -> grid -> number of integers, limits last."""
    sizes: dict[str, dict[str, int]] = {}
    for name, module in sorted(path.named_modules()):
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            sizes[name] = {"input": module.in_channels, "output": module.out_channels, "limit": 1}
        elif name.endswith(".attend"):
            channels = path.get_submodule(name.removesuffix("attend") + "conv_q").out_channels
            sizes[name] = {"query": channels, "key": channels, "value": channels, "limits": 2}
    return sizes


def write(preset: str) -> None:
    """Write the golden file of a shipped model or a preset, and what it decodes to."""
    FOLDER.mkdir(exist_ok=True)
    if preset in SHIPPED:
        with Image.open(FOLDER.parent / "sample.png") as sample:
            data = load(preset, "cpu").encode(sample.convert("RGB").crop((120, 40, 216, 104)), 40)
    else:
        data = _made_up(preset)
    (FOLDER / f"{preset}.bin").write_bytes(data)
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    expected[preset] = decoded(preset)
    EXPECTED.write_text(json.dumps(dict(sorted(expected.items())), indent=2) + "\n")
    print(preset, expected[preset], len(data), "bytes")


def made_up_quality(config: HPCMConfig) -> int:
    return 37 if config.lambdas else 0


def _made_up(preset: str) -> bytes:
    config = CONFIGS[preset]
    path, (y, z) = weights_of(config), latents(preset, config)
    quality = made_up_quality(config)

    def run() -> None:
        path(torch.tensor([float(quality)]), SIZES[preset], SymbolWriter(y, z, thresholds(), []))

    store_grids(preset, path, calibrate(path, run))
    compressed = exact_codec(preset, path).compress(y, z, quality)
    rows, columns = SIZES[preset]
    learned = container.Learned(ARITHMETIC, fingerprint(path), quality, compressed.checksums[0])
    return container.write(
        container.Container(
            width=64 * columns, height=64 * rows, grey=False, learned=learned, payload=compressed.payloads[0]
        )
    )


if __name__ == "__main__":
    for each in sys.argv[1:]:
        write(each)
