"""Does anything get lost when the disk is full, a file unreadable, or the process killed? And do threads disturb it?"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import containers
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hpcmref.cli import app
from hpcmref.format.container import parse, write

if TYPE_CHECKING:
    from hpcmref.codec import Codec

posix = pytest.mark.skipif(os.name != "posix", reason="signals, permissions and devices of POSIX")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


class StandIn:
    """A codec for tests of what is around it: its files are headers."""

    def encode(self, image: Image.Image, quality: int | None = None, **_: object) -> bytes:
        return write(containers.container(quality=quality or 0, width=image.width, height=image.height, grey=False))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcmref.codec.load", lambda model=None, device="auto": StandIn())


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions mean nothing to root, so be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def shell(*arguments: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "hpcmref", *arguments], capture_output=True, env=ENVIRONMENT, timeout=120, **options
    )  # type: ignore[call-overload]


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if not path.is_dir())


# The disk


@posix
def test_no_room_for_the_output(folder: Path) -> None:
    """The kernel refuses what goes beyond 100 bytes, as it does on a full disk: the old file stays, and no other."""
    import resource

    Image.radial_gradient("L").resize((64, 64)).save("a.png")
    Path("a.hpcm").write_bytes(b"precious")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # noqa: E731
    result = shell("encode", "a.png", "--lossless", "--force", preexec_fn=limit)
    assert result.returncode == 1
    assert result.stderr == b"hpcmref: a.png: cannot write a.hpcm: File too large\n"
    assert Path("a.hpcm").read_bytes() == b"precious"
    assert files() == ["a.hpcm", "a.png"]


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_a_device_that_is_full(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save("a.png")
    for arguments in (("encode", "a.png", "-o", "/dev/full"), ("encode", "a.png", "-o", "-")):
        with open("/dev/full", "wb") as full:
            result = subprocess.run(
                [sys.executable, "-m", "hpcmref", *arguments, "--lossless"],
                stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=120,
            )  # fmt: skip
        assert result.returncode == 1
        assert b"No space left on device" in result.stderr
        assert result.stderr.count(b"\n") == 1


@posix
def test_no_permission(folder: Path, stand_in: None) -> None:
    """To read one input, and to write into one folder: each is one line, and nothing else changes."""
    folder.chmod(0o777)
    for parent in folder.parents:
        if parent.name.startswith(("pytest-", "popen-")):  # the second are those of parallel runs
            parent.chmod(parent.stat().st_mode | 0o011)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(name)
    Path("b.png").chmod(0)
    Path("closed").mkdir(mode=0o555)
    Path("open").mkdir()
    Path("open").chmod(0o777)
    CliRunner().invoke(app, ["encode", "a.png", "-o", "open/"])  # imports what nobody may not be allowed to
    Path("open/a.hpcm").unlink()
    with unprivileged():
        first = CliRunner().invoke(app, ["encode", "a.png", "b.png", "-o", "open"])
        second = CliRunner().invoke(app, ["encode", "a.png", "-o", "closed/"])
    assert (first.exit_code, first.stderr) == (1, "hpcmref: cannot read b.png: Permission denied\n")
    assert (second.exit_code, second.stderr) == (1, "hpcmref: a.png: cannot write closed/a.hpcm: Permission denied\n")
    assert files() == ["a.png", "b.png", "open/a.hpcm"]


# A batch


def test_a_thousand_files_some_of_which_cannot_be_read(folder: Path, stand_in: None) -> None:
    good = io.BytesIO()
    Image.new("RGB", (3, 2)).save(good, "PNG")
    noise = io.BytesIO()
    Image.effect_noise((30, 30), 50).save(noise, "PNG")
    Path("in").mkdir()
    for number in range(1000):
        Path(f"in/{number:03}.png").write_bytes(good.getvalue())
    broken = {
        "007": b"",
        "100": b"no image",
        "500": noise.getvalue()[:300],
        "900": good.getvalue()[:30] + bytes(40),
        "999": b"\x89PNG\r\n\x1a\n" + b"\xff" * 60,
    }
    for name, content in broken.items():
        Path(f"in/{name}.png").write_bytes(content)
    result = CliRunner().invoke(app, ["encode", "in", "-o", "out"])
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert len(lines) == len(broken)
    for line, name in zip(lines, broken, strict=True):
        assert f"in/{name}.png" in line
        assert "unexpected" not in line
    written = sorted(path.stem for path in Path("out").iterdir())
    assert written == [f"{number:03}" for number in range(1000) if f"{number:03}" not in broken]
    assert all(parse(path.read_bytes()).width == 3 for path in Path("out").iterdir())
    assert len(result.stdout.splitlines()) == 996  # with the totals

    # And once more: nothing is done twice, nothing is lost, and the exit code still says that something failed.
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    again = CliRunner().invoke(app, ["encode", "in", "-o", "out"])
    assert again.exit_code == 1
    assert {path: path.stat().st_mtime_ns for path in Path("out").iterdir()} == before


@posix
def test_an_interrupt_in_a_batch(folder: Path, sample: Image.Image) -> None:
    """Ctrl-C: what is written is whole, nothing else is there, and the exit code is that of an interrupt."""
    Path("in").mkdir()
    sample.save("in/000.png")
    for number in range(1, 60):
        shutil.copy("in/000.png", f"in/{number:03}.png")
    process = subprocess.Popen(
        [sys.executable, "-m", "hpcmref", "encode", "in", "-o", "out"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (Path("out").is_dir() and len(list(Path("out").glob("*.hpcm"))) >= 2):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    written = list(Path("out").iterdir())
    assert errors.decode() in [f"hpcmref: interrupted after {len(written) - n} of 60 files\n" for n in (0, 1)]
    assert 2 <= len(written) < 60
    assert {path.suffix for path in written} == {".hpcm"}
    assert {parse(path.read_bytes()).width for path in written} == {sample.width}


SLOW_WRITER = """
import os, sys, time
from pathlib import Path
from hpcmref.runtime.files import atomic_write

