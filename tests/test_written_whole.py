"""Is what is written whole, with the permissions that cp would give it, and are pipes and devices never replaced?"""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from containers import changed, learned_of
from PIL import Image, features
from typer.testing import CliRunner, Result

from hpcmref import DEFAULT_QUALITY
from hpcmref.cli import app
from hpcmref.errors import HpcmrefError
from hpcmref.format.container import MAGIC, parse, write
from hpcmref.runtime.files import atomic_write, descriptor_of, is_special

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions, links and pipes of POSIX")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((24, 96)).convert("RGB").save("a.png")
    return tmp_path


def shell(line: str) -> subprocess.CompletedProcess[bytes]:
    """A line for bash, in which `encode` is that of this package, without loss: that needs no torch."""
    return subprocess.run(
        ["bash", "-c", f'encode() {{ "{sys.executable}" -m hpcmref encode --lossless "$@"; }}; {line}'],
        capture_output=True, env=ENVIRONMENT, timeout=120,
    )  # fmt: skip


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_gets_what_the_umask_leaves(tmp_path: Path) -> None:
    for mask in (0o022, 0o027, 0o077):
        path = tmp_path / oct(mask)
        before = os.umask(mask)
        try:
            atomic_write(path, b"data")
        finally:
            os.umask(before)
        assert mode(path) == 0o666 & ~mask


@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o664])
def test_a_replaced_file_keeps_its_permissions(tmp_path: Path, permissions: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(permissions)
    atomic_write(path, b"new")
    assert (path.read_bytes(), mode(path)) == (b"new", permissions)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_a_replaced_file_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.chown(path, 1234, 5678)
    atomic_write(path, b"new")
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 5678)


def test_a_private_file_is_private_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o600)
    modes: list[int] = []
    replace = os.replace

    def look(source: Path, target: Path) -> None:
        modes.append(mode(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    atomic_write(path, b"new")
    assert modes == [0o600]


def test_links(tmp_path: Path) -> None:
    """A symbolic link still leads to the file; a hard link is another file from then on."""
    path, soft, hard = (tmp_path / name for name in ("file", "soft", "hard"))
    path.write_bytes(b"old")
    soft.symlink_to("file")
    hard.hardlink_to(path)
    atomic_write(soft, b"new")
    assert soft.is_symlink()
    assert (path.read_bytes(), hard.read_bytes()) == (b"new", b"old")


def test_file_and_folder_are_flushed_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flush(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    atomic_write(tmp_path / "file", b"data")
    assert events == ["file", "rename", "folder"]


def test_the_time_of_modification(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file", b"data", modified=10**18)
    assert (tmp_path / "file").stat().st_mtime_ns == 10**18


def test_a_folder_that_vanishes_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "file"
    atomic_write(path, b"data")
    path.unlink()
    (tmp_path / "folder").rmdir()
    with pytest.raises(HpcmrefError, match=r"^cannot write .*file: No such file or directory$"):
        atomic_write(path, b"data")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_names_of_open_files(folder: Path, path: str) -> None:
    Path("link").symlink_to("/dev/stdout")
    assert descriptor_of(Path(path)) == 1
    assert is_special(Path(path))


def test_what_is_no_open_file(folder: Path) -> None:
    Path("loop").symlink_to("loop")
    for path in ("a.png", "missing", "loop", "/dev/null", "/dev/fd", "/dev/fd/x"):
        assert descriptor_of(Path(path)) is None
    assert is_special(Path("/dev/null"))
    assert not is_special(Path("a.png"))
    assert not is_special(folder)


def test_an_open_file_is_written_where_it_stands(folder: Path) -> None:
    """What is behind the descriptor is a regular file, which must be appended to and not replaced."""
    with open("log", "wb") as log:
        log.write(b"first ")
        log.flush()
        inode = os.stat("log").st_ino
        atomic_write(Path(f"/dev/fd/{log.fileno()}"), b"second ")
        log.write(b"third")
    assert Path("log").read_bytes() == b"first second third"
    assert os.stat("log").st_ino == inode


def test_a_pipe_gets_everything(folder: Path) -> None:
    os.mkfifo("pipe")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(Path("pipe").read_bytes()))
    reader.start()
    atomic_write(Path("pipe"), bytes(300_000))
    reader.join(20)
    assert found == [bytes(300_000)]
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)


# --- from the command line ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "encode a.png -o /dev/stdout --quiet > out",
        "encode a.png -o /dev/fd/3 3> out",
        "encode a.png -o >(cat > out) && wait && sleep 0.5",
        "mkfifo pipe; cat pipe > out & encode a.png -o pipe && wait && test -p pipe",
        "encode - -o - < a.png > out",
    ],
)
def test_outputs_that_are_no_files(folder: Path, line: str) -> None:
    result = shell(line)
    assert result.returncode == 0, result.stderr
    assert parse(Path("out").read_bytes()).width == 24


