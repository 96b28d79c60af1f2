"""The coders, which process the latents of one step: they estimate the bits, write the symbols, or read them.

The context model (`context.py`) calls a coder at every step. It is the same code for all coders.
"""

import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpcmref.model.entropy import likelihood, quantise, scale_index
from hpcmref.model.schedule import Step, lattices


class Coder(Protocol):
    """Codes the latents of one step."""

    def code(self, step: Step | None, scales: Tensor, means: Tensor) -> Tensor:
        """The quantised latents of `step` (None is the hyper latent z), given its scales and means.

        scales, means: (B, C/G, h, w), for z (B, N, h, w); the result has that shape.
        """


class SymbolSink(Protocol):
    """Takes the symbols of one image: a range encoder."""

    def put(self, symbols: NDArray[np.int32], indexes: NDArray[np.int32]) -> None:
        """symbols and CDF table rows, both (n,) int32."""


class SymbolSource(Protocol):
    """Gives the symbols of one image: a range decoder."""

    def get(self, indexes: NDArray[np.int32]) -> NDArray[np.int32]:
        """The symbols (n,) int32 of the CDF table rows (n,) int32."""


Part = tuple[Step | None, Tensor, Tensor]
"""One coded step (None for z), its symbols (int16) and their rows of the CDF table (uint8), both (B, C/G, h, w)."""


class _Target:
    """The true latents, from which it selects those that a step codes."""

    def __init__(self, y: Tensor, z: Tensor, masked: bool = False) -> None:
        """masked: see `schedule`."""
        self._planes = lattices(y, masked)
        self._z = z
        self._masked = masked

    def of(self, step: Step | None) -> Tensor:
        return self._z if step is None else step.select(self._planes[step.scale], self._masked)


class Estimator:
    """Quantises the true latents and computes their likelihoods, for training and evaluation.

    With `noise` (training), the likelihoods are those of the residual plus uniform noise, and the gradient of rounding
    is 1 (straight-through). Without it, they are those of the rounded residual. y: (B, M, H, W), z: (B, N, H/4, W/4).
    """

    def __init__(self, y: Tensor, z: Tensor, noise: bool) -> None:
        self._target = _Target(y, z, masked=noise)
        self._noise = noise
        self._samples: list[Tensor] = []
        self._scales: list[Tensor] = []

    def code(self, step: Step | None, scales: Tensor, means: Tensor) -> Tensor:
        """See Coder. Gradients reach y, z, scales and means."""
        residual = self._target.of(step) - means
        symbols = quantise(residual.detach())
        if self._noise:
            sample = residual + torch.empty_like(residual).uniform_(-0.5, 0.5)
            symbols = residual + (symbols - residual).detach()
        else:
            sample = symbols
        self._samples.append(sample.flatten(1))
        self._scales.append(scales.flatten(1))
        return symbols + means

    @property
    def z_likelihoods(self) -> Tensor:
        """(B, elements of z), in coding order."""
        return likelihood(self._samples[0], self._scales[0])

    @property
    def y_likelihoods(self) -> Tensor:
        """(B, elements of y), in coding order."""
        return likelihood(torch.cat(self._samples[1:], dim=1), torch.cat(self._scales[1:], dim=1))


class _Checksummed:
    """Computes the CRC-32 of the coded symbols of each image, as little-endian 16-bit numbers in coding order.

    checksums: one dictionary for each image. Its entry 1, 2 or 3 covers z and all steps up to the end of that scale.
    """

    def __init__(self, batch: int) -> None:
        self.checksums: list[dict[int, int]] = [{} for _ in range(batch)]
        self._running = [0] * batch

    def _add(self, image: int, step: Step | None, symbols: NDArray[np.int32]) -> None:
        crc = zlib.crc32(symbols.astype("<i2").tobytes(), self._running[image])
        self._running[image] = crc
        if step is not None:
            self.checksums[image][step.scale] = crc


class SymbolWriter(_Checksummed):
    """Quantises the true latents. `flush` passes the symbols to the range encoders, one for each image.

    Until then the symbols stay on the device, so that a GPU need not wait for the host at every step.
    """

    def __init__(self, y: Tensor, z: Tensor, thresholds: Tensor, sinks: Sequence[SymbolSink]) -> None:
        super().__init__(len(sinks))
        self._target = _Target(y, z)
        self._thresholds = thresholds
        self._sinks = sinks
        self._parts: list[Part] = []

    def code(self, step: Step | None, scales: Tensor, means: Tensor) -> Tensor:
        """See Coder."""
        symbols = quantise(self._target.of(step) - means)
        rows = scale_index(scales, self._thresholds)
        self._parts.append((step, symbols.to(torch.int16), rows.to(torch.uint8)))
        return symbols + means

    def flush(self) -> list[Part]:
        """After the last step: pass all symbols to the range encoders, and return them."""
        for step, symbols, rows in self._parts:
            for image, sink in enumerate(self._sinks):
                flat = _flat(symbols[image])
                self._add(image, step, flat)
                sink.put(flat, _flat(rows[image]))
        parts, self._parts = self._parts, []
        return parts


class SymbolReader(_Checksummed):
    """Reads the symbols from range decoders, one for each image, up to the end of the scale `upto`.

    The latents of later scales are set to their predicted means.
    """

    def __init__(self, thresholds: Tensor, sources: Sequence[SymbolSource], upto: int = 3) -> None:
        super().__init__(len(sources))
        self._thresholds = thresholds
        self._sources = sources
        self._upto = upto

    def code(self, step: Step | None, scales: Tensor, means: Tensor) -> Tensor:
        """See Coder."""
        if step is not None and step.scale > self._upto:
            return means
        rows = scale_index(scales, self._thresholds)
        images = []
        for image, source in enumerate(self._sources):
            flat = source.get(_flat(rows[image]))
            self._add(image, step, flat)
            images.append(torch.from_numpy(flat))
        return torch.stack(images).view(means.shape).to(means) + means


def _flat(x: Tensor) -> NDArray[np.int32]:
    return x.to("cpu", torch.int32).numpy().reshape(-1)
