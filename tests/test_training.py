"""Does training improve a model, continue where it stopped, and leave a checkpoint that codes?"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA
from models import TRAINABLE
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from hpcmref import checkpoints
from hpcmref.cli import app
from hpcmref.codec import load
from hpcmref.errors import CheckpointError, ConfigError, ImageError
from hpcmref.model import PRESETS
from hpcmref.model.config import MEMORY_BANKS
from hpcmref.model.layers import Pointwise
from hpcmref.model.macs import macs_per_pixel
from hpcmref.runtime.torch_names import matmul_in_bfloat16
from hpcmref.training import Phase, Report, Trainer, TrainingConfig, phases_of, profile, train
from hpcmref.training.bfloat16 import train_in_bfloat16
from hpcmref.training.data import Tiles, _cut_on_gpu
from hpcmref.training.objective import LAMBDA_POWER
from hpcmref.training.state import read_state, write_state

SMALL = TrainingConfig(
    data=(DATA / "sample.png",),
    output=Path("unused"),
    phases=(Phase(0, 2, 64), Phase(0.7, 1, 128)),
    warm_up=5,
    log_every=1,
)


@pytest.fixture(autouse=True)
def _a_small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts of nano, so small that a step takes a tenth of a second."""
    monkeypatch.setitem(PRESETS, "nano", TRAINABLE)


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


def test_rescaled_crops_are_what_interpolation_makes_of_larger_parts(sample: Image.Image) -> None:
    """Half of them; every crop is a part of the photograph, by a factor between the two bounds, without aliasing."""
    tiles = Tiles(SMALL.data, 64)
    (image,) = tiles.train
    generator = torch.Generator().manual_seed(0)
    crops = tiles.crops(24, 64, generator, rescale=0.5).float()
    generator.manual_seed(0)
    numbers = torch.rand(24, 6, generator=generator, dtype=torch.float64).tolist()
    whole = 0
    for crop, (_, shrink, top, left, flip, _) in zip(crops, numbers, strict=True):
        size = round(64 / (1 - max(0, shrink - 0.5)))
        row, column = int(top * (image.shape[1] - size + 1)), int(left * (image.shape[2] - size + 1))
        part = image[None, :, row : row + size, column : column + size].float()
        expected = torch.nn.functional.interpolate(part, (64, 64), mode="bilinear", antialias=True)[0]
        assert float((crop.flip(2) if flip < 0.5 else crop).sub(expected).abs().max()) < 0.51
        whole += size == 64
    assert 6 < whole < 18


def test_transposed_crops_are_the_same_crops_with_rows_and_columns_swapped() -> None:
    tiles = Tiles(SMALL.data, 64)
    plain, turned = (
        tiles.crops(40, 64, torch.Generator().manual_seed(2), rescale=0.5, transpose=transpose)
        for transpose in (False, True)
    )
    swapped = [not torch.equal(a, b) for a, b in zip(plain, turned, strict=True)]
    assert 10 < sum(swapped) < 30
    for a, b, swap in zip(plain, turned, swapped, strict=True):
        assert torch.equal(a.mT if swap else a, b)


@pytest.mark.parametrize("transpose", [False, True])
def test_crops_for_a_gpu_are_those_of_the_cpu(transpose: bool) -> None:
    """A GPU cuts all crops in a few kernels, from all images or from the parts alone; here the CPU does it so."""
    tiles = Tiles(SMALL.data, 64)
    expected = tiles.crops(40, 64, torch.Generator().manual_seed(3), rescale=0.5, transpose=transpose)
    table = tiles._drawn(40, 64, torch.Generator().manual_seed(3), rescale=0.5)
    for pixels, places in ((tiles._pixels, table), tiles._gathered(table, 128)):
        assert torch.equal(_cut_on_gpu(pixels, places, 64, 128, transpose), expected)


