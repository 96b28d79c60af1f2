"""Does every script in examples/ run as its first lines say?"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: Path | str) -> str:
    """What a script prints."""
    done = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def photo(tmp_path: Path, sample: Image.Image) -> Path:
    """A part of the sample photograph."""
    path = tmp_path / "photo.png"
    sample.crop((100, 50, 292, 194)).save(path)
    return path


def test_encode_folder(tmp_path: Path, photo: Path) -> None:
    shutil.copy(photo, tmp_path / "another.png")
    assert run("encode_folder.py", tmp_path, tmp_path / "out").count("times smaller") == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["another.hpcm", "photo.hpcm"]


def test_compare_with_jpeg(photo: Path) -> None:
    lines = run("compare_with_jpeg.py", photo).splitlines()
    assert len(lines) == 3
    for line in lines:
        _, _, _, jpeg, _, _, ours, _ = line.replace(",", "").split()
        assert float(ours) > float(jpeg) + 1


def test_plot_curve(tmp_path: Path, photo: Path) -> None:
    pytest.importorskip("matplotlib")
    run("plot_curve.py", photo, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size > (300, 200)


def test_train_tiny(tmp_path: Path, photo: Path) -> None:
    assert run("train_tiny.py", photo, tmp_path).strip().endswith("bytes")


def test_no_other_examples() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "encode_folder.py",
        "compare_with_jpeg.py",
        "plot_curve.py",
        "train_tiny.py",
    }
