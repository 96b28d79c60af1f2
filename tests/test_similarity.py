"""Is MS-SSIM the measure that the field reports, and can a model learn from it?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpcmref.similarity import MS_SSIM_LEAST_SIDE, ms_ssim


def pictures(height: int, width: int) -> Tensor:
    """Two smooth images (2, 3, height, width) in 0..1."""
    coarse = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("size", [(MS_SSIM_LEAST_SIDE, MS_SSIM_LEAST_SIDE), (176, 203)])
@pytest.mark.parametrize("noise", [0.003, 0.1, 1.0])
def test_it_is_what_pytorch_msssim_computes(size: tuple[int, int], noise: float) -> None:
    reference = pytest.importorskip("pytorch_msssim").ms_ssim
    x = pictures(*size)
    y = (x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    found = ms_ssim(x, y)
    assert found.shape == (2,)
    torch.testing.assert_close(found, reference(x, y, data_range=1, size_average=False), rtol=0, atol=2e-6)
    negative = ms_ssim(x, 1 - x)
    torch.testing.assert_close(negative, reference(x, 1 - x, data_range=1, size_average=False), rtol=0, atol=2e-6)


def test_equal_images_are_alike_and_gradients_lead_to_them() -> None:
    x = pictures(161, 161)
    assert ms_ssim(x, x).tolist() == pytest.approx([1, 1], abs=1e-6)
    for y in (0.8 * x + 0.1, 1 - x):
        y = y.clone().requires_grad_()
        before = ms_ssim(x, y).sum()
        before.backward()
        assert y.grad is not None
        assert bool(y.grad.isfinite().all())
        with torch.no_grad():
            after = ms_ssim(x, y + 0.01 * y.grad / y.grad.abs().max().clamp(min=1e-20)).sum()
        assert after >= before
