"""Does what differs on Windows and macOS work there? The platform is faked where its own branch cannot run here."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from models import TINY, model_of

import hpcmref
from hpcmref import checkpoints, models
from hpcmref.bench import external
from hpcmref.cli import folders
from hpcmref.cli.failures import GuardedGroup, tell
from hpcmref.cli.jobs import Job, plan
from hpcmref.codec import device_of
from hpcmref.errors import CheckpointError, ConfigError, HpcmrefError
from hpcmref.format import rans_builtin
from hpcmref.runtime import files, heap, workers

LIBRARIES = rans_builtin.library_path().parent

IMPORT_ALL = """
import importlib, os, pkgutil, signal, sys
for name in ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None
for name in ("fork", "killpg", "getuid", "geteuid", "fchown", "sched_getaffinity"):
    if hasattr(os, name):
        delattr(os, name)
del signal.SIGKILL, signal.SIGHUP
import hpcmref
for module in pkgutil.walk_packages(hpcmref.__path__, "hpcmref."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def test_every_module_imports_without_what_only_unix_has() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_malloc_is_left_alone_where_it_is_not_glibc(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("ctypes.CDLL", lambda *_: pytest.fail("a library was loaded"))
    heap.keep_memory()


def test_malloc_is_left_alone_with_musl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("ctypes.CDLL", lambda *_: object())  # a C library without mallopt
    heap.keep_memory()


def test_the_peak_of_memory_is_unknown_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(field: str) -> int:
        raise FileNotFoundError(field)

    monkeypatch.setattr(heap, "resident", missing)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert heap.peak_memory() is None


def test_a_program_that_takes_too_long_ends_on_windows_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "killpg", raising=False)
    begun = time.monotonic()
    with pytest.raises(HpcmrefError, match="took longer"):
        external._run_to_its_end([sys.executable, "-c", "import time\ntime.sleep(60)"], 0.3, str(tmp_path))
    assert time.monotonic() - begun < 30


def test_the_gpus_of_apple_are_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("mps", "mps:0"):
        with pytest.raises(ConfigError, match=r"float64.*use the device cpu"):
            device_of(name)
    assert device_of("auto") == torch.device("cpu")


@pytest.mark.parametrize(("name", "machine"), [("linux-x86_64.so", 62), ("linux-aarch64.so", 183)])
def test_a_library_for_linux_is_for_its_processor(name: str, machine: int) -> None:
    data = (LIBRARIES / name).read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"  # 64 bits, little-endian
    assert struct.unpack_from("<HH", data, 16) == (3, machine)  # ET_DYN
    assert b"libc.so" not in data


@pytest.mark.parametrize(("name", "machine"), [("windows-amd64.dll", 0x8664), ("windows-arm64.dll", 0xAA64)])
def test_a_library_for_windows_is_for_its_processor(name: str, machine: int) -> None:
    data = (LIBRARIES / name).read_bytes()
    (start,) = struct.unpack_from("<I", data, 0x3C)
    assert data[:2] == b"MZ"
    assert data[start : start + 4] == b"PE\0\0"
    assert struct.unpack_from("<H", data, start + 4) == (machine,)
    assert b"msvcrt" not in data.lower()
    assert b"ucrt" not in data.lower()


@pytest.mark.parametrize(("name", "machine"), [("darwin-x86_64.dylib", 0x01000007), ("darwin-arm64.dylib", 0x0100000C)])
def test_a_library_for_macos_is_for_its_processor_and_signed(name: str, machine: int) -> None:
    data = (LIBRARIES / name).read_bytes()
    magic, processor, _, kind, count = struct.unpack_from("<IIIII", data)
    assert (magic, processor, kind) == (0xFEEDFACF, machine, 6)  # 64 bits, MH_DYLIB
    place, commands = 32, {}
    for _ in range(count):
        command, size = struct.unpack_from("<II", data, place)
        commands[command] = data[place : place + size]
        place += size
    install_name = commands[0x0D][24:].rstrip(b"\0")  # LC_ID_DYLIB: 24 bytes, then the name
    assert install_name == b"@rpath/" + name.encode(), "a library must not name the folder that it was built in"
    if "arm64" in name:  # macOS loads nothing on ARM that is not signed, be it by nobody
        assert 0x1D in commands  # LC_CODE_SIGNATURE


@pytest.mark.parametrize("name", ["rans_encode", "rans_decode"])
def test_every_library_has_both_functions(name: str) -> None:
    for path in LIBRARIES.iterdir():
        if path.suffix in (".so", ".dylib", ".dll"):
            assert name.encode() in path.read_bytes(), path.name


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """These modules find themselves on Windows; the others, and other packages, go on as here."""
    find_on("win32", monkeypatch)


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on Linux, wherever the test runs."""
    find_on("linux", monkeypatch)


def find_on(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faked = SimpleNamespace(**{**vars(sys), "platform": system})
    for module in (files, external, workers):
        monkeypatch.setattr(module, "sys", faked)


# Names that differ in case only. A hard link is what such a file system shows: one file under both names.


def name_again(path: Path, other: Path) -> None:
    if not other.exists():  # as it does where such a file system is at hand
        os.link(path, other)


def test_one_file_in_other_letters_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    name_again(tmp_path / "a.png", tmp_path / "A.PNG")
    (tmp_path / "B.png").write_bytes(b"b")
    names = [str(tmp_path / name) for name in ("a.png", "A.PNG", "B.png", "a.png")]
    found = folders.find(names, (".png",)).sources
    assert [source.path for source in found] == [tmp_path / "a.png", tmp_path / "B.png"]


def test_accents_in_two_forms_of_unicode_are_one_name(tmp_path: Path) -> None:
    composed, parts = tmp_path / "\u00e9.png", tmp_path / "e\u0301.png"  # as most systems write it, and macOS
    composed.write_bytes(b"a")
    name_again(composed, parts)
    assert len(folders.find([str(composed), str(parts)], (".png",)).sources) == 1


def test_two_files_whose_names_differ_in_case_only_never_share_an_output(tmp_path: Path) -> None:
    for name in ("A.jpg", "a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("this file system does not tell names apart that differ in case only")
    planned = plan([str(tmp_path)], str(tmp_path / "out"), (".jpg",), ".hpcm")
    assert [job.target_name for job in planned.jobs] == [str(tmp_path / "out" / name) for name in ("A.hpcm", "b.hpcm")]
    assert [str(each) for each in planned.problems] == [
        f"{tmp_path / 'A.jpg'} and {tmp_path / 'a.jpg'} have the same name, "
        f"and would both be written to {tmp_path / 'out'}"
    ]


def test_an_output_that_is_the_input_in_other_letters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    name_again(tmp_path / "a.png", tmp_path / "A.png")
    refused = [f"{tmp_path / 'A.png'} is an input; name another output with -o"]
    planned = plan([str(tmp_path / "a.png")], str(tmp_path / "A.png"), (".png",), ".png")
    assert [str(each) for each in planned.problems] == refused
    other = tmp_path / "other"
    other.mkdir()
    os.link(tmp_path / "a.png", other / "a.png")
    named = folders.name_outputs([folders.Source(tmp_path / "A.png")], tmp_path, ".png")
    assert [str(each) for each in named.values()] == refused


def test_a_hard_link_of_another_name_is_another_output(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    os.link(tmp_path / "a.png", tmp_path / "b.png")
    planned = plan([str(tmp_path / "a.png")], str(tmp_path / "b.png"), (".png",), ".png")
    assert planned.problems == []


def test_junctions_of_windows_are_not_entered() -> None:
    def entry(tag: int, symlink: bool = False) -> Any:
        return SimpleNamespace(
            is_symlink=lambda: symlink, stat=lambda follow_symlinks: SimpleNamespace(st_reparse_tag=tag)
        )

    assert folders.is_link(entry(0xA0000003))
    assert folders.is_link(entry(0, symlink=True))
    assert not folders.is_link(entry(0))
    assert not folders.is_link(entry(0x9000001A))  # a folder of OneDrive


# A closed pipe is EINVAL on Windows.


class _ClosedPipe(io.StringIO):
    """A stream of a pipe that nobody reads, as Windows has it; descriptor: what is pointed at nothing afterwards."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.buffer = self  # type: ignore[assignment]

    def write(self, text: Any) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    def flush(self) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    def fileno(self) -> int:
        return self.descriptor


@contextlib.contextmanager
def closed_stdout(folder: Path) -> Iterator[_ClosedPipe]:
    """Within, stdout is such a pipe."""
    with (folder / "stdout").open("wb") as file, pytest.MonkeyPatch.context() as patched:
        pipe = _ClosedPipe(file.fileno())
        patched.setattr(sys, "stdout", pipe)
        yield pipe


def _command(work: Any) -> Any:
    app = typer.Typer(cls=GuardedGroup)
    app.command("work")(work)
    app.command("other")(lambda: None)
    return app


@pytest.mark.usefixtures("windows")
def test_text_for_a_closed_pipe_is_no_error_on_windows(tmp_path: Path) -> None:
    with closed_stdout(tmp_path) as pipe:
        tell("a line", pipe)
        with pytest.raises(SystemExit) as ended:
            _command(lambda: print("a line"))(["work"])
    assert not ended.value.code


@pytest.mark.usefixtures("windows")
def test_data_for_a_closed_pipe_is_an_error_on_windows(tmp_path: Path) -> None:
    with closed_stdout(tmp_path), pytest.raises(HpcmrefError, match="standard output was closed before everything"):
        Job(None, None).write(b"data")


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("name", ["a<b.png", None])
def test_an_invalid_argument_elsewhere_stays_an_error_on_windows(
    name: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise OSError(errno.EINVAL, "Invalid argument", name)

    with pytest.raises(SystemExit) as ended:
        _command(fail)(["work"])
    assert ended.value.code == 1
    assert "Invalid argument" in capsys.readouterr().err


@pytest.mark.usefixtures("linux")
def test_an_invalid_argument_is_no_closed_pipe_elsewhere() -> None:
    assert not files.is_closed_pipe(OSError(errno.EINVAL, "Invalid argument"))
    assert files.is_closed_pipe(BrokenPipeError(errno.EPIPE, "Broken pipe"))


# Files on Windows: long paths, files that others have open, read-only files.

LONG = "\\".join(["C:", *("folder" for _ in range(34)), "a.hpcm"])  # 247 characters


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("C:\\folder\\a.hpcm", "C:\\folder\\a.hpcm"),
        (LONG, "\\\\?\\" + LONG),
        ("\\\\server\\" + LONG[3:], "\\\\?\\UNC\\server\\" + LONG[3:]),
        ("\\\\?\\" + LONG, "\\\\?\\" + LONG),
    ],
    ids=["short", "long", "on a server", "extended"],
)
def test_a_temporary_name_makes_no_path_too_long_on_windows(path: str, expected: str) -> None:
    assert str(files._without_limit(Path(path))) == expected


