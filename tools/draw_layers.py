"""Draw the layers of the package, from its imports, into ARCHITECTURE.md.

    python tools/draw_layers.py

The parts of the package are the folders and files directly in hpcmref. A part imports only from parts of lower layers.
`tests/test_layers.py` checks that, and that the drawing is up to date.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hpcmref"
DOCUMENT = ROOT / "ARCHITECTURE.md"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "_version"),
    ("arguments", "runtime", "similarity"),
    ("format", "model"),
    ("picture", "exact"),
    ("preview",),
    ("latents", "checkpoints", "lossless"),
    ("choice", "search"),
    ("codec", "models", "training"),
    ("sources", "selftest"),
    ("many",),
    ("api",),
    ("bench", "plugin"),
    ("cli",),
)
"""The parts from the bottom to the top. Parts of one layer do not import each other."""


def imports() -> dict[str, set[str]]:
    """Return the parts that each part imports, anywhere in its files, also only for types."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(PACKAGE.rglob("*.py")):
        location = path.relative_to(PACKAGE).with_suffix("").parts
        if location[0] in ("__init__", "__main__"):
            continue
        part = location[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                package, *rest = name.split(".")
                if package == "hpcmref" and rest and rest[0] != part:
                    found[part].add(rest[0])
        found[part] |= set()
    return dict(found)


def layer_of(part: str) -> int:
    """The number of a part's layer, from 0 at the bottom, or -1 for an unknown part."""
    return next((number for number, parts in enumerate(LAYERS) if part in parts), -1)


def drawing() -> str:
    """The imports between parts as a Mermaid diagram, which GitHub renders.

    An arrow means that a part imports another. It is left out if the other can be reached through other arrows.
    """
    skipped = {"errors", "_version", "arguments"}  # everything imports them
    parts = {part for layer in LAYERS for part in layer} - skipped
    direct = {part: targets & parts for part, targets in imports().items() if part in parts}
    lines = ["```mermaid", "flowchart TD"]
    for part in sorted(direct, key=lambda each: (-layer_of(each), each)):
        implied = {far for near in direct[part] for far in _reachable(near, direct)}
        lines += [f"    {part} --> {target}" for target in sorted(direct[part] - implied)]
    return "\n".join([*lines, "```"])


def _reachable(part: str, direct: dict[str, set[str]]) -> set[str]:
    """Return all parts that a part imports, directly or through others."""
    return direct[part] | {far for near in direct[part] for far in _reachable(near, direct)}


def with_drawing(text: str) -> str:
    """Replace the drawing in a text by the present one."""
    return re.sub(r"```mermaid\n.*?```", lambda _: drawing(), text, flags=re.DOTALL)


if __name__ == "__main__":
    DOCUMENT.write_text(with_drawing(DOCUMENT.read_text()))
