"""Is a memory bank worth its time? `python -m research.memory_ablation run ...`, then `... report ...`.

Every variant starts from the same trained model with a closed bank, and its context model is fine-tuned. For one seed,
all variants have the same crops, qualities, noise and number of steps, also plain HPCM (`off`). A bank concerns only
the entropy path, so g_a, h_a, h_s and g_s keep their weights, and the features of all crops are computed once. The loss
is the rate, weighted as in training. The weights that are evaluated are an average over the last steps.

On Kodak, bits per pixel are estimated by the model in float32, and the PSNR is measured. `cost` also writes files of a
few images, and measures their time. `off` is evaluated after more steps, too: a variant whose step takes r times as
long is compared with `off` after N steps (equal steps) and after r N steps (equal time, interpolated). Results are
lines of JSON, one for each run, and existing runs are not repeated.
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
from hpcmref.bench.bdrate import bd_rate
from hpcmref.bench.curves import Curve, Point
from hpcmref.bench.measure import PeakMemory
from hpcmref.codec import Codec
from hpcmref.errors import HpcmrefError
from hpcmref.model import HPCM
from hpcmref.model.coders import Estimator
from hpcmref.model.config import MEMORY_BANKS, MemoryConfig
from hpcmref.model.entropy import bits
from hpcmref.model.layers import anchor_weights
from hpcmref.runtime.torch_names import lerp_all_
from hpcmref.training.bfloat16 import train_in_bfloat16
from hpcmref.training.data import Tiles
from hpcmref.training.start import start_from
from research.exactness_cost import bpp_and_psnr

LIGHT, FULL, LINEAR = MEMORY_BANKS["light"], MEMORY_BANKS["full"], MEMORY_BANKS["linear"]

VARIANTS: dict[str, MemoryConfig | None] = {
    "off": None,
    "light": LIGHT,
    "linear": LINEAR,
    "cross": MEMORY_BANKS["cross"],
    "global": MEMORY_BANKS["global"],
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
"""The variants, the most important first."""

QUALITIES = (6, 24, 42, 60)
LONGER = (1.15, 1.4)
"""The multiples of the number of steps after which `off` is also evaluated."""

RATES = {"trained": 1e-4, "bank": 1e-3, "opening": 1e-2}
"""Learning rates, constant after a warm-up: of the trained weights, of a bank, and of its gate."""

AVERAGE = 0.97
"""The decay of the average of the weights in a step."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Picture:
    """An image of the test set: pixels (1, 3, H, W) in 0..1, and features (1, M, H/16, W/16)."""

    x: Tensor
    features: Tensor


