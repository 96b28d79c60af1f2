"""Does what differs on Windows and macOS work there? The platform is faked where its own branch cannot run here."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hpcmref.bench import external
from hpcmref.codec import device_of
from hpcmref.errors import ConfigError, HpcmrefError
from hpcmref.format import rans_builtin
from hpcmref.runtime import heap

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
    place, commands = 32, []
    for _ in range(count):
        command, size = struct.unpack_from("<II", data, place)
        commands.append(command)
        place += size
    if "arm64" in name:  # macOS loads nothing on ARM that is not signed, be it by nobody
        assert 0x1D in commands  # LC_CODE_SIGNATURE


@pytest.mark.parametrize("name", ["rans_encode", "rans_decode"])
def test_every_library_has_both_functions(name: str) -> None:
    for path in LIBRARIES.iterdir():
        if path.suffix in (".so", ".dylib", ".dll"):
            assert name.encode() in path.read_bytes(), path.name
