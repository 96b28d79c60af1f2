"""Do the networks do what the paper and the design say, whatever their weights?"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from coding import SYNCHRONISING
from models import TINY, model_of, tensor_of
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from hpcmref.errors import ConfigError
from hpcmref.model import HPCM, PRESETS, HPCMConfig
from hpcmref.model.context import CrossAttentionCell
from hpcmref.model.entropy import LIKELIHOOD_BOUND, SCALE_BOUND, likelihood, lower_bound, quantise, scale_index
from hpcmref.model.layers import Down, PConvRB, QualityTable, Up, anchor_weights
from hpcmref.model.macs import macs_per_pixel

KINDS = pytest.mark.parametrize(
    "changes",
    [{}, {"displaced_s2": True}, {"heads": 0}, {"lambdas": ()}],
    ids=["plain", "displaced", "phi", "one rate"],
)


# --- configuration -------------------------------------------------------------------------------------------------


def test_presets() -> None:
    assert list(PRESETS) == ["nano", "light", "base", "large", "phi"]
    assert all(name == config.preset for name, config in PRESETS.items())
    for name in ("nano", "light"):
        assert (PRESETS[name].transform, PRESETS[name].qualities) == ("dct", 64)
        assert not PRESETS[name].displaced_s2
    for name in ("base", "large", "phi"):
        assert (PRESETS[name].transform, PRESETS[name].qualities) == ("conv", 1)
        assert PRESETS[name].displaced_s2


def test_the_arithmetic_of_the_presets() -> None:
    """base as published (918.56 thousand, of which 6.72 is an attention that nothing reads); light is 2 to 3 nano."""
    assert sum(macs_per_pixel(PRESETS["base"]).values()) == pytest.approx(918.56e3 - 6.72e3, abs=10)
    assert 2 < sum(macs_per_pixel(PRESETS["light"]).values()) / sum(macs_per_pixel(PRESETS["nano"]).values()) < 3
    parts = macs_per_pixel(TINY)
    assert parts["g_a"] == (192 * 48 + 9 * 12**2 + 2 * 3 * 48**2) / 64 + 4 * 48 * 32 / 256
    assert parts["g_s"] == parts["g_a"]


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_a_configuration_survives_json(config: HPCMConfig) -> None:
    assert HPCMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"transform": "wavelet"},
        {"stages": ((48, 1), (48, 1))},
        {"M": 0},
        {"M": 36},
        {"heads": 7},
        {"lambdas": (0.01,)},
        {"lambdas": (0.02, 0.01)},
        {"lambdas": (0.01, 0.01)},
    ],
)
def test_a_bad_configuration_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("values", [{"depth": 3}, {"M": 64}, {}])
def test_a_bad_dictionary_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        HPCMConfig.from_dict(values if "M" in values or not values else {**TINY.to_dict(), **values})


@pytest.mark.parametrize("preset", PRESETS)
def test_shapes(preset: str) -> None:
    """Of every preset, without computing anything."""
    config = PRESETS[preset]
    with torch.device("meta"), torch.no_grad():
        model = HPCM(config).eval()
        out = model(torch.empty(2, 3, 128, 192))
    assert out["x_hat"].shape == (2, 3, 128, 192)
    assert out["likelihoods"]["y"].shape == (2, config.M * 8 * 12)
    assert out["likelihoods"]["z"].shape == (2, config.N * 2 * 3)


# --- one pass ------------------------------------------------------------------------------------------------------


@KINDS
def test_a_batch_gives_what_each_image_gives_alone(changes: dict[str, Any]) -> None:
    model = model_of(**changes).double()
    torch.manual_seed(3)
    x = torch.rand(3, 3, 128, 192, dtype=torch.float64)
    quality = torch.tensor([3.0, 40.0, 63.0], dtype=torch.float64)
    with torch.no_grad():
        together = model(x, quality)
        for image in range(3):
            alone = model(x[image : image + 1], quality[image : image + 1])
            torch.testing.assert_close(together["x_hat"][image : image + 1], alone["x_hat"])
            for name in "yz":
                torch.testing.assert_close(together["likelihoods"][name][image : image + 1], alone["likelihoods"][name])
    assert (together["x_hat"][0] - together["x_hat"][1]).abs().max() > 0.01


def operations(call: Any) -> set[str]:
    """The names of all operations that a call runs on the CPU."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    return {event.key for event in recorded.key_averages()}


