"""Do worker processes end with their parent, however it ends, and does a batch survive workers that die?"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from hpcmref import lossless
from hpcmref.errors import ConfigError, HpcmrefError
from hpcmref.runtime import cores
from hpcmref.runtime.executor import execute
from hpcmref.runtime.signals import Stopped, stoppable

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are looked up in /proc")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


class UnmakeableError(Exception):
    """Can be pickled, but not made again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def double(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    if number == 4:
        raise UnmakeableError(1, 2)
    return 2 * number


def die(item: tuple[int, Path]) -> int:
    """1 always kills its process; 2 does the first time."""
    number, folder = item
    if number == 1 or (number == 2 and not (folder / "tried").exists()):
        (folder / "tried").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def threads_of(_: int) -> int:
    import torch

    return torch.get_num_threads()


class TestExecute:
    @pytest.mark.parametrize("jobs", [1, 2])
    def test_results_and_errors(self, jobs: int) -> None:
        found: dict[int, object] = dict(execute(double, range(6), jobs))
        assert isinstance(found.pop(3), ValueError)
        assert "1 and 2" in str(found.pop(4))
        assert found == {0: 0, 1: 2, 2: 4, 5: 10}

    def test_an_item_whose_worker_dies_is_tried_once_more_and_the_rest_goes_on(self, tmp_path: Path) -> None:
        found = {number: result for (number, _), result in execute(die, [(n, tmp_path) for n in range(8)], 2)}
        error = found.pop(1)
        assert isinstance(error, HpcmrefError)
        assert "died twice" in str(error)
        assert found == {number: number for number in range(8) if number != 1}

    def test_items_are_taken_as_they_are_needed(self) -> None:
        taken: list[int] = []

        def items() -> Iterator[int]:
            for number in range(50):
                taken.append(number)
                yield number

        results = execute(double, items(), 2)
        next(results)
        assert len(taken) <= 4
        results.close()  # type: ignore[attr-defined]
        assert not [child for child in multiprocessing.active_children() if "SpawnProcess" in child.name]

    def test_jobs(self) -> None:
        with pytest.raises(ConfigError):
            list(execute(double, [1], 0))

    def test_threads(self) -> None:
        """Each process gets its share of the cores, or the number that is asked for."""
        share = max(1, cores.available_cores() // 2)
        assert {result for _, result in execute(threads_of, range(2), 2)} == {share}
        assert {result for _, result in execute(threads_of, range(2), 2, threads=1)} == {1}


class TestCores:
    """Limits of containers, read from files like the kernel's."""

    @pytest.mark.parametrize(("content", "expected"), [("150000 100000", 1.5), ("max 100000", None), ("", None)])
    def test_version_2(self, tmp_path: Path, content: str, expected: float | None) -> None:
        (tmp_path / "a/b").mkdir(parents=True)
        (tmp_path / "a/cpu.max").write_text(content)
        (tmp_path / "member").write_text("0::/a/b\n")
        assert cores._quota(tmp_path, tmp_path / "member") == (expected or float("inf"))

    def test_version_1(self, tmp_path: Path) -> None:
        (tmp_path / "cpu/a").mkdir(parents=True)
        (tmp_path / "cpu/a/cpu.cfs_quota_us").write_text("200000\n")
        (tmp_path / "cpu/a/cpu.cfs_period_us").write_text("100000\n")
        (tmp_path / "member").write_text("3:cpuset:/x\n2:cpu,cpuacct:/a\n")
        assert cores._quota(tmp_path, tmp_path / "member") == 2

    @pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
    def test_affinity(self) -> None:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(before)})
        try:
            assert cores.available_cores() == 1
        finally:
            os.sched_setaffinity(0, before)


class TestStoppable:
    @pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
    def test_a_signal_is_an_exception_once(self, name: str) -> None:
        number = getattr(signal, name)
        found = signal.signal(number, signal.SIG_DFL)  # where tests run in the background, it is ignored
        before = signal.getsignal(number)

        def run() -> None:
            with stoppable():
                try:
                    signal.raise_signal(number)
                finally:
                    signal.raise_signal(number)  # while it is tidied up: ignored

        try:
            with pytest.raises(Stopped) as caught:
                run()
            assert caught.value.exit_code == 128 + number
            assert signal.getsignal(number) == before
        finally:
            signal.signal(number, found)

    def test_ignored_signals_stay_ignored(self) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with stoppable():
                signal.raise_signal(signal.SIGHUP)
        finally:
            signal.signal(signal.SIGHUP, before)


# --- no worker outlives its parent ----------------------------------------------------------------------------------


def children(parent: int) -> set[int]:
    """The processes that a process has started, and those that they have."""
    found: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found |= {int(folder.name)} | children(int(folder.name))
    return found


def alive(processes: set[int]) -> set[int]:
    left = set()
    for process in processes:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            left.add(process)
    return left


