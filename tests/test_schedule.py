"""Is every latent coded exactly once, and are the lattices those of the official code?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hpcmref.model.schedule import (
    S1,
    S2,
    STEPS,
    STEPS_S1,
    STEPS_S2,
    STEPS_S3,
    Lattice,
    Step,
    displaced_source,
    lattices,
)

SIZES = [(4, 4), (4, 20), (8, 12), (16, 16)]
"""Of y."""

CPU = torch.device("cpu")

LATTICES = pytest.mark.parametrize("lattice", [S1, S2], ids=["S1", "S2"])


def numbered(channels: int, height: int, width: int, batch: int = 2) -> Tensor:
    """Every element is another number, none 0."""
    return torch.arange(1, batch * channels * height * width + 1).view(batch, channels, height, width).float()


def alone(step: Step, values: Tensor) -> Tensor:
    """What a step codes, at its places in a plane of its lattice, zero elsewhere."""
    batch, channels, height, width = values.shape
    return step.put(torch.zeros(batch, step.groups * channels, height, width), values)


def on_y(step: Step, values: Tensor) -> Tensor:
    """What a step codes, at its places in y, zero elsewhere."""
    placed = alone(step, values)
    if step.scale == 1:
        placed = S1.up(placed)
    return S2.up(placed) if step.scale < 3 else placed


@pytest.mark.parametrize("size", SIZES)
def test_every_latent_is_coded_exactly_once(size: tuple[int, int]) -> None:
    y = numbered(16, *size)
    planes = lattices(y)
    coded = [on_y(step, step.select(planes[step.scale])) for step in STEPS]
    assert torch.equal(torch.stack(coded).count_nonzero(dim=0), torch.ones_like(y, dtype=torch.int64))
    assert torch.equal(sum(coded), y)


def test_there_are_2_3_and_6_steps() -> None:
    assert [step.scale for step in STEPS] == [1] * 2 + [2] * 3 + [3] * 6
    assert [step.groups for step in STEPS] == [2] * 2 + [4] * 3 + [8] * 6
    assert (*STEPS_S1, *STEPS_S2, *STEPS_S3) == STEPS


def test_a_coarser_scale_is_what_a_finer_one_leaves_out() -> None:
    """The steps of s2 and s3 code none of the positions that the scales before them have coded."""
    for lattice, steps, groups in ((S1, STEPS_S2, 4), (S2, STEPS_S3, 8)):
        height, width = 8, 8
        taken = lattice.up(torch.ones(1, 16, height // 2, width // 2))
        coded = sum(alone(step, torch.ones(1, 16 // groups, height, width)) for step in steps)
        assert torch.equal(taken + coded, torch.ones(1, 16, height, width))


def test_s1_is_where_the_official_code_has_it() -> None:
    """(row, column) modulo 4 of the latents that s1 holds, by channel group: recorded from the official code."""
    held = [(0, 0), (1, 1), (0, 3), (1, 2), (2, 0), (3, 1), (2, 3), (3, 2)]
    y = torch.zeros(1, 8, 8, 12)
    for group, (row, col) in enumerate(held):
        y[:, group, row::4, col::4] = 1
    assert torch.equal(lattices(y)[1], torch.ones(1, 8, 2, 3))
    assert torch.equal(S2.up(S1.up(torch.ones(1, 8, 2, 3))), y)


@LATTICES
@pytest.mark.parametrize("size", [(2, 2), (4, 6), (10, 2)])
def test_down_put_and_up_undo_each_other(lattice: Lattice, size: tuple[int, int]) -> None:
    height, width = size
    x = numbered(16, *size)
    values = -numbered(16, height // 2, width // 2)
    assert torch.equal(lattice.down(lattice.up(values)), values)
    assert torch.equal(lattice.put(x, lattice.down(x)), x)
    put = lattice.put(x, values)
    assert torch.equal(lattice.down(put), values)
    assert torch.equal(torch.where(put < 0, put, 0), lattice.up(values))
    assert torch.equal(torch.where(put < 0, 0, x) + lattice.up(values), put)
    assert bool((x > 0).all())  # `put` does not write into its argument


def test_put_with_an_underscore_overwrites_its_argument() -> None:
    for lattice in (S1, S2):
        x, values = numbered(16, 4, 8), -torch.ones(2, 16, 2, 4)
        expected = lattice.put(x, values)
        assert torch.equal(x, numbered(16, 4, 8))
        assert lattice.put_(x, values) is x
        assert torch.equal(x, expected)
    for step in STEPS:
        x, values = numbered(16, 4, 8), -torch.ones(2, 16 // step.groups, 4, 8)
        expected = torch.where(alone(step, values) == -1, -1, x)
        assert torch.equal(step.put(x, values), expected)
        assert torch.equal(x, numbered(16, 4, 8))
        assert step.put_(x, values) is x
        assert torch.equal(x, expected)


def test_masks_move_the_same_values_as_indices() -> None:
    x = numbered(16, 4, 8)
    for lattice in (S1, S2):
        assert torch.equal(lattice.down(x, masked=True), lattice.down(x))
        assert torch.equal(lattice.up(x, masked=True), lattice.up(x))
    for step in STEPS:
        assert torch.equal(step.select(x, masked=True), step.select(x))


@pytest.mark.parametrize("step", STEPS, ids=range(11))
@pytest.mark.parametrize("size", [(4, 4), (6, 10), (1, 3)])
def test_select_and_put_undo_each_other(step: Step, size: tuple[int, int]) -> None:
    """At any size: attention windows and priors may see planes that do not fill a pattern."""
    x = numbered(16, *size)
    values = step.select(x)
    assert values.shape == (2, 16 // step.groups, *size)
    placed = alone(step, values)
    assert torch.equal(step.select(placed), values)
    assert torch.equal(placed[placed != 0], x[placed != 0])
    assert placed.count_nonzero() == values.numel()


@pytest.mark.parametrize("step", STEPS, ids=range(11))
def test_a_position_codes_the_channel_group_that_the_table_says(step: Step) -> None:
    group = torch.arange(8 * step.groups).div(8, rounding_mode="floor").view(1, -1, 1, 1).expand(1, -1, 8, 8)
    chosen = step.select(group.float())
    assert torch.equal(chosen, step.table(8, 8, CPU).expand_as(chosen).float())
    assert set(step.table(8, 8, CPU).flatten().tolist()) == set(range(step.groups))


# --- the displaced hyper parameters of s2 --------------------------------------------------------------------------


def official_s2_hyper(y: Tensor) -> Tensor:
    """What get_s2_hyper_with_mask of the official code does, with its masks: y (B, C, H, W) -> (B, C, H/2, W/2).

    y[mask_s2 - mask_s1] goes into recon[~mask_rec_s2], both flattened in row-major order inside each channel, with the
    mask_s1 of get_mask_for_s1, which does not describe what s1 holds. Zero where s1 has coded.
    """
    mask_s1_says = ((0, 0), (1, 1), (0, 1), (1, 0), (0, 2), (1, 3), (0, 3), (1, 2))
    batch, channels, height, width = y.shape
    result = torch.zeros(batch, channels, height // 2, width // 2, dtype=y.dtype)
    for channel in range(channels):
        group = channel // (channels // 8)
        mask = torch.zeros(height, width, dtype=torch.bool)
        row, col = ((0, 0), (1, 1), (0, 1), (1, 0))[group % 4]
        mask[row::2, col::2] = True
        row, col = mask_s1_says[group]
        mask[row::4, col::4] = False
        free = torch.ones(height // 2, width // 2, dtype=torch.bool)
        row, col = ((0, 0), (0, 1), (1, 0), (1, 1))[group // 2]
        free[row::2, col::2] = False
        for image in range(batch):
            result[image, channel][free] = y[image, channel][mask]
    return result


def displaced(y: Tensor) -> Tensor:
    """By `displaced_source`, and zero where s1 has coded."""
    batch, channels, height, width = y.shape
    source = displaced_source(channels, height // 2, width // 2, CPU)
    values = y.flatten(2).gather(2, source.expand(batch, -1, -1)).unflatten(2, (height // 2, width // 2))
    return S1.put(values, torch.zeros(batch, channels, height // 4, width // 4))


@pytest.mark.parametrize("size", [*SIZES, (12, 8), (20, 4)])
@pytest.mark.parametrize("channels", [8, 24])
def test_displaced_source_is_the_official_selection(channels: int, size: tuple[int, int]) -> None:
    y = numbered(channels, *size)
    assert torch.equal(displaced(y), official_s2_hyper(y))


def test_what_the_displacement_does() -> None:
    """As it was observed in the official code: (row, column) of s2 that the value at each position comes from."""
    width = 6
    plane = torch.arange(4 * width).view(4, width)
    y = S2.up(plane.expand(1, 8, 4, width).float() + 1)
    found = displaced(y)[0].long() - 1
    for group in range(8):
        for rows in (slice(0, 2), slice(2, 4)):  # nothing leaves a pair of rows
            (upper, lower), (even, odd) = plane[rows], found[group, rows]
            if group < 2:  # in place
                assert even[1::2].tolist() == upper[1::2].tolist()
                assert odd.tolist() == lower.tolist()
            elif group < 4:  # even rows come from one column to the right
                assert even[0::2].tolist() == upper[1::2].tolist()
                assert odd.tolist() == lower.tolist()
            else:  # element k of one list goes to element k of another
                source = [*upper[0::2].tolist(), *lower.tolist()]
                assert [*even.tolist(), *odd[1 if group < 6 else 0 :: 2].tolist()] == source


def test_the_order_is_that_of_format_md() -> None:
    text = (Path(__file__).parent.parent / "FORMAT.md").read_text()
    table = text.split("## Model coding order")[1].split("| --- | --- | --- | --- | --- |\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len(rows) == len(STEPS)
    for number, ((count, lattice, groups, array, pattern), step) in enumerate(zip(rows, STEPS, strict=True), start=1):
        side = {1: "h, w", 2: "2h, 2w", 3: "4h, 4w"}[step.scale]
        assert (count, lattice, groups) == (str(number), f"s{step.scale}", str(step.groups))
        assert array == f"(M/{step.groups}, {side})"
        assert pattern == " / ".join(" ".join(map(str, row)) for row in step.pattern)
