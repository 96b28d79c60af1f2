"""Where does the work on many independent items run? In this process, in several, or on a Ray cluster.

`execute` hides which: items go in, (item, result or exception) come out as they are done. Workers get an item pickled
and give a result back; what they need of the disk should travel in the item, because a cluster may not share one.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

from hpcmref.errors import ConfigError, HpcmrefError
from hpcmref.runtime.heap import keep_memory

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 2
"""Items given out for each worker: one in work and one waiting, so that few are in memory at a time."""


def execute(
    work: Callable[[T], R], items: Iterable[T], jobs: int = 1, ray: str | None = None
) -> Iterator[tuple[T, R | Exception]]:
    """Do `work` on every item; yields each item with its result, or with the exception that ended it, as they finish.

    jobs: processes on this machine; 1 is this process, and keeps the order. ray: address of a Ray cluster ("auto",
    "host:port", "ray://host:port", or "local" for one on this machine with `jobs` workers). Raises ConfigError.
    """
    if jobs < 1:
        raise ConfigError(f"{jobs} jobs: it must be 1 or more")
    if ray is None and jobs == 1:
        for item in items:
            try:
                yield item, work(item)
            except Exception as error:
                yield item, error
        return
    pool: _Pool = _Cluster(ray, jobs) if ray is not None else _Processes(jobs)
    with contextlib.closing(pool):
        waiting: dict[Any, T] = {}
        for item in items:
            waiting[pool.submit(work, item)] = item
            while len(waiting) >= AHEAD * pool.workers:
                yield from _collect(pool, waiting)
        while waiting:
            yield from _collect(pool, waiting)


def _collect(pool: _Pool, waiting: dict[Any, T]) -> Iterator[tuple[T, Any]]:
    for handle in pool.wait(list(waiting)):
        item = waiting.pop(handle)
        try:
            yield item, pool.result(handle)
        except Exception as error:
            yield item, error


class _Pool(Protocol):
    workers: int

    def submit(self, work: Callable[[Any], Any], item: Any) -> Any: ...

    def wait(self, handles: list[Any]) -> Iterable[Any]: ...

    def result(self, handle: Any) -> Any: ...

    def close(self) -> None: ...


class _Processes(_Pool):
    """Worker processes on this machine, started afresh (spawn), because torch and CUDA do not survive a fork."""

    def __init__(self, jobs: int) -> None:
        self.workers = jobs
        self._pool = self._start()

    def submit(self, work: Callable[[Any], Any], item: Any) -> futures.Future[Any]:
        try:
            return self._pool.submit(work, item)
        except BrokenProcessPool:  # a worker died, of want of memory as a rule; its items have failed, others go on
            self._pool = self._start()
            return self._pool.submit(work, item)

    def wait(self, handles: list[futures.Future[Any]]) -> Iterable[futures.Future[Any]]:
        return futures.wait(handles, return_when=futures.FIRST_COMPLETED).done

    def result(self, handle: futures.Future[Any]) -> Any:
        try:
            return handle.result()
        except BrokenProcessPool:
            raise HpcmrefError("a worker process died, perhaps for want of memory; try fewer --jobs") from None

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _start(self) -> futures.ProcessPoolExecutor:
        import multiprocessing

        threads = max(1, (os.cpu_count() or 1) // self.workers)
        context = multiprocessing.get_context("spawn")
        return futures.ProcessPoolExecutor(self.workers, context, _begin, (threads,))


def _begin(threads: int) -> None:
    """Prepare a worker: its share of the cores, and the interrupt key left to the parent."""
    keep_memory()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by torch when it is imported, which is later
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _call(work: Callable[[Any], Any], item: Any) -> Any:
    return work(item)


class _Cluster(_Pool):
    """Tasks on a Ray cluster, one CPU each."""

    def __init__(self, address: str, jobs: int) -> None:
        try:
            import ray
        except ImportError:
            raise ConfigError("--ray needs Ray: pip install 'hpcmref[ray]'") from None
        self._ray = ray
        try:
            if address == "local":
                ray.init(address="local", num_cpus=jobs, include_dashboard=False, log_to_driver=False)
            else:
                ray.init(address=address, log_to_driver=False)
        except Exception as error:
            raise ConfigError(f"no Ray cluster at {address}: {' '.join(str(error).split())}") from error
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._task = ray.remote(_call)

    def submit(self, work: Callable[[Any], Any], item: Any) -> Any:
        return self._task.remote(work, item)

    def wait(self, handles: list[Any]) -> Iterable[Any]:
        return self._ray.wait(handles)[0]

    def result(self, handle: Any) -> Any:
        try:
            return self._ray.get(handle)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def close(self) -> None:
        self._ray.shutdown()
