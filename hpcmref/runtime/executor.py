"""Do work on many independent items in this process, in several processes, or on a Ray cluster.

`execute` has the same interface for all three. It takes items, and yields each item with its result or exception as
soon as it is done. Items are pickled for workers. An item should contain the file contents that its work needs, because
the machines of a cluster may not share a disk.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

from hpcmref.errors import ConfigError, HpcmrefError
from hpcmref.runtime.workers import WorkerDiedError, Workers

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 2
"""How many items are sent to a cluster for each of its workers: one in work and one waiting. This limits memory."""


def execute(
    work: Callable[[T], R], items: Iterable[T], jobs: int = 1, ray: str | None = None, threads: int | None = None
) -> Generator[tuple[T, R | Exception], None, None]:
    """Do `work` on every item, and yield each item with its result or its exception, in the order in which they finish.

    jobs: the number of processes on this machine. 1 means this process, which keeps the order of the items.
    ray: the address of a Ray cluster: "auto", "host:port", "ray://host:port", or "local" for a new one on this machine
        with `jobs` workers.
    threads: the number of threads of each process. None divides the cores among the processes.

    If a process dies, its item is tried once more, alone, after all others. If that fails too, the item gets an
    HpcmrefError. Raises ConfigError for wrong arguments, and if there is no cluster.
    """
    if jobs < 1:
        raise ConfigError(f"{jobs} jobs: it must be 1 or more")
    if ray is not None:
        yield from _on_cluster(work, items, ray, jobs)
    elif jobs == 1:
        for item in items:
            try:
                yield item, work(item)
            except Exception as error:
                yield item, error
    else:
        yield from _in_processes(work, items, jobs, threads)


def _in_processes(
    work: Callable[[T], R], items: Iterable[T], jobs: int, threads: int | None
) -> Iterator[tuple[T, R | Exception]]:
    again: list[T] = []
    with contextlib.closing(Workers(work, jobs, threads)) as workers:
        for item in items:
            workers.give(item)
            while workers.are_busy:
                yield from _collect(workers, again)
        while workers.at_work:
            yield from _collect(workers, again)
    lost: list[T] = []
    with contextlib.closing(Workers(work, 1, threads)) as alone:  # because the usual reason is too little memory
        for item in again:
            alone.give(item)
            yield from _collect(alone, lost)
    for item in lost:
        yield item, HpcmrefError("a worker process died twice, perhaps because memory ran out; try fewer --jobs")


def _collect(workers: Workers[T, R], died: list[T]) -> Iterator[tuple[T, R | Exception]]:
    """Wait until at least one worker is done, and yield its result. Items whose worker died are added to `died`."""
    for item, result in workers.wait():
        if isinstance(result, WorkerDiedError):
            died.append(item)
        else:
            yield item, result


def _on_cluster(
    work: Callable[[T], R], items: Iterable[T], address: str, jobs: int
) -> Iterator[tuple[T, R | Exception]]:
    """Run each item as a task with one CPU on a Ray cluster."""
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray needs Ray: pip install 'hpcmref[ray]'") from None
    try:
        if address == "local":
            ray.init(address="local", num_cpus=jobs, include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address=address, log_to_driver=False)
    except Exception as error:
        raise ConfigError(f"no Ray cluster at {address}: {' '.join(str(error).split())}") from error
    try:
        workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        task = ray.remote(_call)
        waiting: dict[Any, T] = {}
        queue = iter(items)
        while True:
            for item in itertools.islice(queue, AHEAD * workers - len(waiting)):
                waiting[task.remote(work, item)] = item
            if not waiting:
                return
            for handle in ray.wait(list(waiting))[0]:
                item = waiting.pop(handle)
                try:
                    result = ray.get(handle)
                except ray.exceptions.RayTaskError as error:
                    result = error.cause
                except Exception as error:
                    result = error
                yield item, result
    finally:
        ray.shutdown()


def _call(work: Callable[[Any], Any], item: Any) -> Any:
    return work(item)
