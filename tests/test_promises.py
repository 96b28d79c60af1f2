"""Is every promise of SECURITY.md and docs held by a test that exists, and does every limit have the value they say?"""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]


def names_in(path: Path) -> set[str]:
    """The names of all test functions of a file, also those in classes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@cache
def known_names() -> dict[str, set[str]]:
    """The names of every file of tests."""
    return {path.name: names_in(path) for path in Path(__file__).parent.glob("test_*.py")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_is_named_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    known = known_names()
    for file, name in re.findall(r"`tests/(\w+\.py)(?:::(\w+))?`", text):
        assert (ROOT / "tests" / file).exists(), file
        assert not name or name in known[file], f"{document.name} names {name}, which is not in {file}"
    everywhere = set().union(*known.values())
    for name in re.findall(r"`(test_\w+)`", text):
        assert name in everywhere, f"{document.name} names {name}, which is no test"


def test_every_promise_has_a_test() -> None:
    section = (ROOT / "SECURITY.md").read_text(encoding="utf-8").split("## Promises")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+) \| (.+) \|$", section, re.MULTILINE)[2:]
    assert len(rows) > 15
    for promise, tests in rows:
        assert re.search(r"`tests/\w+\.py::\w+`", tests), promise


def test_limits_are_what_the_page_says() -> None:
    rows = re.findall(r"^\| `([\w.]+)\.(\w+)` \| (\d+) \|", (ROOT / "docs" / "limits.md").read_text(), re.MULTILINE)
    assert len(rows) >= 18
    for module, name, value in rows:
        assert getattr(importlib.import_module(module), name) == int(value), name
