"""Does this process compute what it is asked for? Switches reduced precision off, and checks known answers."""

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from hpcmref.errors import UnsupportedError


@contextlib.contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Run float32 convolutions and products as such, whatever the caller has set; restores the caller's settings.

    Off: autocast, TF32 and bfloat16 modes, cuDNN (which may choose Winograd or FFT). Raises UnsupportedError if the
    process computes something else all the same.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(_full_precision())
        check(device.type)
        yield


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """float32 means float32, in matrix products and convolutions of every backend."""
    backends: Any = torch.backends
    new = hasattr(backends.mkldnn, "matmul")  # torch 2.9 and later
    modes = [backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv] if new else []
    before = [mode.fp32_precision for mode in modes]
    if not modes:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    for mode in modes:
        mode.fp32_precision = "ieee"
    try:
        yield
    finally:
        for mode, value in zip(modes, before, strict=True):
            mode.fp32_precision = value
        if not modes:
            torch.set_float32_matmul_precision(precision)


@lru_cache(maxsize=4)
def check(device: str) -> None:
    """Compare convolutions and products of large integers with answers computed in integers, once per process.

    Raises UnsupportedError if one differs: a mode of reduced precision or a transforming algorithm that cannot be
    switched off from here (ONEDNN_DEFAULT_FPMATH_MODE, for instance).
    """
    random = np.random.RandomState(0)

    def integers(limit: int, *shape: int) -> np.ndarray:
        return random.randint(-limit, limit + 1, shape).astype(np.float64)  # whose sums are exact below 2^53

    def differs(result: torch.Tensor, expected: np.ndarray) -> bool:
        return not np.array_equal(result.double().cpu().numpy().reshape(expected.shape), expected)

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    x, w = integers(511, 1, 256, 16, 24), integers(127, 192, 256)
    image, pointwise = tensor(x).contiguous(memory_format=torch.channels_last), tensor(w)
    padded = np.pad(x[0], ((0, 0), (1, 1), (1, 1)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (1, 3, 3))[:, :, :, 0]
    depthwise, full = integers(999, 256, 3, 3), integers(127, 32, 64, 3, 3)
    doubling = integers(127, 256, 32, 2, 2)
    query, key = integers(511, 24, 64, 48), integers(511, 24, 48, 64)
    mixed = np.tensordot(w, x[0], 1)
    doubled = np.tensordot(doubling, x[0], ((0,), (0,))).transpose(0, 3, 1, 4, 2)  # channel, row, phase, column, phase
    wrong = [
        differs(F.conv2d(image, pointwise[:, :, None, None]), mixed),
        differs(F.conv2d(image.contiguous(), pointwise[:, :, None, None]), mixed),
        differs(
            F.conv2d(image, tensor(depthwise)[:, None], padding=1, groups=256),
            np.einsum("chwrs,crs->chw", patches, depthwise),
        ),
        differs(
            F.conv2d(image[:, :64], tensor(full), padding=1),
            np.tensordot(full, patches[:64], ((1, 2, 3), (0, 3, 4))),
        ),
        differs(F.conv_transpose2d(image, tensor(doubling), stride=2), doubled),
        differs(tensor(query) @ tensor(key), query @ key),
    ]
    if any(wrong):
        raise UnsupportedError(
            "this process does not compute float32 convolutions exactly, so its files could not be decoded elsewhere: "
            "unset ONEDNN_DEFAULT_FPMATH_MODE, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE and the like"
        )
