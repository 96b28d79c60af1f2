"""Is every wrong, empty or extreme value of an option one sentence and exit 2, without a traceback?"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DATA
from PIL import Image
from typer.testing import CliRunner, Result

from hpcmref import lossless
from hpcmref.cli import app

ENCODE = ["encode", "a.png", "-o", "new"]
DECODE = ["decode", "a.hpcm", "-o", "new.png"]
BENCH = ["bench", "a.png", "--codecs", "jpeg"]
TRAIN = ["train", "a.png", "-o", "run", "--steps", "1"]

WRONG: list[list[str]] = [
    *([*ENCODE, "-q", value] for value in ("64", "-1", "31.5", "high", "", "nan")),
    *([*ENCODE, "--bpp", value] for value in ("0", "-1", "nan", "inf", "low", "")),
    *([*ENCODE, "--psnr", value] for value in ("0", "-1", "nan", "inf", "")),
    *([*ENCODE, "--size", value] for value in ("0", "-1", "1TB", "", "9" * 400, "kB")),
    *([*ENCODE, "--frame", value] for value in ("0", "-1", "first", "")),
    *([*ENCODE, "--strip-only", value] for value in ("", "locaton", "exif,,")),
    *([*ENCODE, "-m", value] for value in ("nosuch", "nanno")),
    *([*ENCODE, "--device", value] for value in ("gpu", "")),
    *([*ENCODE, "--jobs", value] for value in ("0", "-1", "many", "", "1.5")),
    *([*ENCODE, "--threads", value] for value in ("0", "-1", "many", "9999999999")),
    [*ENCODE, "-q", "5", "--bpp", "1"],
    [*ENCODE, "--lossless", "--size", "5"],
    [*ENCODE, "--force", "--resume"],
    ["encode", "a.png", "-o", ""],
    ["encode", "", "-o", "new"],
    ["encode"],
    *([*DECODE, "--format", value] for value in ("jpegg", "", "gif")),
    *([*DECODE, "--background", value] for value in ("puple", "", "#12")),
    *([*DECODE, "--output-quality", value] for value in ("0", "101", "high", "50")),  # PNG has none
    *([*DECODE, "--upto", value] for value in ("0", "4", "")),
    *([*DECODE, "--max-pixels", value] for value in ("0", "-1", "all")),
    *(["compare", "a.png", "a.png", "--metrics", value] for value in ("psnrr", "", ",")),
    ["compare", "a.png"],
    ["compare", "a.png", "."],
    ["thumbnail", "a.hpcm"],
    ["thumbnail", "a.hpcm", "-o", ""],
    ["thumbnail", "", "-o", "new.png"],
    ["verify"],
    ["verify", "learned.hpcm", "-m", "nosuch"],
    ["verify", "learned.hpcm", "-m", "nosuch", "--jobs", "2"],
    ["decode", "learned.hpcm", "-o", "new.png", "-m", "nosuch"],
    ["bench"],
    ["bench", "-"],
    *([*BENCH[:-1], value] for value in ("", "jpg", "jpeg:speed=1", "jpeg:", "hpcmref:x=1", "jpeg,jpeg")),
    ["bench", "a.png", "--codecs", "hpcmref", "--models", "nano,nosuch"],
    ["bench", "a.png", "--codecs", "hpcmref", "--models", "mine=nosuch"],
    ["bench", "--profile", "--models", "nosuch"],
    *([*BENCH, "--qualities", value] for value in ("jpeg=200", "jpge=20", "jpeg=", "jpeg=1:2:0", "jpeg=x")),
    *([*BENCH, "--metrics", value] for value in ("ssimulacra", "")),
    *([*BENCH, "--range", value] for value in ("nan:1", "1", "2:1", "0:1", "")),
    *([*BENCH, "--target", value] for value in ("bpp=nan", "bpp=0", "bpp=", "size=3", "")),
    *([*BENCH, "--repeat", value] for value in ("0", "x")),
    *([*BENCH, "--jobs", value] for value in ("0", "x")),
    *([*BENCH, "--limit", value] for value in ("0", "-1")),
    *([*BENCH, "--time-limit", value] for value in ("0", "nan", "inf", "-1")),
    *([*BENCH, "--generations", value] for value in ("0", "x")),
    *([*BENCH, "--json", value] for value in (".", "missing/x.json")),
    *([*BENCH, "--csv", value] for value in (".", "missing/x.csv")),
    [*BENCH, "--report", "-"],
    [*BENCH, "--results", "kodk"],
    [*BENCH, "--encoder", "x=nothing"],
    *([*TRAIN, "--minutes", value] for value in ("nan", "inf", "0", "-1")),
    *([*TRAIN, "--lambda", value] for value in ("nan", "-1", "0")),
    *([*TRAIN, "--learning-rate", value] for value in ("nan", "0", "-1", "inf")),
    *([*TRAIN, "--rescale", value] for value in ("nan", "0", "2")),
    *([*TRAIN, "--crops", value] for value in ("", "0x64", "1x63", "1x64@1", "1x64@nan")),
    *([*TRAIN, "--shard-mb", value] for value in ("nan", "0")),
    *([*TRAIN, "--seed", value] for value in ("-1", "9" * 30)),
    *([*TRAIN, "--limit", value] for value in ("0", "-1")),
    *([*TRAIN, option, "nonsense"] for option in ("--preset", "--memory", "--metric", "--schedule", "--device")),
    ["train", "missing", "-o", "run", "--steps", "1"],
    ["checkpoints", "convert", "", "-o", ""],
    ["checkpoints", "convert", "x.pth.tar", "-o", "y"],
    ["checkpoints", "lst"],
    ["verfy", "a.hpcm"],
]

NEAR = {
    "--quality": [*ENCODE, "--qualty", "3"],
    "verify": ["verfy", "a.hpcm"],
    "nano": [*ENCODE, "-m", "nanno"],
    "location": [*ENCODE, "--strip-only", "locaton"],
    "jpeg": [*DECODE, "--format", "jpegg"],
    "purple": [*DECODE, "--background", "puple"],
    "ssimulacra2": ["compare", "a.png", "a.png", "--metrics", "ssimulacra"],
    "kodak": [*BENCH, "--results", "kodk"],
    "cosine": [*TRAIN, "--schedule", "cosin"],
    "light": [*TRAIN, "--preset", "ligt"],
}
"""What is meant, and what was typed."""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("options"))
        image = Image.linear_gradient("L").resize((70, 65))
        image.save("a.png")
        Path("a.hpcm").write_bytes(lossless.encode(image))
        shutil.copy(DATA / "conformance" / "light.bin", "learned.hpcm")
        yield


def call(arguments: list[str]) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_wrong_value_is_one_sentence_and_exit_2(arguments: list[str]) -> None:
    before = sorted(Path().iterdir())
    result = call(arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert "unexpected" not in result.output
    assert "Usage:" in result.stderr or result.stderr.count("\n") == 1
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("meant", NEAR)
def test_a_near_name_is_suggested(meant: str) -> None:
    result = call(NEAR[meant])
    assert result.exit_code in (1, 2)
    said = " ".join(result.stderr.replace("│", " ").lower().split())  # Typer breaks lines
    assert meant in said
    assert "did you mean" in said or "possible options" in said


@pytest.mark.parametrize("arguments", [[*ENCODE, "--bpp", "1e308"], [*ENCODE, "--size", "999999999999999GB"]])
def test_an_extreme_value_that_means_something_works(arguments: list[str], tmp_path: Path) -> None:
    arguments[3] = str(tmp_path / "new")
    assert call(arguments).exit_code == 0
