"""Detect that something has written into a network, by the version counters and a SHA-256 of its tensors.

If an operation overwrote a parameter by mistake, every file that the process encodes afterwards would be different, and
other processes could not decode it. So the codec checks its network before it returns a file.
"""

import hashlib

import torch
from torch import Tensor, nn

from hpcmref.errors import ModelChangedError


class Unchanged:
    """Remembers the state of a network, and raises ModelChangedError once it differs."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._tensors = _tensors(network)
        self._versions = self._read_versions()
        self.digest = digest(network)

    def check(self) -> None:
        """Compare PyTorch's version counters, which every in-place operation raises. This takes 0.02 ms for nano-1.

        Tensors that were made in inference mode have no counter. A network with such tensors is hashed each time.
        Raises ModelChangedError if a counter differs.
        """
        if self._versions is None:
            self._check_digest()
        elif self._versions != self._read_versions():
            raise ModelChangedError(_MESSAGE)

    def check_all(self) -> None:
        """As `check`, and also compare the SHA-256 of all parameters and buffers with that at construction.

        This also detects writes that did not go through PyTorch. It takes 14 ms for nano-1 on one core. Raises
        ModelChangedError if anything differs.
        """
        self.check()
        self._check_digest()

    def _check_digest(self) -> None:
        if self.digest != digest(self._network):
            raise ModelChangedError(_MESSAGE)

    def _read_versions(self) -> list[int] | None:
        if any(tensor.is_inference() for tensor in self._tensors.values()):
            return None
        return [tensor._version for tensor in self._tensors.values()]


def digest(network: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and contents of all parameters and buffers of a network, in hexadecimal."""
    found = hashlib.sha256()
    for name, tensor in _tensors(network).items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


_MESSAGE = (
    "the model in memory has changed while it was used, so other processes could not decode what it encodes: "
    "nothing was returned; please report this"
)