@KINDS
def test_nothing_leaves_the_device_inside_a_pass(changes: dict[str, Any]) -> None:
    """No number is read back and no boolean mask selects: either would stop a GPU until it has caught up."""
    model = model_of(**changes)
    x, quality = torch.rand(2, 3, 192, 128), torch.tensor([10.0, 50.0])
    found = operations(lambda: model(x, quality))
    assert "aten::conv2d" in found
    assert not found & SYNCHRONISING


def test_the_profiler_would_notice() -> None:
    x = torch.rand(4, 4)
    assert "aten::nonzero" in operations(lambda: x[x > 0.5])
    assert "aten::item" in operations(lambda: float(x.sum()))
    assert "aten::lift_fresh" in operations(lambda: torch.tensor([1.0, 2.0]))


def test_the_last_attention_is_not_computed() -> None:
    """Attention follows each network step but the last, whose context nobody reads."""
    model = model_of()
    context = model.entropy.context
    calls: dict[str, int] = {}

    def count(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda *_: calls.update({name: calls.get(name, 0) + 1}))

    for name in ("attn_s1", "attn_s2", "attn_s3", "prior_s1_s2", "prior_s3"):
        count(name, getattr(context, name))
    with torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
    assert calls == {"attn_s1": 1, "attn_s2": 3, "attn_s3": 5, "prior_s1_s2": 4, "prior_s3": 6}


def test_the_default_quality_is_the_middle() -> None:
    model = model_of()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x)["x_hat"], model(x, torch.tensor([31.5]))["x_hat"], rtol=0, atol=0)
        assert not torch.equal(model(x)["x_hat"], model(x, torch.tensor([33.0]))["x_hat"])


def test_a_training_step_reaches_every_parameter() -> None:
    """Of nano, at 128 x 128, the smallest size at which every window of attention has more than one token."""
    torch.manual_seed(0)
    model = HPCM(PRESETS["nano"]).initialise().train()
    x = torch.rand(2, 3, 128, 128)
    out = model(x, torch.tensor([5.0, 58.0]))
    loss = (out["x_hat"] - x).square().mean() - sum(part.log2().mean() for part in out["likelihoods"].values())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A bias of all keys adds the same to all similarities, so softmax does not see it.
        assert name.endswith("conv_k.bias") or parameter.grad.count_nonzero(), name


def test_training_adds_noise_and_evaluation_does_not() -> None:
    model = model_of()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        first, second = (model.train()(x)["likelihoods"]["y"] for _ in range(2))
        assert not torch.equal(first, second)
        first, second = (model.eval()(x)["likelihoods"]["y"] for _ in range(2))
        assert torch.equal(first, second)


