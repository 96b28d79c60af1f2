"""Does mypy, in somebody else's script, know what the functions of the package take and return?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SCRIPT = """
from collections.abc import Iterator
from pathlib import Path

import hpcmref
import numpy as np
from PIL import Image
from typing_extensions import assert_type

photo = Image.open("photo.png")
assert_type(hpcmref.encode(photo, quality=32), bytes)
assert_type(hpcmref.encode(np.zeros((4, 4), np.uint8), lossless=True), bytes)
hpcmref.encode("photo.png", size=40_000, strip=["exif"], verify=True)
hpcmref.encode(Path("photo.png"), bpp=0.5, model=Path("mine.safetensors"), device="cpu")
with open("photo.png", "rb") as file:
    hpcmref.encode(file, psnr=35, strip=True)
data = hpcmref.encode(b"bytes")
assert_type(hpcmref.decode(data), Image.Image)
assert_type(hpcmref.decode(data, as_array=False, upto=1), Image.Image)
array = hpcmref.decode("photo.hpcm", as_array=True)
array.mean(axis=0)
found = hpcmref.info(data)
assert_type(found, hpcmref.FileInfo)
assert_type(found.model, str | None)
assert_type(found.bits_per_pixel, float)


def progress(done: int, total: int | None) -> None: ...


assert_type(hpcmref.encode_many([photo, "photo.png"], 20, jobs=2, progress=progress), Iterator[bytes])
assert_type(hpcmref.decode_many([data]), Iterator[Image.Image])
for each in hpcmref.decode_many([data], as_array=True):
    each.astype(np.float32)
codec = hpcmref.load("nano")
assert_type(codec, hpcmref.Codec)
assert_type(codec.encode(photo), bytes)
assert_type(codec.decode(data), Image.Image)
try:
    hpcmref.load("nowhere")
except hpcmref.HpcmrefError as error:
    print(error)
"""

WRONG = """
import hpcmref

hpcmref.encode(42)
hpcmref.encode("photo.png", quality="high")
hpcmref.decode(b"", as_aray=True)
hpcmref.info(None)
hpcmref.encode_many("photo.png", jobs=1.5)
hpcmref.info(b"").width = 3
hpcmref.encrypt(b"")
"""


def complaints(folder: Path) -> set[tuple[str, int]]:
    """Name and line of every error that mypy finds in the scripts of a folder.

    With the settings of this repository, so that what it knows of torch since `mypy` ran there is of use.
    """
    settings = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *settings, *sorted(path.name for path in folder.iterdir())],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "checked 2 source files" in result.stdout, result.stdout + result.stderr
    found = re.findall(r"^([^:]+):(\d+): error", result.stdout, re.MULTILINE)
    return {(name, int(line)) for name, line in found}


def test_a_type_checker_finds_the_wrong_calls_alone(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "good.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text(WRONG)
    calls = [number for number, line in enumerate(WRONG.splitlines(), start=1) if line.startswith("hpcmref.")]
    assert complaints(tmp_path) == {("wrong.py", number) for number in calls}