def test_a_backward_pass_in_bfloat16_gives_nearly_the_same_gradients() -> None:
    """Float32 factors of matrix products may be rounded to bfloat16 (see `matmul_in_bfloat16`)."""
    trainer = Trainer(dataclasses.replace(SMALL, bfloat16=False))
    x, quality = trainer.sample(Tiles(SMALL.data, 64))
    gradients = []
    for context in (contextlib.nullcontext(), matmul_in_bfloat16()):
        torch.manual_seed(0)
        loss, _ = trainer.objective(x, quality)
        trainer.optimiser.zero_grad()
        with context:
            loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.9999


def test_bfloat16_gives_nearly_the_same_loss_and_gradients() -> None:
    """On a CPU, residual blocks have a backward pass of their own then (see `hpcmref.training.bfloat16`)."""
    gradients, losses = [], []
    for bfloat16 in (False, True):
        trainer = Trainer(dataclasses.replace(SMALL, bfloat16=bfloat16))
        x, quality = trainer.sample(Tiles(SMALL.data, 64))
        trainer.update = lambda skip=False: torch.zeros(())  # type: ignore[method-assign]
        losses.append(float(trainer.plain_step(x, quality)[0]))
        gradients.append([parameter.grad.flatten() for parameter in trainer.model.parameters()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert torch.nn.functional.cosine_similarity(*map(torch.cat, gradients), dim=0) > 0.9998
    for exact, rounded in zip(*gradients, strict=True):
        assert torch.dist(exact, rounded) <= 0.1 * exact.norm() + 1e-6


def test_rounded_factors_change_a_step_by_their_rounding_alone() -> None:
    """Within `matmul_in_bfloat16`, the result of a 1x1 convolution is not rounded again."""
    layer = Pointwise(64, 32, 1)
    train_in_bfloat16(layer, "cpu")
    x = torch.randn(2, 64, 8, 8).bfloat16().float()
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16())
    expected = torch.nn.functional.conv2d(x, layer.weight, layer.bias)
    with matmul_in_bfloat16():
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_a_large_crop_comes_from_an_image_that_has_room_for_it(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png"], side=8)
    write_images(tmp_path, ["c.png", "d.png"], side=16)
    tiles = Tiles([tmp_path], smallest=8)
    assert tiles.crops(20, 16, torch.Generator(), rescale=0.5).shape == (20, 3, 16, 16)
    assert {int(crop[0, 0, 0]) for crop in tiles.crops(50, 8, torch.Generator())} == {0, 1}
    with pytest.raises(ConfigError, match="17"):
        tiles.crops(1, 17, torch.Generator())


# --- the loop ------------------------------------------------------------------------------------------------------


def test_training_makes_it_better() -> None:
    """30 steps of two small crops: on the photograph itself, fewer bits and no loss of quality."""
    config = configured(steps=30, phases=(Phase(0, 2, 64),))
    tiles = Tiles(config.data, 64)
    tiles.held_out = tiles.train
    trainer = Trainer(config)
    before = trainer.validate(tiles)
    for _ in range(30):
        values = trainer.run_step(tiles)
        assert values is not None
        assert bool(values.isfinite().all())
    assert trainer.progress == 1
    after = trainer.validate(tiles)
    assert set(after) == {f"{name}_{quality}" for name in ("bpp", "psnr") for quality in (8, 32, 56)}
    for quality in (8, 32, 56):
        assert after[f"bpp_{quality}"] < 0.95 * before[f"bpp_{quality}"]
        assert after[f"psnr_{quality}"] > before[f"psnr_{quality}"] - 0.1


class StoppedError(Exception):
    pass


def stop_at(step: int) -> Callable[[Report], None]:
    def report(entry: Report) -> None:
        if entry.step == step:
            raise StoppedError

    return report


def test_a_run_that_was_stopped_continues_exactly(tmp_path: Path) -> None:
    """Through both phases: the same weights, average and optimiser in the end, from the same random numbers."""
    whole = train(configured(output=tmp_path / "whole", steps=6))
    config = configured(output=tmp_path / "stopped", steps=6, save_minutes=0.0)
    for step in (3, 6):  # a state is saved after each step, and the report of a step comes before
        with pytest.raises(StoppedError):
            train(config, stop_at(step))
    stopped = train(config)

    assert stopped.step == whole.step == 6
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


def test_every_schedule_has_its_learning_rates() -> None:
    """The learning rate after the warm-up, at the start, in the middle and near the end of the budget."""
    rates: dict[str, list[float]] = {}
    for schedule in ("cosine", "constant", "decay"):
        trainer = Trainer(configured(schedule=schedule, warm_up=4, steps=100, learning_rate=2e-3))
        for step in (1, 50, 99):
            trainer.step = step
            trainer.set_learning_rate()
            rates.setdefault(schedule, []).append(trainer.optimiser.param_groups[0]["lr"] / 2e-3)
    assert rates["cosine"] == pytest.approx([0.5, 0.5, 0.0], abs=1e-3)
    assert rates["constant"] == [0.5, 1, 1]
    assert rates["decay"] == pytest.approx([0.9, 1 - 0.5**0.5, 0.005], abs=1e-3)


def test_a_run_without_an_end_is_exported_by_another_that_begins_with_its_state(tmp_path: Path) -> None:
    """Weights, average and optimiser are those of the first run; the clock is the second's own, when it resumes too."""
    first = train(configured(output=tmp_path / "first", steps=2, schedule="constant"))
    config = configured(
        output=tmp_path / "second", start=tmp_path / "first", steps=1, schedule="decay", learning_rate=1e-12
    )
    second = train(config)
    assert second.step == 1
    moments = [trainer.optimiser.state_dict()["state"][0]["step"] for trainer in (first, second)]
    assert [float(moment) for moment in moments] == [2, 3]
    for found, expected in zip(second.model.parameters(), first.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
    assert train(config).step == 1
    with pytest.raises(CheckpointError, match="with memory light"):
        train(dataclasses.replace(config, memory="light", output=tmp_path / "third"))


def test_the_seed_decides(tmp_path: Path) -> None:
    first, second, third = (Trainer(configured(seed=seed)).model.g_a[2].expand.weight for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_a_step_that_is_not_finite_is_skipped_and_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiles = Tiles(SMALL.data, 64)
    trainer = Trainer(configured(steps=10, output=tmp_path))
    window = [trainer.run_step(tiles)]
    before = [tensor.clone() for tensor in trainer.model.parameters()]

    compute = trainer.objective.forward
    with monkeypatch.context() as patched:
        patched.setattr(trainer.objective, "forward", lambda *x: (compute(*x)[0] * float("nan"), compute(*x)[1]))
        window.append(trainer.run_step(tiles))
    for kept, tensor in zip(before, trainer.model.parameters(), strict=True):
        assert torch.equal(kept, tensor)

    window.append(trainer.run_step(tiles))
    moved = trainer.count_skipped(torch.stack(window))
    assert torch.equal(moved, torch.stack((window[0], window[2])))
    assert (trainer.step, trainer.skipped) == (3, 1)
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters())
    trainer.save()
    resumed = Trainer(trainer.config)
    resumed.load()
    assert (resumed.step, resumed.skipped) == (3, 1)


@pytest.mark.parametrize("memory", ["none", *MEMORY_BANKS])
def test_every_number_gets_a_gradient(memory: str | None) -> None:
    """In bfloat16 too, and with every memory bank; processes that train together wait for all of them."""
    trainer = Trainer(configured(memory=memory, phases=(Phase(0, 1, 64),)))
    assert bool(trainer.run_step(Tiles(SMALL.data, 64)).isfinite().all())
    assert [name for name, parameter in trainer.model.named_parameters() if parameter.grad is None] == []
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_the_average_lends_itself_to_the_model() -> None:
    trainer = Trainer(SMALL)
    for average in trainer.average:
        average.fill_(0.25)
    own = [parameter.clone() for parameter in trainer.model.parameters()]
    with trainer.averaged() as model:
        assert not model.training
        assert all(bool((parameter == 0.25).all()) for parameter in model.parameters())
    assert all(torch.equal(parameter, kept) for parameter, kept in zip(trainer.model.parameters(), own, strict=True))


@pytest.mark.parametrize("steps", [1, 4, 6, 9])
def test_the_average_counts_every_step(steps: int) -> None:
    """It moves with each fourth step, and where it is read also by the steps since then."""
    trainer, tiles = Trainer(configured(steps=9, ema=0.5)), Tiles(SMALL.data, 64)
    expected = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    previous = 0
    for step in range(1, steps + 1):
        trainer.run_step(tiles)
        if step % 4 == 0 or step == steps:
            decay = min(0.5, (1 + step) / (10 + step)) ** (step - previous)
            previous = step
            for average, parameter in zip(expected, trainer.model.parameters(), strict=True):
                average.lerp_(parameter.detach(), 1 - decay)
    with trainer.averaged() as model:
        torch.testing.assert_close(list(model.parameters()), expected)


def test_gradients_are_clipped_as_torch_clips_them() -> None:
    """The optimiser divides them by the same number. Of several steps some are clipped, and one has no finite norm."""
    trainer = Trainer(configured(bfloat16=False))
    parameters = [parameter.detach().clone().requires_grad_() for parameter in trainer.model.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for scale in (1e-6, 1.0, 1e-5, float("inf"), 3.0):
        for ours, theirs in zip(trainer.model.parameters(), parameters, strict=True):
            ours.grad = scale * torch.ones_like(ours)
            theirs.grad = ours.grad.clone()
        norm = trainer.update()
        assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(parameters, SMALL.clip))
        if norm.isfinite():
            optimiser.step()
        assert norm.isfinite() == (scale < 10)
    torch.testing.assert_close(list(trainer.model.parameters()), parameters)
    assert not torch.equal(next(trainer.model.parameters()), next(Trainer(configured(seed=0)).model.parameters()))


@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "huge"},
        {"preset": "base"},
        {"phases": ()},
        {"phases": (Phase(0, 1, 100),)},
        {"phases": (Phase(0, 1, 0),)},
        {"phases": (Phase(0, 0, 64),)},
        {"phases": (Phase(0.5, 1, 64),)},
        {"phases": (Phase(0, 1, 64), Phase(0, 1, 128))},
        {"phases": (Phase(0, 1, 64), Phase(1, 1, 128))},
        {"metric": "vmaf"},
        {"memory": "lite"},
        {"schedule": "linear"},
        {"device": "tpu"},
        {"metric": "ms-ssim"},  # its window does not fit into crops of 64
        {"rate": 0.5},
        {"rescale": 0.0},
        {"minutes": 0.0},
        {"steps": 0},
        {"part_mb": 0.0},
    ],
)
def test_a_bad_configuration_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        configured(**changes)


