"""Measure the package: files, lines, lengths of functions, docstrings, layers and size.

    python tools/measure_code.py [FOLDER]

FOLDER is a checkout of this repository, by default this one. `docs/decisions/code.md` has a table of such figures.
Public are the modules, classes, functions and methods of which no part of the dotted name begins with an underscore.
(The docstring of a class says how to make one, so `__init__` needs none.) Functions inside functions are not public. An
overload needs no docstring.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Figures:
    """The figures of one checkout. Lengths are in lines, size in bytes, coverage in percent."""

    files: int
    lines: int
    functions: int
    median: float
    longest: tuple[int, str]
    public: int
    undocumented: tuple[str, ...]
    layers: int | None
    size: int

    @property
    def coverage(self) -> float:
        """The part of public names that have a docstring, in percent."""
        return 100 * (1 - len(self.undocumented) / self.public)

    def rows(self) -> Iterator[tuple[str, str]]:
        """Names and values, for a table."""
        length, name = self.longest
        yield "files", f"{self.files}"
        yield "lines", f"{self.lines}"
        yield "functions", f"{self.functions}"
        yield "lines of a function, median", f"{self.median:g}"
        yield "lines of the longest function", f"{length} ({name})"
        yield "public names with a docstring", f"{self.coverage:.1f} % of {self.public}"
        yield "layers that a test checks", "none" if self.layers is None else f"{self.layers}"
        yield "size without models", f"{self.size / 1e6:.2f} MB"


def measured(folder: Path) -> Figures:
    """The figures of the package `hpcmref` in a checkout."""
    package = folder / "hpcmref"
    sources = {path: path.read_text() for path in sorted(package.rglob("*.py"))}
    lengths: list[tuple[int, str]] = []
    public: dict[str, bool] = {}
    for path, text in sources.items():
        tree = ast.parse(text)
        name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        lengths += [(_length(node), f"{name}.{node.name}") for node in ast.walk(tree) if isinstance(node, Function)]
        public |= _public(tree, name)
    return Figures(
        files=len(sources),
        lines=sum(len(text.splitlines()) for text in sources.values()),
        functions=len(lengths),
        median=median(length for length, _ in lengths),
        longest=max(lengths),
        public=len(public),
        undocumented=tuple(name for name, documented in public.items() if not documented),
        layers=_layers(folder / "tools" / "draw_layers.py"),
        size=sum(path.stat().st_size for path in package.rglob("*") if _counts(path)),
    )


def _length(node: Function) -> int:
    """The lines of a function, from its `def` to its end."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def _public(tree: ast.Module, module: str) -> dict[str, bool]:
    """Whether each public name of a module has a docstring."""
    found: dict[str, bool] = {}
    if _is_public(module):
        found[module] = ast.get_docstring(tree) is not None

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, Function | ast.ClassDef) and not _is_overload(node):
                name = f"{prefix}.{node.name}"
                if _is_public(name):
                    found[name] = ast.get_docstring(node) is not None
                if isinstance(node, ast.ClassDef):
                    visit(node.body, name)

    visit(tree.body, module)
    return found


def _is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def _is_overload(node: ast.stmt) -> bool:
    return any(ast.unparse(each).endswith("overload") for each in getattr(node, "decorator_list", ()))


def _layers(drawing: Path) -> int | None:
    """The number of layers in `tools/draw_layers.py`, or None if there is no such file."""
    if not drawing.is_file():
        return None
    for node in ast.parse(drawing.read_text()).body:
        if (
            isinstance(node, ast.AnnAssign)
            and ast.unparse(node.target) == "LAYERS"
            and isinstance(node.value, ast.Tuple)
        ):
            return len(node.value.elts)
    return None


def _counts(path: Path) -> bool:
    """Whether a file belongs to the package's size: no model and no cache."""
    return path.is_file() and path.suffix != ".safetensors" and not re.search(r"__pycache__|\.mypy_cache", str(path))


if __name__ == "__main__":
    figures = measured(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    for title, value in figures.rows():
        print(f"{title:32} {value}")
    for missing in figures.undocumented:
        print(f"no docstring: {missing}")
