"""Latents there and back in exact arithmetic, and what watches how a model computes."""

from __future__ import annotations

from typing import Any

import torch
from models import latents_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hpcmref.exact import attach, calibrate
from hpcmref.exact.convert import Grids
from hpcmref.latents import LatentCodec
from hpcmref.model import HPCM
from hpcmref.model.coders import SymbolWriter, _Target
from hpcmref.model.hpcm import EntropyPath
from hpcmref.model.schedule import Step
from research.exactness_matrix import Configuration

CPU = torch.device("cpu")

OTHERS = (
    Configuration(
        "an old machine",
        {
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "MKL_CBWR": "COMPATIBLE",
            "OMP_NUM_THREADS": "1",
        },
    ),
    Configuration(
        "a machine with AVX2",
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
        "batch",
    ),
    Configuration("bfloat16 by default", {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}, "medium precision"),
)
"""Other machines, as processes that compute otherwise."""

SYNCHRONISING = {
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",  # which indexing with a boolean mask calls
    "aten::equal",
    "aten::_unique2",
    "aten::lift_fresh",  # of torch.tensor, which copies from the host
}
"""Operations that make the host wait for the device."""


def calibrated(model: HPCM, size: tuple[int, int] = (1, 2)) -> Grids:
    y, z = latents_of(model, 2, size)

    def run() -> None:
        for quality in {0.0, float(model.config.qualities - 1)}:
            model.entropy(torch.full((2,), quality), size, SymbolWriter(y, z, torch.empty(0), []))

    return calibrate(model.entropy, run)


def there_and_back(entropy: EntropyPath, y: Tensor, z: Tensor, quality: int = 20) -> tuple[list[bytes], Tensor, Tensor]:
    """Payloads of a batch of latents, and y_hat of the writer and of the reader, without the sign of zeros."""
    codec = LatentCodec(entropy, CPU)
    compressed = codec.compress(y, z, quality)
    read = codec.decompress(compressed.payloads, compressed.checksums, (z.shape[2], z.shape[3]), quality)
    codec.unchanged.check_all()
    return compressed.payloads, compressed.y_hat + 0.0, read + 0.0


def exact_after_checks(model: HPCM, size: tuple[int, int]) -> tuple[EntropyPath, Tensor]:
    """The exact entropy path of a model, and how far its y_hat is from that of the float model, on the average.

    On the way it is checked that two images are read as they were written, bit for bit, and that the second is written
    alike alone and on another number of threads.
    """
    exact = attach(model.entropy, calibrated(model, size)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = {name: tensor.clone() for name, tensor in exact.state_dict().items()}
    y, z = latents_of(model, 2, size)
    payloads, written, read = there_and_back(exact, y, z)
    assert torch.equal(written.view(torch.int32), read.view(torch.int32))
    before = torch.get_num_threads()
    torch.set_num_threads(4 - before)
    try:
        (payload,), alone, _ = there_and_back(exact, y[1:], z[1:])
    finally:
        torch.set_num_threads(before)
    assert payload == payloads[1]
    assert torch.equal(alone[0].view(torch.int32), written[1].view(torch.int32))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in exact.state_dict().items())
    with torch.inference_mode():
        approximate = model.entropy(torch.full((2,), 20.0), size, SymbolWriter(y, z, torch.empty(0), []))
    return exact, (written - approximate).abs().mean()


class Recorder:
    """A coder that codes nothing: every latent is what `latents` says, and the predictions are kept."""

    def __init__(self, y: Tensor, z: Tensor) -> None:
        self._target = _Target(y, z)
        self.predicted: list[tuple[Tensor, Tensor]] = []

    def code(self, step: Step | None, scales: Tensor, means: Tensor) -> Tensor:
        self.predicted.append((scales, means))
        return self._target.of(step)


class Operations(TorchDispatchMode):
    """Keeps the names of all operations; the profiler does the same, a hundred times slower."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.name().split(".")[0])
        return function(*args, **(kwargs or {}))
