"""Record a training step once as a CUDA graph and replay it, so that the GPU does not wait for the host.

A step has thousands of small kernels, and most of them work on lattices of a few positions. If the host launched them
one by one, the GPU would be idle most of the time.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

WARM_UP = 3
"""Steps before the recording: kernels are chosen and compiled, and memory is allocated."""


class Stepping(Protocol):
    """What a graph records: a trainer."""

    def plain_step(self, x: Tensor, quality: Tensor, skip: bool = False) -> Tensor:
        """One step on images (B, 3, H, W) and qualities (B,): values (4,). skip: the weights do not move."""


class StepGraph:
    """Forward, backward and update for one shape of batch. The learning rate must be a tensor on the GPU."""

    def __init__(self, trainer: Stepping, x: Tensor, quality: Tensor) -> None:
        """x: (B, 3, H, W), quality: (B,), of the shape that all steps have; the weights stay as they are."""
        self.x, self.quality = x.clone(memory_format=torch.preserve_format), quality.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                trainer.plain_step(self.x, self.quality, skip=True)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._values = trainer.plain_step(self.x, self.quality)

    def run(self, x: Tensor, quality: Tensor) -> Tensor:
        """One step: values (4,), see `Trainer.run_step`."""
        self.x.copy_(x)
        self.quality.copy_(quality)
        self._graph.replay()
        return self._values.clone()
