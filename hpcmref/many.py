"""Process many images or files, one after the other or in several processes, and yield the results in order."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

from hpcmref import arguments
from hpcmref.errors import HpcmrefError
from hpcmref.sources import is_file

Progress: TypeAlias = "Callable[[int, int | None], object]"
R = TypeVar("R")


def each_of(
    name: str,
    sources: Iterable[Any],
    work: Callable[[Any], R],
    portable: Callable[[Any], Any],
    jobs: int,
    progress: Progress | None,
) -> Iterator[R]:
    """Return a generator of the results of `work` for every source, in order; see `hpcmref.encode_many`.

    name: the name of the argument `sources`, for messages. jobs: the number of processes. progress: a function that is
    called after each source, or None. portable: converts a source to what is sent to a worker
    process. Raises ConfigError at once, not at the first result, if an argument is wrong.
    """
    arguments.integer("jobs", jobs, 1)
    if progress is not None and not callable(progress):
        raise arguments.wrong_type("progress", progress, "a function of two numbers, or None")
    if isinstance(sources, (str, os.PathLike)) or is_file(sources) or not hasattr(sources, "__iter__"):
        raise arguments.wrong_type(name, sources, "an iterable, such as a list")
    total = len(sources) if isinstance(sources, Sized) else None
    results = _alone(sources, work) if jobs == 1 else _spread(sources, work, portable, jobs)
    return _counted(results, total, progress)


@dataclass(frozen=True)
class _Numbered:
    """Work on a pair of a number and a source, and return the result with the warnings, which the caller shows.

    If the pair contains an error instead of a source, it is raised.
    """

    work: Callable[[Any], Any]

    def __call__(self, item: tuple[int, Any]) -> tuple[Any, list[Warning]]:
        if isinstance(item[1], HpcmrefError):
            raise item[1]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = self.work(item[1])
        return made, [each.message for each in caught if isinstance(each.message, Warning)]


def _counted(results: Iterator[R], total: int | None, progress: Progress | None) -> Iterator[R]:
    with contextlib.closing(cast("Any", results)):
        for done, result in enumerate(results, start=1):
            if progress is not None:
                progress(done, total)
            yield result


def _alone(sources: Iterable[Any], work: Callable[[Any], R]) -> Iterator[R]:
    for number, source in enumerate(sources):
        try:
            result = work(source)
        except HpcmrefError as error:
            raise _about(number, error) from error
        yield result


def _spread(sources: Iterable[Any], work: Callable[[Any], R], portable: Callable[[Any], Any], jobs: int) -> Iterator[R]:
    """Do the same as `_alone` in several processes. Results that are early wait until it is their turn."""
    from hpcmref.runtime.executor import execute

    def items() -> Iterator[tuple[int, Any]]:
        for number, source in enumerate(sources):
            try:
                yield number, portable(source)
            except HpcmrefError as error:
                yield number, error  # raised when its turn comes, as errors of workers are

    waiting: dict[int, Any] = {}
    turn = 0
    with contextlib.closing(cast("Any", execute(_Numbered(work), items(), jobs))) as finished:
        for (number, _), outcome in finished:
            waiting[number] = outcome
            while turn in waiting:
                yield _received(turn, waiting.pop(turn))
                turn += 1


def _received(number: int, outcome: Any) -> Any:
    """Return the result of a worker and repeat its warnings here. If the worker failed, raise its exception."""
    if isinstance(outcome, HpcmrefError):
        raise _about(number, outcome) from outcome
    if isinstance(outcome, Exception):
        raise outcome
    result, caught = outcome
    for each in caught:
        warnings.warn(each, stacklevel=6)
    return result


def _about(number: int, error: HpcmrefError) -> HpcmrefError:
    """Return an error of the same class whose message begins with the number of the source."""
    return type(error)(f"number {number}: {error}")