@app.callback()
def _commands() -> None:
    """Measure what a memory bank gains and costs."""


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
    """Fine-tune and evaluate every variant, one seed after the other."""
    output.mkdir(parents=True, exist_ok=True)
    trained = channels_last(checkpoints.load(checkpoints.find(model)).model)
    features = _crops(trained, data, output / "crops.pt", crops, crop)
    pictures = pictures_of(trained, kodak)
    results = output / "results.jsonl"
    done = {(row["variant"], row["seed"]) for row in lines_of(results)}
    for seed in map(int, seeds.split(",")):
        for name in list(VARIANTS)[:first]:
            if (name, seed) not in done:
                row = {"model": model, **_tuned(trained, name, features, pictures, steps, batch, seed, output)}
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def channels_last(model: HPCM) -> HPCM:
    """Return the model with its weights in the memory format that is fastest for convolutions on a CPU."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _weights(output: Path, name: str, seed: int) -> Path:
    return output / f"{name.replace(', ', '-').replace(' ', '_')}.{seed}.pt"


def lines_of(results: Path) -> list[dict[str, Any]]:
    """The lines of a file of results, which need not exist."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def _crops(model: HPCM, data: Sequence[Path], cache: Path, count: int, side: int) -> Tensor:
    """Compute the features (count, M, side/16, side/16) of random crops."""
    if not cache.exists():
        tiles = Tiles(data, side)
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            parts = [model.features(tiles.crops(8, side, generator).float() / 255) for _ in range(-(-count // 8))]
        torch.save(torch.cat(parts).contiguous(), cache)
    return torch.load(cache, weights_only=True)


def pictures_of(model: HPCM, folder: Path) -> list[Picture]:
    """Read the PNG files of a folder, cropped to multiples of 64 pixels, and compute the model's features of each."""
    pictures = []
    for path in sorted(folder.glob("*.png")):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        height, width = (side // 64 * 64 for side in pixels.shape[:2])
        x = torch.from_numpy(pixels[:height, :width].copy()).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            pictures.append(Picture(x, model.features(x)))
    return pictures


def _with_memory(trained: HPCM, memory: MemoryConfig | None, seed: int) -> HPCM:
    """Return the trained model with a closed bank, whose other weights come from the seed."""
    torch.manual_seed(seed)
    model = HPCM(replace(trained.config, memory=memory))
    start_from(model, trained)
    return channels_last(model).eval()


def _tuned(
    trained: HPCM, name: str, features: Tensor, pictures: list[Picture], steps: int, batch: int, seed: int, output: Path
) -> dict[str, Any]:
    """Do one run, and return its line of the results."""
    model = _with_memory(trained, VARIANTS[name], seed)
    judged = _with_memory(trained, VARIANTS[name], seed)
    plain = _with_memory(trained, None, seed)
    train_in_bfloat16(model, "cpu")
    train_in_bfloat16(plain, "cpu")
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
            lerp_all_(averages, list(parameters), 1 - decay)
        seconds += time.process_time() - begun
        losses.append(float(loss.detach()))
        if step in last:
            curves[step] = [_judged(judged, pictures, quality) for quality in QUALITIES]
    torch.save(judged.state_dict(), _weights(output, name, seed))
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
    """Return the mean bits per pixel of y, where those of each image are divided by lambda^0.4 as in training."""
    with torch.no_grad():
        y, z = model.latents(features.contiguous(memory_format=torch.channels_last), quality)
    estimator = Estimator(y, z, noise=True)
    model.entropy.train()
    model.entropy(quality, (z.shape[2], z.shape[3]), estimator)
    rate = bits(estimator.y_likelihoods) / (256 * features.shape[2] * features.shape[3])
    log_lambdas = torch.tensor(model.config.lambdas).log()
    weight = (-0.4 * (anchor_weights(quality, len(log_lambdas)) @ log_lambdas - log_lambdas.mean())).exp()
    return (rate * weight).mean()


def _step_ratio(model: HPCM, plain: HPCM, features: Tensor) -> float:
    """Return the seconds of a step divided by those of plain HPCM. Both take turns, and the best time is used."""
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
    """Return the mean bits per pixel and the mean PSNR in dB of pictures at one quality."""
    rates, decibels = [], []
    for picture in pictures:
        qualities = torch.tensor([float(quality)])
        y, z = model.latents(picture.features, qualities)
        estimator = Estimator(y, z, noise=False)
        y_hat = model.entropy(qualities, (z.shape[2], z.shape[3]), estimator)
        total = bits(estimator.y_likelihoods.double()) + bits(estimator.z_likelihoods.double())
        rates.append(float(total) / picture.x[0, 0].numel())
        if synthesis:
            error = (model.synthesise(y_hat, qualities).clamp(0, 1) - picture.x).square().mean()
            decibels.append(float(-10 * error.log10()))
    return [statistics.fmean(rates), statistics.fmean(decibels) if synthesis else float("nan")]


def _use(model: HPCM, pictures: list[Picture]) -> dict[str, Any]:
    """Return how far the gates are open, and how many percent the rate at a middle quality rises with closed gates."""
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


@app.command()
def cost(
    output: Annotated[Path, typer.Argument(help="The folder of `run`.")],
    kodak: Annotated[Path, typer.Option(help="The images to code.")],
    limit: Annotated[int, typer.Option(help="How many of them.")] = 2,
    repeat: Annotated[int, typer.Option(help="How often each is coded; the best time counts.")] = 3,
    quality: Annotated[int, typer.Option(help="At which quality.")] = 24,
) -> None:
    """Measure real files, time and memory of every variant against `off`, coded in turns: cost.jsonl."""
    images = [Image.open(path).convert("RGB") for path in sorted(kodak.glob("*.png"))[:limit]]
    names = list(dict.fromkeys(row["variant"] for row in lines_of(output / "results.jsonl")))
    plain = _codec("off", output)
    done = {row["variant"] for row in lines_of(output / "cost.jsonl")}
    for name in names:
        if name not in done:
            row = _cost(name, plain if name == "off" else _codec(name, output), plain, images, repeat, quality)
            with (output / "cost.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def _codec(name: str, output: Path) -> Codec:
    """Return the codec of the first seed of a variant."""
    state = torch.load(_weights(output, name, 0), weights_only=True)
    trained = checkpoints.load(checkpoints.find(lines_of(output / "results.jsonl")[0]["model"])).model
    model = HPCM(replace(trained.config, memory=VARIANTS[name])).eval()
    model.load_state_dict(state)
    path = _weights(output, name, 0).with_suffix(".safetensors")
    checkpoints.save(model, path, name, {})
    return Codec(checkpoints.load(path), name, torch.device("cpu"))


def _cost(
    name: str, codec: Codec, plain: Codec, images: Sequence[Image.Image], repeat: int, quality: int
) -> dict[str, Any]:
    """Measure bytes, ratios of time to that of `plain`, and working memory in bytes; return a line of cost.jsonl."""
    best: dict[tuple[bool, str, int], float] = {}
    memory = size = 0
    pixels = sum(image.width * image.height for image in images)
    estimated = statistics.fmean(bpp_and_psnr(codec, codec.latents.entropy, image, quality)[0] for image in images)
    for index, image in enumerate(images):
        for _ in range(repeat):
            for is_plain, each in ((False, codec), (True, plain)):
                with PeakMemory("cpu") as peak:
                    begun = time.process_time()
                    data = each.encode(image, quality)
                    encoded = time.process_time()
                    each.decode(data)
                    spent = {"encode": encoded - begun, "decode": time.process_time() - encoded}
                for kind, seconds in spent.items():
                    key = (is_plain, kind, index)
                    best[key] = min(seconds, best.get(key, seconds))
                if not is_plain:
                    memory = max(memory, peak.bytes or 0)
        size += len(codec.encode(image, quality))
    totals = {
        (is_plain, kind): sum(best[is_plain, kind, index] for index in range(len(images)))
        for is_plain in (False, True)
        for kind in ("encode", "decode")
    }
    return {
        "variant": name,
        "encode_ratio": round(totals[False, "encode"] / totals[True, "encode"], 3),
        "decode_ratio": round(totals[False, "decode"] / totals[True, "decode"], 3),
        "memory": memory,
        "file_bpp": round(8 * size / pixels, 5),
        "estimated_bpp": round(estimated, 5),
    }


@app.command()
def report(
    output: Annotated[Path, typer.Argument(help="The folder of `run` and `cost`.")],
    figure: Annotated[Path | None, typer.Option(help="A PNG file to draw.")] = None,
) -> None:
    """Print the table of all variants in Markdown, and draw it."""
    rows = lines_of(output / "results.jsonl")
    costs = {row["variant"]: row for row in lines_of(output / "cost.jsonl")}
    plain = {row["seed"]: row for row in rows if row["variant"] == "off"}
    deltas: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["variant"] != "off" and row["seed"] in plain:
            deltas.setdefault(row["variant"], []).append(_deltas(row, plain[row["seed"]]))
    names = ("memory", "equal steps", "equal time", "step", "encode", "decode", "MB", "numbers", "closed")
    print(f"| {' | '.join(names)} |\n| {' | '.join(['---'] * len(names))} |")
    for name in dict.fromkeys(row["variant"] for row in rows if row["seed"] in plain):
        print(_line(name, [row for row in rows if row["variant"] == name], deltas.get(name, []), costs.get(name)))
    if figure is not None:
        _draw(deltas, figure)


def _curve(name: str, points: Sequence[Sequence[float]]) -> Curve:
    return Curve(name, tuple(Point(bpp, psnr) for bpp, psnr in points))


def _deltas(row: dict[str, Any], plain: dict[str, Any]) -> tuple[float, float]:
    """Return the BD-rates in percent against `off` after the same number of steps, and after the same time."""
    steps = sorted(map(int, plain["curves"]))
    found = _curve(row["variant"], row["curves"][str(row["steps"])])
    wanted = min(row["steps"] * row["step_ratio"], steps[-1])
    later = np.array([plain["curves"][str(step)] for step in steps])  # (steps, qualities, 2)
    at = [[float(np.interp(wanted, steps, column)) for column in quality.T] for quality in later.transpose(1, 0, 2)]
    deltas = (bd_rate(_curve("off", plain["curves"][str(row["steps"])]), found), bd_rate(_curve("off", at), found))
    return deltas[0].value or 0.0, deltas[1].value or 0.0


def _line(
    name: str, rows: Sequence[dict[str, Any]], deltas: Sequence[tuple[float, float]], cost: dict[str, Any] | None
) -> str:
    """Return a row of the table. For several seeds it has the mean, and the value of each in brackets."""
    cells = ["", ""]
    for column in range(2 if deltas else 0):
        values = [delta[column] for delta in deltas]
        each = f" ({', '.join(f'{value:+.2f}' for value in values)})" if len(values) > 1 else ""
        cells[column] = f"{statistics.fmean(values):+.2f} %{each}"
    cells.append(f"x {statistics.fmean(row['step_ratio'] for row in rows):.2f}")
    if cost is None:
        cells += ["", "", ""]
    else:
        cells += [f"x {cost['encode_ratio']:.2f}", f"x {cost['decode_ratio']:.2f}", f"{cost['memory'] / 1e6:.0f}"]
    cells.append(f"{rows[0]['parameters'] / 1e6:.2f} M")
    closed = [row["closed_percent"] for row in rows if "closed_percent" in row]
    cells.append(f"{statistics.fmean(closed):+.2f} %" if closed else "")
    return f"| {name} | {' | '.join(cells)} |"


def _draw(deltas: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Draw the BD-rate of every variant: a point for each seed, and a bar for their mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.3 * len(deltas)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, values in enumerate(deltas.values()):
        for column, (label, colour) in enumerate((("equal steps", "tab:blue"), ("equal time", "tab:orange"))):
            height = row + 0.4 * column - 0.2
            each = [value[column] for value in values]
            axes.barh(height, statistics.fmean(each), 0.35, color=colour, alpha=0.6, label=label if row == 0 else None)
            axes.plot(each, [height] * len(each), "k.", markersize=4)
    axes.set_yticks(range(len(deltas)), list(deltas))
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("BD-rate against plain HPCM, fine-tuned alike, in percent (Kodak, RGB PSNR)")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    try:
        app()
    except HpcmrefError as error:
        sys.exit(f"memory_ablation: {error}")
