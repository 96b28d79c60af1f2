"""Draw the layers of the package, from its imports, into ARCHITECTURE.md.

    python tools/draw_layers.py

A room is a folder or a file directly in hpcmref. A room imports from rooms of lower layers alone;
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
    ("plugin", "sources", "selftest"),
    ("many",),
    ("api",),
    ("bench",),
    ("cli",),
)
"""Rooms from the bottom to the top. Rooms of one layer do not import each other."""


def imports() -> dict[str, set[str]]:
    """Return the rooms that each room imports, anywhere in its files, also only for types."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] in ("__init__", "__main__"):
            continue
        room = parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                package, *rest = name.split(".")
                if package == "hpcmref" and rest and rest[0] != room:
                    found[room].add(rest[0])
        found[room] |= set()
    return dict(found)


def layer_of(room: str) -> int:
    """The number of a room's layer, from 0 at the bottom, or -1 for an unknown room."""
    return next((number for number, rooms in enumerate(LAYERS) if room in rooms), -1)


def drawing() -> str:
    """The imports between rooms as a Mermaid diagram, which GitHub renders.

    An arrow means that a room imports another. It is left out if the other can be reached through other arrows.
    """
    skipped = {"errors", "_version", "arguments"}  # everything imports them
    rooms = {room for layer in LAYERS for room in layer} - skipped
    direct = {room: targets & rooms for room, targets in imports().items() if room in rooms}
    lines = ["```mermaid", "flowchart TD"]
    for room in sorted(direct, key=lambda each: (-layer_of(each), each)):
        implied = {far for near in direct[room] for far in _reachable(near, direct)}
        lines += [f"    {room} --> {target}" for target in sorted(direct[room] - implied)]
    return "\n".join([*lines, "```"])


def _reachable(room: str, direct: dict[str, set[str]]) -> set[str]:
    """Return all rooms that a room imports, directly or through others."""
    return direct[room] | {far for near in direct[room] for far in _reachable(near, direct)}


def with_drawing(text: str) -> str:
    """Replace the drawing in a text by the present one."""
    return re.sub(r"```mermaid\n.*?```", lambda _: drawing(), text, flags=re.DOTALL)


if __name__ == "__main__":
    DOCUMENT.write_text(with_drawing(DOCUMENT.read_text()))
