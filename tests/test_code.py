"""Does the package keep the rules that ARCHITECTURE.md names under "Rules of the code"?"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tools import measure_code
from tools.draw_layers import PACKAGE, ROOT

AMBIENT = r"is_grad_enabled|is_inference_mode_enabled|is_autocast_enabled|get_default_dtype|get_default_device"


def test_no_function_asks_for_the_gradient_mode() -> None:
    """What a function does follows from its arguments and its module, and not from who has called it."""
    asking = [path for path in sorted(PACKAGE.rglob("*.py")) if re.search(AMBIENT, path.read_text())]
    assert asking == []


HANDED_OVER = {("layers.py", "forward")}
"""The exact layers, which overwrite what is handed over to them, as their docstrings say."""


def test_a_function_that_overwrites_a_tensor_says_so() -> None:
    """By a name that ends with an underscore, or by an argument called `into`."""
    silent = [
        f"{path.name}: {function.name} overwrites {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        and not function.name.endswith("_")
        and (path.name, function.name) not in HANDED_OVER
        for name in sorted(_overwritten(function) & (_tensors(function) - {"into"}))
    ]
    assert silent == []


def test_such_a_function_is_found() -> None:
    text = "def f(a: Tensor, b: Tensor, c: Tensor, d: Tensor):\n    a[0].add_(b)\n    c[1] = 2\n    d += 1"
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert _overwritten(function) & _tensors(function) == {"a", "c", "d"}


def _tensors(function: ast.FunctionDef) -> set[str]:
    """The names of the arguments that are tensors."""
    arguments = (*function.args.args, *function.args.kwonlyargs)
    return {each.arg for each in arguments if each.annotation and ast.unparse(each.annotation).startswith("Tensor")}


def _overwritten(function: ast.FunctionDef) -> set[str]:
    """The names of which a function calls a method that ends with an underscore, or to parts of which it assigns."""
    found: set[str] = set()
    for node in ast.walk(function):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and re.search(r"[^_]_$", node.func.attr):
            targets = [node.func.value]
        elif isinstance(node, ast.Assign):
            targets = [target for target in node.targets if isinstance(target, ast.Subscript)]
        elif isinstance(node, ast.AugAssign):
            targets = [node.target]
        for target in targets:
            while isinstance(target, ast.Subscript):
                target = target.value
            if isinstance(target, ast.Name):
                found.add(target.id)
    return found


def test_public_names_have_docstrings() -> None:
    found = measure_code.measured(ROOT)
    assert found.coverage >= 97, found.undocumented


def test_docstrings_name_the_errors_that_a_function_raises() -> None:
    assert not measure_code.measured(ROOT).unnamed


ERRORS = '''
class HpcmrefError(Exception):
    """Base class."""

class FormatError(HpcmrefError):
    """A bad file."""

class TruncatedError(FormatError):
    """A short file."""
'''

RAISING = '''
class Reader:
    """Raises FormatError, of which TruncatedError is one."""

    def __init__(self):
        raise errors.TruncatedError("named by the class")

    def read(self):
        """Read, if there is something."""
        if True:
            raise FormatError("not named")

    def _hidden(self):
        raise FormatError("not public")

def vague():
    """Raises HpcmrefError."""
    raise TruncatedError("named too vaguely")

def outer():
    """Return a function."""
    def inner():
        raise FormatError("not raised by the outer function")
    return inner

def other():
    """Say nothing of Python's errors."""
    raise ValueError("not of the package")
'''


def test_an_error_that_no_docstring_names_is_found(tmp_path: Path) -> None:
    package = tmp_path / "hpcmref"
    package.mkdir()
    (package / "errors.py").write_text(ERRORS)
    (package / "part.py").write_text(RAISING)
    found = measure_code.measured(tmp_path).unnamed
    assert found == ("hpcmref.part.Reader.read: FormatError", "hpcmref.part.vague: TruncatedError")


def test_the_code_can_be_measured(tmp_path: Path) -> None:
    """Of a package of two files; what is private, nested or an overload needs no docstring."""
    package = tmp_path / "hpcmref"
    package.mkdir()
    (package / "__init__.py").write_text('"""A package."""\n')
    (package / "model.safetensors").write_bytes(bytes(1000))
    (package / "part.py").write_text(
        "from typing import overload\n\n\n"
        "class Open:\n    def method(self):\n        def inner():\n            pass\n\n"
        "    def _hidden(self):\n        pass\n\n\n"
        '@overload\ndef said(x: int) -> int: ...\n\n\ndef said(x):\n    """Said."""\n'
    )
    found = measure_code.measured(tmp_path)
    assert (found.files, found.functions, found.public, found.layers) == (2, 5, 5, None)
    assert found.undocumented == ("hpcmref.part", "hpcmref.part.Open", "hpcmref.part.Open.method")
    assert found.longest == (3, "hpcmref.part.method")
    assert found.lines == 19
    assert found.size < 500
    titles = [title for title, _ in measure_code.measured(ROOT).rows()]
    assert all(f"| {title} |" in (ROOT / "docs" / "decisions" / "code.md").read_text() for title in titles)
