"""Does training improve a model, continue where it stopped, and leave a checkpoint that codes?"""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from hpcmref import checkpoints
from hpcmref.cli import app
from hpcmref.codec import load
from hpcmref.errors import CheckpointError, ConfigError, ImageError
from hpcmref.training import Report, TrainingConfig, train
from hpcmref.training.data import Tiles
from hpcmref.training.loop import Trainer

SMALL = TrainingConfig(
    data=(DATA / "sample.png",),
    output=Path("unused"),
    preset="nano",
    batch=2,
    crop=64,
    last_batch=1,
    last_crop=128,
    warm_up=5,
    log_every=1,
)


def configured(**changes: Any) -> TrainingConfig:
    return dataclasses.replace(SMALL, **changes)


# --- data ----------------------------------------------------------------------------------------------------------


def write_images(folder: Path, names: list[str], side: int = 8) -> None:
    """Images whose pixels say which they are."""
    for i, name in enumerate(names):
        Image.new("RGB", (side, side), (i % 256, i // 256, 0)).save(folder / name)


def colours(tiles: list[Tensor]) -> list[int]:
    return sorted(int(tile[0, 0, 0]) + 256 * int(tile[1, 0, 0]) for tile in tiles)


def test_what_is_held_out_follows_from_the_name(tmp_path: Path) -> None:
    """From the name without number and suffix, whatever else is there, in a folder or in a tar."""
    names = [f"photo{i // 2}_{i % 2}.png" for i in range(300)] + ["lake.bmp", "lake_7.bmp"]
    expected = [i for i, name in enumerate(names) if zlib.crc32(name.split("_")[0].split(".")[0].encode()) % 64 == 0]
    assert 2 < len(expected) < 12
    write_images(tmp_path, names)
    (tmp_path / "notes.txt").write_text("no image")
    tiles = Tiles([tmp_path], smallest=8)
    assert colours(tiles.held_out) == expected
    assert colours(tiles.train) == [i for i in range(len(names)) if i not in expected]

    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for name in reversed(names):
            archive.add(tmp_path / name, arcname=f"deep/{name}")
    assert colours(Tiles([tmp_path / "all.tar"], smallest=8).held_out) == expected

    few = tmp_path / "few"
    few.mkdir()
    for i in (*expected, 0, 1):
        (few / names[i]).write_bytes((tmp_path / names[i]).read_bytes())
    assert colours(Tiles([few], smallest=8).held_out) == expected


def test_small_images_and_later_ones_are_left_out(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png"], side=8)
    write_images(tmp_path, ["c.png"], side=7)
    assert len(Tiles([tmp_path], smallest=8).train) == 2
    assert len(Tiles([tmp_path], smallest=8, limit=1).train) == 1
    with pytest.raises(ConfigError, match="9 pixels"):
        Tiles([tmp_path], smallest=9)
    with pytest.raises(ConfigError, match="missing"):
        Tiles([tmp_path / "missing"], smallest=8)
    (tmp_path / "d.png").write_text("no image")
    with pytest.raises(ImageError, match=r"d\.png"):
        Tiles([tmp_path], smallest=8)


def test_crops_are_parts_of_the_tiles(tmp_path: Path) -> None:
    """At any place, half of them mirrored, and the same for the same generator."""
    pixels = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30)
    image = np.stack((pixels % 256, pixels // 256, 0 * pixels), axis=2).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    tiles = Tiles([tmp_path], smallest=8)
    crops = tiles.crops(200, 8, torch.Generator().manual_seed(0))
    assert crops.shape == (200, 3, 8, 8)
    assert crops.dtype == torch.uint8
    numbers = crops[:, 0].int() + 256 * crops[:, 1].int()
    steps = numbers[:, 0, 1] - numbers[:, 0, 0]
    assert 60 < int((steps == -1).sum()) < 140
    assert set(steps.tolist()) == {1, -1}
    assert bool((numbers[:, 1:] - numbers[:, :-1] == 30).all())
    corners = torch.where(steps == 1, numbers[:, 0, 0], numbers[:, 0, 7])
    assert {int(corner) // 30 for corner in corners} == set(range(13))
    assert {int(corner) % 30 for corner in corners} == set(range(23))
    assert torch.equal(tiles.crops(200, 8, torch.Generator().manual_seed(0)), crops)
    assert not torch.equal(tiles.crops(200, 8, torch.Generator().manual_seed(1)), crops)


# --- the loop ------------------------------------------------------------------------------------------------------


def test_training_makes_it_better() -> None:
    """40 steps of two small crops: on the photograph itself, a tenth fewer bits for less than 1.5 dB."""
    config = configured(steps=40, last_part=0.0)
    tiles = Tiles(config.data, 64)
    tiles.held_out = tiles.train
    trainer = Trainer(config)
    before = trainer.validate(tiles)
    for _ in range(40):
        values = trainer.run_step(tiles)
        assert values is not None
        assert all(np.isfinite(value) for value in values.values())
    assert trainer.progress == 1
    after = trainer.validate(tiles)
    assert set(after) == {f"{name}_{quality}" for name in ("bpp", "psnr") for quality in (8, 32, 56)}
    for quality in (8, 32):
        assert after[f"bpp_{quality}"] < 0.9 * before[f"bpp_{quality}"]
        assert after[f"psnr_{quality}"] > before[f"psnr_{quality}"] - 1.5


class StoppedError(Exception):
    pass


def stop_at(step: int) -> Callable[[Report], None]:
    def report(entry: Report) -> None:
        if entry.step == step:
            raise StoppedError

    return report


def test_a_run_that_was_stopped_continues_exactly(tmp_path: Path) -> None:
    """Through both parts of the schedule: the same weights, average, optimiser and random numbers in the end."""
    whole = train(configured(output=tmp_path / "whole", steps=6, last_part=0.3))
    config = configured(output=tmp_path / "stopped", steps=6, last_part=0.3, save_minutes=0.0)
    for step in (3, 6):  # a state is saved after each step, and the report of a step comes before
        with pytest.raises(StoppedError):
            train(config, stop_at(step))
    stopped = train(config)

    assert stopped.step == whole.step == 6
    assert torch.equal(stopped.generator.get_state(), whole.generator.get_state())
    pairs = [
        *zip(stopped.model.state_dict().values(), whole.model.state_dict().values(), strict=True),
        *zip(stopped.average, whole.average, strict=True),
    ]
    for found, expected in zip(
        stopped.optimiser.state_dict()["state"].values(), whole.optimiser.state_dict()["state"].values(), strict=True
    ):
        pairs += [(found[name], expected[name]) for name in ("step", "exp_avg", "exp_avg_sq")]
    assert all(torch.equal(found, expected) for found, expected in pairs)

    start = Trainer(config).model.state_dict()
    moved = [not torch.equal(start[name], value) for name, value in whole.model.state_dict().items()]
    assert np.mean(moved) > 0.95
    log = [json.loads(line) for line in (config.output / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if entry["kind"] == "start"] == [0, 2, 5]
    assert [entry["step"] for entry in log if entry["kind"] == "train"] == [1, 2, 3, 3, 4, 5, 6, 6]


def test_the_seed_decides(tmp_path: Path) -> None:
    first, second, third = (Trainer(configured(seed=seed)).model.g_a[2].expand.weight for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_a_step_that_is_not_finite_is_skipped_and_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiles = Tiles(SMALL.data, 64)
    trainer = Trainer(configured(steps=10))
    assert trainer.run_step(tiles) is not None
    before = [tensor.clone() for tensor in (*trainer.model.parameters(), *trainer.average)]

    compute = trainer._losses
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "_losses", lambda *x: (compute(*x)[0] * float("nan"), *compute(*x)[1:]))
        assert trainer.run_step(tiles) is None
    assert (trainer.step, trainer.skipped) == (2, 1)
    for kept, tensor in zip(before, (*trainer.model.parameters(), *trainer.average), strict=True):
        assert torch.equal(kept, tensor)

    assert trainer.run_step(tiles) is not None
    assert (trainer.step, trainer.skipped) == (3, 1)
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters())
    trainer.save(tmp_path / "state.pt")
    resumed = Trainer(configured(steps=10))
    resumed.load(tmp_path / "state.pt")
    assert (resumed.step, resumed.skipped) == (3, 1)


def test_the_average_lends_itself_to_the_model() -> None:
    trainer = Trainer(SMALL)
    for average in trainer.average:
        average.fill_(0.25)
    own = [parameter.clone() for parameter in trainer.model.parameters()]
    with trainer.averaged() as model:
        assert not model.training
        assert all(bool((parameter == 0.25).all()) for parameter in model.parameters())
    assert all(torch.equal(parameter, kept) for parameter, kept in zip(trainer.model.parameters(), own, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "huge"},
        {"preset": "base"},
        {"crop": 100},
        {"crop": 0},
        {"last_crop": 65},
        {"minutes": 0.0},
        {"steps": 0},
        {"batch": 0},
    ],
)
def test_a_bad_configuration_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        configured(**changes)


@pytest.mark.parametrize("content", ["another preset", "no state", "text", "nothing"])
def test_a_state_that_does_not_fit_is_refused(tmp_path: Path, content: str) -> None:
    state = tmp_path / "state.pt"
    trainer = Trainer(SMALL)
    if content == "another preset":
        trainer.save(state)
        saved = torch.load(state, weights_only=True)
        torch.save({**saved, "preset": "light"}, state)
    elif content == "no state":
        torch.save({"a": 1}, state)
    else:
        state.write_text("" if content == "nothing" else content)
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        trainer.load(state)


# --- from photographs to a codec -----------------------------------------------------------------------------------


def test_from_the_command_line_to_an_image(tmp_path: Path, sample: Image.Image) -> None:
    """Train, resume, export: the checkpoint encodes and decodes."""
    arguments = [
        *("train", str(DATA / "sample.png"), "-o", str(tmp_path / "run"), "--preset", "nano", "--seed", "3"),
        *("--batch", "1", "--crop", "64", "--last-batch", "1", "--last-crop", "64", "--no-bfloat16"),
    ]
    result = CliRunner().invoke(app, [*arguments, "--steps", "2"])
    assert result.exit_code == 0, result.output
    path = tmp_path / "run" / "nano.safetensors"
    first = checkpoints.info(path)
    assert first.preset == "nano"
    assert first.fingerprint.hex() in result.stdout
    result = CliRunner().invoke(app, [*arguments, "--steps", "3", "--quiet"])
    assert (result.exit_code, result.stdout) == (0, "")
    second = checkpoints.info(path)
    assert second.fingerprint != first.fingerprint

    codec = load(path, "cpu")
    part = sample.crop((30, 30, 170, 130))
    data = codec.encode(part, 63)
    decoded = codec.decode(data)
    error = np.square(np.asarray(decoded, np.float64) - np.asarray(part, np.float64)).mean()
    assert decoded.size == part.size
    assert 10 * np.log10(255**2 / error) > 25  # of a model that has hardly been trained

    stream = io.BytesIO()
    part.save(stream, "PNG")
    for command, data_in in (("encode", stream.getvalue()), ("decode", data)):
        result = CliRunner().invoke(app, [command, "-", "-o", "-", "-m", str(path)], input=data_in)
        assert result.exit_code == 0, result.output
