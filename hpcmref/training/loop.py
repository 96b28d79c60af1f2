"""The training loop, with random crops and qualities, a wall-clock budget and an average of the weights."""

import contextlib
import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpcmref import checkpoints
from hpcmref.errors import CheckpointError, ConfigError
from hpcmref.model import HPCM
from hpcmref.runtime.torch_names import allow_tf32, lerp_all_, matmul_in_bfloat16
from hpcmref.training.bfloat16 import train_in_bfloat16
from hpcmref.training.config import SCHEDULES, TrainingConfig
from hpcmref.training.data import Tiles, tiles_of
from hpcmref.training.graph import StepGraph
from hpcmref.training.objective import Objective, bits_per_pixel, mean_squared_error, psnr
from hpcmref.training.ranks import Ranks, joined
from hpcmref.training.start import start_from
from hpcmref.training.state import has_state, read_state, write_state

AVERAGE_EVERY = 4
"""Steps from one update of the average of the weights to the next. Each one reads and writes all of it."""


@dataclass
class Report:
    """What a run tells while it goes on: averages since the last report, or a validation."""

    kind: str
    step: int
    minutes: float
    values: dict[str, float]


class Trainer:
    """The state of a run: model, optimiser, average and clock; saved and resumed as a whole.

    All random numbers of a step follow from the seed, the step and the rank, so there are none to save. Making a
    trainer raises ConfigError if the rank's CUDA device does not exist.
    """

    def __init__(self, config: TrainingConfig, ranks: Ranks | None = None) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.device = torch.device(config.device)
        if self.device.type == "cuda":
            if self.ranks.local >= torch.cuda.device_count():
                raise ConfigError(f"There is no CUDA device {self.ranks.local} here, of {torch.cuda.device_count()}.")
            self.device = torch.device("cuda", self.ranks.local)
            torch.cuda.set_device(self.device)
            allow_tf32()
        torch.manual_seed(config.seed)
        self.generator = torch.Generator()
        self.model = HPCM(config.model).initialise().to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = [parameter.detach().clone() for parameter in self.model.parameters()]
        cuda = self.device.type == "cuda"
        # In a CUDA graph the learning rate is a number on the device.
        learning_rate = torch.tensor(config.learning_rate, device=self.device) if cuda else config.learning_rate
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True, capturable=cuda
        )
        self.start = None if config.start is None else str(config.start)
        """The model or run that this run began with."""
        self.step = 0
        self.skipped = 0
        self.seconds = 0.0
        if config.bfloat16:
            train_in_bfloat16(self.model, self.device.type)
        self.objective: nn.Module = Objective(self.model, config.metric).to(self.device)
        if config.compile:
            self.objective.compile(dynamic=False)  # each shape of a batch by itself
        if self.ranks.count > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.objective = DistributedDataParallel(self.objective, device_ids=devices)
        self._graph: StepGraph | None = None

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

    def run_step(self, tiles: Tiles) -> Tensor:
        """One optimiser step; loss, bits per pixel, PSNR in dB and gradient norm (4,), on the device.

        Nothing moves if the gradients are not finite: then the norm is not, and `count_skipped` counts it.
        """
        x, quality = self.sample(tiles)
        self.set_learning_rate()
        if self.device.type == "cuda" and self.ranks.count == 1:
            if self._graph is None or self._graph.x.shape != x.shape:
                self._graph = None  # its memory goes first
                self._graph = StepGraph(self, x, quality)
            values = self._graph.run(x, quality)
        else:
            values = self.plain_step(x, quality)
        self.step += 1
        if self.step % AVERAGE_EVERY == 0:
            self._approach(self.average, list(self.model.parameters()), AVERAGE_EVERY)
        return values

    @torch.no_grad()
    def _approach(self, average: Sequence[Tensor], weights: Sequence[Tensor], steps: int) -> None:
        """Move an average towards the weights, as far as so many steps move it."""
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        lerp_all_(average, weights, 1 - decay**steps)

    def plain_step(self, x: Tensor, quality: Tensor, skip: bool = False) -> Tensor:
        """Forward, backward and update; see `run_step`. skip: nothing moves."""
        with matmul_in_bfloat16() if self.config.bfloat16 and x.device.type == "cpu" else contextlib.nullcontext():
            loss, measures = self.objective(x, quality)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
        norm = self.update(skip)
        return torch.stack((loss.detach(), *measures.mean(1), norm))

    def count_skipped(self, values: Tensor) -> Tensor:
        """Of the values of some steps (n, 4), those of the steps that moved the weights; the others are counted."""
        moved = values[values[:, 3].isfinite()]
        self.skipped += len(values) - len(moved)
        return moved

    def sample(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """The batch of this step: images (B, 3, H, W) in 0..1 and qualities (B,)."""
        seed = zlib.crc32(f"{self.config.seed} {self.step} {self.ranks.rank}".encode())
        self.generator.manual_seed(seed)
        torch.manual_seed(seed)  # for the noise in place of rounding
        self.model.train()
        phase = self.config.phase(self.progress)
        x = tiles.crops(phase.batch, phase.crop, self.generator, self.config.rescale, self.config.transpose)
        x = x.to(self.device).float().div_(255).contiguous(memory_format=torch.channels_last)
        quality = torch.rand(phase.batch, generator=self.generator) * (self.model.config.qualities - 1)
        if self.config.fixed_quality is not None:
            quality.fill_(self.config.fixed_quality)
        return x, quality.to(self.device, non_blocking=True)

    def set_learning_rate(self) -> None:
        """The learning rate of this step."""
        config = self.config
        part = SCHEDULES[config.schedule](self.progress)
        if config.schedule != "decay":  # which goes on where another run stands
            part *= min(1.0, (self.step + 1) / config.warm_up)
        for group in self.optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(config.learning_rate * part)
            else:
                group["lr"] = config.learning_rate * part

    def update(self, skip: bool = False) -> Tensor:
        """Move the weights along the gradients, unless their norm, the result (), is not finite. skip: do not move."""
        norm = nn.utils.get_total_norm([each.grad for each in self.model.parameters() if each.grad is not None])
        # The fused optimiser clips, and looks whether the norm is finite: so the host need not wait for the norm, and
        # the gradients are not written once more.
        self.optimiser.grad_scale = (norm / self.config.clip).clamp(min=1)  # type: ignore[attr-defined]
        self.optimiser.found_inf = torch.ones_like(norm) if skip else (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self.optimiser.step()
        return norm

    @contextlib.contextmanager
    def averaged(self) -> Iterator[HPCM]:
        """The model with the average of the weights, in eval mode, for the length of the context."""
        parameters = list(self.model.parameters())
        current = [parameter.detach().clone() for parameter in parameters]
        _assign(parameters, self.average)
        self._approach(parameters, current, self.step % AVERAGE_EVERY)
        self.model.eval()
        try:
            yield self.model
        finally:
            _assign(parameters, current)

    def validate(self, tiles: Tiles, count: int = 12, qualities: Sequence[int] = (8, 32, 56)) -> dict[str, float]:
        """Means of bpp and PSNR of the average on held-out tiles: bpp_8, psnr_8, and so on for each quality."""
        values: dict[str, float] = {}
        with self.averaged() as model, torch.no_grad():
            for quality in qualities:
                sums = torch.zeros(2)
                chosen = tiles.held_out[:count]
                for tile in chosen:
                    x = tile[None, :, : tile.shape[1] // 64 * 64, : tile.shape[2] // 64 * 64].to(self.device) / 255
                    out = model(x, x.new_full((1,), quality))
                    decibels = psnr(mean_squared_error(out["x_hat"].clamp(0, 1), x))
                    sums += torch.cat((bits_per_pixel(out), decibels)).cpu()
                values[f"bpp_{quality}"], values[f"psnr_{quality}"] = (sums / len(chosen)).tolist()
        return values

    def save(self) -> None:
        """Write the whole state to `output`, so that `load` continues as if nothing had happened."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "clock": {"step": self.step, "skipped": self.skipped, "seconds": self.seconds},
            "preset": self.config.name,
            "settings": self._settings,
            "start": self.start,
        }
        write_state(self.config.output, state, f"{self.step:08d}", self.config.part_mb)

    @property
    def _settings(self) -> dict[str, str]:
        """What a run keeps from its first step to its last, by the names of the options."""
        config = self.config
        kept = {"--metric": config.metric, "--lambda": config.rate, "--seed": config.seed}
        return {name: str(value) for name, value in kept.items()}

    def branch_off(self, folder: Path) -> None:
        """Take over weights, average and optimiser of another run; the clock is this run's own. Raises CheckpointError.

        The random numbers of its steps are other ones only if the seed is.
        """
        self.load(folder)
        self.step, self.skipped, self.seconds = 0, 0, 0.0

    def load(self, folder: Path | None = None) -> None:
        """Continue a run: read model, average, optimiser, and clock (step, skipped steps, seconds) from a folder.

        folder: where `save` wrote them; by default `config.output`. Files are read with `weights_only=True`.

        Raises CheckpointError if there is no such state, or if it is damaged, of another preset, or a run to continue
        that began with other settings. The trainer may then have taken over a part of the state.
        """
        continues, folder = folder is None, folder or self.config.output
        state = read_state(folder, self.device)
        if (preset := state.get("preset")) != self.config.name:
            raise CheckpointError(f"{folder} has a run of {preset!r}, not of {self.config.name!r}.")
        for name, value in state.get("settings", {}).items() if continues else ():
            if value != self._settings.get(name):
                raise CheckpointError(f"{folder} has a run with {name} {value}, not {self._settings.get(name)}.")
        try:
            self.model.load_state_dict(state["model"])
            _assign(self.average, state["average"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.start = state.get("start", self.start) if continues else self.start
            self.step, self.skipped, self.seconds = (state["clock"][name] for name in ("step", "skipped", "seconds"))
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise CheckpointError(f"{folder} has a run of another {preset!r}: {reason}") from error


def train(config: TrainingConfig, report: Callable[[Report], None] = lambda _: None) -> Trainer:
    """Run (or resume, when `output` holds a state) until the budget is spent; `report` is called now and then.

    Writes the state and log.jsonl to `config.output`; the caller exports the weights. Under `torchrun` every process
    calls this with the same configuration, gets other crops, and does the same steps; only the first one writes.
    """
    with joined(config.device) as ranks:
        trainer = Trainer(config, ranks)
        tiles = tiles_of(config, trainer.device)
        if has_state(config.output):
            trainer.load()
        elif config.start is not None and has_state(Path(config.start)):
            trainer.branch_off(Path(config.start))
        elif config.start is not None:
            trainer.begin_with(checkpoints.load(checkpoints.find(config.start)).model)
        config.output.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(_Log(config.output / "log.jsonl", trainer, report)) if ranks.leads else None
            _run(trainer, tiles, log)
    return trainer


class _Log:
    """log.jsonl, and who wants to know what goes there."""

    def __init__(self, path: Path, trainer: Trainer, report: Callable[[Report], None]) -> None:
        self._trainer = trainer
        self._report = report
        self._file = path.open("a", encoding="utf-8")
        settings: dict[str, Any] = {name: str(value) for name, value in asdict(trainer.config).items()}
        self._write({"kind": "start", "step": trainer.step, "ranks": trainer.ranks.count, "config": settings})

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def tell(self, kind: str, values: dict[str, float]) -> None:
        entry = Report(kind, self._trainer.step, self._trainer.seconds / 60, values)
        self._write(asdict(entry))
        self._report(entry)

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()


def _run(trainer: Trainer, tiles: Tiles, log: _Log | None) -> None:
    """Steps until the budget is spent; the process with the log also saves and validates."""
    config = trainer.config
    window: list[Tensor] = []
    saved = trainer.seconds
    while trainer.progress < 1:
        begun = time.monotonic()
        window.append(trainer.run_step(tiles))
        trainer.seconds += time.monotonic() - begun
        if trainer.step % config.log_every == 0:
            means = trainer.count_skipped(torch.stack(window)).mean(0).tolist()
            window.clear()
            if log is not None:
                values_by_name = dict(zip(("loss", "bpp", "psnr", "norm"), means, strict=True))
                log.tell("train", {**values_by_name, "skipped": trainer.skipped})
        # All processes take the same steps, so one clock counts.
        trainer.seconds = trainer.ranks.agree(trainer.seconds)
        if trainer.progress >= 1 or trainer.seconds - saved > 60 * config.save_minutes:
            saved = trainer.seconds
            if log is not None:
                begun = time.monotonic()
                trainer.save()
                if tiles.held_out:
                    log.tell("validation", trainer.validate(tiles))
                trainer.seconds += time.monotonic() - begun
            trainer.seconds = trainer.ranks.agree(trainer.seconds)


def _assign(targets: list[Any], sources: list[Tensor]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
