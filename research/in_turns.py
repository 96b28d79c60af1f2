"""Run the same code with this package and with that of an older commit, in two processes that take turns.

Times of two versions can be compared only when both are measured in one run: machines differ, and change their speed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parent.parent


class Worker:
    """A process that runs a program with the package of one folder. It answers each line of its input with a line.

    The program's first line of output must be the folder that its package came from, which is compared with the wanted.
    """

    def __init__(self, program: str, arguments: Sequence[object], code: Path, threads: int, folder: Path) -> None:
        """code: the folder that holds `hpcmref/`; folder: an empty one to run in, as Python looks there first."""
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": str(threads)},
            cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        found = self._line().strip()
        if found != str(code.resolve()):
            raise RuntimeError(f"the package came from {found}, not from {code}")

    def ask(self, question: object) -> Any:
        """The answer, parsed as JSON, to a question, which is sent as a line of JSON."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return line
        raise RuntimeError("a worker has ended")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@contextmanager
def versions(commit: str) -> Iterator[Mapping[str, Path]]:
    """The folders of both packages, as "old" (of the commit, taken from the history) and "new", and "empty"."""
    with tempfile.TemporaryDirectory() as temporary:
        old, empty = Path(temporary) / "old", Path(temporary) / "empty"
        for folder in (old, empty):
            folder.mkdir()
        archive = subprocess.run(["git", "archive", commit, "hpcmref"], cwd=ROOT, check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", old], input=archive.stdout, check=True)
        yield {"old": old, "new": ROOT, "empty": empty}
