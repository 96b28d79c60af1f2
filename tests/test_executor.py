"""Does spread work give the results of work in one process, and survive workers that fail?"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from hpcmref.cli import app
from hpcmref.errors import ConfigError, HpcmrefError
from hpcmref.runtime.executor import execute


def double(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return 2 * number


def die(number: int) -> int:
    if number == 1:
        os._exit(1)
    return number


class TestExecute:
    @pytest.mark.parametrize("jobs", [1, 2])
    def test_results_and_errors(self, jobs: int) -> None:
        found: dict[int, object] = dict(execute(double, range(6), jobs))
        assert isinstance(found.pop(3), ValueError)
        assert found == {0: 0, 1: 2, 2: 4, 4: 8, 5: 10}

    def test_a_dead_worker_is_an_error_and_not_the_end(self) -> None:
        found = dict(execute(die, range(12), 2))
        assert len(found) == 12
        assert isinstance(found[1], HpcmrefError)
        assert found[11] == 11

    def test_items_are_taken_as_they_are_needed(self) -> None:
        taken: list[int] = []

        def items() -> Iterator[int]:
            for number in range(50):
                taken.append(number)
                yield number

        results = execute(double, items(), 2)
        next(results)
        assert len(taken) <= 6
        results.close()  # type: ignore[attr-defined]

    def test_jobs(self) -> None:
        with pytest.raises(ConfigError):
            list(execute(double, [1], 0))


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images and something else in the folder "in"."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for seed in range(3):
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((80, 65 + seed), Image.Resampling.BICUBIC).save(f"in/{seed}.png")
    Path("in/bad.png").write_text("no image")
    return tmp_path


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


class TestEncode:
    def test_processes_change_no_file(self, folder: Path) -> None:
        one = call("encode", "in", "-o", "one")
        assert one.exit_code == 1  # because of bad.png
        two = call("encode", "in", "-o", "two", "--jobs", "2")
        assert two.exit_code == 1
        assert sorted(contents("one")) == ["0.bin", "1.bin", "2.bin"]
        assert contents("one") == contents("two")
        assert two.stderr == one.stderr
        assert one.stderr.startswith("hpcmref: in/bad.png is not an image of a kind that is read: ")
        assert one.stderr.count("\n") == 1
        assert sorted(two.stdout.splitlines()) == sorted(one.stdout.replace("one/", "two/").splitlines())
        Path("one/bad.bin").write_text("no file")
        one = call("decode", "one", "-o", "back")
        two = call("decode", "one", "-o", "back2", "--jobs", "2")
        assert one.exit_code == two.exit_code == 1
        assert sorted(contents("back")) == ["0.png", "1.png", "2.png"]
        assert contents("back") == contents("back2")
        assert two.stderr == one.stderr
        assert sorted(two.stdout.splitlines()) == sorted(one.stdout.replace("back/", "back2/").splitlines())

    def test_resume(self, folder: Path) -> None:
        Path("in/bad.png").unlink()
        Path("out").mkdir()
        Path("out/1.bin").write_text("done before")
        result = call("encode", "in", "-o", "out", "--resume")
        assert result.exit_code == 0, result.output
        assert [line.split(" ")[0] for line in result.stdout.splitlines()] == ["in/0.png", "in/2.png"]
        assert Path("out/1.bin").read_text() == "done before"
        again = call("encode", "in", "-o", "out", "--resume")
        assert (again.exit_code, again.output) == (0, "")
        assert call("encode", "in", "-o", "out", "--resume", "--force").exit_code == 2


class TestRay:
    """On a Ray instance of two workers on this machine."""

    def test_bench(self, folder: Path) -> None:
        pytest.importorskip("ray")
        pytest.importorskip("bjontegaard")
        arguments = ["bench", "in", "--codecs", "jpeg,hpcmref", "--qualities", "jpeg=20,70", "--qualities", "10,40"]
        local = call(*arguments, "--csv", "local.csv")
        spread = call(*arguments, "--csv", "ray.csv", "--ray", "local", "--jobs", "2")
        assert local.exit_code == spread.exit_code == 1  # because of bad.png
        assert local.stderr == spread.stderr
        ours, theirs = (list(csv.DictReader(Path(name).read_text().splitlines())) for name in ("local.csv", "ray.csv"))
        assert len(ours) == 4 * 4
        for column in ("image", "codec", "quality", "bytes", "bpp", "psnr_db"):
            assert [row[column] for row in ours] == [row[column] for row in theirs]

    def test_encode(self, folder: Path) -> None:
        pytest.importorskip("ray")
        assert call("encode", "in", "-o", "local").exit_code == 1
        assert call("encode", "in", "-o", "spread", "--ray", "local", "--jobs", "2").exit_code == 1
        assert contents("local") == contents("spread")

    def test_no_cluster(self, folder: Path) -> None:
        pytest.importorskip("ray")
        result = call("bench", "in", "--codecs", "jpeg", "--ray", "nonsense://there")
        assert result.exit_code == 1
        assert "no Ray cluster at nonsense://there" in result.stderr
