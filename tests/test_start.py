"""Does a run that begins with a trained model begin as the same function, also when the model has grown?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from coding import Recorder
from conftest import DATA
from models import STATE, TRAINABLE, model_of

from hpcmref import checkpoints
from hpcmref.errors import CheckpointError, ConfigError
from hpcmref.model import HPCM, PRESETS, HPCMConfig
from hpcmref.training import Phase, TrainingConfig, train
from hpcmref.training.start import start_from

GROWN = dataclasses.replace(TRAINABLE, M=48)
WIDER = dataclasses.replace(
    TRAINABLE, stages=((200, 3),), synthesis=((208, 2),), ratio=4, hyper_ratio=3, hyper_blocks=2, context_width=56,
    prior_s1_s2=(3, 2), prior_s3=(2, 3),
)  # fmt: skip
OLD = torch.arange(48) % 6 < 4
"""The places of a grown model that hold the 32 trained channels: 4 of the 6 in each group."""


def started(config: Any, trained: HPCM) -> HPCM:
    torch.manual_seed(5)
    model = HPCM(config).initialise().to(next(trained.parameters()).dtype)
    start_from(model, trained)
    return model.eval()


def test_a_model_of_the_same_shape_begins_as_the_same() -> None:
    trained = model_of(TRAINABLE)
    model = started(TRAINABLE, trained)
    for (name, found), (_, expected) in zip(model.named_parameters(), trained.named_parameters(), strict=True):
        assert torch.equal(found, expected), name


@torch.no_grad()
def test_a_grown_model_computes_the_old_channels_as_before() -> None:
    """y and z; all scales and means, whatever the new latents hold; the picture, where the new latents are zero."""
    trained = model_of(TRAINABLE).double()
    model = started(GROWN, trained)
    x, quality = torch.rand(2, 3, 64, 128).double(), torch.tensor([10.0, 50.0]).double()
    y, z = trained.analyse(x, quality)
    y_grown, z_grown = model.analyse(x, quality)
    torch.testing.assert_close(y_grown[:, OLD], y)
    torch.testing.assert_close(z_grown, z)

    before, after = Recorder(8 * y, z), Recorder(torch.randn_like(y_grown), z)
    after._target._planes = {
        scale: plane.index_copy(1, OLD.nonzero().flatten(), before._target._planes[scale])
        for scale, plane in after._target._planes.items()
    }
    size = (z.shape[2], z.shape[3])
    y_hat = trained.entropy(quality, size, before)
    y_hat_grown = model.entropy(quality, size, after)
    torch.testing.assert_close(y_hat_grown[:, OLD], y_hat)
    assert len(before.predicted) == len(after.predicted) == 12
    for pair, grown_pair in zip(before.predicted, after.predicted, strict=True):
        for expected, found in zip(pair, grown_pair, strict=True):
            # A step codes 1/2, 1/4 or 1/8 of the channels, in whole groups, so the old ones lie as in y.
            kept = found if found.shape == expected.shape else found[:, OLD[: found.shape[1]]]
            torch.testing.assert_close(kept, expected)

    alone = torch.zeros_like(y_hat_grown)
    alone[:, OLD] = y_hat
    torch.testing.assert_close(
        model.synthesise(alone, quality), trained.synthesise(y_hat, quality), rtol=1e-4, atol=1e-4
    )


def test_new_channels_begin_with_the_next_frequencies_and_the_gains_of_the_start() -> None:
    fresh = HPCM(GROWN).initialise()
    model = started(GROWN, model_of(TRAINABLE))
    assert fresh.log_gain is not None
    assert model.log_gain is not None
    assert torch.equal(model.log_gain.values[:, ~OLD], fresh.log_gain.values[:, ~OLD])
    new, rest = model.g_a[-1].weight[~OLD], fresh.g_a[-1].weight[32:]
    assert torch.equal(new, rest)
    assert torch.equal(model.g_s[0].weight[~OLD], fresh.g_s[0].weight[32:])


@pytest.mark.parametrize("of", [TRAINABLE, STATE], ids=["attention", "state"])
@torch.no_grad()
def test_a_wider_and_deeper_model_computes_the_same(of: HPCMConfig) -> None:
    """All predictions and the picture, and every network of the larger model is learning from the first step on."""
    of = dataclasses.replace(of, stages=TRAINABLE.stages, synthesis=TRAINABLE.synthesis)
    wider = dataclasses.replace(WIDER, heads=of.heads, memory=of.memory)
    trained = model_of(of).double()
    model = started(wider, trained)
    x, quality = torch.rand(2, 3, 64, 128).double(), torch.tensor([10.0, 50.0]).double()
    before, after = trained(x, quality), model(x, quality)
    torch.testing.assert_close(after["x_hat"], before["x_hat"])
    for name, expected in before["likelihoods"].items():
        torch.testing.assert_close(after["likelihoods"][name], expected)

    model.train()
    with torch.enable_grad():
        out = model(x, quality)
        (sum(each.log().mean() for each in out["likelihoods"].values()) + out["x_hat"].square().mean()).backward()
    still = [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()]
    new = ("g_a.3", "g_a.4", "g_s.2", "branch_1.2", "branch_2.1", "branch_2.2", "h_a.3", "h_s.2")
    assert all(any(part in name for part in new) and "project" not in name for name in still), still


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"M": 24}, "M = 24"),
        ({"context_width": 32}, "context_width 32, and the trained model 40"),
        ({"context_width": 48, "M": 48}, "in M or in context_width"),
        ({"prior_s3": (3, 0)}, r"prior_s3 \(3, 0\)"),
        ({"heads": 8}, "heads"),
        ({"N": 24, "M": 48}, "N"),
    ],
)
def test_what_cannot_begin_is_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        started(dataclasses.replace(TRAINABLE, **changes), model_of(TRAINABLE))
    with pytest.raises(ConfigError, match="heads"):
        started(dataclasses.replace(GROWN, heads=32), model_of(TRAINABLE, heads=32))


def test_a_run_begins_with_a_model_and_goes_on_with_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights and their average; no state is overruled."""
    monkeypatch.setitem(PRESETS, "nano", GROWN)
    model = model_of(TRAINABLE)
    path = tmp_path / "small.safetensors"
    checkpoints.save(model, path, "small", {})
    stored = checkpoints.load(path).model.g_a[1].weight
    config = TrainingConfig(
        data=(DATA / "sample.png",), output=tmp_path / "run", start=path, phases=(Phase(0, 1, 64),), steps=1,
        warm_up=10**12,
    )  # fmt: skip
    begun = train(config)
    torch.testing.assert_close(begun.model.g_a[1].weight, stored)
    torch.testing.assert_close(begun.average, list(begun.model.parameters()))
    begun.step = 7
    begun.average[0].fill_(0.5)
    begun.save()
    resumed = train(dataclasses.replace(config, start=tmp_path / "is gone"))
    assert (resumed.step, float(resumed.average[0].mean())) == (7, 0.5)
    with pytest.raises(CheckpointError, match="is gone"):
        train(dataclasses.replace(config, output=tmp_path / "other", start=tmp_path / "is gone"))