# --- attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 8), (6, 7), (1, 1), (3, 2), (9, 4)])
def test_attention_sees_the_tokens_of_its_window_that_exist(size: tuple[int, int]) -> None:
    """Against attention written out token by token."""
    torch.manual_seed(0)
    side, heads, channels = 4, 2, 6
    cell = CrossAttentionCell(channels, side, heads).double()
    context, previous = torch.randn(2, 2, channels, *size, dtype=torch.float64) * 3
    height, width = size
    with torch.no_grad():
        query, key, value = cell.conv_q(context), cell.conv_k(previous), cell.conv_v(previous)
        expected = cell.conv_out(context).clone()
        for image in range(2):
            for row in range(height):
                for col in range(width):
                    top, left = row // side * side, col // side * side
                    tokens = [
                        (image, slice(None), r, c)
                        for r in range(top, min(top + side, height))
                        for c in range(left, min(left + side, width))
                    ]
                    for head in range(heads):
                        part = slice(head * channels // heads, (head + 1) * channels // heads)
                        asked = query[image, :, row, col][part]
                        similarity = torch.stack([key[token][part] @ asked for token in tokens])
                        weights = (similarity / math.sqrt(channels / heads)).softmax(0)
                        seen = torch.stack([value[token][part] for token in tokens])
                        expected[image, part, row, col] += weights @ seen
        torch.testing.assert_close(cell(context, previous), expected)


@pytest.mark.parametrize("layer", [Down(6, 5), Up(6, 5), Down(3, 8, kernel=4), Up(8, 3, kernel=4)])
def test_training_computes_strided_convolutions_as_they_are(layer: nn.Module) -> None:
    """As matrix products, where the kernel is as wide as the stride: the same values and gradients."""
    layer = layer.double()
    torch.manual_seed(0)
    x = torch.randn(2, layer.in_channels, 8, 12, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    results = []
    for mode in (True, False):
        layer.train(mode).zero_grad()
        inputs = x.clone().requires_grad_()
        result = layer(inputs)
        result.square().sum().backward()
        results.append((result, inputs.grad, layer.weight.grad, layer.bias.grad))
    for trained, coded in zip(*results, strict=True):
        torch.testing.assert_close(trained, coded)


# --- entropy -------------------------------------------------------------------------------------------------------


def test_the_likelihood_is_that_of_a_generalized_gaussian() -> None:
    residual = torch.arange(-30, 31, dtype=torch.float64)[:, None]
    scales = torch.tensor([0.12, 0.3, 1, 5, 64], dtype=torch.float64)
    found = likelihood(residual.expand(61, 5), scales.expand(61, 5))
    cdf = scipy.stats.gennorm(1.5, scale=scales.numpy()).cdf
    expected = np.maximum(cdf(residual.numpy() + 0.5) - cdf(residual.numpy() - 0.5), LIKELIHOOD_BOUND)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert (found == LIKELIHOOD_BOUND).any()
    torch.testing.assert_close(found.sum(0)[:4], torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-6)


def test_likelihoods_in_float32_are_accurate_to_a_ten_thousandth_of_a_bit() -> None:
    """Over all scales and as far into the tails as a likelihood is above its bound."""
    torch.manual_seed(0)
    scales = torch.cat((torch.full((100,), SCALE_BOUND), torch.logspace(-0.9, 2.5, 4000)))[:, None]
    residual = torch.linspace(-9, 9, 1001) * scales + torch.rand(4100, 1) - 0.5
    exact = likelihood(residual.double(), scales.double().expand(4100, 1001))
    found = likelihood(residual, scales.expand(4100, 1001))
    assert (exact > LIKELIHOOD_BOUND).float().mean() > 0.5
    error = (found.double().log2() - exact.log2()).abs()[scales[:, 0] < 64]
    assert error.max() < 1e-4


def test_scales_below_the_bound_cost_as_the_bound() -> None:
    residual = torch.arange(-3.0, 4.0, dtype=torch.float64)
    at_bound = likelihood(residual, torch.full_like(residual, SCALE_BOUND))
    for scale in (0.1, 0.0, -7.0):
        assert torch.equal(likelihood(residual, torch.full_like(residual, scale)), at_bound)


def test_the_gradient_of_the_likelihood() -> None:
    torch.manual_seed(0)
    residual = (2 * torch.randn(40, dtype=torch.float64)).requires_grad_()
    scales = (0.5 + torch.rand(40, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(likelihood, (residual, scales))


def test_the_lower_bound_lets_gradients_through_that_raise() -> None:
    x = torch.tensor([1.0, 1.0, 3.0, 3.0], requires_grad=True)
    bounded = lower_bound(x, 2.0)
    assert bounded.tolist() == [2, 2, 3, 3]
    (bounded * torch.tensor([1.0, -1.0, 1.0, -1.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, -1, 1, -1]


def test_a_scale_takes_the_number_of_thresholds_below_it() -> None:
    thresholds = torch.tensor([1.0, 2.0, 3.0])
    scales = torch.tensor([[-5.0, 0.5, 1.0], [1.1, 3.0, 99.0]])
    assert scale_index(scales, thresholds).tolist() == [[0, 0, 0], [1, 2, 3]]
    assert scale_index(scales.T, thresholds).tolist() == [[0, 1], [0, 2], [0, 3]]  # not contiguous


def test_symbols_are_rounded_half_to_even_and_fit_16_bits() -> None:
    found = quantise(torch.tensor([0.5, 1.5, -0.5, -2.5, 2.6, 1e9, -1e9]))
    assert found.tolist() == [0, 2, 0, -2, 3, 2**15 - 1, -(2**15)]


# --- rate ----------------------------------------------------------------------------------------------------------


def test_qualities_lie_between_anchors() -> None:
    weights = anchor_weights(torch.tensor([0.0, 9.0, 4.5, 63.0, 61.2]), 8)
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    torch.testing.assert_close(weights[0], F.one_hot(torch.tensor(0), 8).float())
    torch.testing.assert_close(weights[1], F.one_hot(torch.tensor(1), 8).float())
    torch.testing.assert_close(weights[2, :2], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(weights[3], F.one_hot(torch.tensor(7), 8).float())
    torch.testing.assert_close(weights[4, 6:], torch.tensor([0.2, 0.8]))
    assert anchor_weights(torch.tensor([0.0, 63.0]), 1).tolist() == [[1], [1]]


def test_a_rate_table_interpolates() -> None:
    table = QualityTable(torch.tensor([1.0, 3.0]), channels=5)
    values = table(torch.tensor([0.0, 31.5, 63.0]))
    torch.testing.assert_close(values, torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1).expand(3, 5, 1, 1))


# --- the DCT start -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started() -> HPCM:
    """nano as a training begins with it."""
    torch.manual_seed(0)
    return HPCM(PRESETS["nano"]).initialise().eval()


def decibels(x: Tensor, reference: Tensor) -> float:
    return float(-10 * (x - reference).square().mean().log10())


def test_an_untrained_nano_is_a_codec(started: HPCM, sample: Image.Image) -> None:
    """24 to 31 dB, where it was measured, between the lowest and the highest quality."""
    x = tensor_of(sample)
    rates, distortions = [], []
    with torch.no_grad():
        for quality in (0.0, 32.0, 63.0):
            out = started(x, torch.tensor([quality]))
            rates.append(-sum(float(part.log2().sum()) for part in out["likelihoods"].values()) / x[0, 0].numel())
            distortions.append(decibels(out["x_hat"].clamp(0, 1), x))
    assert distortions[0] > 23
    assert distortions[2] > 30
    assert distortions == sorted(distortions)
    assert rates == sorted(rates)
    assert rates[2] < 6  # of 24


def test_the_start_is_an_orthonormal_transform(started: HPCM, sample: Image.Image) -> None:
    x = tensor_of(sample)
    with torch.no_grad():
        y = started.g_a(x)
        x_hat = started.g_s(y)
        assert decibels(x_hat, x) > 30  # M of the 768 frequencies are kept
        assert decibels(started.g_s(started.g_a(x_hat)), x_hat) > 50  # and nothing more is lost the second time
        difference = x[..., 64:128, 64:128] - 0.5
        # The basis is orthonormal, so that no energy is added, and a photograph's is nearly all in what is kept.
        energy = float(started.g_a(x[..., 64:128, 64:128]).square().sum() / difference.square().sum())
        assert 0.95 < energy < 1.02


def test_residual_branches_start_small(started: HPCM) -> None:
    blocks = [block for block in (*started.g_a, *started.g_s) if isinstance(block, PConvRB)]
    assert len(blocks) == 8
    with torch.no_grad():
        for block in blocks:
            x = torch.randn(1, block.expand.in_channels, 8, 8)
            assert 0 < float((block(x) - x).norm() / x.norm()) < 0.05


@pytest.mark.parametrize("quality", [0.0, 20.0, 63.0])
def test_gains_are_undone(started: HPCM, quality: float) -> None:
    assert started.log_gain is not None
    assert started.log_inverse_gain is not None
    at = torch.tensor([quality])
    with torch.no_grad():
        gain = started.log_gain(at).exp()
        torch.testing.assert_close(gain * started.log_inverse_gain(at).exp(), torch.ones_like(gain))
    # One channel like another, 1.5 at the lowest quality to 19.3 at the highest; latents are in units of 0..1 pixels.
    torch.testing.assert_close(gain, gain[:, :1].expand_as(gain))
    assert 1.49 < float(gain[0, 0]) < 19.33


@pytest.mark.parametrize("preset", ["nano", "light"])
def test_every_trainable_preset_starts_as_a_transform(preset: str, sample: Image.Image) -> None:
    torch.manual_seed(0)
    model = HPCM(PRESETS[preset]).initialise()
    x = tensor_of(sample)
    with torch.no_grad():
        assert decibels(model.g_s(model.g_a(x)), x) > 30
