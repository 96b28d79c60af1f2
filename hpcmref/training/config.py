"""What does a run do? One frozen description, checked when it is made."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from hpcmref.arguments import METRICS
from hpcmref.errors import ConfigError, near
from hpcmref.model import PRESETS, HPCMConfig
from hpcmref.model.config import MEMORY_BANKS, QUALITIES
from hpcmref.similarity import MS_SSIM_LEAST_SIDE

NO_MEMORY = "none"
"""The name of no memory bank, where a preset has one."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
    "decay": lambda progress: 1 - math.sqrt(progress),
}
"""The learning rate, as a part of its peak, at each part of the budget.

constant: for a run without a fixed end, whose weights are exported by a run of decay that begins with its state.
decay: down from the peak at once, most of it early (arXiv 2405.18392).
"""


@dataclass(frozen=True)
class Phase:
    """A part of a run: from the fraction `begin` of the budget on, `batch` crops of `crop` pixels a side per step."""

    begin: float
    batch: int
    crop: int


def phases_of(text: str) -> tuple[Phase, ...]:
    """The phases that "12x128,4x256@0.85" names: crops a step x pixels a side @ begin. Raises ConfigError."""
    phases = []
    for part in text.split(","):
        if (match := re.fullmatch(r"(\d+)x(\d+)(?:@(\d*\.?\d+))?", part.strip())) is None:
            raise ConfigError(f"{part!r} is not a phase of a run, such as 4x256@0.85.")
        batch, crop, begin = match.groups()
        phases.append(Phase(float(begin or 0), int(batch), int(crop)))
    return tuple(phases)


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides what a run does. Lengths in steps unless the name says otherwise.

    memory: a bank of MEMORY_BANKS, or "none", instead of the preset's. start: a model to begin with, by name or file (a
    bank that it has not is closed at first), or the folder of another run, whose weights, average and optimiser are
    taken over; a state in `output` goes first. schedule: how the learning rate goes over the budget (SCHEDULES).
    phases: the batch is that of one process. rescale: half of the crops are made smaller, by a factor between this and
    1. transpose: rows and columns of half of them are swapped. rate: train for this one lambda (of the MSE) instead of
    all. part_mb: the largest file of the state, in 10^6 bytes.

    Making an invalid one raises ConfigError.
    """

    data: tuple[Path, ...]
    output: Path
    preset: str = "nano"
    memory: str | None = None
    start: str | Path | None = None
    minutes: float = 60.0
    steps: int | None = None
    phases: tuple[Phase, ...] = (Phase(0, 12, 128), Phase(0.85, 4, 256))
    metric: str = "mse"
    rate: float | None = None
    rescale: float = 0.5
    transpose: bool = False
    learning_rate: float = 1e-3
    schedule: str = "cosine"
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
    part_mb: float | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(
                f"There is no preset {self.preset!r}; there are {', '.join(PRESETS)}{near(self.preset, PRESETS)}."
            )
        if self.memory is not None and self.memory not in (NO_MEMORY, *MEMORY_BANKS):
            names = (NO_MEMORY, *MEMORY_BANKS)
            hint = near(self.memory, names)
            raise ConfigError(f"There is no memory bank {self.memory!r}; there are {', '.join(names)}{hint}.")
        if self.schedule not in SCHEDULES:
            hint = near(self.schedule, SCHEDULES)
            raise ConfigError(f"There is no schedule {self.schedule!r}; there are {', '.join(SCHEDULES)}{hint}.")
        lambdas = self.model.lambdas
        if not lambdas:
            raise ConfigError(f"The preset {self.preset!r} has no quality anchors to train over.")
        if self.rate is not None and not lambdas[0] <= self.rate <= lambdas[-1]:
            raise ConfigError(f"Lambda must be between {lambdas[0]} and {lambdas[-1]}.")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"The device is {self.device!r}; it must be cpu or cuda.")
        if self.metric not in METRICS:
            raise ConfigError(f"The metric is {self.metric!r}; it must be {' or '.join(METRICS)}.")
        if self.steps is not None and self.steps < 1:
            raise ConfigError("A run has at least one step.")
        if not 0 < self.minutes < math.inf or not (self.part_mb is None or 0 < self.part_mb < math.inf):
            raise ConfigError("The budget and the size of a part must be positive.")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"The learning rate is {self.learning_rate:g}; it must be a number above 0.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError("A run reads at least one image.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"The seed is {self.seed}; it must be 0 to 2^32 - 1.")
        if not 0 < self.rescale <= 1:
            raise ConfigError("Crops are rescaled by a factor above 0 and at most 1.")
        self._check_phases()

    def _check_phases(self) -> None:
        if not self.phases or self.phases[0].begin != 0:
            raise ConfigError("The first phase begins at 0.")
        if any(second.begin <= first.begin for first, second in pairwise(self.phases)) or self.phases[-1].begin >= 1:
            raise ConfigError("Phases begin one after the other, before 1.")
        least = MS_SSIM_LEAST_SIDE if self.metric == "ms-ssim" else 64
        for phase in self.phases:
            if phase.crop % 64 or phase.crop < least:
                raise ConfigError(f"Crops must be multiples of 64, and at least {least}, pixels a side.")
            if phase.batch < 1:
                raise ConfigError("A step needs at least one crop.")

    def phase(self, progress: float) -> Phase:
        """The phase at this fraction of the budget."""
        return next(phase for phase in reversed(self.phases) if progress >= phase.begin)

    @property
    def model(self) -> HPCMConfig:
        """The networks: the preset, with its memory bank or another."""
        preset = PRESETS[self.preset]
        return preset if self.memory is None else replace(preset, memory=MEMORY_BANKS.get(self.memory))

    @property
    def name(self) -> str:
        """What is trained, for people and to tell one run's state from another's."""
        return self.preset if self.memory is None else f"{self.preset} with memory {self.memory}"

    @property
    def fixed_quality(self) -> float | None:
        """The quality (0..63) whose lambda is `rate`; None to train all."""
        if self.rate is None:
            return None
        lambdas = np.log(self.model.lambdas)
        return float(np.interp(np.log(self.rate), lambdas, np.linspace(0, QUALITIES - 1, len(lambdas))))
