"""Which of how many processes is this? What `torchrun` says of a run on many GPUs, or on one alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True)
class Ranks:
    """This process among `count`; `local` counts those of this machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the one process that logs, saves and exports."""
        return self.rank == 0

    def agree(self, number: float) -> float:
        """The number of the process that leads, in every process."""
        if self.count == 1:
            return number
        agreed = torch.tensor(number, dtype=torch.float64)
        distributed.broadcast(agreed, 0)
        return float(agreed)


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks of a run that `torchrun` started, connected to each other; one rank without it."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    ranks = Ranks(int(os.environ["RANK"]), count, int(os.environ.get("LOCAL_RANK", "0")))
    # What is agreed on lies on the CPU, so that no GPU has to wait for it.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield ranks
    finally:
        distributed.destroy_process_group()
