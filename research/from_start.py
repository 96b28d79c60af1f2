"""What does a change of nano gain when it is trained from the start, in the same time as nano itself?

    python -m research.from_start run train-*.tar -o variants --variants "state 64;none;state 128"
    python -m research.from_start report variants

Every variant trains on one thread from the same seed, on the same kind of crops, with a complete cosine. Its number of
steps is that of nano (`--steps`), divided by the ratio of their times a step: these are measured in turns, in processor
time, before any training. So other work on the machine changes no result. Afterwards, the average of the weights codes
the middle of held-out tiles at five qualities, with estimated bits. `report` prints BD-rates against nano, and the
multiplications per pixel. Results are lines of JSON, one for each run; existing ones are not repeated, and a run that
was stopped continues.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from hpcmref.bench.bdrate import bd_rate
from hpcmref.bench.curves import Curve, Point
from hpcmref.model import PRESETS, HPCMConfig
from hpcmref.model.config import MEMORY_BANKS
from hpcmref.model.macs import macs_per_pixel
from hpcmref.model.memory_bank import StateBank
from hpcmref.runtime.heap import keep_memory
from hpcmref.training import Phase, Trainer, TrainingConfig
from hpcmref.training.data import Tiles
from hpcmref.training.state import has_state
from research.effort_curve import middle
from research.memory_ablation import lines_of

NANO = PRESETS["nano"]
BASELINE = "state 64"
LIGHT = MEMORY_BANKS["light"]
STATE = MEMORY_BANKS["state"]


class GatedState(StateBank):
    """Half of what a prior writes are gates: the other half is multiplied by their sigmoid, and then added.

    The channels of the state that belong to gates stay zero, so only half of its width is used.
    """

    def write(self, state: Tensor, written: Tensor) -> Tensor:
        values, gates = written.chunk(2, dim=1)
        return state + torch.cat((values * gates.sigmoid(), torch.zeros_like(gates)), dim=1)

    write_ = write


class LastReferences(StateBank):
    """The last four references side by side instead of a sum: a quarter of the width is new, and the rest moves on."""

    COUNT = 4

    def write(self, state: Tensor, written: Tensor) -> Tensor:
        newest = self.width // self.COUNT
        return torch.cat((written[:, :newest], state[:, : self.width - newest]), dim=1)

    write_ = write


@dataclass(frozen=True)
class Variant:
    """One change of nano: its networks, its bank (if none of the package's), and its learning rate and crops a step."""

    model: HPCMConfig
    bank: type[StateBank] | None = None
    learning_rate: float = 1e-3
    batch: int = 8


def _state(width: int) -> HPCMConfig:
    return replace(NANO, memory=replace(STATE, width=width))


VARIANTS: dict[str, Variant] = {
    BASELINE: Variant(NANO),
    "none": Variant(replace(NANO, memory=None)),
    "state 32": Variant(_state(32)),
    "state 128": Variant(_state(128)),
    "state 256": Variant(_state(256)),
    "state 64, gated": Variant(_state(128), GatedState),
    "4 references of 32": Variant(_state(128), LastReferences),
    "light": Variant(replace(NANO, memory=LIGHT)),
    "light, before the prior": Variant(replace(NANO, memory=replace(LIGHT, before_prior=True))),
    "global": Variant(replace(NANO, memory=MEMORY_BANKS["global"])),
    "cross": Variant(replace(NANO, memory=MEMORY_BANKS["cross"])),
    "g_s with 6 blocks": Variant(replace(NANO, synthesis=((192, 6),))),
    "g_a and g_s with 6 blocks": Variant(replace(NANO, stages=((192, 6),), synthesis=((192, 6),))),
    "g_a and g_s with 3 blocks": Variant(replace(NANO, stages=((192, 3),), synthesis=((192, 3),))),
    "g_a and g_s of width 256, 3 blocks": Variant(replace(NANO, stages=((256, 3),), synthesis=((256, 3),))),
    "priors with 3 blocks": Variant(replace(NANO, prior_s1_s2=(3, 1), prior_s3=(3, 1))),
    "priors with 1 block": Variant(replace(NANO, prior_s1_s2=(1, 1), prior_s3=(1, 1))),
    "M = 192": Variant(replace(NANO, M=192)),
    "M = 256": Variant(replace(NANO, M=256)),
    "learning rate 2e-3": Variant(NANO, learning_rate=2e-3),
    "learning rate 5e-4": Variant(NANO, learning_rate=5e-4),
    "16 crops, learning rate 1.4e-3": Variant(NANO, learning_rate=1.4e-3, batch=16),
    "4 crops, learning rate 7e-4": Variant(NANO, learning_rate=7e-4, batch=4),
}  # fmt: skip

QUALITIES = (4, 18, 32, 46, 60)
CROP, SIDE = 128, 448
"""The sides of the crops of a step, and of the middle of the held-out tiles."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    data: Annotated[list[Path], typer.Argument(help="Folders or tar files to train on.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder for results.jsonl and the runs.")],
    variants: Annotated[str, typer.Option(help="Which ones, with semicolons between.")] = ";".join(VARIANTS),
    steps: Annotated[int, typer.Option(min=1, help="Of nano.")] = 4500,
    tiles: Annotated[int, typer.Option(min=1, help="Held-out tiles to judge on.")] = 24,
    seed: Annotated[int, typer.Option()] = 1,
    limit: Annotated[int | None, typer.Option(help="Read only the first images, this many.")] = None,
) -> None:
    """Train and judge variants, one after the other."""
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    results = output / "results.jsonl"
    for name in map(str.strip, variants.split(";")):
        if any((row["variant"], row["seed"]) == (name, seed) for row in lines_of(results)):
            continue
        folder = output / f"{name.replace(', ', '-').replace(' ', '_')}.{seed}"
        row = trained(name, tuple(data), folder, steps, tiles, seed, limit)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def trained(
    name: str, data: tuple[Path, ...], folder: Path, steps: int, count: int, seed: int, limit: int | None
) -> dict[str, Any]:
    """Do one run, and return its line of the results. A state in `folder` is continued."""
    variant, tiles = VARIANTS[name], Tiles(data, CROP, limit)
    folder.mkdir(parents=True, exist_ok=True)
    ratio_file = folder / "ratio.json"
    if not ratio_file.exists():
        ratio_file.write_text(json.dumps(step_ratio(variant, data, tiles)))
    ratio = json.loads(ratio_file.read_text())
    trainer = _trainer(variant, data, folder, round(steps / ratio), seed)
    if has_state(folder):
        trainer.load()
    saved = time.monotonic()
    while trainer.progress < 1:
        trainer.run_step(tiles)
        if trainer.progress >= 1 or time.monotonic() - saved > 300:
            trainer.save()
            saved = time.monotonic()
    return {
        "variant": name,
        "seed": seed,
        "steps": trainer.step,
        "batch": variant.batch,
        "step_ratio": round(ratio, 3),
        "multiplications": round(sum(macs_per_pixel(variant.model).values())),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "points": judged(trainer, tiles, count),
    }


def _trainer(variant: Variant, data: tuple[Path, ...], folder: Path, steps: int, seed: int) -> Trainer:
    """The trainer of a variant. The package knows presets only, so the variant is one while its trainer is made."""
    nano, PRESETS["nano"] = PRESETS["nano"], variant.model
    try:
        trainer = Trainer(
            TrainingConfig(
                data=data, output=folder, steps=steps, phases=(Phase(0, variant.batch, CROP),), transpose=True,
                learning_rate=variant.learning_rate, seed=seed,
            )
        )  # fmt: skip
    finally:
        PRESETS["nano"] = nano
    if variant.bank is not None:
        trainer.model.entropy.context.state = variant.bank(variant.model.state_width)
    return trainer


def step_ratio(variant: Variant, data: tuple[Path, ...], tiles: Tiles, rounds: int = 6) -> float:
    """The processor time of a step of the variant, divided by that of nano. Both take turns; the medians count."""
    if (variant.model, variant.batch) == (NANO, 8):
        return 1.0
    trainers = [_trainer(each, data, Path("unused"), 10**6, 0) for each in (VARIANTS[BASELINE], variant)]
    seconds: list[list[float]] = [[], []]
    for index in range(rounds + 1):
        for trainer, times in zip(trainers, seconds, strict=True):
            begun = time.process_time()
            for _ in range(3):
                trainer.run_step(tiles)
            if index > 0:  # the first ones allocate memory
                times.append(time.process_time() - begun)
    nano, other = map(statistics.median, seconds)
    return other / nano


def judged(trainer: Trainer, tiles: Tiles, count: int) -> list[tuple[float, float]]:
    """Mean bits per pixel and PSNR in dB at each quality, on the middle of held-out tiles, which stay cut."""
    tiles.held_out = [middle(tile, SIDE) for tile in tiles.held_out]
    values = trainer.validate(tiles, count, QUALITIES)
    return [(values[f"bpp_{quality}"], values[f"psnr_{quality}"]) for quality in QUALITIES]


@app.command()
def report(output: Annotated[Path, typer.Argument(help="The folder of the runs.")]) -> None:
    """Print BD-rates against nano with the same seed, as a table."""
    results = lines_of(output / "results.jsonl")
    nano = {row["seed"]: row for row in results if row["variant"] == BASELINE}
    print("| variant | thousand multiplications | time a step | steps | BD-rate |\n| --- | --- | --- | --- | --- |")
    for row in results:
        delta = bd_rate(curve(nano[row["seed"]]), curve(row)).value if row["seed"] in nano else None
        text = "none" if delta is None else f"{delta:+.2f} %"
        thousands = row["multiplications"] / 1000
        print(f"| {row['variant']} | {thousands:.1f} | {row['step_ratio']:.2f} | {row['steps']} | {text} |")


def curve(row: dict[str, Any]) -> Curve:
    """The curve of one line of the results."""
    return Curve(row["variant"], tuple(Point(*point) for point in row["points"]))


if __name__ == "__main__":
    keep_memory()
    app()
