"""Does a memory bank pay? `python -m hpcmref.bench.ablation run ...`, then `... report ...`.

Every variant starts as one and the same trained model, with a closed bank, and its context model is fine-tuned: the
same crops, qualities, noise and number of steps for all of one seed, plain HPCM (`off`) included. A bank acts on the
entropy path alone, so g_a, h_a, h_s and g_s keep their weights, and the features of all crops are computed once. The
loss is the rate, weighted as in training; the weights that are judged are an average over the last steps.

Kodak: bits per pixel are estimated by the model in float32, and PSNR is real; `report` writes real files of a few
images beside that, and measures the time that they take.
`off` is judged after more steps, too: a variant whose step takes r times as long is compared with `off` after N steps
(equal steps) and after r N (equal time, interpolated). Results are lines of JSON, one a run, and runs that are there
already are not repeated.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from hpcmref import checkpoints
from hpcmref.errors import HpcmrefError
from hpcmref.model import HPCM
from hpcmref.model.coders import Estimator
from hpcmref.model.config import MEMORIES, MemoryConfig
from hpcmref.model.entropy import bits
from hpcmref.model.layers import anchor_weights
from hpcmref.training.data import Tiles
from hpcmref.training.loop import _blocks_in_bfloat16
from hpcmref.training.start import start_from

LIGHT, FULL, LINEAR = MEMORIES["light"], MEMORIES["full"], MEMORIES["linear"]

VARIANTS: dict[str, MemoryConfig | None] = {
    "off": None,
    "light": LIGHT,
    "linear": LINEAR,
    "cross": MEMORIES["cross"],
    "global": MEMORIES["global"],
    "full": FULL,
    "light, per position": replace(LIGHT, per_position=True),
    "light, before the prior": replace(LIGHT, before_prior=True),
    "full, no transfer": replace(FULL, transfer=False),
    "linear, relu": replace(LINEAR, feature_map="relu"),
    "linear, 2 x 2 tokens": replace(LINEAR, value_resolution=2),
    "light, max_refs 2": replace(LIGHT, max_refs=(2, 2, 2)),
    "light, max_refs 6": replace(LIGHT, max_refs=(6, 6, 6)),
    "light, topk 1": replace(LIGHT, topk=(1, 1, 1)),
    "light, topk 3": replace(LIGHT, topk=(1, 3, 3)),
    "light, compress_ratio 2": replace(LIGHT, compress_ratio=2),
    "light, compress_ratio 8": replace(LIGHT, compress_ratio=8),
    "full, s3": replace(FULL, scales=(3,), transfer=False),
    "full, s2 and s3": replace(FULL, scales=(2, 3)),
    "full, value_resolution 4": replace(FULL, value_resolution=4),
    "full, value_resolution 16": replace(FULL, value_resolution=16),
}
"""The most important first."""

QUALITIES = (6, 24, 42, 60)
LONGER = (1.15, 1.4)
"""How many times the steps `off` is judged after, beside once."""

RATES = {"trained": 1e-4, "bank": 1e-3, "opening": 1e-2}
"""Learning rates, constant after a warm-up: of what was trained before, of a bank, and of how far its gate opens."""

AVERAGE = 0.97
"""Decay of the average of the weights, a step."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Picture:
    """An image of the test set: pixels (1, 3, H, W) in 0..1, and features (1, M, H/16, W/16)."""

    x: Tensor
    features: Tensor


@app.callback()
def _commands() -> None:
    """What a memory bank gains and costs."""


