"""How is a model trained? One loop: random crops and qualities, a wall-clock budget, an average of the weights."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpcmref import checkpoints
from hpcmref.errors import CheckpointError, ConfigError
from hpcmref.model import HPCM, PRESETS
from hpcmref.model.context import CrossAttentionCell
from hpcmref.model.entropy import bits
from hpcmref.model.hpcm import Estimate
from hpcmref.model.layers import ResidualBlock, anchor_weights
from hpcmref.training.data import Tiles
from hpcmref.training.start import start_from


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides what a run does. Lengths in steps unless the name says otherwise."""

    data: tuple[Path, ...]
    output: Path
    preset: str = "nano"
    start: str | Path | None = None
    """A model to begin with, by name or file; a state in `output` goes first."""
    minutes: float = 60.0
    batch: int = 12
    crop: int = 128
    last_batch: int = 4
    last_crop: int = 256
    last_part: float = 0.15
    learning_rate: float = 1e-3
    warm_up: int = 200
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    device: str = "cpu"
    bfloat16: bool = True
    compile: bool = False
    limit: int | None = None
    log_every: int = 50
    save_minutes: float = 5.0
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"There is no preset {self.preset!r}; there are {', '.join(PRESETS)}.")
        if not PRESETS[self.preset].lambdas:
            raise ConfigError(f"The preset {self.preset!r} has no rate anchors to train over.")
        if self.crop % 64 or self.last_crop % 64 or min(self.crop, self.last_crop) < 64:
            raise ConfigError("Crops must be multiples of 64 pixels.")
        if self.steps is not None and self.steps < 1:
            raise ConfigError("A run has at least one step.")
        if self.minutes <= 0 or self.batch < 1 or self.last_batch < 1:
            raise ConfigError("The budget and the batches must be positive.")


@dataclass
class Report:
    """What a run tells while it goes on: averages since the last report, or a validation."""

    kind: str
    step: int
    minutes: float
    values: dict[str, float]


