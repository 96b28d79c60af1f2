"""How much do earlier contexts add to the present one? `python -m research.memory_probe FOLDER --kodak KODAK`.

A memory bank can gain at most the information about the latents that earlier contexts have and the present context has
not. This script estimates it for plain HPCM. In some steps of s3, two targets are predicted by ridge regression: the
residual of every latent divided by its predicted scale, and the log of its magnitude (the error of the scale). The
features are the context before the step alone, or that and all earlier contexts of s3, at the same position, over the
surrounding 4 x 4 positions, and over the image.

The regression is fitted on the crops of `research.memory_ablation run`, and evaluated on other photographs. The result
is the part of the variance that is explained there, in percent, for the best of several ridge parameters. It can fall
with more features, because they were fitted on other images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from hpcmref import checkpoints
from hpcmref.errors import HpcmrefError
from hpcmref.model import HPCM
from hpcmref.model.coders import Estimator
from hpcmref.model.entropy import SCALE_BOUND
from hpcmref.model.schedule import STEPS_S3, Step
from research.memory_ablation import channels_last, pictures_of

STEPS, GROUPS = (2, 5), (0, 3)
"""The steps (of the six of s3) and the channel groups (of eight) that are examined."""

RIDGES = (300.0, 3000.0, 30000.0, 300000.0)

SETS = {
    "the present context": ("present",),
    "and its 4 x 4 means": ("present", "present 4 x 4"),
    "and earlier contexts": ("present", "earlier"),
    "and their 4 x 4 means": ("present", "earlier 4 x 4"),
    "and their image means": ("present", "earlier image"),
}


class _Residuals(Estimator):
    """An estimator that stores the residuals of s3 divided by their scales, (B, M/8, h, w) each."""

    def __init__(self, y: Tensor, z: Tensor) -> None:
        super().__init__(y, z, noise=False)
        self.of_step: dict[int, Tensor] = {}

    def code(self, step: Step | None, scales: Tensor, means: Tensor) -> Tensor:
        if step in STEPS_S3:
            residual = (self._target.of(step) - means) / scales.clamp(min=SCALE_BOUND)
            self.of_step[STEPS_S3.index(step)] = residual.clamp(-8, 8)
        return super().code(step, scales, means)


def main(
    output: Annotated[Path, typer.Argument(help="The folder of `research.memory_ablation run`.")],
    kodak: Annotated[Path, typer.Option(help="The images to judge on.")],
    model: Annotated[str, typer.Option("-m", "--model", help="The model that the run started from.")] = "nano",
    quality: Annotated[int, typer.Option(help="At which quality.")] = 42,
) -> None:
    """Print how much of the residuals each set of contexts explains."""
    hpcm = channels_last(checkpoints.load(checkpoints.find(model)).model)
    crops = torch.load(output / "crops.pt", weights_only=True)
    fitted = _collected(hpcm, crops.split(8), quality)
    judged = _collected(hpcm, (picture.features for picture in pictures_of(hpcm, kodak)[::2]), quality)
    table = Table("step", "group", "of the", *SETS, title=f"variance explained, quality {quality}")
    for key, columns in fitted.items():
        for target in ("residual", "magnitude"):
            parts = [f"{100 * _explained(columns, judged[key], names, target):.2f} %" for names in SETS.values()]
            table.add_row(str(key[0]), str(key[1]), target, *parts)
    Console(width=160).print(table)


def _collected(model: HPCM, batches: Iterable[Tensor], quality: int) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Return for each (step, group) the features and targets by name, with one row for each position: (n, C)."""
    contexts: list[Tensor] = []  # contexts[i] is what the prior of step i gets

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        contexts[-1:] = [inputs[1], output]  # the output of one is the second input of the next

    attention = model.entropy.context.attn_s3
    assert attention is not None
    hook = attention.register_forward_hook(keep)
    rows: dict[tuple[int, int], dict[str, list[Tensor]]] = {}
    with torch.inference_mode():
        for features in batches:
            contexts.clear()
            qualities = torch.full((len(features),), float(quality))
            y, z = model.latents(features.contiguous(memory_format=torch.channels_last), qualities)
            coder = _Residuals(y, z)
            model.entropy(qualities, (z.shape[2], z.shape[3]), coder)
            for step in STEPS:
                planes = _planes(contexts[step], torch.cat(contexts[:step], dim=1), coder.of_step[step])
                groups = STEPS_S3[step].table(y.shape[2], y.shape[3], y.device)
                for group in GROUPS:
                    into = rows.setdefault((step, group), {})
                    for name, plane in planes.items():
                        into.setdefault(name, []).append(plane[:, :, groups == group].transpose(1, 2).flatten(0, 1))
    hook.remove()
    return {key: {name: torch.cat(parts) for name, parts in columns.items()} for key, columns in rows.items()}


def _planes(present: Tensor, earlier: Tensor, residual: Tensor) -> dict[str, Tensor]:
    size = present.shape[2:]
    return {
        "residual": residual,
        "magnitude": (residual.abs() + 0.05).log(),
        "present": present,
        "present 4 x 4": F.interpolate(F.avg_pool2d(present, 4), size),
        "earlier": earlier,
        "earlier 4 x 4": F.interpolate(F.avg_pool2d(earlier, 4), size),
        "earlier image": earlier.mean((2, 3), keepdim=True).expand(-1, -1, *size),
    }


def _explained(fitted: dict[str, Tensor], judged: dict[str, Tensor], names: tuple[str, ...], target: str) -> float:
    """Return 1 - squared error / variance on the images that were not used for fitting."""
    x, at = (torch.cat([columns[name] for name in names], dim=1).double() for columns in (fitted, judged))
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    x, at = (x - mean) / spread, (at - mean) / spread
    level = fitted[target].double().mean(0)
    gram, products = x.T @ x, x.T @ (fitted[target].double() - level)
    wanted = judged[target].double()
    best = -torch.inf
    for ridge in RIDGES:
        weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=torch.float64), products)
        error = (wanted - level - at @ weights).square().sum()
        best = max(best, float(1 - error / (wanted - wanted.mean(0)).square().sum()))
    return best


if __name__ == "__main__":
    try:
        typer.run(main)
    except HpcmrefError as error:
        sys.exit(f"memory_probe: {error}")
