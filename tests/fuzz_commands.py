"""Is every command line answered with a sentence? Puts commands together at random and runs them on small files.

    python tests/fuzz_commands.py --mutations 2000 --seed 7

Allowed are exit codes 0, 1 and 2, nothing but lines of "hpcmref: ..." on stderr with exit code 1, no traceback and no
"unexpected" error, and no temporary file. Anything else ends the run with the command line.
"""

from __future__ import annotations

import collections
import os
import re
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from fuzz import damaged, run
from PIL import Image
from typer.testing import CliRunner

from hpcmref.cli import app

NUMBERS = (
    "32",
    "1",
    "2",
    "3",
    "63",
    "0",
    "64",
    "-1",
    "1e9",
    "nan",
    "inf",
    "0.5",
    "31.5",
    "40kB",
    "-5kB",
    "9" * 30,
    "",
    " ",
)
NAMES = (
    "out",
    "out.png",
    "out.bin",
    "out.jpg",
    "out.xyz",
    "folder",
    ".",
    "-",
    "",
    "é",
    "a b",
    "/dev/null",
    "/nowhere/x",
)
MODELS = ("nano", "light", "model.safetensors", "a.png", "folder", "")
DEVICES = ("cpu", "cpu", "auto", "cuda", "gpu")
COMMANDS: dict[tuple[str, ...], dict[str, tuple[str, ...] | None]] = {
    ("encode",): {
        "-q": NUMBERS, "-o": NAMES, "-m": MODELS, "--device": DEVICES, "--size": NUMBERS, "--bpp": NUMBERS,
        "--psnr": NUMBERS, "--frame": NUMBERS, "--strip-only": ("location", "exif,icc", "all", ""), "--force": None,
        "--strip": None, "--lossless": None, "--keep-invisible": None, "--resume": None, "--quiet": None,
        "--verify": None,
    },
    ("decode",): {
        "-o": NAMES, "-m": MODELS, "--device": DEVICES, "--upto": NUMBERS, "--max-pixels": NUMBERS, "--force": None,
        "--strip": None, "--allow-partial": None, "--allow-damaged": None, "--quiet": None,
    },
    ("info",): {"--json": None},
    ("verify",): {"--quick": None, "--json": None, "--device": DEVICES},
    ("compare",): {"--json": None},
    ("checkpoints", "list"): {"--json": None},
    ("checkpoints", "convert"): {"-o": NAMES, "--preset": ("base", "light", "nano"), "--force": None},
    ("nonsense",): {},
    (): {"--version": None},
}  # fmt: skip
"""Command -> option -> its values, None for a switch. Some options are those of later versions."""

FILES = ("a.png", "grey.png", "clear.png", "a.bin", "lossless.bin", "cut.bin", "broken.bin", "text.txt", "empty.png",
         "empty.bin", "folder", "model.safetensors", "missing.png", "link.png", "x[bold].png", "*.png")  # fmt: skip


def prepare(random: np.random.Generator) -> None:
    """The files that command lines name, in the current folder."""
    image = Image.linear_gradient("L").resize((30, 20))
    for name, each in (("a.png", image.convert("RGB")), ("grey.png", image), ("x[bold].png", image)):
        each.save(name)
    clear = image.convert("RGBA")
    clear.putalpha(image)
    clear.save("clear.png")
    Path("folder").mkdir()
    image.save("folder/b.png")
    Path("text.txt").write_text("no image")
    for name in ("empty.png", "empty.bin"):
        Path(name).touch()
    os.symlink("a.png", "link.png")
    runner = CliRunner()
    assert runner.invoke(app, ["encode", "a.png", "-o", "a.bin", "--device", "cpu"]).exit_code == 0
    assert runner.invoke(app, ["encode", "clear.png", "-o", "lossless.bin", "--lossless"]).exit_code == 0
    data = Path("a.bin").read_bytes()
    Path("cut.bin").write_bytes(data[: len(data) // 2])
    Path("broken.bin").write_bytes(damaged(random, data, data, 20, len(data)))
    Path("model.safetensors").write_bytes(b"\x10" + bytes(40))


def command_line(random: np.random.Generator) -> list[str]:
    """One command with up to eight words."""

    def one(values: tuple[str, ...]) -> str:
        return values[random.integers(len(values))]

    commands = [*COMMANDS][:2] * 4 + [*COMMANDS]
    words = list(commands[random.integers(len(commands))])
    options = COMMANDS[tuple(words)]
    if random.random() < 0.1:  # those of all commands
        options = {name: values for each in COMMANDS.values() for name, values in each.items()}
    parts = [[one(FILES)] for _ in range(random.integers(0, 4))]
    for _ in range(random.integers(0, 4) if options else 0):
        name = one(tuple(options))
        values = options[name]
        parts.append([name] if values is None else [name, one(values if random.random() < 0.3 else values[:5])])
    if random.random() < 0.1:
        parts.append([one(("--", "-x", "--help", *NUMBERS, *NAMES))])
    for index in random.permutation(len(parts)):
        words += parts[index]
    return words


def wrong(words: list[str]) -> str:
    """What is wrong with the answer to a command line, or "" and the exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, words, input=b"")
    errors = result.stderr
    if result.exit_code not in (0, 1, 2):
        return f"exit code {result.exit_code}"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"{type(result.exception).__name__}: {result.exception}"
    if "Traceback" in errors or re.search(r"unexpected \w+: ", errors):
        return errors
    lines = [line for line in errors.splitlines() if not line.startswith("hpcmref: ")]
    if result.exit_code == 1 and (lines or not errors) and "FAILED" not in result.output and "verify" not in words:
        return f"stderr: {errors!r}"
    if leftover := list(Path().rglob("*.tmp")):
        return f"a temporary file: {leftover}"
    return f"exit code {result.exit_code}" if result.exit_code else ""


def fuzz(seed: int, mutations: int, seconds: float = float("inf")) -> tuple[collections.Counter[str], float]:
    """How often each exit code was, and the seconds of the slowest; AssertionError for an answer that should not be."""
    random = np.random.default_rng(seed)
    outcomes: collections.Counter[str] = collections.Counter()
    slowest, start = 0.0, time.monotonic()
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            prepare(random)
            for _ in range(mutations):
                words = command_line(random)
                begin = time.monotonic()
                found = wrong(words)
                slowest = max(slowest, time.monotonic() - begin)
                assert found in ("", "exit code 1", "exit code 2"), f"{found} by {words}"
                outcomes[found or "exit code 0"] += 1
                if time.monotonic() - start > seconds:
                    break
        finally:
            os.chdir(here)
    return outcomes, slowest


if __name__ == "__main__":
    run(__doc__, "commands", fuzz)