class Trainer:
    """The state of a run: model, optimiser, average, clock and random numbers; saved and resumed as a whole."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.model = HPCM(PRESETS[config.preset]).initialise().to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        self.step = 0
        self.skipped = 0
        self.seconds = 0.0
        lambdas = torch.tensor(self.model.config.lambdas, device=self.device)
        self.log_lambdas = lambdas.log()
        if config.bfloat16:
            _blocks_in_bfloat16(self.model, self.device.type)
        self._losses: Callable[..., tuple[Tensor, Tensor, Tensor]] = self._compute_losses
        if config.compile:
            self._losses = torch.compile(self._compute_losses, dynamic=False)

    def begin_with(self, trained: HPCM) -> None:
        """Take over the weights of a trained model, which may be smaller. Raises ConfigError if they do not fit."""
        start_from(self.model, trained)
        _assign(self.average, list(self.model.parameters()))

    @property
    def progress(self) -> float:
        """Part of the budget that is spent, 0 to 1."""
        if self.config.steps is not None:
            return min(1.0, self.step / self.config.steps)
        return min(1.0, self.seconds / (60 * self.config.minutes))

    def run_step(self, tiles: Tiles) -> dict[str, float] | None:
        """One optimiser step; bpp, PSNR in dB and loss of the batch, or None if it was skipped as not finite."""
        config = self.config
        last = self.progress >= 1 - config.last_part
        batch, side = (config.last_batch, config.last_crop) if last else (config.batch, config.crop)
        x = tiles.crops(batch, side, self.generator).to(self.device).float().div_(255)
        x = x.contiguous(memory_format=torch.channels_last)
        quality = torch.rand(batch, generator=self.generator).mul_(self.model.config.qualities - 1).to(self.device)
        rate = min(1.0, (self.step + 1) / config.warm_up) * 0.5 * (1 + math.cos(math.pi * self.progress))
        for group in self.optimiser.param_groups:
            group["lr"] = config.learning_rate * rate
        self.model.train()
        loss, bpp, mse = self._losses(x, quality)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.step += 1
        if not torch.isfinite(norm):
            self.skipped += 1
            return None
        self.optimiser.step()
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - decay)
        values = {"loss": loss.detach(), "bpp": bpp.mean(), "psnr": _psnr(mse).mean(), "norm": norm}
        return {name: float(value) for name, value in values.items()}

    def _compute_losses(self, x: Tensor, quality: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (), and bits per pixel (B,) and mean squared error (B,) in the 0..1 range.

        The loss of an image is bpp + lambda 255^2 MSE, over lambda^0.4: about the same relative weight for every rate.
        """
        out = self.model(x, quality)
        pixels = x.shape[2] * x.shape[3]
        bpp = _total_bits(out) / pixels
        mse = (out["x_hat"] - x).square().flatten(1).mean(1)
        log_lambda = anchor_weights(quality, len(self.log_lambdas)) @ self.log_lambdas
        weight = (-0.4 * (log_lambda - self.log_lambdas.mean())).exp()
        return ((bpp + log_lambda.exp() * 255**2 * mse) * weight).mean(), bpp.detach(), mse.detach()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[HPCM]:
        """The model with the average of the weights, in eval mode, for the length of the context."""
        parameters = list(self.model.parameters())
        current = [parameter.detach().clone() for parameter in parameters]
        _assign(parameters, self.average)
        self.model.eval()
        try:
            yield self.model
        finally:
            _assign(parameters, current)

    def validate(self, tiles: Tiles, count: int = 12) -> dict[str, float]:
        """bpp and PSNR of the average on held-out tiles at three qualities."""
        values: dict[str, float] = {}
        with self.averaged() as model, torch.no_grad():
            for quality in (8, 32, 56):
                sums = torch.zeros(2)
                chosen = tiles.held_out[:count]
                for tile in chosen:
                    x = tile[None, :, : tile.shape[1] // 64 * 64, : tile.shape[2] // 64 * 64].to(self.device) / 255
                    out = model(x, x.new_full((1,), quality))
                    rate = _total_bits(out) / x[0, 0].numel()
                    mse = (out["x_hat"].clamp(0, 1) - x).square().mean()
                    sums += torch.stack((rate[0], _psnr(mse))).cpu()
                bpp, psnr = (sums / len(chosen)).tolist()
                values |= {f"bpp_{quality}": bpp, f"psnr_{quality}": psnr}
        return values

    def save(self, path: Path) -> None:
        """Write the whole state, so that `load` continues as if nothing had happened."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "clock": {"step": self.step, "skipped": self.skipped, "seconds": self.seconds},
            "random": {"data": self.generator.get_state(), "noise": torch.get_rng_state()},
            "preset": self.config.preset,
        }
        temporary = path.with_suffix(".part")
        torch.save(state, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Take over the state that `save` wrote. Raises CheckpointError if it is damaged or of another preset."""
        try:
            state = torch.load(path, weights_only=True, map_location=self.device)
            preset = state["preset"]
        except MemoryError:
            raise
        except Exception as error:  # the unpickler raises whatever damaged bytes lead it to
            raise CheckpointError(f"{path} is not the state of a run, or is damaged.") from error
        if preset != self.config.preset:
            raise CheckpointError(f"{path} is a run of {preset!r}, not of {self.config.preset!r}.")
        self.model.load_state_dict(state["model"])
        _assign(self.average, state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.skipped, self.seconds = (state["clock"][name] for name in ("step", "skipped", "seconds"))
        self.generator.set_state(state["random"]["data"].cpu())
        torch.set_rng_state(state["random"]["noise"].cpu())


def train(config: TrainingConfig, report: Callable[[Report], None] = lambda _: None) -> Trainer:
    """Run (or resume, when `output` holds a state) until the budget is spent; `report` is called now and then.

    Writes state.pt and log.jsonl to `config.output`; the caller exports the weights.
    """
    config.output.mkdir(parents=True, exist_ok=True)
    state = config.output / "state.pt"
    tiles = Tiles(config.data, max(config.crop, config.last_crop), config.limit)
    trainer = Trainer(config)
    if state.exists():
        trainer.load(state)
    elif config.start is not None:
        trainer.begin_with(checkpoints.load(checkpoints.find(config.start)).model)
    with (config.output / "log.jsonl").open("a") as log:

        def tell(kind: str, values: dict[str, float]) -> None:
            entry = Report(kind, trainer.step, trainer.seconds / 60, values)
            log.write(json.dumps(asdict(entry)) + "\n")
            log.flush()
            report(entry)

        settings: dict[str, Any] = {name: str(value) for name, value in asdict(config).items()}
        log.write(json.dumps({"kind": "start", "step": trainer.step, "config": settings}) + "\n")
        window: list[dict[str, float]] = []
        saved = trainer.seconds
        while trainer.progress < 1:
            begun = time.monotonic()
            if (values := trainer.run_step(tiles)) is not None:
                window.append(values)
            trainer.seconds += time.monotonic() - begun
            if trainer.step % config.log_every == 0 and window:
                tell("train", {name: sum(row[name] for row in window) / len(window) for name in window[0]})
                window.clear()
            if trainer.progress >= 1 or trainer.seconds - saved > 60 * config.save_minutes:
                begun = time.monotonic()
                trainer.save(state)
                if tiles.held_out:
                    tell("validation", trainer.validate(tiles))
                trainer.seconds += time.monotonic() - begun
                saved = trainer.seconds
    return trainer


def _blocks_in_bfloat16(model: HPCM, device: str) -> None:
    """Compute inside residual blocks and attention in bfloat16; what runs between them stays in float32.

    Latents reach values of a hundred quantiser steps, more than the 8 bits of bfloat16 can hold to half a step.
    """
    for module in model.modules():
        if isinstance(module, ResidualBlock | CrossAttentionCell):
            module.forward = torch.autocast(device, torch.bfloat16)(module.forward)  # type: ignore[method-assign]


def _total_bits(out: Estimate) -> Tensor:
    return bits(out["likelihoods"]["y"]) + bits(out["likelihoods"]["z"])


def _psnr(mse: Tensor) -> Tensor:
    return -10 * mse.clamp(min=1e-10).log10()


def _assign(targets: list[Any], sources: list[Tensor]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