@app.command()
def run(
    data: Annotated[list[Path], typer.Argument(help="Folders or tar files to fine-tune on.")],
    kodak: Annotated[Path, typer.Option(help="The images to judge on.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for results.jsonl, weights and crops.")],
    model: Annotated[str, typer.Option("-m", "--model", help="The trained model to start from.")] = "nano",
    steps: Annotated[int, typer.Option(help="Steps of every variant.")] = 200,
    batch: Annotated[int, typer.Option(help="Crops a step.")] = 4,
    crop: Annotated[int, typer.Option(help="Side of a crop in pixels.")] = 256,
    crops: Annotated[int, typer.Option(help="How many different crops.")] = 1000,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between.")] = "0,1",
    first: Annotated[int | None, typer.Option(help="Only the first variants.")] = None,
) -> None:
    """Fine-tune and judge every variant, one seed after the other."""
    output.mkdir(parents=True, exist_ok=True)
    trained = checkpoints.load(checkpoints.find(model)).model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    features = _crops(trained, data, output / "crops.pt", crops, crop)
    pictures = _pictures(trained, kodak)
    results = output / "results.jsonl"
    done = {(row["variant"], row["seed"]) for row in _rows(results)}
    for seed in map(int, seeds.split(",")):
        for name in list(VARIANTS)[:first]:
            if (name, seed) not in done:
                row = _tuned(trained, name, features, pictures, steps, batch, seed, output)
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def _rows(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def _crops(model: HPCM, data: Sequence[Path], cache: Path, count: int, side: int) -> Tensor:
    """Features (count, M, side/16, side/16) of random crops; computed once."""
    if not cache.exists():
        tiles = Tiles(data, side)
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            parts = [model.features(tiles.crops(8, side, generator).float() / 255) for _ in range(-(-count // 8))]
        torch.save(torch.cat(parts).contiguous(), cache)
    return torch.load(cache, weights_only=True)


def _pictures(model: HPCM, folder: Path) -> list[Picture]:
    pictures = []
    for path in sorted(folder.glob("*.png")):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        height, width = (side // 64 * 64 for side in pixels.shape[:2])
        x = torch.from_numpy(pixels[:height, :width].copy()).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            pictures.append(Picture(x, model.features(x)))
    return pictures


def _with_memory(trained: HPCM, memory: MemoryConfig | None, seed: int) -> HPCM:
    """The trained model with a closed bank whose other weights come from the seed."""
    torch.manual_seed(seed)
    model = HPCM(replace(trained.config, memory=memory))
    start_from(model, trained)
    return model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def _tuned(
    trained: HPCM, name: str, features: Tensor, pictures: list[Picture], steps: int, batch: int, seed: int, output: Path
) -> dict[str, Any]:
    """One run: a line of the results."""
    model = _with_memory(trained, VARIANTS[name], seed)
    judged = _with_memory(trained, VARIANTS[name], seed)
    plain = _with_memory(trained, None, seed)
    _blocks_in_bfloat16(model, "cpu")
    _blocks_in_bfloat16(plain, "cpu")
    ratio = 1.0 if name == "off" else _step_ratio(model, plain, features[:batch])
    groups: dict[str, list[Tensor]] = {kind: [] for kind in RATES}
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.startswith("entropy.context."))
        if parameter.requires_grad:
            groups["opening" if ".opening." in key else "bank" if ".banks." in key else "trained"].append(parameter)
    optimiser = torch.optim.AdamW(
        [{"params": group, "lr": 0.0, "kind": kind} for kind, group in groups.items() if group],
        betas=(0.9, 0.99), weight_decay=0.0,
    )  # fmt: skip
    parameters: list[Tensor] = [parameter for group in groups.values() for parameter in group]
    places = {id(one): other for one, other in zip(model.parameters(), judged.parameters(), strict=True)}
    averages: list[Tensor] = [places[id(parameter)] for parameter in parameters]
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    last = [steps, *(round(steps * part) for part in LONGER if name == "off")]
    curves: dict[int, list[list[float]]] = {}
    losses = []
    seconds = 0.0
    for step in range(1, last[-1] + 1):
        chosen = torch.randint(len(features), (batch,), generator=generator)
        quality = torch.rand(batch, generator=generator) * (model.config.qualities - 1)
        begun = time.process_time()
        for group in optimiser.param_groups:
            group["lr"] = RATES[group["kind"]] * min(1.0, step / 20)
        loss = _loss(model, features[chosen], quality)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        decay = min(AVERAGE, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(averages, list(parameters), 1 - decay)
        seconds += time.process_time() - begun
        losses.append(float(loss.detach()))
        if step in last:
            curves[step] = [_judged(judged, pictures, quality) for quality in QUALITIES]
    torch.save(judged.state_dict(), output / f"{name.replace(', ', '-').replace(' ', '_')}.{seed}.pt")
    return {
        "variant": name,
        "seed": seed,
        "steps": steps,
        "step_ratio": round(ratio, 4),
        "cpu_seconds": round(seconds, 1),
        "parameters": sum(parameter.numel() for parameter in judged.parameters()),
        "loss": round(statistics.fmean(losses[:steps][-50:]), 5),
        "curves": curves,
        **({} if name == "off" else _use(judged, pictures[:6])),
    }


def _loss(model: HPCM, features: Tensor, quality: Tensor) -> Tensor:
    """Bits per pixel of y, each image's over lambda^0.4 as in training."""
    with torch.no_grad():
        y, z = model.latents(features.contiguous(memory_format=torch.channels_last), quality)
    estimator = Estimator(y, z, noise=True)
    model.entropy(quality, (z.shape[2], z.shape[3]), estimator)
    rate = bits(estimator.y_likelihoods) / (256 * features.shape[2] * features.shape[3])
    log_lambdas = torch.tensor(model.config.lambdas).log()
    weight = (-0.4 * (anchor_weights(quality, len(log_lambdas)) @ log_lambdas - log_lambdas.mean())).exp()
    return (rate * weight).mean()


def _step_ratio(model: HPCM, plain: HPCM, features: Tensor) -> float:
    """Seconds of a step over those of plain HPCM: the best of each, tried in turns."""
    best = {True: float("inf"), False: float("inf")}
    quality = torch.linspace(0, 63, len(features))
    for _ in range(4):
        for is_plain, each in ((False, model), (True, plain)):
            begun = time.process_time()
            _loss(each, features, quality).backward()
            best[is_plain] = min(best[is_plain], time.process_time() - begun)
    return best[False] / best[True]


@torch.inference_mode()
def _judged(model: HPCM, pictures: list[Picture], quality: int, synthesis: bool = True) -> list[float]:
    """Mean bits per pixel and PSNR in dB of pictures at one quality."""
    rates, decibels = [], []
    for picture in pictures:
        rate = torch.tensor([float(quality)])
        y, z = model.latents(picture.features, rate)
        estimator = Estimator(y, z, noise=False)
        y_hat = model.entropy(rate, (z.shape[2], z.shape[3]), estimator)
        total = bits(estimator.y_likelihoods.double()) + bits(estimator.z_likelihoods.double())
        rates.append(float(total) / picture.x[0, 0].numel())
        if synthesis:
            error = (model.synthesise(y_hat, rate).clamp(0, 1) - picture.x).square().mean()
            decibels.append(float(-10 * error.log10()))
    return [statistics.fmean(rates), statistics.fmean(decibels) if synthesis else float("nan")]


def _use(model: HPCM, pictures: list[Picture]) -> dict[str, Any]:
    """How far the gates are open, and by how many percent the rate at a middle quality rises when they are closed."""
    openings = [value for key, value in model.named_parameters() if ".opening." in key]
    open_rate, _ = _judged(model, pictures, 32, synthesis=False)
    kept = [opening.detach().clone() for opening in openings]
    with torch.no_grad():
        for opening in openings:
            opening.zero_()
        closed_rate, _ = _judged(model, pictures, 32, synthesis=False)
        for opening, values in zip(openings, kept, strict=True):
            opening.copy_(values)
    return {
        "opening": round(statistics.fmean(float(values.abs().mean()) for values in kept), 4),
        "closed_percent": round(100 * (closed_rate / open_rate - 1), 4),
    }


if __name__ == "__main__":
    try:
        app()
    except HpcmrefError as error:
        sys.exit(f"ablation: {error}")
