"""Is every skipped test counted by its reason, and does CI fail on a reason that is not on the list?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MAY_BE_MISSING

TESTS = """
import pytest

@pytest.mark.parametrize("number", [1, 2, 3])
def test_one(number):
    pytest.skip({one!r})

@pytest.mark.skipif(True, reason={other!r})
def test_other(): ...

def test_that_passes(): ...
"""


def run(folder: Path, one: str, other: str, ci: bool, *options: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(Path(__file__).parent / "conftest.py", folder)
    (folder / "test_them.py").write_text(TESTS.format(one=one, other=other))
    outside = ("CI", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT")
    environment = {name: value for name, value in os.environ.items() if name not in outside}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(folder),
            *options,
            str(folder),
        ],
        env=environment | ({"CI": "true"} if ci else {}),
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems lack more by nature")
@pytest.mark.parametrize("ci", [False, True])
@pytest.mark.parametrize("other", ["nobody knows why", "could not import 'bjontegaard': No module named 'bjontegaard'"])
def test_an_unknown_reason_fails_in_ci_alone(other: str, ci: bool, tmp_path: Path) -> None:
    result = run(tmp_path, "needs a CUDA device", other, ci)
    assert "    3  needs a CUDA device" in result.stdout
    assert f"    1  {other}" in result.stdout
    assert ("nothing may be skipped in CI" in result.stdout) == ci
    assert result.returncode == ci


@pytest.mark.skipif(sys.platform != "linux", reason="other systems lack more by nature")
def test_an_unknown_reason_fails_two_processes_too(tmp_path: Path) -> None:
    """Each process collects all files; what is skipped is counted once all the same, and the slowest are listed."""
    pytest.importorskip("xdist")
    (tmp_path / "test_module.py").write_text(
        "import pytest\n\npytest.skip('the whole file', allow_module_level=True)\n"
    )
    result = run(tmp_path, "needs a CUDA device", "nobody knows why", True, "-n", "2", "--durations=3", "-vv")
    assert "    3  needs a CUDA device" in result.stdout
    assert "    1  the whole file" in result.stdout
    assert "    1  nobody knows why" in result.stdout
    assert "slowest 3 durations" in result.stdout
    assert result.returncode == 1


def test_listed_reasons_do_not_fail(tmp_path: Path) -> None:
    result = run(tmp_path, "root may write anywhere", "could not import 'ray': No module named 'ray'", ci=True)
    assert "    1  could not import 'ray'" in result.stdout
    assert result.returncode == 0


def test_the_list_is_short() -> None:
    assert len(MAY_BE_MISSING) <= 14
