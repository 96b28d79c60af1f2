"""Does every command that a document shows work? Blocks are run; what cannot be run is listed here with a reason.

Blocks with outputs are checked by test_readme.py, those of Python by the tests that PYTHON names.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models import model_of
from test_readme import SHOWN

from hpcmref import checkpoints

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "tests" / "data" / "sample.png"
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "re*/*.md", "tests/**/*.md") for path in ROOT.glob(pattern)
)

LANGUAGES = {"sh", "console", "python", "mermaid", "bibtex"}

PYTHON = {
    "README.md": ("test_readme.py", "test_the_python_example_runs"),
    "docs/python.md": ("test_api.py", "test_the_examples_of_the_documentation"),
    "docs/processes.md": ("test_workers.py", "test_the_example_of_the_document"),
}
"""Document -> the test that runs its Python."""

NOT_RUN = {
    r"python -m pip install .*": "needs a network; .ci/run runs both set-up commands of README.md",
    r"git clone .*": "needs a network",
    r"python -m venv .*": "what follows in it needs a network",
    r"ruff check \. .*": "it runs these tests",
    r"python -m build|python -m twine .*": "needs build and twine, and minutes",
    r"python -m research\..*": "takes minutes to hours",
    r"hpcmref train .* --minutes 60": "takes an hour; test_training.py trains for a few steps",
    r"hpcmref checkpoints convert official\.pth\.tar .*": "needs an official file; test_checkpoints.py converts some",
    r"hpcmref bench .*effort=6": "takes a minute; test_bench.py measures an effort",
    r"hpcmref encode .*--effort 9 --max-seconds 60 .*": "takes a minute; test_effort.py stops such a search",
    r"hpcmref compare photo\.png decoded\.png": "the console block before it makes this picture; test_cli.py compares",
    r"hpcmref bench --kodak .*": "needs the Kodak images and an hour",
    r"_HPCMREF_COMPLETE=\S+ hpcmref > /usr/.*": "writes to the system; test_shell.py runs what it prints",
}
"""Commands, as regular expressions -> why they are parsed and not run."""

FILES = ("photo.png", "sample.png", "photos/a.png", "photos/b.png")


def blocks(document: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```$", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(document: Path) -> list[str]:
    """The commands of the sh blocks: lines without comments, those that go on in the next line joined."""
    text = "\n".join(text for language, text in blocks(document) if language == "sh")
    lines = (re.sub(r"\s+# .*", "", line).strip() for line in text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


def reason(command: str) -> str | None:
    """Why this command is not run, if it is not."""
    found = [why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, command)]
    assert len(found) < 2, command
    return found[0] if found else missing(command)


def missing(command: str) -> str | None:
    """What is not installed of what this command needs."""
    programs = re.findall(r"(?:=|\||&& |^)(cjxl|avifenc|ffmpeg|EncoderAppStatic|man|update-mime-database) ", command)
    programs += ["libx265"] if "libx265" in command and not _has_x265() else []
    needed = [name for name in programs if name == "libx265" or shutil.which(name) is None]
    if re.search(r"--codecs \S*jxl", command) and importlib.util.find_spec("pillow_jxl") is None:
        needed.append("pillow-jxl-plugin")
    if "bench" in command and importlib.util.find_spec("bjontegaard") is None:
        needed.append("the extra hpcmref[bench]")
    return f"{needed[0]} is not installed" if needed else None


def _has_x265() -> bool:
    if shutil.which("ffmpeg") is None:
        return False
    said = subprocess.run(["ffmpeg", "-hide_banner", "-encoders"], capture_output=True, text=True, timeout=60)
    return "libx265" in said.stdout


def parse(command: str) -> None:
    """Raise for a command or an option of hpcmref that does not exist, and for a wrong number of arguments."""
    import typer

    from hpcmref.cli import app, load

    words = shlex.split(command.split(" < ")[0].split(" > ")[0].split(" | ")[0])
    parser: Any = typer.main.get_command(app)
    name, arguments = "hpcmref", words[1:]
    while arguments and not arguments[0].startswith("-") and (name in ("hpcmref", "checkpoints")):
        name = arguments.pop(0)
        parser = load(name) if isinstance(parser, typer.main.get_command(app).__class__) else parser.commands[name]
    context = parser.context_class(parser, info_name=name, resilient_parsing=True)
    parser.make_parser(context).parse_args(args=list(arguments))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that does not ship."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    checkpoints.save(model_of(), path, "tiny", {})
    return path


@pytest.fixture
def place(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as documents assume it, with small pictures, and a home of its own."""
    from PIL import Image

    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with Image.open(SAMPLE) as image:
            image.crop((200, 100, 248, 132)).save(tmp_path / name)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    shutil.copy(trained, tmp_path / "runs" / "mine" / "nano.safetensors")
    shutil.copy(checkpoints.find("nano"), tmp_path / "base.safetensors")
    (tmp_path / "contrib").symlink_to(ROOT / "contrib")
    (tmp_path / "home").mkdir()
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "hpcmref").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m hpcmref "$@"\n')
    (programs / "hpcmref").chmod(0o755)
    for name, value in {
        "HOME": str(tmp_path / "home"),
        "HPCMREF_MODELS": str(tmp_path / "models"),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "MANPAGER": "cat",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> None:
    """A command of hpcmref alone in this process, which has torch already; anything else in a shell."""
    if command.startswith("hpcmref ") and not re.search(r"(?<!')[<>$]|\| |--install-completion", command):
        from typer.testing import CliRunner

        from hpcmref.cli import app

        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, (command, result.output)
    else:
        done = subprocess.run(["bash", "-c", f"{command}; exit $?"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (command, done.stdout, done.stderr)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_is_of_a_kind_that_is_tested(document: Path) -> None:
    for language, text in blocks(document):
        assert language in LANGUAGES, text
        if language == "console":
            assert document in SHOWN
        if language == "python":
            file, test = PYTHON[str(document.relative_to(ROOT))]
            assert f"def {test}(" in (ROOT / "tests" / file).read_text()


@pytest.mark.skipif(os.name == "nt", reason="the commands are for a shell of Unix")
@pytest.mark.parametrize(
    "document", [each for each in DOCUMENTS if commands(each)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_commands_run(document: Path, place: Path) -> None:
    for command in commands(document):
        if command.startswith("hpcmref "):
            parse(command)
        if reason(command) is None:
            run(command)


def inline() -> Iterator[tuple[str, str]]:
    """Document and text of every command that stands in a sentence or a table."""
    for document in DOCUMENTS:
        text = re.sub(r"^ *```.*?^ *```$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for found in re.findall(r"`((?:hpcmref|python) [^`]+)`", text):
            yield document.name, " ".join(found.split())


def test_commands_in_sentences_exist() -> None:
    for document, command in inline():
        if command.startswith("hpcmref ") and not command.startswith("hpcmref COMMAND"):
            try:
                parse(command)
            except Exception as error:
                raise AssertionError(f"{document}: {command}: {error}") from error
        for module in re.findall(r"python -m (research\.\w+)", command):
            assert importlib.util.find_spec(module), (document, command)
        for script in re.findall(r"python ((?:tools|tests|examples)/\S+\.py)", command):
            assert (ROOT / script).is_file(), (document, command)


def test_what_is_not_run_is_there() -> None:
    every = [command for document in DOCUMENTS for command in commands(document)]
    for pattern in NOT_RUN:
        assert any(re.fullmatch(pattern, command) for command in every), pattern