@pytest.mark.parametrize("text", ["", "12", "12x", "x128", "12x128@", "12x128@-1", "12x128;4x64", "12x128@0.5.5"])
def test_phases_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="phase"):
        phases_of(text)


def test_the_lambdas_of_ms_ssim_are_those_of_the_field() -> None:
    """HPCM's pairs with the lambda of the MSE; loss and gradients of such a step are finite."""
    for mse, similarity in (
        (0.0018, 2.40),
        (0.0035, 4.58),
        (0.0067, 8.73),
        (0.013, 16.64),
        (0.025, 31.73),
        (0.0483, 60.50),
    ):
        assert 2.40 * (mse / 0.0018) ** LAMBDA_POWER == pytest.approx(similarity, rel=0.02)
    trainer = Trainer(configured(metric="ms-ssim", phases=(Phase(0, 1, 192),), steps=1))
    values = trainer.run_step(Tiles(SMALL.data, 192))
    assert bool(values.isfinite().all())


def test_phases_are_read_and_followed() -> None:
    phases = phases_of("12x128, 4x256@0.85,2x512@.9")
    assert phases == (Phase(0, 12, 128), Phase(0.85, 4, 256), Phase(0.9, 2, 512))
    config = configured(phases=phases)
    assert [config.phase(part).batch for part in (0, 0.84, 0.85, 0.89, 0.9, 1)] == [12, 12, 4, 4, 2, 2]


