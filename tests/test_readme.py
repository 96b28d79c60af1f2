"""Is every output in the documents what the command above it prints? `python tests/test_readme.py` writes them anew."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

README = Path(__file__).parent.parent / "README.md"
SHOWN = (README, README.parent / "docs" / "guide.md")
"""Documents with console blocks."""
SAMPLE = Path(__file__).parent / "data" / "sample.png"

TOLERANCE = 0.02
"""Of numbers: an encoder's floating-point transform may differ a little from machine to machine."""


def with_outputs(text: str) -> str:
    """A document with its console blocks run in the current folder, in order."""
    from hpcmref.cli import app

    def run(block: re.Match[str]) -> str:
        lines = []
        for command in re.findall(r"^\$ (.*)$", block[1], re.MULTILINE):
            program, *arguments = shlex.split(command)
            assert program == "hpcmref"
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, result.output
            lines += [f"$ {command}", *(line.rstrip() for line in result.output.splitlines())]
        return "```console\n" + "\n".join(lines) + "\n```"

    return re.sub(r"```console\n(.*?)\n```", run, text, flags=re.DOTALL)


def tokens(text: str) -> list[str]:
    """Words and numbers; a fingerprint, which is not to differ in the least, is a word."""
    return re.findall(r"\b[0-9a-f]{8}\b|\d+(?:\.\d+)?|[^\s\d]+", text)


@pytest.mark.parametrize("document", SHOWN, ids=lambda path: path.name)
def test_commands_print_what_the_documents_show(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(SAMPLE, "sample.png")
    text = document.read_text()
    expected, found = tokens(text), tokens(with_outputs(text))
    assert "```console" in text
    assert len(found) == len(expected)
    units = [*expected[1:], ""]
    for one, other, unit in zip(found, expected, units, strict=True):
        if unit.rstrip(",") in ("s", "MP/s"):
            assert float(one) >= 0  # how long it took here
        elif re.fullmatch(r"\d+(\.\d+)?", other) and not re.fullmatch("[0-9a-f]{8}", other):
            assert float(one) == pytest.approx(float(other), rel=TOLERANCE), text[: text.index(other)][-80:]
        else:
            assert one == other


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(SAMPLE, "sample.png")
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert isinstance(names["data"], bytes)
    assert isinstance(names["files"], list)
    assert len(names["files"]) == 3


def test_links_lead_somewhere() -> None:
    root = README.parent
    for name in (path.relative_to(root) for path in (*root.glob("*.md"), *root.glob("docs/**/*.md"))):
        text = (README.parent / name).read_text()
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
            assert ((README.parent / name).parent / target).exists(), (name, target)


def test_there_are_two_set_up_commands() -> None:
    """The first two blocks, a line each; .ci/run finds the second by what it says."""
    first, second = re.findall(r"```sh\n(.*)\n```", README.read_text())[:2]
    assert "hpcmref encode tests/data/sample.png" in first
    assert "hpcmref decode" in first
    found = [line for line in README.read_text().splitlines() if re.match("python -m pip install .*pytest", line)]
    assert found == [second]


if __name__ == "__main__":
    for document in SHOWN:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(SAMPLE, folder)
            os.chdir(folder)
            written = with_outputs(document.read_text())
            os.chdir(README.parent)
        document.write_text(written)
