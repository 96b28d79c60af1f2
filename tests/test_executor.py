"""Does work that is spread over processes or a cluster give the results of work in one process?"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from hpcmref.cli import app


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


def lines(result: Result, old: str = "", new: str = "") -> list[str]:
    """What is printed of each file, sorted; without the totals."""
    return sorted(line.replace(old, new) for line in result.stdout.splitlines() if " -> " in line)


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


class TestEncode:
    def test_processes_change_no_file(self, folder: Path) -> None:
        one = call("encode", "in", "-o", "one")
        assert one.exit_code == 1  # because of bad.png
        two = call("encode", "in", "-o", "two", "--jobs", "2")
        assert two.exit_code == 1
        assert sorted(contents("one")) == ["0.hpcm", "1.hpcm", "2.hpcm"]
        assert contents("one") == contents("two")
        assert two.stderr == one.stderr
        assert one.stderr.startswith("hpcmref: in/bad.png is not an image in one of the supported formats: ")
        assert one.stderr.count("\n") == 1
        assert lines(two) == lines(one, "one/", "two/")

    def test_processes_change_no_picture(self, folder: Path) -> None:
        assert call("encode", "in", "-o", "one", "--lossless").exit_code == 1
        Path("one/bad.hpcm").write_text("no file")
        one = call("decode", "one", "-o", "back")
        two = call("decode", "one", "-o", "back2", "--jobs", "2")
        assert one.exit_code == two.exit_code == 1
        assert sorted(contents("back")) == ["0.png", "1.png", "2.png"]
        assert contents("back") == contents("back2")
        assert two.stderr == one.stderr
        assert lines(two) == lines(one, "back/", "back2/")


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
        assert result.exit_code == 2
        assert "no Ray cluster at nonsense://there" in result.stderr