@linux
@pytest.mark.parametrize(
    ("name", "options"), [("SIGINT", []), ("SIGTERM", ["--lossless"]), ("SIGHUP", ["--lossless"]), ("SIGKILL", [])]
)
def test_no_worker_outlives_its_parent(tmp_path: Path, sample: Image.Image, name: str, options: list[str]) -> None:
    """Two seconds after any end of "encode --jobs 2" no worker is left, no temporary file, and it is said how far.

    With --lossless the workers do not import torch, and without it they do.
    """
    (tmp_path / "in").mkdir()
    sample.save(tmp_path / "in/0.png")
    for number in range(1, 150):
        (tmp_path / f"in/{number}.png").hardlink_to(tmp_path / "in/0.png")
    number = getattr(signal, name)
    process = subprocess.Popen(
        [sys.executable, "-m", "hpcmref", "encode", "in", "-o", "out", "--jobs", "2", "--quiet", *options],
        cwd=tmp_path, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL) if name != "SIGKILL" else None,
    )  # fmt: skip
    started: set[int] = set()
    try:
        deadline = time.monotonic() + 90
        while len(list(tmp_path.glob("out/*.hpcm"))) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        started = children(process.pid)
        assert len(started) >= 2
        process.send_signal(number)
        code = process.wait(20)
        deadline = time.monotonic() + 2
        while alive(started) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert alive(started) == set()
    finally:
        for each in {process.pid} | alive(started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
    assert process.stderr is not None
    said = process.stderr.read()
    if name == "SIGKILL":
        assert code == -signal.SIGKILL
        return
    assert code == 128 + number
    assert said.startswith("hpcmref: interrupted after " if name == "SIGINT" else f"hpcmref: stopped by {name} after ")
    assert said.endswith(" of 150 files\n")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".hpcm"}


@linux
def test_the_interrupt_key_while_workers_start_is_one_line(tmp_path: Path, sample: Image.Image) -> None:
    """A terminal sends it to all processes of the group, those that are importing modules too."""
    (tmp_path / "in").mkdir()
    for number in range(20):
        sample.save(tmp_path / f"in/{number}.png")
    process = subprocess.Popen(
        [sys.executable, "-m", "hpcmref", "encode", "in", "-o", "out", "--jobs", "2"],
        cwd=tmp_path, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(children(process.pid)) < 3 and time.monotonic() < deadline:  # two workers and multiprocessing's tracker
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "hpcmref: interrupted after 0 of 20 files\n")


@linux
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_workers_tidy_up_what_the_bench_has_begun(tmp_path: Path, sample: Image.Image, name: str) -> None:
    """Programs that a worker has started, and temporary folders, go with it; even if the parent is killed."""
    pytest.importorskip("bjontegaard")
    (tmp_path / "tmp").mkdir()
    for number in range(3):
        sample.save(tmp_path / f"{number}.png")
    slow = tmp_path / "slow.sh"
    slow.write_text("#!/bin/sh\nsleep 60\n")
    slow.chmod(0o755)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "hpcmref", "bench", ".", "--codecs", "jpeg", "--metrics", "psnr", "--jobs", "2"),
            *("--encoder", f"slow={slow} {{in}} {{out}} {{q}}|cp {{out}} {{png}}", "--qualities", "slow=1,2"),
        ],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**ENVIRONMENT, "TMPDIR": str(tmp_path / "tmp")},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "tmp").glob("hpcmref-*/between"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    started = children(process.pid)
    process.send_signal(getattr(signal, name))
    process.wait(20)
    deadline = time.monotonic() + 2
    while (alive(started) or list((tmp_path / "tmp").glob("hpcmref-*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(started) == set()
    assert not list((tmp_path / "tmp").glob("hpcmref-*"))


# --- after a fork ---------------------------------------------------------------------------------------------------


FORK = """
import multiprocessing, sys
import hpcmref, torch
from PIL import Image

torch.set_num_threads(2)  # the threads of OpenMP do not survive a fork

def work(name):
    image = Image.open(name)
    image.load()
    data = hpcmref.encode(image)
    return hpcmref.decode(data).size, torch.get_num_threads()

if __name__ == "__main__":
    image = Image.linear_gradient("L").resize((300, 200)).convert("RGB")
    image.save(sys.argv[1])
    Image.open(sys.argv[1]).load()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(pool.map_async(work, [sys.argv[1]] * 4).get(60))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_of_a_process_that_has_used_a_codec_works(tmp_path: Path) -> None:
    """It computes with one thread, without changing the setting of torch."""
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run(
        [sys.executable, "-c", FORK, str(tmp_path / "a.hpcm")],
        capture_output=True, env=environment, timeout=120, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str([((300, 200), 2)] * 4)


def test_the_example_of_the_document(tmp_path: Path) -> None:
    """docs/processes.md says how to use several processes; its code runs as it stands there."""
    document = (Path(__file__).parent.parent / "docs" / "processes.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    for name in ("a.hpcm", "b.hpcm"):
        (tmp_path / name).write_bytes(lossless.encode(Image.new("RGB", (9, 7), "teal")))
    result = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, env=ENVIRONMENT, timeout=120, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
