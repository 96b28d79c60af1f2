"""Make sure that PyTorch computes float32 sums exactly.

Modes of reduced precision are switched off while the entropy path runs, and known answers are checked first.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hpcmref.errors import UnsupportedError
from hpcmref.exact.layers import BOUNDS, depthwise
from hpcmref.runtime.torch_names import use_full_precision


@contextlib.contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Compute float32 convolutions and matrix products in full precision.

    The caller's settings are restored at the end. This context switches off autocast, the TF32 and bfloat16 modes, and
    cuDNN and NNPACK (which may choose Winograd or FFT). If the caller has called `torch.use_deterministic_algorithms`,
    PyTorch would refuse to use cuBLAS. That is switched off too, since exact sums do not depend on their order. The
    context may be nested, and several threads may enter it at once. Raises UnsupportedError if the process still does
    not compute exactly.
    """
    with torch.autocast(device.type, enabled=False), _EXACT.entered():
        check(str(device))
        yield


def repeatably(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Run the transforms on a GPU with kernels that give the same result each time.

    The caller's settings are restored at the end. This is needed because cuDNN's transposed convolutions may add up in
    an order that changes from run to run. On a CPU no setting is changed.
    """
    return _REPEATABLE.entered() if device.type == "cuda" else contextlib.nullcontext()


class _Switches:
    """Settings of the whole process that are changed while at least one thread needs them.

    When the last thread leaves, they are restored.
    """

    def __init__(self, switch: Callable[[contextlib.ExitStack], None]) -> None:
        """switch: a function that changes the settings and registers on the stack how to restore them."""
        self._switch = switch
        self._lock = threading.Lock()
        self._users = 0
        self._undo = contextlib.ExitStack()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                with contextlib.ExitStack() as undo:
                    self._switch(undo)
                    self._undo = undo.pop_all()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._undo.close()


def _make_exact(undo: contextlib.ExitStack) -> None:
    backends: Any = torch.backends
    undo.callback(setattr, backends.cudnn, "enabled", backends.cudnn.enabled)
    backends.cudnn.enabled = False
    undo.callback(backends.nnpack.set_flags, *backends.nnpack.set_flags(False))
    use_full_precision(undo)
    _allow_cublas(undo)


def _make_repeatable(undo: contextlib.ExitStack) -> None:
    cudnn: Any = torch.backends.cudnn
    for name, value in (("deterministic", True), ("benchmark", False)):
        undo.callback(setattr, cudnn, name, getattr(cudnn, name))
        setattr(cudnn, name, value)
    _allow_cublas(undo)


def _allow_cublas(undo: contextlib.ExitStack) -> None:
    """Switch PyTorch's deterministic algorithms off, if the caller has switched them on.

    With them, PyTorch refuses matrix products on a GPU.
    """
    if torch.are_deterministic_algorithms_enabled():
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        undo.callback(torch.use_deterministic_algorithms, True, warn_only=warn_only)
        torch.use_deterministic_algorithms(False)


_EXACT, _REPEATABLE = _Switches(_make_exact), _Switches(_make_repeatable)


@lru_cache(maxsize=4)
def check(device: str) -> None:
    """Compare the operations of exact layers with answers that NumPy computes, once per process and device.

    Raises UnsupportedError if a result differs. The cause is then a mode of reduced precision or a transforming
    algorithm that this process cannot switch off (one set by ONEDNN_DEFAULT_FPMATH_MODE, for instance).
    """
    results = (*_sums(torch.float32, device), *_sums(torch.float64, device), *_operations(device))
    wrong = [name for name, same in results if not same]
    if wrong:
        raise UnsupportedError(
            f"this process does not compute exactly ({', '.join(wrong)}), so its files could not be decoded elsewhere: "
            "unset ONEDNN_DEFAULT_FPMATH_MODE, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE and the like"
        )


def _sums(dtype: torch.dtype, device: str) -> Iterator[tuple[str, bool]]:
    """Convolutions and matrix products whose sums come close to the bound of `dtype`.

    Some terms have many bits and some have few. Yields a name and whether the result is right.
    """
    random = np.random.RandomState(0)
    bound = BOUNDS[dtype].bit_length() - 1

    def integers(bits: Any, *shape: int) -> NDArray[Any]:
        """Integers of so many bits as float64 (exact below 2^53); positive in the first half of the first dimension."""
        lowest = 2.0 ** (np.asarray(bits) - 1)
        magnitudes = lowest + np.floor(random.random_sample(shape) * lowest)
        negative = random.random_sample(shape) < 0.3
        negative[: shape[0] // 2] = False
        return np.where(negative, -magnitudes, magnitudes)

    def tensor(values: NDArray[Any]) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def same(result: Tensor, expected: NDArray[Any]) -> bool:
        return np.array_equal(result.cpu().numpy().reshape(expected.shape), expected)

    # Channels have 1 to 14 bits, and weights have the more bits the fewer their channel has, as in calibrated layers.
    # Terms have 8 bits fewer than the bound, which leaves room for 256 of them.
    bits = np.arange(256) % 14 + 1
    x = integers(bits[:, None, None], 256, 10, 16)
    image = tensor(x)[None]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (1, 3, 3))[:, :, :, 0]

    w = integers(bound - 8 - bits, 96, 256)
    mixed, pointwise = np.tensordot(w, x, 1), tensor(w)[:, :, None, None]
    yield f"{dtype} 1x1", same(F.conv2d(image, pointwise), mixed)
    last = image.contiguous(memory_format=torch.channels_last)
    yield f"{dtype} 1x1, channels last", same(F.conv2d(last, pointwise), mixed)

    w = integers(bound - 8 - bits[:28, None, None], 32, 28, 3, 3)
    full = np.tensordot(w, patches[:28], ((1, 2, 3), (0, 3, 4)))
    yield f"{dtype} 3x3", same(F.conv2d(image[:, :28], tensor(w), padding=1), full)

    w = integers(bound - 4 - bits[:, None, None, None], 256, 1, 3, 3)
    each = np.einsum("chwrs,crs->chw", patches, w[:, 0])
    yield f"{dtype} depthwise", same(depthwise(image, tensor(w), image.new_zeros(256)), each)

    w = integers(bound - 8 - bits[:, None, None, None], 256, 32, 2, 2)
    doubled = np.tensordot(w, x, ((0,), (0,))).transpose(0, 3, 1, 4, 2)  # channel, row, phase, column, phase
    yield f"{dtype} transposed", same(F.conv_transpose2d(image, tensor(w), stride=2), doubled)

    query, key = integers(8, 24, 64, 48), integers(bound - 14, 24, 48, 64)
    yield f"{dtype} product", same(tensor(query) @ tensor(key), query @ key)


def _operations(device: str) -> Iterator[tuple[str, bool]]:
    """Single operations whose results IEEE 754 prescribes, on numbers that need rounding.

    Yields a name and whether the result is right.
    """
    random = np.random.RandomState(1)
    a, b = (random.uniform(-1000, 1000, 4096).astype(np.float32) for _ in range(2))
    halves = (np.arange(-2048, 2048) + 0.5).astype(np.float32)
    x, y = torch.tensor(a, device=device), torch.tensor(b, device=device)
    whole = random.randint(-(2**31), 2**31, 4096).astype(np.int32)
    fine = np.abs(a).astype(np.float64) / 3
    results = {
        "addition": (x + y, a + b),
        "subtraction": (x - y, a - b),
        "multiplication": (x * y, a * b),
        "division": (x / y, a / b),
        "rounding": (torch.tensor(halves, device=device).round_(), np.rint(halves)),
        "LeakyReLU": (F.leaky_relu(x, 0.01), np.where(a > 0, a, a * np.float32(0.01))),
        "float64 division": (torch.tensor(fine, device=device) / y, fine / b),
        "int32 to float32": (torch.tensor(whole, device=device).float(), whole.astype(np.float32)),
    }
    for name, (result, expected) in results.items():
        yield name, np.array_equal(result.cpu().numpy(), expected)
