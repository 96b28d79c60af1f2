"""Private and version-dependent names of torch, each with a fallback for versions that lack the name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


def has_int8_units() -> bool:
    """Whether torch reports that this CPU has int8 instructions (VNNI), and can use them.

    Uses torch.cpu._is_vnni_supported and torch._int_mm; False where either is missing.
    """
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return supported is not None and bool(supported()) and hasattr(torch, "_int_mm")


def has_bfloat16_units() -> bool:
    """Whether torch reports that this CPU has bfloat16 instructions. Without them bfloat16 is slower than float32.

    Uses torch.cpu._is_avx512_bf16_supported and _is_amx_tile_supported; False where both are missing.
    """
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def int_mm(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply two int8 matrices (n, C_in) and (C_in, C_out); the result is int32 (n, C_out).

    Uses torch._int_mm. Without it, the matrices are converted to int32, which is slow.
    """
    multiply = getattr(torch, "_int_mm", None)
    return multiply(x, weight) if multiply is not None else x.to(torch.int32) @ weight.to(torch.int32)


def lerp_all_(targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
    """Interpolate in place: target = target + weight (source - target), for each pair of tensors of one shape.

    Uses torch._foreach_lerp_. Without it, the tensors are processed one after the other.
    """
    lerp = getattr(torch, "_foreach_lerp_", None)
    if lerp is not None:
        lerp(list(targets), list(sources), weight)
        return
    for target, source in zip(targets, sources, strict=True):
        target.lerp_(source, weight)


def use_full_precision(undo: ExitStack) -> None:
    """Switch off TF32 and bfloat16 in float32 matrix products and convolutions.

    `undo` gets the callbacks that restore the settings. Uses fp32_precision in torch 2.9 and later, and
    torch.set_float32_matmul_precision in older versions.
    """
    backends: Any = torch.backends
    modes = (backends.cuda.matmul, *(getattr(backends.mkldnn, name, None) for name in ("matmul", "conv")))
    if not all(hasattr(mode, "fp32_precision") for mode in modes):
        undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        return
    for mode in modes:
        if mode.fp32_precision not in ("none", "ieee"):
            undo.callback(_set_precision, mode, mode.fp32_precision)
            mode.fp32_precision = "ieee"


@contextmanager
def matmul_in_bfloat16() -> Iterator[None]:
    """Let oneDNN round the inputs of float32 matrix products on CPUs to bfloat16, for the length of the context.

    Sums stay in float32. PyTorch 2.13 uses oneDNN for products without a bias, such as those of backward passes. Uses
    fp32_precision in torch 2.9 and later, and torch.set_float32_matmul_precision in older versions.
    """
    mode: Any = getattr(torch.backends.mkldnn, "matmul", None)
    with ExitStack() as undo:
        if hasattr(mode, "fp32_precision"):
            undo.callback(_set_precision, mode, mode.fp32_precision)
            mode.fp32_precision = "bf16"
        else:
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("medium")
        yield


def allow_tf32() -> None:
    """Let float32 matrix products and convolutions on GPUs round their inputs to TF32 (10 bits of mantissa).

    Uses fp32_precision in torch 2.9 and later, and allow_tf32 in older versions.
    """
    backends: Any = torch.backends
    for mode in (backends.cuda.matmul, backends.cudnn.conv if hasattr(backends.cudnn, "conv") else backends.cudnn):
        if hasattr(mode, "fp32_precision"):
            mode.fp32_precision = "tf32"
        else:
            mode.allow_tf32 = True


def _set_precision(mode: Any, precision: str) -> None:
    """Restore the precision of a mode. If the mode above it has the same precision, it is left unset ("none"), because
    reading a mode does not tell whether it was set itself.
    """
    mode.fp32_precision = "none"
    if mode.fp32_precision != precision:
        mode.fp32_precision = precision
