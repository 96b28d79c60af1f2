"""The stages of a search. Effort e runs the first e of them, so a higher effort never gives a worse result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from hpcmref.latents import Compressed, LatentCodec
from hpcmref.model.coders import Part
from hpcmref.search.anneal import Annealer, Schedule, predictions
from hpcmref.search.synthesis import Target

ZOf = Callable[[Tensor], Tensor]

Watch = Callable[[float], bool | None]
"""Is told the part of the search that is done, 0 to 1, after every iteration; ends the search by returning True."""


@dataclass(frozen=True)
class Options:
    """How to search. effort: 0 (not at all) to 9, how many stages. metric: "mse" or "ms-ssim", what a picture lacks.

    max_seconds: stop after them, which makes the result depend on the machine's speed.
    """

    effort: int = 0
    metric: str = "mse"
    max_seconds: float | None = None
    watch: Watch | None = None


@dataclass(frozen=True)
class Stage:
    """Rounds of a search that belong together: a cosine of learning rates, and a falling temperature.

    learning_rate: at the start and at quality 56, in quantiser steps (see `pace`); temperature: at the start and at the
    end.
    """

    rounds: int
    iterations: int
    learning_rate: float
    temperature: tuple[float, float]

    def schedules(self, quality: int) -> Iterator[Schedule]:
        """One for each round. quality: 0 to 63."""
        low, high = (math.log(each) for each in self.temperature)
        parts = [index / self.rounds for index in range(self.rounds + 1)]
        rate = self.learning_rate * pace(quality)
        rates = [rate * (0.5 + 0.5 * math.cos(math.pi * part)) for part in parts]
        temperatures = [math.exp(low + part * (high - low)) for part in parts]
        for index in range(self.rounds):
            ends = index, index + 1
            yield Schedule(self.iterations, [rates[each] for each in ends], [temperatures[each] for each in ends])


def pace(quality: int) -> float:
    """The factor of learning rates at a quality (0 to 63): 0.5 at 8, 1 at 56.

    With effort 3 on six crops, the best factors of 0.15 to 2 were 0.5 at the qualities 8 and 24, 0.7 at 40 and 1 at 56.
    """
    return float(2 ** ((quality - 56) / 48))


_COLD = 0.05
STAGES = (
    Stage(2, 5, 0.015, (0.5, _COLD)),
    Stage(2, 10, 0.015, (0.25, _COLD)),
    Stage(3, 20, 0.015, (0.25, _COLD)),
    Stage(5, 18, 0.015, (0.25, _COLD)),
    Stage(7, 20, 0.015, (0.25, _COLD)),
    Stage(10, 24, 0.015, (0.25, _COLD)),
    Stage(10, 25, 0.01, (0.5, _COLD)),
    Stage(14, 25, 0.01, (0.5, _COLD)),
    Stage(20, 25, 0.01, (0.5, _COLD)),
)
"""Tuned on held-out training tiles with nano-1. Short stages begin colder than the first, or they would have no time to
do again what the heat undoes (0.2 to 0.3 % of the rate); long ones begin as hot, and find more.
"""


@dataclass(frozen=True)
class Goal:
    """Which of two files is better: fewer bits + weight * error. With a limit, the other of the two decides alone.

    weight: bits that a unit of `Target.error` is worth, lambda. most_bytes: of the payload, which no file exceeds; the
    smallest error wins. most_error: which no file exceeds; the smallest file wins.
    """

    weight: float
    most_bytes: float | None = None
    most_error: float | None = None

    def objective(self, size: int, error: float) -> float:
        """What is to be small: of a payload of `size` bytes; infinite beyond a limit."""
        if self.most_bytes is not None:
            return error if size <= self.most_bytes else math.inf
        if self.most_error is not None:
            return size if error <= self.most_error else math.inf
        return 8 * size + self.weight * error

    def stronger(self, last: tuple[int, float], size: int, error: float) -> float:
        """The factor for the weight with which the next files come nearer to the limit; last: size and error before.

        It takes rounds until a weight has its full effect, so what the last one has changed counts twice more.
        """
        if self.most_bytes is not None:
            room = AIM * self.most_bytes / size * (last[0] / size) ** 2
        elif self.most_error is not None:
            room = error / (AIM * self.most_error) * (error / max(last[1], 1e-9)) ** 2
        else:
            return 1.0
        return min(max(room**4, 0.7), 1.4)


AIM = 0.997
"""Part of a limit that is aimed at, so that a round ends below it rather than just above."""


@dataclass(frozen=True)
class _Best:
    objective: float
    compressed: Compressed
    y: Tensor


class Search:
    """One search under way. `best` is what it has found; `run` continues it."""

    def __init__(self, latents: LatentCodec, target: Target, goal: Goal, y: Tensor, z_of: ZOf, quality: int) -> None:
        self._latents, self._target, self._goal = latents, target, goal
        self._z_of, self._quality = z_of, quality
        self.annealer = Annealer(target, goal.weight, y)
        compressed, self._parts = self._coded()
        error = target.error(compressed.y_hat)
        self._last = _size(compressed), error
        # The limits are what this file has been measured by; rounding must not turn it away.
        self.best = _Best(min(goal.objective(_size(compressed), error), 1e300), compressed, y)

    def run(self, stages: Sequence[Stage]) -> Iterator[float]:
        """Yields the part that is done after every iteration."""
        total, done = sum(stage.rounds * stage.iterations for stage in stages), 0
        for stage in stages:
            for schedule in stage.schedules(self._quality):
                known = predictions(self._parts, self._y_hat)
                for _ in self.annealer.round(known, schedule):
                    done += 1
                    yield done / total
                self._compare()

    def _compare(self) -> None:
        """Code y as it is now, and keep it if it is the best so far."""
        compressed, self._parts = self._coded()
        size, error = _size(compressed), self._target.error(compressed.y_hat)
        objective = self._goal.objective(size, error)
        if objective < self.best.objective:
            self.best = _Best(objective, compressed, self.annealer.y.clone())
        self.annealer.weight *= self._goal.stronger(self._last, size, error)
        self._last = size, error

    def _coded(self) -> tuple[Compressed, list[Part]]:
        y = self.annealer.y
        compressed, parts = self._latents.compress_and_predict(y, self._z_of(y), self._quality)
        self._y_hat = compressed.y_hat
        return compressed, parts


def search(
    latents: LatentCodec,
    target: Target,
    goal: Goal,
    y: Tensor,
    z_of: ZOf,
    quality: int,
    options: Options,
) -> Compressed:
    """The best file found from y (1, M, h, w) on, in real bytes and pixels; that of y at worst.

    target: the picture, and its error for given latents. goal: what is minimised, and within which limits. z_of: h_a,
    which gives z anew whenever y is coded. quality: the one that is written into the file.
    """
    started = time.monotonic()
    found = Search(latents, target, goal, y, z_of, quality)
    for done in found.run(STAGES[: options.effort]):
        late = options.max_seconds is not None and time.monotonic() - started > options.max_seconds
        if (options.watch is not None and options.watch(done)) or late:
            break
    return found.best.compressed


def _size(compressed: Compressed) -> int:
    return len(compressed.payloads[0])
