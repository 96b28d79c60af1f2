"""`hpcmref bench` with several efforts in the time of the highest: each continues the search of the one before.

    python -m research.bench_efforts kodak --codecs hpcmref,hpcmref:effort=3,hpcmref:effort=9 --qualities 8,24,40,56

All arguments are those of `hpcmref bench`. A search with a higher effort begins as one with a lower effort does, so the
files are those of `hpcmref bench`. Efforts must be in rising order. The encoding time of an effort is the sum of the
times of all parts of its search.
"""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from dataclasses import replace
from typing import Any
from unittest import mock

from torch import Tensor

from hpcmref.bench import measure
from hpcmref.bench.codecs import Codec
from hpcmref.bench.measure import Measurement
from hpcmref.errors import ConfigError
from hpcmref.latents import Compressed, LatentCodec
from hpcmref.search import Goal, Options, efforts
from hpcmref.search.synthesis import Target

KEPT = 64
"""The number of searches that may be continued: those of one image at all qualities."""


class _UnderWay:
    """A search, the effort that it has reached, and the seconds that it has taken."""

    def __init__(self, search: efforts.Search) -> None:
        self.search = search
        self.effort = 0
        self.seconds = 0.0


class Continuing:
    """Takes the place of `hpcmref.search.search`.

    before: the seconds that the search of the last call had taken before that call.
    """

    def __init__(self) -> None:
        self._searches: OrderedDict[tuple[bytes, int, Goal], _UnderWay] = OrderedDict()
        self.before = 0.0

    def __call__(
        self,
        latents: LatentCodec,
        target: Target,
        goal: Goal,
        y: Tensor,
        z_of: efforts.ZOf,
        quality: int,
        options: Options,
    ) -> Compressed:
        """As `search`. Raises ConfigError if this search has reached a higher effort already."""
        started = time.perf_counter()
        key = y.cpu().numpy().tobytes(), quality, goal
        if key not in self._searches:
            self._searches[key] = _UnderWay(efforts.Search(latents, target, goal, y, z_of, quality))
        found = self._searches[key]
        while len(self._searches) > KEPT:
            self._searches.popitem(last=False)
        if options.effort < found.effort:
            raise ConfigError("the efforts must be in rising order")
        for _ in found.search.run(efforts.STAGES[found.effort : options.effort]):
            pass
        self.before, found.effort = found.seconds, options.effort
        found.seconds += time.perf_counter() - started
        return found.search.best.compressed

    def measure(self, measured: Any, *arguments: Any) -> Measurement:
        """A measurement with the seconds of all parts of its search. measured: `hpcmref.bench.measure._measure`."""
        self.before = 0.0
        row: Measurement = measured(*arguments)
        return replace(row, encode_seconds=row.encode_seconds + self.before)


def _warm_up_without_search(warm_up: Any, codec: Codec, *arguments: Any) -> None:
    """A whole search would be a long preparation, and an encoder without one has warmed up the same networks."""
    warm_up(replace(codec, effort=0) if getattr(codec, "effort", 0) else codec, *arguments)  # type: ignore[type-var]


def main(arguments: list[str]) -> None:
    """Run `hpcmref bench` in this process with these arguments."""
    from hpcmref.cli import app

    continuing = Continuing()
    measured, warm_up = measure._measure, measure._warm_up
    with (
        mock.patch("hpcmref.codec.search", continuing),
        mock.patch.object(measure, "_measure", lambda *each: continuing.measure(measured, *each)),
        mock.patch.object(measure, "_warm_up", lambda *each: _warm_up_without_search(warm_up, *each)),
    ):
        app(["bench", *arguments, "--jobs", "1"])


if __name__ == "__main__":
    main(sys.argv[1:])
