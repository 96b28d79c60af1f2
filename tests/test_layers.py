"""Does every part of the package import from lower layers alone, and does ARCHITECTURE.md show what is so?"""

from __future__ import annotations

import re
from pathlib import Path

from tools import draw_layers

ROOT = Path(__file__).parent.parent


def test_no_import_runs_upward() -> None:
    upward = [
        f"{part} imports {target}"
        for part, targets in draw_layers.imports().items()
        for target in sorted(targets)
        if draw_layers.layer_of(target) >= draw_layers.layer_of(part)
    ]
    assert upward == []


def test_every_part_has_a_layer() -> None:
    parts = {path.stem for path in draw_layers.PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    parts |= {path.name for path in draw_layers.PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert parts == {part for layer in draw_layers.LAYERS for part in layer}


def test_the_drawing_is_up_to_date() -> None:
    text = draw_layers.DOCUMENT.read_text()
    assert text.count("```mermaid\nflowchart") == 1
    assert draw_layers.with_drawing(text) == text, "python tools/draw_layers.py draws it anew"


def test_every_path_that_the_documents_name_exists() -> None:
    for document in ("ARCHITECTURE.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        paths = re.findall(r"`((?:hpcmref|tests|tools|research|docs|results|contrib|\.ci)/[\w./-]*)`", text)
        assert len(paths) > 5
        for path in paths:
            assert (ROOT / path).exists(), f"{document} names {path}"


def test_every_function_that_the_architecture_names_exists() -> None:
    """As `Owner.name()`, where the owner is a class or a module, or as `name()`."""
    sources = {path: path.read_text() for path in draw_layers.PACKAGE.rglob("*.py")}
    called = re.findall(r"`(?:(\w+)\.)?(\w+)\(\)`", (ROOT / "ARCHITECTURE.md").read_text())
    assert len(called) > 15
    for owner, name in called:
        homes = [text for path, text in sources.items() if not owner or path.stem == owner or f"class {owner}" in text]
        assert any(f"def {name}(" in text for text in homes), f"{owner}.{name}"
