"""Does `hpcmref --version --verbose` say what a report of a fault needs, quickly and with any set of packages?"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest

from hpcmref import __version__
from hpcmref.cli import versions


def shell(*arguments: str, coder: str = "") -> list[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HPCMREF_RANGECODER": coder}
    command = [sys.executable, "-m", "hpcmref", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("arguments", [("--version", "--verbose"), ("-v", "--version")])
def test_verbose_adds_what_hpcmref_runs_on(arguments: tuple[str, str]) -> None:
    lines = shell(*arguments, coder="builtin")
    assert lines[0] == f"hpcmref {__version__}"
    facts = {line[2:15].strip(): line[15:] for line in lines[1:]}
    assert facts["range coder"] == "builtin (C)"
    assert facts["torch"] == importlib.metadata.version("torch")
    assert facts["numpy"] == importlib.metadata.version("numpy")


def test_a_package_that_is_not_installed_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "PACKAGES", ("torch", "a-package-that-nobody-has"))
    assert "a-package-that-nobody-has  not installed" in versions.described()


def test_torch_is_not_imported_for_its_version() -> None:
    code = "import sys\nfrom hpcmref.cli import versions\nversions.described()\nassert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
