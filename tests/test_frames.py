"""Which frames of an image file are encoded, and is it said which are not?"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import hpcmref
from hpcmref.cli import app
from hpcmref.errors import ImageError
from hpcmref.picture.images import open_image

COLOURS = ["red", "lime", "blue"]
FORMATS = {"TIFF": ".tif", "GIF": ".gif", "WEBP": ".webp", "PNG": ".png", "AVIF": ".avif", "MPO": ".mpo"}


def animation(folder: Path, form: str) -> Path:
    """A file of three frames, 16 x 16."""
    first, *others = (Image.new("RGB", (16, 16), colour) for colour in COLOURS)
    path = folder / f"name{FORMATS[form]}"
    first.save(path, form, save_all=True, append_images=others)
    return path


def run(*arguments: object) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    return result.exit_code, result.stderr.splitlines()


def is_near(path: Path, colour: str) -> bool:
    with Image.open(path) as image, Image.new("RGB", (1, 1), colour) as wanted:
        found, expected = image.convert("RGB").getpixel((8, 8)), wanted.getpixel((0, 0))
    return all(abs(a - b) < 12 for a, b in zip(found, expected, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.filterwarnings("ignore:palette")
def test_every_kind_of_animation(tmp_path: Path, form: str) -> None:
    path = animation(tmp_path, form)
    code, lines = run("encode", path, "-o", tmp_path / "one.hpcm")
    assert code == 0
    assert sum("only the first frame" in line and "2 more are left out" in line for line in lines) == 1
    assert is_near(tmp_path / "one.hpcm", "red")
    code, lines = run("encode", path, "-o", tmp_path / "two.hpcm", "--frame", "2")
    assert (code, [line for line in lines if "frame" in line]) == (0, [])
    assert is_near(tmp_path / "two.hpcm", "lime")
    (tmp_path / "all").mkdir()
    code, lines = run("encode", path, "-o", tmp_path / "all", "--all-frames")
    assert (code, [line for line in lines if "left out" in line]) == (0, [])
    made = sorted((tmp_path / "all").iterdir())
    assert [each.stem for each in made] == ["name-0001", "name-0002", "name-0003"]
    assert all(is_near(each, colour) for each, colour in zip(made, COLOURS, strict=True))


def test_pictures_that_cameras_append_are_no_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.mpo"
    Image.new("RGB", (32, 32), "red").save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(path).size == (32, 32)
    assert run("encode", path, "--all-frames")[0] == 0
    assert sorted(each.stem for each in tmp_path.iterdir()) == ["a", "a-0001"]


def test_a_frame_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = animation(tmp_path, "GIF")
    for frame in (0, 4):
        with pytest.raises(ImageError, match=f"has 3 frames, and no frame {frame}"):
            open_image(path, frame)


def test_all_frames_of_a_folder_with_a_broken_file(tmp_path: Path) -> None:
    animation(tmp_path, "TIFF")
    (tmp_path / "broken.png").write_bytes(b"no image")
    code, lines = run("encode", tmp_path, "-o", tmp_path / "out", "--all-frames")
    assert code == 1
    assert [line for line in lines if "broken.png" in line] == lines
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_options_that_contradict_each_other_are_refused() -> None:
    assert run("encode", "-", "-o", "-", "--all-frames")[0] == 2
    assert run("encode", "a.tif", "--all-frames", "--frame", "2")[0] == 2


def test_an_explicit_first_frame_is_no_surprise(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(animation(tmp_path, "TIFF"), 1).getpixel((0, 0)) == (255, 0, 0)
    with pytest.warns(UserWarning, match="2 more are left out"):
        hpcmref.encode(tmp_path / "name.tif")
