"""Worker processes on this machine. They end when their parent ends, for any reason.

Workers are started afresh ("spawn"), because the threads of OpenMP and the state of CUDA do not survive a fork. Each
has a pipe to the parent, over which it gets one item at a time, so that the parent knows what was in work when a worker
dies.

| end of the parent | what ends its workers |
| --- | --- |
| the work is done, an exception, Ctrl-C, SIGTERM, SIGHUP | the parent, in `Workers.close` |
| SIGKILL, a crash | Linux: a signal that the kernel sends; everywhere: a thread that notices the closed pipe |
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from hpcmref.errors import HpcmrefError
from hpcmref.runtime.cores import available_cores, compute_with
from hpcmref.runtime.heap import keep_memory

T = TypeVar("T")
R = TypeVar("R")

_PATIENCE = 1.0
"""How many seconds a worker gets to end by itself before it is killed."""

_MOST_ON_WINDOWS = 61
"""Processes that can be waited for at once there, as in concurrent.futures."""

_PR_SET_PDEATHSIG = 1  # Linux, prctl.h


class WorkerDiedError(Exception):
    """The process that worked on an item has ended without sending a result."""


@dataclass(eq=False)
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    item: Any = None
    at_work: bool = False


class Workers(Generic[T, R]):
    """A pool of `count` processes that do the same work on items.

    A process that dies is replaced when the next item is given.
    """

    def __init__(self, work: Callable[[T], R], count: int, threads: int | None = None) -> None:
        """Prepare the pool; processes start with the first item.

        work: what is done with each item; it is pickled. threads: the number of threads of each process; None divides
        the cores among the processes.
        """
        self._work = work
        self._count = count = min(count, _MOST_ON_WINDOWS) if sys.platform == "win32" else count
        self._threads = threads or max(1, available_cores() // count)
        self._workers: list[_Worker] = []
        self._started = False

    @property
    def at_work(self) -> int:
        """The number of workers that have an item."""
        return sum(worker.at_work for worker in self._workers)

    @property
    def are_busy(self) -> bool:
        """Whether all workers have an item. No further item can be given until one of them is done."""
        return self.at_work >= self._count

    def give(self, item: T) -> None:
        """Give an item to an idle worker. There must be one, see `are_busy`."""
        if not self._started:
            self._started = True
            for _ in range(self._count):
                self._start()  # start all at once, because each needs some time to be ready
        worker = next((each for each in self._workers if not each.at_work), None) or self._start()
        worker.item, worker.at_work = item, True
        with contextlib.suppress(OSError):  # the worker has died; `wait` reports it
            worker.pipe.send(item)

    def wait(self) -> Iterator[tuple[T, R | Exception]]:
        """Wait until at least one worker is done, and yield items with their results or with the exceptions raised.

        The result is a WorkerDiedError if the process has died.
        """
        busy = {worker.pipe: worker for worker in self._workers if worker.at_work}
        for pipe in wait(list(busy)) if busy else ():
            worker = busy[pipe]  # type: ignore[index]
            try:
                result = pickle.loads(worker.pipe.recv_bytes())
            except (EOFError, OSError):
                result = WorkerDiedError()
                self._workers.remove(worker)
                _end([worker])
            item, worker.item, worker.at_work = worker.item, None, False
            yield item, result

    def close(self) -> None:
        """End all workers and wait for their end. Those that have an item are interrupted."""
        workers, self._workers = self._workers, []
        _end(workers)

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        # The kernel sends its signal when the thread ends that has started the process. Only the main thread lasts.
        lasts = threading.current_thread() is threading.main_thread()
        arguments = (theirs, os.getpid() if lasts else None, self._threads)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        with _interrupts_blocked():
            process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        with contextlib.suppress(OSError):
            ours.send(self._work)
        return worker


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT in this context. Processes started in it ignore the interrupt key, which their parent handles.

    An interrupt of this process is delivered when the context ends.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # it changes the signal mask when it starts, so it must be running before
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(workers: list[_Worker]) -> None:
    """End workers: idle ones by closing their pipe, the others by SIGTERM. After _PATIENCE, they are killed."""
    for worker in workers:
        worker.pipe.close()
        if worker.at_work:
            worker.process.terminate()
    deadline = time.monotonic() + _PATIENCE
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.process.close()


# The following functions run in the worker process.


def _serve(pipe: Connection, parent: int | None, threads: int) -> None:
    """Work on the items that come through the pipe, until it is closed."""
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for systems on which it could not be blocked
    keep_memory()
    compute_with(threads)
    try:
        work = pipe.recv()
        while True:
            pipe.send_bytes(_done(work, pipe.recv()))
    except (EOFError, OSError):
        pass
    except SystemExit:
        os._exit(1)  # everything is cleaned up by now, and the normal end of Python with torch can take seconds


def _done(work: Callable[[Any], Any], item: Any) -> bytes:
    try:
        return pickle.dumps(work(item), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        try:
            message = pickle.dumps(error)
            pickle.loads(message)  # some exceptions can be pickled, but not unpickled
            return message
        except Exception:
            return pickle.dumps(HpcmrefError(f"{type(error).__name__}: {error}"))


def _end_with(parent: int | None) -> None:
    """Make this process end when its parent ends.

    parent: the process id of the parent, to have the kernel send SIGTERM when it ends; None if a thread alone shall
    watch it. SIGTERM ends the process at once. Work that must clean up first uses `signals.tidying`.
    """
    if sys.platform == "linux" and parent is not None:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent ended before the kernel was told
            raise SystemExit
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    """Wait until the parent ends, which closes a pipe, and end this process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    if hasattr(signal, "pthread_kill"):  # interrupts a system call of the main thread
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        time.sleep(_PATIENCE)
    os._exit(1)