def test_a_single_rate_fixes_the_quality() -> None:
    """Every image of every step has the quality whose lambda was asked for."""
    lambdas = TRAINABLE.lambdas
    assert configured(rate=lambdas[0]).fixed_quality == 0
    assert configured(rate=lambdas[3]).fixed_quality == pytest.approx(27)
    trainer = Trainer(configured(rate=lambdas[-1]))
    _, quality = trainer.sample(Tiles(SMALL.data, 64))
    assert quality.tolist() == [63, 63]


def test_a_profile_measures_every_phase_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def short(config: TrainingConfig) -> list[profile.Profile]:
        measured.extend(profile_of(config, steps=1))
        return measured

    profile_of = profile.profile
    monkeypatch.setattr(profile, "profile", short)
    result = CliRunner().invoke(
        app, ["train", str(DATA / "sample.png"), "-o", str(tmp_path / "run"), "--crops", "1x64,2x64@0.9", "--profile"]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.count("images/s") == 2
    assert not (tmp_path / "run").exists()
    assert [each.phase for each in measured] == [Phase(0, 1, 64), Phase(0.9, 2, 64)]
    for each in measured:
        assert tuple(each.seconds) == profile.PARTS
        assert each.images * sum(each.seconds.values()) == pytest.approx(each.phase.batch)
        assert each.flops / each.pixels == pytest.approx(6 * sum(macs_per_pixel(TRAINABLE, each.phase.crop).values()))
        parts = [part for _, part in each.kernels]
        assert parts == sorted(parts, reverse=True)
        assert 0.3 < sum(parts) <= 1


# --- the state -----------------------------------------------------------------------------------------------------


def test_a_state_in_parts_is_read_again(tmp_path: Path) -> None:
    """Parts under the size; the parts of the state before are gone; the whole comes back."""
    state = {"numbers": torch.arange(100_000), "name": "x"}
    write_state(tmp_path, {"old": torch.zeros(100_000)}, "1", part_mb=0.25)
    write_state(tmp_path, state, "2", part_mb=0.25)
    parts = sorted(tmp_path.glob("*.part"))
    assert [part.name for part in parts] == [f"state-2-{i:03d}.part" for i in range(4)]
    assert max(part.stat().st_size for part in parts) == 250_000
    found = read_state(tmp_path, torch.device("cpu"))
    assert torch.equal(found["numbers"], state["numbers"])
    assert found["name"] == "x"


def test_a_state_that_was_not_finished_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(tmp_path, {"a": torch.zeros(50_000)}, "1", part_mb=0.1)

    def stop(path: Path, data: bytes) -> None:
        if path.name in ("state-2-001.part", "state.json"):
            raise StoppedError
        path.write_bytes(data)

    with monkeypatch.context() as patched:
        patched.setattr("hpcmref.training.state.atomic_write", stop)
        for size in (0.1, None):
            with pytest.raises(StoppedError):
                write_state(tmp_path, {"a": torch.ones(50_000)}, "2", part_mb=size)
    assert float(read_state(tmp_path, torch.device("cpu"))["a"].sum()) == 0


@pytest.mark.parametrize(
    "damage", ["a bit", "short", "gone", "no manifest", "a list", "outside", "a long manifest", "no state"]
)
def test_a_damaged_state_is_refused(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write_state(folder, {"a": torch.zeros(50_000)}, "1", part_mb=0.1)
    part, manifest = folder / "state-1-001.part", folder / "state.json"
    data = bytearray(part.read_bytes())
    if damage == "a bit":
        data[777] ^= 1
        part.write_bytes(data)
    elif damage == "short":
        part.write_bytes(data[:-1])
    elif damage == "gone":
        part.unlink()
    elif damage == "outside":
        part.rename(tmp_path / part.name)
        manifest.write_text(manifest.read_text().replace(part.name, f"../{part.name}"))
    elif damage == "no state":
        manifest.write_text('{"parts": []}')
    else:
        manifest.write_text({"no manifest": "{", "a list": "[1]", "a long manifest": " " * 10**6 + "{}"}[damage])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_state(folder, torch.device("cpu"))


@pytest.mark.parametrize(
    "changes", [{"preset": "light"}, {"preset": None}, {"average": []}, {"clock": {}}, {"model": {}}]
)
def test_a_state_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = Trainer(configured(output=tmp_path))
    trainer.save()
    write_state(tmp_path, {**read_state(tmp_path, torch.device("cpu")), **changes}, "changed")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        trainer.load()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_missed() -> None:
    with pytest.raises(ConfigError, match="no CUDA device 0"):
        Trainer(configured(device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [(), ("--compile",)])
def test_the_recipe_for_a_gpu(tmp_path: Path, compiled: tuple[str, ...]) -> None:
    """The command of docs/training.md, on one photograph and for a few steps; the model codes on the CPU."""
    arguments = ["train", str(DATA / "sample.png"), "-o", str(tmp_path), "--preset", "light", "--device", "cuda"]
    result = CliRunner().invoke(
        app, [*arguments, "--crops", "4x192,1x256@0.9", "--shard-mb", "15", "--steps", "10", *compiled]
    )
    assert result.exit_code == 0, result.output
    assert max(part.stat().st_size for part in tmp_path.glob("*.part")) <= 15 * 10**6
    codec = load(tmp_path / "light.safetensors", "cpu")
    assert codec.decode(codec.encode(Image.new("RGB", (70, 70), "teal"), 30)).size == (70, 70)


# --- from photographs to a codec -----------------------------------------------------------------------------------


def test_data_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.tar").write_bytes(b"no archive")
    huge = tmp_path / "huge"
    huge.mkdir()
    Image.new("1", (20000, 20000)).save(huge / "bomb.png")
    for source, name in ((tmp_path / "broken.tar", "broken.tar"), (huge, "bomb.png")):
        result = CliRunner().invoke(app, ["train", str(source), "-o", str(tmp_path / "run"), "--steps", "1"])
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert f"{name} cannot be read" in result.stderr


def test_from_the_command_line_to_an_image(tmp_path: Path, sample: Image.Image) -> None:
    """Train, resume, export: the checkpoint encodes and decodes."""
    arguments = [
        *("train", str(DATA / "sample.png"), "-o", str(tmp_path / "run"), "--preset", "nano", "--seed", "3"),
        *("--crops", "1x64,1x128@0.5", "--no-bfloat16", "--shard-mb", "0.5"),
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

    before = path.read_bytes()
    for option, value, why in (("--seed", "4", "--seed 3, not 4"), ("--lambda", "0.01", "--lambda None, not 0.01")):
        result = CliRunner().invoke(app, [*arguments, "--steps", "3", option, value])
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert f"has a run with {why}" in result.stderr
    (tmp_path / "own").mkdir()
    own = Path(shutil.copy(path, tmp_path / "own"))
    result = CliRunner().invoke(app, [*arguments, "--steps", "1", "-o", str(own.parent), "--from", str(own)])
    assert result.exit_code == 2
    assert "to continue" in result.stderr
    assert own.read_bytes() == path.read_bytes() == before

    codec = load(path, "cpu")
    part = sample.crop((30, 30, 170, 130))
    data = codec.encode(part, 63)
    decoded = codec.decode(data)
    error = np.square(np.asarray(decoded, np.float64) - np.asarray(part, np.float64)).mean()
    assert decoded.size == part.size
    assert 10 * np.log10(255**2 / error) > 17  # of 32 latent channels that have hardly been trained

    stream = io.BytesIO()
    part.save(stream, "PNG")
    for command, data_in in (("encode", stream.getvalue()), ("decode", data)):
        result = CliRunner().invoke(app, [command, "-", "-o", "-", "-m", str(path)], input=data_in)
        assert result.exit_code == 0, result.output