moment, target = sys.argv[1], Path(sys.argv[2])

def ready(*_):
    print("ready", flush=True)
    time.sleep(60)

setattr(os, moment, ready)
atomic_write(target, b"new" * 10000)
"""


@posix
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_killed_in_the_middle_of_a_write(folder: Path, moment: str, stand_in: None) -> None:
    """No process can clean up after SIGKILL, but the old file is there, and what is left over is in nobody's way."""
    Path("a.hpcm").write_bytes(b"old")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER, moment, "a.hpcm"], stdout=subprocess.PIPE, env=ENVIRONMENT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.communicate(timeout=60)
    assert Path("a.hpcm").read_bytes() == b"old"
    (left_over,) = [name for name in files() if name != "a.hpcm"]
    assert left_over.startswith(".hpcmref-")
    Image.new("RGB", (8, 8)).save("a.png")
    assert CliRunner().invoke(app, ["encode", "a.png", "--force"]).exit_code == 0
    assert parse(Path("a.hpcm").read_bytes()).width == 8
    assert CliRunner().invoke(app, ["info", "."]).exit_code == 0


# Threads


def pictures(sample: Image.Image, count: int) -> list[Image.Image]:
    """Parts of the sample, each of another size, and in turn of every mode."""
    parts = [sample.crop((9 * i, 5 * i, 9 * i + 50 + 7 * i, 5 * i + 40 + 5 * i)) for i in range(count)]
    for number, image in enumerate(parts):
        mode = ("RGB", "L", "RGBA", "1")[number % 4]
        parts[number] = image.convert(mode)
        if mode == "RGBA":
            parts[number].putalpha(Image.radial_gradient("L").resize(image.size))
    return parts


def test_eight_threads_on_one_codec(codec: Codec, sample: Image.Image) -> None:
    """Encoding and decoding at once gives the bytes and pixels of one after the other."""
    images = pictures(sample, 16)
    expected = [codec.encode(image, 4 * number) for number, image in enumerate(images)]
    decoded = [codec.decode(data).tobytes() for data in expected]
    with ThreadPoolExecutor(8) as pool:
        encodings = [pool.submit(codec.encode, image, 4 * number) for number, image in enumerate(images)]
        decodings = [pool.submit(codec.decode, data) for data in expected]
        assert [each.result() for each in encodings] == expected
        assert [each.result().tobytes() for each in decodings] == decoded


FRESH = """
import io, sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
import numpy as np
from PIL import Image
import hpcmref

sys.setswitchinterval(1e-5)
barrier = Barrier(8)
codec = hpcmref.load(device="cpu")
pixels = np.add.outer(np.arange(40), np.arange(60)).astype(np.uint8)
image = Image.merge("RGB", [Image.fromarray(pixels)] * 3)

def work(number):
    barrier.wait()
    data = codec.encode(image)
    opened = Image.open(io.BytesIO(data))
    return data, codec.decode(data).tobytes(), opened.tobytes()

with ThreadPoolExecutor(8) as pool:
    results = list(pool.map(work, range(8)))
assert len(set(results)) == 1
assert results[0][0] == codec.encode(image)
assert results[0][1] == results[0][2]
"""


def test_eight_threads_that_are_the_first_to_use_it() -> None:
    """Tables and the range coder are loaded on first use: here by all threads at once."""
    result = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, env=ENVIRONMENT, timeout=120, text=True)
    assert result.returncode == 0, result.stderr


def test_threads_do_not_share_metadata(codec: Codec, sample: Image.Image) -> None:
    image = sample.crop((0, 0, 20, 20))
    copies = []
    for number in range(8):
        copies.append(image.copy())
        copies[-1].info["xmp"] = f"<x n={number}>".encode()
        copies[-1].putalpha(number)
    with ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(lambda each: codec.decode(codec.encode(each, 0)), copies))
    for number, each in enumerate(decoded):
        assert each.info["xmp"] == f"<x n={number}>".encode()
        assert np.asarray(each)[0, 0, 3] == number