def test_an_output_that_is_appended_to(folder: Path) -> None:
    Path("out").write_bytes(b"before")
    assert shell("encode a.png -o /dev/stdout --quiet >> out").returncode == 0
    data = Path("out").read_bytes()
    assert data.startswith(b"before" + MAGIC)
    assert parse(data[6:]).width == 24


def test_an_open_file_that_is_not_open(folder: Path) -> None:
    result = shell("encode a.png -o /dev/fd/77")
    assert (result.returncode, result.stderr) == (
        1, b"hpcmref: a.png: cannot write /dev/fd/77: Bad file descriptor\n"
    )  # fmt: skip


SLOW = """
import os, sys, time
from hpcmref.cli import app

def slow(descriptor):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)

os.fsync = slow
app(["encode", "a.png", "-o", "b.hpcm", "--lossless", "--quiet"])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_in_the_middle_of_a_write_leaves_nothing(folder: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW], stderr=subprocess.PIPE, env=ENVIRONMENT, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert said == f"hpcmref: {'interrupted' if number == signal.SIGINT else f'stopped by {number.name}'}\n"
    assert [path.name for path in Path().iterdir()] == ["a.png"]


def test_outputs_that_cannot_be_say_why(folder: Path) -> None:
    Path("loop").symlink_to("loop")
    for output, why in (("loop", "Too many levels of symbolic links"), ("a.png/x", "Not a directory")):
        result = CliRunner().invoke(app, ["encode", "a.png", "-o", output, "--lossless"])
        assert result.exit_code == 1
        assert result.stderr.endswith(f"cannot write {output}: {why}\n")
        assert result.stderr.count("\n") == 1
    assert Path("loop").is_symlink()


class TestResume:
    """With --lossless, which needs no model and leaves the rest to be tested."""

    @staticmethod
    def encode(*options: str) -> Result:
        return CliRunner().invoke(app, ["encode", "a.png", "-o", "a.hpcm", "--resume", *options])

    @pytest.mark.parametrize("damage", ["empty", "cut in the magic", "cut", "flipped"])
    def test_what_is_not_whole_is_made_again(self, folder: Path, damage: str) -> None:
        assert self.encode("--lossless").exit_code == 0
        whole = Path("a.hpcm").read_bytes()
        length = {"empty": 0, "cut in the magic": 2, "cut": len(whole) - 5, "flipped": len(whole)}[damage]
        data = bytearray(whole[:length])
        if damage == "flipped":
            data[20] ^= 1
        Path("a.hpcm").write_bytes(data)
        assert self.encode("--lossless").exit_code == 0
        assert Path("a.hpcm").read_bytes() == whole

    def test_what_is_whole_is_kept(self, folder: Path) -> None:
        assert self.encode("--lossless").exit_code == 0
        before = Path("a.hpcm").stat().st_mtime_ns
        result = self.encode("--lossless")
        assert (result.exit_code, result.output) == (0, "")
        assert Path("a.hpcm").stat().st_mtime_ns == before

    def test_another_quality_is_made_anew(self, folder: Path) -> None:
        def quality() -> int:
            return learned_of(parse(Path("a.hpcm").read_bytes())).quality

        assert self.encode("-q", "5").exit_code == 0
        assert self.encode("-q", "5").output == ""
        assert self.encode().exit_code == 0
        assert quality() == DEFAULT_QUALITY
        size = Path("a.hpcm").stat().st_size
        assert self.encode("--size", str(size)).output == ""
        assert self.encode("--size", str(size - 1)).exit_code == 0
        assert quality() < DEFAULT_QUALITY
        assert self.encode("--lossless").exit_code == 0
        assert parse(Path("a.hpcm").read_bytes()).learned is None

    def test_another_model_is_made_anew(self, folder: Path) -> None:
        assert self.encode().exit_code == 0
        file = parse(Path("a.hpcm").read_bytes())
        Path("a.hpcm").write_bytes(write(changed(file, fingerprint=b"else")))
        assert self.encode().exit_code == 0
        assert parse(Path("a.hpcm").read_bytes()) == file

    def test_a_foreign_file_is_never_replaced(self, folder: Path) -> None:
        Path("a.hpcm").write_bytes(b"precious")
        result = self.encode("--lossless")
        assert result.exit_code == 1
        sentence = "a.hpcm exists already and is not an hpcmref file (--force replaces it)"
        assert result.stderr == f"hpcmref: a.png: {sentence}\n"
        assert Path("a.hpcm").read_bytes() == b"precious"

    def test_what_misses_the_psnr_is_made_anew(self, folder: Path, sample: Image.Image) -> None:
        sample.crop((100, 100, 196, 164)).save("a.png")
        assert self.encode("-q", "0").exit_code == 0
        rough = Path("a.hpcm").read_bytes()
        assert self.encode("--psnr", "20").output == ""
        assert Path("a.hpcm").read_bytes() == rough
        assert self.encode("--psnr", "36", "--measure").exit_code == 0
        good = Path("a.hpcm").read_bytes()
        assert len(good) > len(rough)
        assert self.encode("--psnr", "36").output == ""
        assert self.encode("--psnr", "20").output == ""
        assert Path("a.hpcm").read_bytes() == good

    def test_what_lacks_invisible_pixels_is_made_anew_with_lossless(self, folder: Path) -> None:
        pixels = np.zeros((40, 60, 4), np.uint8)
        pixels[::2, ::2] = 255, 0, 0, 255
        pixels[30:] = 9, 200, 30, 0
        Image.fromarray(pixels).save("a.png")
        assert self.encode("-q", "50").exit_code == 0
        assert parse(Path("a.hpcm").read_bytes()).learned is None  # the encoder's choice
        assert self.encode("-q", "50").output == ""
        assert self.encode("--lossless", "--quiet").exit_code == 0
        assert CliRunner().invoke(app, ["decode", "a.hpcm", "-o", "b.png"]).exit_code == 0
        with Image.open("b.png") as decoded:
            assert (np.asarray(decoded) == pixels).all()
        assert self.encode("--lossless").output == ""

    def test_a_file_that_cannot_be_read_is_named(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path) -> bytes:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        assert self.encode("--lossless").exit_code == 0
        monkeypatch.setattr(Path, "read_bytes", refuse)
        assert self.encode("--lossless").stderr == "hpcmref: a.png: cannot read a.hpcm: Permission denied\n"

    def test_thumbnails_are_told_from_images(self, folder: Path) -> None:
        def decode(*options: str) -> str:
            result = CliRunner().invoke(app, ["decode", "a.hpcm", "-o", "b.png", "--resume", *options])
            assert result.exit_code == 0
            return result.output

        assert self.encode("--lossless").exit_code == 0
        decode()
        assert decode("--thumbnail", "16") != ""
        with Image.open("b.png") as small:
            assert max(small.size) == 16
        assert decode("--thumbnail", "16") == ""
        assert decode() != ""

    def test_previews_cannot_be_resumed(self, folder: Path) -> None:
        """An image does not show whether it is a preview."""
        assert CliRunner().invoke(app, ["decode", "a.hpcm", "-o", "b.png", "--resume", "--upto", "1"]).exit_code == 2

    @pytest.mark.parametrize("form", ["png", "jpg", "webp", "tif", "bmp", "ppm", "avif", "npy"])
    def test_decode(self, folder: Path, form: str) -> None:
        def decode() -> Result:
            return CliRunner().invoke(app, ["decode", "a.hpcm", "-o", name, "--resume"])

        name = f"b.{form}"
        if form == "avif" and not features.check("avif"):
            pytest.skip("this Pillow has no AVIF")

        assert self.encode("--lossless").exit_code == 0
        assert decode().exit_code == 0
        whole = Path(name).read_bytes()
        assert decode().output == ""
        for data in (b"", whole[:4], whole[:-20]):
            Path(name).write_bytes(data)
            assert decode().exit_code == 0
            assert Path(name).read_bytes() == whole
        Image.new("L", (3, 3)).save(name) if form != "npy" else Path(name).write_bytes(b"")
        assert decode().exit_code == 0
        assert Path(name).read_bytes() == whole
        Path(name).write_bytes(b"precious")
        assert decode().exit_code == 1
        assert Path(name).read_bytes() == b"precious"


def test_preserve_keeps_the_time_there_and_back(folder: Path) -> None:
    os.utime("a.png", ns=(10**18, 10**18 + 12345))
    for arguments in (["encode", "a.png", "-o", "a.hpcm", "--lossless"], ["decode", "a.hpcm", "-o", "b.png"]):
        assert CliRunner().invoke(app, [*arguments, "--preserve"]).exit_code == 0
        assert Path(arguments[3]).stat().st_mtime_ns == 10**18 + 12345
