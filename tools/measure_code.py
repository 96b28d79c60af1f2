"""Measure the package: files, lines, lengths of functions, docstrings, errors that they do not name, layers and size.

    python tools/measure_code.py [FOLDER]

FOLDER is a checkout of this repository, by default this one. `docs/decisions/code.md` has a table of such figures.
Public are the modules, classes, functions and methods of which no part of the dotted name begins with an underscore.
(The docstring of a class says how to make one, so `__init__` needs none.) Functions inside functions are not public. An
overload needs no docstring. A docstring must name each exception of `hpcmref.errors` that the function itself raises,
or a class that this exception is derived from, but HpcmrefError names no other. Exceptions of `__init__` and
`__post_init__` may be named by the docstring of their class.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
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
    unnamed: tuple[str, ...]
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
        yield "errors that a docstring does not name", f"{len(self.unnamed)}"
        yield "layers that a test checks", "none" if self.layers is None else f"{self.layers}"
        yield "size without models", f"{self.size / 1e6:.2f} MB"


def measured(folder: Path) -> Figures:
    """The figures of the package `hpcmref` in a checkout."""
    package = folder / "hpcmref"
    sources = {path: path.read_text() for path in sorted(package.rglob("*.py"))}
    lengths: list[tuple[int, str]] = []
    public: dict[str, bool] = {}
    unnamed: list[str] = []
    errors = _errors(package / "errors.py")
    for path, text in sources.items():
        tree = ast.parse(text)
        name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        lengths += [(_length(node), f"{name}.{node.name}") for node in ast.walk(tree) if isinstance(node, Function)]
        public |= _public(tree, name)
        unnamed += _unnamed(tree, name, errors)
    return Figures(
        files=len(sources),
        lines=sum(len(text.splitlines()) for text in sources.values()),
        functions=len(lengths),
        median=median(length for length, _ in lengths),
        longest=max(lengths),
        public=len(public),
        undocumented=tuple(name for name, documented in public.items() if not documented),
        unnamed=tuple(unnamed),
        layers=_layers(folder / "tools" / "draw_layers.py"),
        size=sum(path.stat().st_size for path in package.rglob("*") if _counts(path)),
    )


def _length(node: Function) -> int:
    """The lines of a function, from its `def` to its end."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def _public(tree: ast.Module, module: str) -> dict[str, bool]:
    """Whether each public name of a module has a docstring."""
    nodes = {module: tree, **{name: node for name, node, _ in _definitions(tree, module)}}
    return {name: ast.get_docstring(node) is not None for name, node in nodes.items() if _is_public(name)}


def _definitions(
    tree: ast.Module | ast.ClassDef, prefix: str
) -> Iterator[tuple[str, Function | ast.ClassDef, ast.Module | ast.ClassDef]]:
    """Yield name, node and owner of all functions, classes and methods, without overloads."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not _is_overload(node):
            yield f"{prefix}.{node.name}", node, tree
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, f"{prefix}.{node.name}")


def _errors(path: Path) -> dict[str, set[str]]:
    """The exceptions of `hpcmref.errors`, each with the names that say it: its own, and those of its bases there."""
    if not path.is_file():
        return {}
    names: dict[str, set[str]] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            bases = [names.get(ast.unparse(base), set()) for base in node.bases]
            names[node.name] = {node.name}.union(*bases) - {"HpcmrefError"}
    return names | {"HpcmrefError": {"HpcmrefError"}} if names else names


def _unnamed(tree: ast.Module, module: str, errors: dict[str, set[str]]) -> list[str]:
    """The exceptions that public functions of a module raise, and that no docstring names, as "function: error"."""
    found = []
    for name, node, owner in _definitions(tree, module):
        makes = node.name in ("__init__", "__post_init__")
        if not isinstance(node, Function) or not _is_public(name.removesuffix(f".{node.name}") if makes else name):
            continue
        text = (ast.get_docstring(node) or "") + (ast.get_docstring(owner) or "" if makes else "")
        raised = {error for error in _raised(node.body) if error in errors}
        found += [f"{name}: {each}" for each in sorted(raised) if not errors[each] & set(re.findall(r"\w+", text))]
    return found


def _raised(body: Iterable[ast.AST]) -> Iterator[str]:
    """The names of the classes that are raised in a body, but not in functions inside it."""
    for node in body:
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield ast.unparse(node.exc.func).rpartition(".")[2]
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            yield from _raised(ast.iter_child_nodes(node))


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
    for missing in figures.unnamed:
        print(f"not named: {missing}")
