"""Private and version-dependent names of torch, each with a fallback for versions that lack the name."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
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
    """The matrix product, int32 (n, C_out), of int8 (n, C_in) and int8 (C_in, C_out).

    Uses torch._int_mm; without it an int32 product, which is slow.
    """
    multiply = getattr(torch, "_int_mm", None)
    return multiply(x, weight) if multiply is not None else x.to(torch.int32) @ weight.to(torch.int32)


def lerp_all_(targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
    """Move each target in place by `weight` of its way to its source.

    Uses torch._foreach_lerp_; without it one tensor after the other.
    """
    lerp = getattr(torch, "_foreach_lerp_", None)
    if lerp is not None:
        lerp(list(targets), list(sources), weight)
        return
    for target, source in zip(targets, sources, strict=True):
        target.lerp_(source, weight)


def use_full_precision(undo: ExitStack) -> None:
    """Switch off TF32 and bfloat16 in float32 products and convolutions; `undo` gets what restores the settings.

    Uses the fp32_precision of torch 2.9 and later; before, torch.set_float32_matmul_precision.
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


def allow_tf32() -> None:
    """Let float32 products and convolutions on GPUs of this process round their inputs to TF32 (10 bits).

    Uses the fp32_precision of torch 2.9 and later; before, allow_tf32.
    """
    backends: Any = torch.backends
    for mode in (backends.cuda.matmul, backends.cudnn.conv if hasattr(backends.cudnn, "conv") else backends.cudnn):
        if hasattr(mode, "fp32_precision"):
            mode.fp32_precision = "tf32"
        else:
            mode.allow_tf32 = True


def _set_precision(mode: Any, precision: str) -> None:
    """Set a mode as it was, and leave it unset where the mode above it says the same (reading does not tell which)."""
    mode.fp32_precision = "none"
    if mode.fp32_precision != precision:
        mode.fp32_precision = precision
