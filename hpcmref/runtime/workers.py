"""Worker processes on this machine that end when their parent does, however it ends.

Workers are started afresh ("spawn"), because the threads of OpenMP and the state of CUDA do not survive a fork. Each
has a pipe to the parent, over which it gets one item at a time, so that the parent knows what was in work when a worker
dies.

| end of the parent | what ends its workers |
| --- | --- |
| the work is done, an exception, Ctrl-C, SIGTERM, SIGHUP | the parent, in `Workers.close` |
| SIGKILL, a crash | Linux: a signal that the kernel sends; everywhere: a thread that sees the parent's pipe end |
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
"""Seconds that a worker has to end by itself before it is killed."""

_MOST_ON_WINDOWS = 61
"""Processes that can be waited for at once there, as in concurrent.futures."""

_PR_SET_PDEATHSIG = 1  # Linux, prctl.h


class WorkerDiedError(Exception):
    """The process that worked on an item is gone, and has sent no result."""


@dataclass(eq=False)
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    item: Any = None
    at_work: bool = False


class Workers(Generic[T, R]):
    """`count` processes that do the same work on items; one that dies is replaced when there is an item for it."""

    def __init__(self, work: Callable[[T], R], count: int, threads: int | None = None) -> None:
        """threads: that each computes with; None gives each its share of the cores."""
        self._work = work
        self._count = count = min(count, _MOST_ON_WINDOWS) if sys.platform == "win32" else count
        self._threads = threads or max(1, available_cores() // count)
        self._workers: list[_Worker] = []
        self._started = False

    @property
    def at_work(self) -> int:
        """How many workers have an item."""
        return sum(worker.at_work for worker in self._workers)

    @property
    def are_busy(self) -> bool:
        """Whether no worker is left for another item."""
        return self.at_work >= self._count

    def give(self, item: T) -> None:
        """Have an idle worker work on an item; there must be one (`are_busy`)."""
        if not self._started:
            self._started = True
            for _ in range(self._count):
                self._start()  # all at once, because each takes a while to be ready
        worker = next((each for each in self._workers if not each.at_work), None) or self._start()
        worker.item, worker.at_work = item, True
        with contextlib.suppress(OSError):  # it has died: `wait` will say so
            worker.pipe.send(item)

    def wait(self) -> Iterator[tuple[T, R | Exception]]:
        """Wait for one worker at least; yields items with their results, or with what their work raised.

        The result is WorkerDiedError where a process died.
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
        """End all workers, at once if they are at work. Afterwards none is left."""
        workers, self._workers = self._workers, []
        _end(workers)

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        # The kernel's signal comes at the end of the thread that started the process, so that thread must last.
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
    """Have a process that is started meanwhile never see the interrupt key, which is its parent's business; here, an
    interrupt waits."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # which changes the mask when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(workers: list[_Worker]) -> None:
    """Idle workers end when their pipe does; the others are asked to, and killed if that takes too long."""
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


# In the worker


def _serve(pipe: Connection, parent: int | None, threads: int) -> None:
    """Work on what comes through the pipe until it ends."""
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it could not be blocked
    keep_memory()
    compute_with(threads)
    try:
        work = pipe.recv()
        while True:
            pipe.send_bytes(_done(work, pipe.recv()))
    except (EOFError, OSError):
        pass
    except SystemExit:
        os._exit(1)  # what was begun is tidied up by now; to take the interpreter and torch apart can take seconds


def _done(work: Callable[[Any], Any], item: Any) -> bytes:
    try:
        return pickle.dumps(work(item), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        try:
            message = pickle.dumps(error)
            pickle.loads(message)  # many exceptions can be pickled, but not made again
            return message
        except Exception:
            return pickle.dumps(HpcmrefError(f"{type(error).__name__}: {error}"))


def _end_with(parent: int | None) -> None:
    """End this process when its parent ends; parent: its id, if the kernel shall see to that too.

    SIGTERM ends it at once, whatever it is at; work that has to tidy up says so (`signals.tidying`).
    """
    if sys.platform == "linux" and parent is not None:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before it could be asked for
            raise SystemExit
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    """Wait for the end of the parent, which closes a pipe, and end this process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    if hasattr(signal, "pthread_kill"):  # what waits for something in the main thread is woken up
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        time.sleep(_PATIENCE)
    os._exit(1)
