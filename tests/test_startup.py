"""Does a command import only what it needs, and do its threads sleep while they wait?

What is counted are imported modules, and not seconds, which a busy machine would change.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DATA

from hpcmref.cli import COMMANDS, load
from hpcmref.runtime.waiting import SETTINGS, SLEEP, sleep_while_waiting

MODULES = """
import json, sys
from hpcmref.cli import app
try:
    app(sys.argv[1:], standalone_mode=False)
except SystemExit:
    pass
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    bare = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=bare | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def modules_of(*arguments: str, **environment: str) -> set[str]:
    result = python(MODULES, *arguments, **environment)
    return set(json.loads(result.stderr.splitlines()[-1]))


def own(modules: set[str]) -> set[str]:
    """The modules of hpcmref, without the package's name."""
    return {name.removeprefix("hpcmref.") for name in modules if name.startswith("hpcmref.")}


@pytest.fixture
def encoded(tmp_path: Path) -> str:
    import hpcmref

    path = tmp_path / "a.bin"
    path.write_bytes(hpcmref.encode(_tiny(), lossless=True))
    return str(path)


def _tiny() -> object:
    from PIL import Image

    return Image.new("RGB", (3, 2))


def test_help_imports_no_command() -> None:
    modules = modules_of("--help")
    assert {name for name in own(modules) if name.startswith("cli.")} <= {"cli.failures"}
    assert not own(modules) & {"api", "codec", "checkpoints", "picture", "format", "model", "exact"}
    assert not modules & {"numpy", "torch", "safetensors"}
    assert len(modules) < 600  # 341 where it was written, most of them of Python, Typer and Rich


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_imports_that_command(name: str) -> None:
    modules = modules_of(name, "--help")
    assert {each.split(".")[1] for each in own(modules) if each.startswith("cli.")} & set(COMMANDS) <= {
        name,
        *(["encode"] if name == "bench" else []),  # for the suffixes of images
    }
    assert not modules & {"numpy", "torch", "safetensors"}


@pytest.mark.parametrize("arguments", [["checkpoints", "list"], ["checkpoints", "list", "--json"]])
def test_models_are_listed_without_their_numbers(arguments: list[str]) -> None:
    assert not modules_of(*arguments) & {"numpy", "torch", "safetensors", "hpcmref.model"}


def test_info_reads_headers_alone(encoded: str) -> None:
    modules = modules_of("info", encoded)
    assert not modules & {"numpy", "torch", "safetensors", "hpcmref.picture.images"}


@pytest.mark.parametrize("words", ["hpcmref enc", "hpcmref encode --qu", "hpcmref checkpoints l"])
def test_completion_computes_nothing(words: str) -> None:
    code = MODULES.replace("app(sys.argv[1:], standalone_mode=False)", "app(prog_name='hpcmref')")
    result = python(code, _HPCMREF_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))
    assert result.stdout.split()[0] in ("encode", "--quality", "list")
    modules = set(json.loads(result.stderr.splitlines()[-1]))
    assert not modules & {"numpy", "torch", "safetensors"}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_the_commands_say(name: str) -> None:
    command = load(name)
    assert command.name == name
    assert inspect.cleandoc(command.help).splitlines()[0] == COMMANDS[name]


# --- threads that sleep ----------------------------------------------------------------------------------------------


def test_threads_are_told_to_sleep() -> None:
    environment: dict[str, str] = {}
    assert sleep_while_waiting(environment)
    assert environment == SLEEP


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_user_has_set_is_left_alone(name: str) -> None:
    environment = {name: "whatever"}
    assert not sleep_while_waiting(environment)
    assert environment == {name: "whatever"}


def test_openmp_has_read_it_when_a_command_computes() -> None:
    """GNU's OpenMP itself says how its threads wait. What precedes every command is enough: none has imported torch."""
    code = "from hpcmref.cli import main; main(); import torch"
    result = python(code, OMP_DISPLAY_ENV="VERBOSE")
    if "GOMP_SPINCOUNT" not in result.stderr:
        pytest.skip("torch does not use GNU's OpenMP here")
    assert "GOMP_SPINCOUNT = '1000'" in result.stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in result.stderr
    chosen = python(code, OMP_DISPLAY_ENV="VERBOSE", GOMP_SPINCOUNT="77")
    assert "GOMP_SPINCOUNT = '77'" in chosen.stderr


def test_the_python_interface_changes_no_environment() -> None:
    code = (
        "import os, sys; before = dict(os.environ); import hpcmref; from PIL import Image\n"
        "hpcmref.decode(hpcmref.encode(Image.open(sys.argv[1]).crop((0, 0, 64, 64))))\n"
        "after = {k: v for k, v in os.environ.items() if before.get(k) != v}; print(sorted(after))"
    )
    result = python(code, str(DATA / "sample.png"))
    changed = json.loads(result.stdout.replace("'", '"'))
    assert not set(changed) & {*SETTINGS, "OMP_NUM_THREADS"}, result.stderr
