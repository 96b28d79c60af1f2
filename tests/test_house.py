"""Does the package keep the rules that ARCHITECTURE.md names under "Rules of the house"?"""

from __future__ import annotations

import re
from pathlib import Path

from tools import measure_house
from tools.draw_layers import PACKAGE, ROOT

AMBIENT = r"is_grad_enabled|is_inference_mode_enabled|is_autocast_enabled|get_default_dtype|get_default_device"


def test_no_function_asks_for_the_gradient_mode() -> None:
    """What a function does follows from its arguments and its module, and not from who has called it."""
    asking = [path for path in sorted(PACKAGE.rglob("*.py")) if re.search(AMBIENT, path.read_text())]
    assert asking == []


def test_public_names_have_docstrings() -> None:
    found = measure_house.measured(ROOT)
    assert found.coverage >= 97, found.undocumented


def test_the_house_can_be_measured(tmp_path: Path) -> None:
    """Of a package of two files; what is private, nested or an overload needs no docstring."""
    package = tmp_path / "hpcmref"
    package.mkdir()
    (package / "__init__.py").write_text('"""A package."""\n')
    (package / "model.safetensors").write_bytes(bytes(1000))
    (package / "room.py").write_text(
        "from typing import overload\n\n\n"
        "class Open:\n    def method(self):\n        def inner():\n            pass\n\n"
        "    def _hidden(self):\n        pass\n\n\n"
        '@overload\ndef said(x: int) -> int: ...\n\n\ndef said(x):\n    """Said."""\n'
    )
    found = measure_house.measured(tmp_path)
    assert (found.files, found.functions, found.public, found.layers) == (2, 5, 5, None)
    assert found.undocumented == ("hpcmref.room", "hpcmref.room.Open", "hpcmref.room.Open.method")
    assert found.longest == (3, "hpcmref.room.method")
    assert found.lines == 19
    assert found.size < 500
    titles = [title for title, _ in measure_house.measured(ROOT).rows()]
    assert all(f"| {title} |" in (ROOT / "docs" / "decisions" / "house.md").read_text() for title in titles)
