"""Does an image in strips come out as the whole one does, without seams?"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from coding import calibrated, there_and_back
from models import TINY, in_few_rows, latents_of, model_of, psnr
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hpcmref.codec import Codec
from hpcmref.exact import attach
from hpcmref.model.coders import Estimator
from hpcmref.model.config import PRESETS
from hpcmref.model.strips import in_strips
from hpcmref.model.transforms import halo, hyper_halo

TRANSFORMS = {
    "nano": TINY,
    "light": dataclasses.replace(
        PRESETS["light"], M=24, N=16, stages=((24, 4),), synthesis=((24, 6),), context_width=24, heads=4
    ),
    "base": dataclasses.replace(
        PRESETS["base"], M=16, N=8, stages=((8, 2), (8, 2), (12, 4)), synthesis=((12, 4), (8, 2), (8, 2)),
        context_width=24, heads=4,
    ),
}  # fmt: skip
"""The depth of each preset, with few channels."""


# --- in_strips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height", [1, 2, 7, 16])
@pytest.mark.parametrize("positions", [1, 15, 40])
@pytest.mark.parametrize("radius", [0, 1, 3])
def test_a_local_function_gives_the_same_in_strips(height: int, positions: int, radius: int) -> None:
    torch.manual_seed(0)
    x, other, kernel = (torch.randn(1, 2, *shape) for shape in ((height, 5), (height, 5), (2 * radius + 1, 1)))
    kernel = kernel.expand(2, 2, -1, 1)

    def local(x: Tensor, y: Tensor) -> Tensor:
        return F.conv2d(x, kernel, padding=(radius, 0)) + y

    with torch.no_grad():
        expected = local(x, other)
        torch.testing.assert_close(in_strips(local, x, other, halo=radius, positions=positions), expected)
        into = torch.empty_like(expected)
        result = in_strips(local, x, other, halo=radius, positions=positions, into=into)
        torch.testing.assert_close(result, expected)
        assert (result is into) == (positions // 5 < height and height > 1)


def test_a_plane_may_be_overwritten_by_what_is_made_of_it() -> None:
    x = torch.arange(48.0).view(1, 2, 6, 4)
    expected = x.square()
    with torch.no_grad():
        assert in_strips(torch.square, x, halo=0, positions=8, into=x) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("height", [48, 80, 16])
def test_rows_become_fewer_or_more(height: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, height, 16)
    with torch.no_grad():
        for function in (lambda x: F.avg_pool2d(x, 16), lambda x: F.interpolate(x, scale_factor=(3, 1))):
            torch.testing.assert_close(in_strips(function, x, halo=0, unit=16, positions=1), function(x))


def test_gradients_may_ask_for_the_whole() -> None:
    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    seen = []
    in_strips(lambda x: seen.append(x.shape) or x, x, halo=1, positions=1, whole=True)  # type: ignore[func-returns-value]
    assert seen == [(1, 1, 8, 8)]


# --- the networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_network_gives_the_same_in_strips(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where the order of sums does not show: g_a, h_a, the entropy path and g_s."""
    model = model_of(TRANSFORMS[name]).double()
    torch.manual_seed(1)
    x, quality = torch.rand(1, 3, 448, 64, dtype=torch.float64), torch.tensor([9.0], dtype=torch.float64)

    def run() -> list[Tensor]:
        y, z = model.analyse(x, quality)
        estimator = Estimator(4 * y, 4 * z, noise=False)
        y_hat = model.entropy(quality, (z.shape[2], z.shape[3]), estimator)
        return [y, z, estimator.y_likelihoods, estimator.z_likelihoods, y_hat, model.synthesise(y_hat, quality)]

    with torch.no_grad():
        whole = run()
        ran = in_few_rows(monkeypatch)
        for part, expected in zip(run(), whole, strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-9, atol=1e-9)
    for network in (model.h_a, model.entropy.h_s):
        assert network in ran
    assert len(ran) >= 4 + 4 + 6  # g_a, h_a, h_s, g_s; prior and attention in s2 and s3; between the scales


@pytest.mark.parametrize("name", TRANSFORMS)
def test_halos_are_as_wide_as_needed(name: str) -> None:
    """What a transform sees beyond its row ends within the halo, and is no unit less."""
    config = TRANSFORMS[name]
    model = model_of(config).double().train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    m, n = config.M, config.N
    for network, channels, rows, unit, scale, width in (
        (model.g_a, 3, halo(config, config.stages), 16, 1 / 16, 32),
        (model.g_s, m, halo(config, config.synthesis), 1, 16, 2),
        (model.h_a, m, hyper_halo(config), 4, 1 / 4, 8),
        (model.entropy.h_s, n, hyper_halo(config), 1, 4, 2),
        (model.entropy.context.prior_s3.branch_1, config.context_width, config.prior_s3[0], 1, 1, 2),
    ):
        height = unit * (2 * rows + 3)
        torch.manual_seed(0)
        x = torch.randn(1, channels, height, width, dtype=torch.float64).requires_grad_()
        middle = slice(int(unit * (rows + 1) * scale), int(unit * (rows + 2) * scale))
        (gradient,) = torch.autograd.grad(network(x)[:, :, middle].square().sum(), x)
        seen = gradient.abs().amax((0, 1, 3)).view(-1, unit).amax(1).nonzero().flatten()
        assert int(seen.min()) >= 1  # rows + 1 is the middle unit
        assert int(seen.max()) <= 2 * rows + 1
        assert int(seen.max()) - int(seen.min()) == 2 * rows


@pytest.mark.parametrize("changes", [{}, {"displaced_s2": True}, {"heads": 0}], ids=["plain", "displaced", "phi"])
def test_the_exact_entropy_path_gives_the_same_bits(
    changes: dict[str, Any], codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of integers come out alike, however the plane is cut."""
    model = model_of(**changes)
    exact = attach(model.entropy, calibrated(model))
    y, z = latents_of(model, 2, (5, 1))
    payloads, written, read = there_and_back(exact, y, z)
    ran = in_few_rows(monkeypatch)
    in_strips_payloads, in_strips_written, in_strips_read = there_and_back(exact, y, z)
    assert in_strips_payloads == payloads
    for y_hat in (read, in_strips_written, in_strips_read):
        assert torch.equal(y_hat.view(torch.int32), written.view(torch.int32))
    assert len(ran) > 20


def test_a_picture_has_no_seams(codec: Codec, sample: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded and decoded in strips of a single unit: the same picture, but for rounding."""
    image = sample.crop((100, 10, 180, 310))
    whole = codec.encode(image, 40)
    shown = np.asarray(codec.decode(whole), np.int16)
    ran = in_few_rows(monkeypatch)
    assert np.abs(np.asarray(codec.decode(whole), np.int16) - shown).max() <= 1
    parts = codec.encode(image, 40)
    assert len(ran) > 25
    # A sum of g_a or h_a that is rounded otherwise (even to bfloat16) may turn a latent halfway between two symbols,
    # and one of z all that follow: another picture, but as good a one. Seams every 16 rows would cost 0.4 dB.
    assert abs(len(parts) - len(whole)) < 50
    assert psnr(codec.decode(parts), image) == pytest.approx(psnr(codec.decode(whole), image), abs=0.05)
