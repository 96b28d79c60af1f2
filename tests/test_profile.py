"""Does the profile count what is computed, assign it to the right stage, and leave everything as it was?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import TINY, model_of
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from hpcmref import checkpoints
from hpcmref.bench.profile import Profile, photograph, profile
from hpcmref.checkpoints import Checkpoint
from hpcmref.cli import app

SIDE = 128


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    model = model_of(TINY)
    return Checkpoint(model, checkpoints.calibrated(model), bytes(4))


@pytest.fixture(scope="module")
def found(tiny: Checkpoint) -> Profile:
    return profile(tiny, torch.device("cpu"), photograph(SIDE, SIDE), repeat=2)


def test_multiplications_are_those_of_the_networks(tiny: Checkpoint, found: Profile) -> None:
    """Counted by hand: every weight of a 1x1 or full convolution works once for every position of its output."""
    positions = {"h_a": SIDE**2 // 256, "g_a": SIDE**2 // 64, "g_s": SIDE**2 // 64}
    for name, stages in (("g_a", found.encode), ("g_s", found.decode)):
        expected = 0
        for module in getattr(tiny.model, name).modules():
            if isinstance(module, nn.Conv2d):
                expected += module.weight.numel() * positions[name] // (module.stride[0] * module.stride[1])
            elif isinstance(module, nn.ConvTranspose2d):  # each input position works with all taps
                expected += module.weight.numel() * positions[name] // 4
        assert stages[name].macs == expected
    context = {name: stage.macs for name, stage in found.encode.items() if name[:2] in ("s1", "s2", "s3")}
    assert context == {name: stage.macs for name, stage in found.decode.items() if name in context}
    assert min(context[f"s{scale} {part}"] for scale in (1, 2, 3) for part in ("adaptor", "prior", "attention")) > 0


def test_every_stage_has_its_time(found: Profile) -> None:
    stages = {"pixels", "rest", "h_s", "range coder", "file", "context_net", "s1 rest", "s3 prior"}
    assert stages | {"g_a", "h_a"} <= set(found.encode)
    assert stages | {"g_s"} <= set(found.decode)
    assert all(stage.seconds > 0 for stages in (found.encode, found.decode) for stage in stages.values())
    assert found.encode["range coder"].macs == 0
    assert found.plain_encode > 0 < found.plain_decode


def test_nothing_stays_watched(tiny: Checkpoint, found: Profile) -> None:
    watched = [name for name, each in tiny.model.named_modules() if "forward" in vars(each)]
    assert watched == []


def test_the_command_shows_a_table(tmp_path: Path, sample: Image.Image) -> None:
    sample.crop((0, 0, 140, 100)).save(tmp_path / "a.png")
    result = CliRunner().invoke(app, ["bench", "--profile", str(tmp_path / "a.png"), "--repeat", "1"])
    assert result.exit_code == 0, result.output
    assert {"nano-2,", "encode", "decode", "GOP/s"} <= set(result.output.split())
