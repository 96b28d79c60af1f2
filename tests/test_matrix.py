"""Does tools/matrix.py keep its table, and does the table have every corner?"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOUND = {
    "python": "3.11.7",
    "torch": "2.13.0",
    "numpy": "2.0.0",
    "pillow": "13.0.0",
    "coder": "builtin (C)",
    "golden": 5,
    "entropy": "01234567",
    "selftest": {"passed": True, "decoded": [6, 6], "coded": [4, 4]},
    "files": {"a.bin": "00000000", "b.bin": "11111111"},
    "megabytes": {"torch": 700.0, "numpy": 50.0, "pip": 15.0, "hpcmref": 13.0, "rich": 2.0},
    "seen": {"torch and numpy": 800.0, "everything": 850.0, "base": ["torch", "numpy", "pip"]},
}


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "tools" / "matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["matrix"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_rows_are_added_and_replaced(matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "platforms.md"
    table.write_text("a\n<!-- corners -->\n<!-- end of corners -->\nb\n<!-- sizes -->\n<!-- end of sizes -->\nc\n")
    monkeypatch.setattr(matrix, "TABLE", table)
    matrix.write_table([{"name": "one", **FOUND}, {"name": "two", "error": "no such Python"}])
    matrix.write_table([{"name": "two", **FOUND, "entropy": "89abcdef"}])
    lines = table.read_text().splitlines()
    assert [line[:6] for line in lines if line.startswith("|")] == ["| one ", "| two ", "| one ", "| two "]
    assert "| 6 and 4 | 5 of 5 | 01234567 | 2 of 2 |" in lines[2]
    assert "89abcdef" in lines[3]
    assert lines[7] == "| one | 800 | 50 | hpcmref 13, rich 2 |"
    assert (lines[0], lines[-1]) == ("a", "c")


def test_the_requirements_of_a_wheel_are_those_of_no_extra(matrix: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        said = "Name: x\nRequires-Dist: torch>=2.6\nRequires-Dist: ray; extra == 'ray'\n"
        archive.writestr("x-1.dist-info/METADATA", said)
    assert matrix._requirements(wheel) == ["torch>=2.6"]


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        (
            {"hpcmref/a.py": 9, "hpcmref-0.2.0.dist-info/METADATA": 9, "hpcmref-0.2.0.data/data/share/man/man1/a.1": 9},
            None,
        ),
        ({"hpcmref/a.py": 9, "tests/test_a.py": 9}, "the wheel holds .*tests/test_a.py"),
        ({"hpcmref/weights": 2000}, "are allowed"),
    ],
    ids=["good", "with tests", "too large"],
)
def test_a_wheel_holds_the_package_alone_and_is_small(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, int], wrong: str | None
) -> None:
    monkeypatch.setattr(matrix, "MOST_BYTES", 1500)
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        for name, size in files.items():
            archive.writestr(name, bytes(size))
    with pytest.raises(matrix.CornerError, match=wrong) if wrong else contextlib.nullcontext():
        matrix.look_at(tmp_path / "x.whl")


def test_a_command_that_fails_is_told(matrix: ModuleType) -> None:
    with pytest.raises(matrix.CornerError, match="it / fails"):
        matrix._run([sys.executable, "-c", "raise SystemExit('first\\nit | fails')"])


def test_all_are_compared_with_the_first_that_works(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first corner that cannot be installed, or whose check fails, stops neither the others nor the table."""
    read: list[tuple[str, list[str]]] = []

    def install(corner: Any, interpreter: str, wheel: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
        if corner.name == "one":
            raise matrix.CornerError("no such Python")
        return folder / "python", {}

    def check(python: Path, work: Path, name: str, others: list[str], variant: Any = None) -> dict[str, Any]:
        if python.parent.name == "environment-1":
            raise matrix.CornerError("it breaks")
        read.append((name, list(others)))
        (work / "files" / name).mkdir(parents=True, exist_ok=True)
        return {**FOUND, "decoded": len(others)}

    monkeypatch.setattr(matrix, "build", lambda work: work / "a.whl")
    monkeypatch.setattr(matrix, "install", install)
    monkeypatch.setattr(matrix, "check", check)
    monkeypatch.setattr(matrix, "_interpreter", lambda *_: sys.executable)
    corners = [matrix.Corner(name, "3.11") for name in ("one", "two", "three", "four")]
    rows, passed = matrix.run(corners, None, {})
    assert [row.get("error") for row in rows] == ["no such Python", "it breaks", None, None]
    assert not passed
    assert read == [("first", []), ("3-3", ["first"]), ("first", ["3-3", "first"])]
    assert "three decodes all 2 files" in capsys.readouterr().out
    rows, passed = matrix.run(corners[:1], None, {})
    assert not passed
    assert matrix.run(corners[3:], None, {})[1]


def test_the_document_has_every_corner(matrix: ModuleType) -> None:
    text = (ROOT / "docs" / "platforms.md").read_text(encoding="utf-8")
    names = {each.name for corner in matrix.CORNERS for each in (corner, *corner.variants)}
    assert {name for name in names if f"| {name} |" not in text} == set()