@pytest.mark.usefixtures("linux")
def test_long_paths_stay_as_they_are_elsewhere() -> None:
    path = Path("/", *("folder" for _ in range(40)), "a.hpcm")
    assert files._without_limit(path) == path


@pytest.mark.usefixtures("windows")
def test_a_file_that_a_scanner_has_open_is_replaced_a_little_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [1, 1]
    replace = os.replace

    def refusing(source: Any, target: Any) -> None:
        if refusals:
            refusals.pop()
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    (tmp_path / "a").write_bytes(b"old")
    files.atomic_write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.usefixtures("windows")
def test_a_read_only_file_that_cannot_be_replaced_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    unlink = Path.unlink

    def unlink_as_windows(path: Path, missing_ok: bool = False) -> None:
        if not path.stat().st_mode & stat.S_IWUSR:
            raise PermissionError(errno.EACCES, "Permission denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(files, "_PAUSES", (0.01,))
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", unlink_as_windows)
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a").chmod(0o444)
    with pytest.raises(HpcmrefError, match="Permission denied"):
        files.atomic_write(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# Other programs and processes on Windows.


@pytest.mark.usefixtures("windows")
def test_paths_of_windows_in_the_commands_of_bench() -> None:
    encoding, decoding = external._split(r'C:\tools\enc.exe -q {q} {in} {out} | "C:\my tools\dec.exe" {out} {png}', "")
    assert encoding[0][0] == r"C:\tools\enc.exe"
    assert decoding[0][0] == r"C:\my tools\dec.exe"


def test_a_folder_with_a_file_that_a_program_has_open_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def refuse(path: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "the file is open", str(path))

    with external._temporary_folder() as name, monkeypatch.context() as patched:
        Path(name, "open").touch()
        patched.setattr(os, "unlink", refuse)
        folder = Path(name)
    assert not folder.exists() or list(folder.iterdir()) == [folder / "open"]


@pytest.mark.usefixtures("windows")
def test_no_more_processes_than_windows_can_wait_for() -> None:
    assert workers.Workers(abs, 200)._count == 61


BREAK = """
import os, signal
signal.SIGBREAK = signal.SIGUSR1
from hpcmref.runtime.signals import Stopped, stoppable
try:
    with stoppable():
        os.kill(os.getpid(), signal.SIGBREAK)
        raise SystemExit("not stopped")
except Stopped as stopped:
    assert stopped.exit_code == 128 + signal.SIGUSR1
"""


@pytest.mark.skipif(not hasattr(os, "kill") or os.name == "nt", reason="fakes Ctrl-Break with a signal of Unix")
def test_ctrl_break_of_windows_ends_a_run_tidily() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", BREAK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Names of our own files.

RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}


def test_the_package_has_only_names_that_windows_and_macos_allow() -> None:
    root = Path(hpcmref.__file__).parent
    names = [str(path.relative_to(root)) for path in root.rglob("*") if "__pycache__" not in path.parts]
    assert len({name.casefold() for name in names}) == len(names)
    parts = {part for name in names for part in Path(name).parts}
    assert {part for part in parts if part.split(".")[0].lower() in RESERVED} == set()
    assert {part for part in parts if set(part) & set('<>:"\\|?*') or part[-1] in ". " or not part.isascii()} == set()
    assert max(map(len, names)) < 60  # below the folder of an environment there is room for as much


@pytest.mark.parametrize("name", ["con", "NUL", "aux.v2", "Com1"])
def test_a_model_never_has_the_name_of_a_device(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="on Windows it is the name of a device"):
        models.add(tmp_path / "a.safetensors", name)


def test_two_models_never_have_names_that_differ_in_case_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCMREF_MODELS", str(tmp_path / "models"))
    for seed, name in enumerate(("one", "other")):
        checkpoints.save(model_of(TINY, seed=seed), tmp_path / f"{name}.safetensors", name, {})
    models.add(tmp_path / "one.safetensors", "mine")
    for force in (False, True):
        with pytest.raises(CheckpointError, match=r"There is a model mine already .* choose another with --name"):
            models.add(tmp_path / "other.safetensors", "Mine", force)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["mine.safetensors"]


def test_characters_that_a_code_page_lacks_are_escaped(tmp_path: Path) -> None:
    for name in ("\u5199", "\u00e9"):
        (tmp_path / f"{name}.png").touch()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-m", "hpcmref", "encode", "--dry-run", "\u5199.png", "\u00e9.png", "-o", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    lines = done.stdout.decode("cp1252").splitlines()
    assert lines == [f"{name}.png -> {Path('out', name)}.hpcm" for name in (r"\u5199", "\u00e9")], done.stderr
