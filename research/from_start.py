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
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hpcmref.bench.bdrate import bd_rate
from hpcmref.bench.curves import Curve, Point
from hpcmref.model.macs import macs_per_pixel
from hpcmref.runtime.heap import keep_memory
from hpcmref.training import Phase, Trainer, TrainingConfig
from hpcmref.training.data import Tiles
from hpcmref.training.state import has_state
from research.effort_curve import middle
from research.memory_ablation import lines_of
from research.variants import VARIANTS, Variant

BASELINE = "state 64"
QUALITIES = (4, 18, 32, 46, 60)
SIDE = 448
"""The side of the middle of the held-out tiles."""

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
    variant = VARIANTS[name]
    tiles = Tiles(data, variant.crop, limit)
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
        "multiplications": round(multiplications(variant)),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "points": judged(trainer, tiles, count),
    }


def _trainer(variant: Variant, data: tuple[Path, ...], folder: Path, steps: int, seed: int) -> Trainer:
    """The trainer of a variant."""
    with variant.in_place():
        trainer = variant.trainer(
            TrainingConfig(
                data=data, output=folder, steps=steps, phases=(Phase(0, variant.batch, variant.crop),), transpose=True,
                learning_rate=variant.learning_rate, ema=variant.average, seed=seed,
            )
        )  # fmt: skip
    if variant.bank is not None:
        trainer.model.entropy.context.state = variant.bank(variant.model.state_width)
    return trainer


def step_ratio(variant: Variant, data: tuple[Path, ...], tiles: Tiles, rounds: int = 6) -> float:
    """The processor time of a step of the variant, divided by that of nano. Both take turns; the medians count."""
    nano = VARIANTS[BASELINE]
    if replace(variant, learning_rate=nano.learning_rate, average=nano.average, trainer=nano.trainer) == nano:
        return 1.0
    trainers = [_trainer(each, data, Path("unused"), 10**6, 0) for each in (nano, variant)]
    seconds: list[list[float]] = [[], []]
    for index in range(rounds + 1):
        for trainer, times in zip(trainers, seconds, strict=True):
            begun = time.process_time()
            for _ in range(3):
                trainer.run_step(tiles)
            if index > 0:  # the first ones allocate memory
                times.append(time.process_time() - begun)
    one, other = map(statistics.median, seconds)
    return other / one


def multiplications(variant: Variant) -> float:
    """Multiply-accumulates per pixel."""
    with variant.in_place():
        return sum(macs_per_pixel(variant.model).values()) + variant.besides


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
