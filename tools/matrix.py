"""Test the wheel in many environments ("corners"): Python, torch, numpy, Pillow, range coder, instruction set, locale.

    python tools/matrix.py                                       all corners
    python tools/matrix.py "Python 3.11" "lowest packages"       these, compared with the first of them
    python tools/matrix.py --python 3.14=/opt/python3.14/bin/python3 "Python 3.14"
    python tools/matrix.py --pictures FOLDER --table             more pictures; writes the rows into docs/platforms.md

The script builds sdist and wheel. For each corner it makes a fresh environment, installs only the wheel, and runs
`corner_check.py`. Equal latents must give equal bytes in all corners. Each corner decodes the files of the first one,
and the first one decodes the files of all others. The exit code is 1 if anything fails or differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "platforms.md"
FIRST = "first"
"""The folder with the files of the corner that all others are compared with."""
MOST_BYTES = 50_000_000
"""The largest permitted size of the wheel."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant of the process in an environment. read_only: make its home and its packages read-only."""

    name: str
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    read_only: bool = False


@dataclasses.dataclass(frozen=True)
class Corner:
    """A fresh environment: a version of Python, pinned packages, and variants of the process that runs in it."""

    name: str
    python: str
    pins: tuple[str, ...] = ()
    compressai: bool = True
    variants: tuple[Variant, ...] = ()


LOWEST = ("numpy==1.24.4", "pillow==11.3.0", "rich==13.0.0", "safetensors==0.4.3", "typer==0.16.0")
VARIANTS = (
    Variant("HPCMREF_RANGECODER=builtin", {"HPCMREF_RANGECODER": "builtin"}),
    Variant("HPCMREF_RANGECODER=compressai", {"HPCMREF_RANGECODER": "compressai"}),
    Variant("ATEN_CPU_CAPABILITY=default", {"ATEN_CPU_CAPABILITY": "default"}),
    Variant("ATEN_CPU_CAPABILITY=avx2", {"ATEN_CPU_CAPABILITY": "avx2"}),
    Variant("ONEDNN_MAX_CPU_ISA=AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    Variant(
        "AVX2 everywhere",
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    ),
    Variant("python -O", {"PYTHONOPTIMIZE": "1"}),
    Variant(
        "LANG=C without UTF-8",
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ),
    Variant("read-only home and packages", read_only=True),
)
CORNERS = (
    Corner("Python 3.11", "3.11", ("torch==2.13.0",), variants=VARIANTS),
    Corner("without compressai", "3.11", ("torch==2.13.0",), compressai=False),
    Corner("lowest packages", "3.11", ("torch==2.13.0", *LOWEST)),
    Corner("lowest Pillow, newest numpy", "3.11", ("torch==2.13.0", "pillow==11.3.0"), compressai=False),
    Corner("Python 3.10, everything lowest", "3.10", ("torch==2.6.0", *LOWEST)),
    Corner("Python 3.12, torch 2.10", "3.12", ("torch==2.10.0",)),
    Corner("Python 3.13, newest torch", "3.13"),
    Corner("Python 3.14, newest torch", "3.14"),
)


class CornerError(Exception):
    """A corner has failed. The message is the last line of its output."""


def build(folder: Path) -> Path:
    """Build sdist and wheel, check the content of both, and return the path of the wheel."""
    python = _environment(sys.executable, folder / "builder")
    _run([python, "-m", "pip", "install", "-q", "build", "twine"])
    _run([python, "-m", "build", "--outdir", folder / "dist", ROOT])
    (wheel,) = (folder / "dist").glob("*.whl")
    _run([python, "-m", "twine", "check", "--strict", *(folder / "dist").iterdir()])
    look_at(wheel)
    return wheel


def look_at(wheel: Path) -> None:
    """Print the size of the wheel. Raises CornerError if it is too large or holds anything but the package."""
    with zipfile.ZipFile(wheel) as archive:
        strangers = {name for name in archive.namelist() if not re.match(r"hpcmref(-[\d.]+\.(dist-info|data))?/", name)}
    if strangers:
        raise CornerError(f"the wheel holds {sorted(strangers)}")
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 1e6:.1f} MB")
    if size > MOST_BYTES:
        raise CornerError(f"the wheel has {size} bytes, and {MOST_BYTES} are allowed")


def install(corner: Corner, interpreter: str, wheel: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Make the environment of a corner. Return its Python and what is in the environment.

    The latter has the megabytes of torch with numpy ("torch and numpy") and of everything ("everything"), and the names
    of the packages that came with torch and numpy ("base").
    """
    python = _environment(interpreter, folder)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(corner.pins) + "\n")
    pip = [python, "-m", "pip", "install", "-q", "-c", constraints]
    seen: dict[str, Any] = {}
    # compressai needs numpy below 2, and torch alone would install a newer one first.
    _run([*pip, "torch", "numpy<2" if corner.compressai and corner.python < "3.13" else "numpy"])
    seen["torch and numpy"] = _megabytes(folder)
    # Not by `pip list`, which prints nothing where PIP_QUIET is set.
    listing = "import importlib.metadata as m, json; print(json.dumps([each.name for each in m.distributions()]))"
    seen["base"] = json.loads(_run([python, "-c", listing]))
    if corner.compressai:
        _run([*pip, wheel])
    else:
        _run([*pip, "--no-deps", wheel])
        _run([*pip, *(each for each in _requirements(wheel) if not each.startswith("compressai"))])
    seen["everything"] = _megabytes(folder)
    return python, seen


def check(python: Path, work: Path, name: str, others: Sequence[str], variant: Variant | None = None) -> dict[str, Any]:
    """Run `corner_check.py` in an environment and return its results."""
    command: list[Any] = [python, work / "checks" / "corner_check.py", work, name, *others]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HPCMREF"))}
    environment["PYTHONPATH"] = str(work / "checks" / "tests")
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads are slow on a busy machine
    if variant is not None:
        environment |= variant.environment
        if variant.read_only:
            home = work / "home"
            home.mkdir(exist_ok=True)
            environment["HOME"] = str(home)
            command = [*_read_only(python.parents[1], home), *command]
    return dict(json.loads(_run(command, environment, work).splitlines()[-1]))


def run(corners: Sequence[Corner], pictures: Path | None, interpreters: dict[str, str]) -> tuple[list[dict], bool]:
    """Run all corners and compare them with the first. Returns the rows of the table, and whether all is well."""
    rows: list[dict[str, Any]] = []
    first: dict[str, Any] | None = None
    reader: Path | None = None  # the Python of that row, whose environment stays until the end
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        wheel = build(work)
        _prepare(work, pictures)
        for number, corner in enumerate(corners):
            begun = time.monotonic()
            folder = work / f"environment-{number}"
            try:
                python, seen = install(corner, _interpreter(corner.python, interpreters), wheel, folder)
            except CornerError as error:
                python, failure = None, str(error)
            for variant in (None, *corner.variants):
                row: dict[str, Any] = {"name": variant.name if variant else corner.name}
                try:
                    if python is None:
                        raise CornerError(failure)
                    name = f"{number}-{len(rows)}" if first else FIRST
                    row |= check(python, work, name, [FIRST] if first else [], variant)
                    row["seen"] = seen if variant is None else {}
                    if first is None:
                        first, reader = row, python
                except CornerError as error:
                    row["error"] = str(error)
                rows.append(row)
                print(f"{_line(row, first)} {time.monotonic() - begun:.0f} s", flush=True)
                begun = time.monotonic()
            if python != reader or python is None:
                shutil.rmtree(folder, ignore_errors=True)
        if first is None or reader is None:
            return rows, False
        count = check(reader, work, FIRST, sorted(path.name for path in (work / "files").iterdir()))["decoded"]
        print(f"{first['name']} decodes all {count} files of all corners")
    return rows, all("error" not in row and row["entropy"] == first["entropy"] for row in rows)


def _prepare(work: Path, pictures: Path | None) -> None:
    """Copy the checks, without the package, and the pictures to the working folder."""
    unwanted = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("tests", "research"):
        shutil.copytree(ROOT / name, work / "checks" / name, ignore=unwanted)
    shutil.copy(ROOT / "tools" / "corner_check.py", work / "checks")
    (work / "pictures").mkdir()
    for picture in sorted(pictures.glob("*.png"))[:4] if pictures else []:
        shutil.copy(picture, work / "pictures")


def _line(row: dict[str, Any], first: dict[str, Any] | None) -> str:
    """Return the row of a corner in the table of results."""
    if first is None or "error" in row:
        return f"| {row['name']} | failed: {row['error']} |"
    same = sum(row["files"].get(name) == crc for name, crc in first["files"].items())
    cells = [row["name"], row["python"], row["torch"], row["numpy"], row["pillow"], row["coder"]]
    cells += [_selftest(row["selftest"]), f"{row['golden']} of {row['golden']}", row["entropy"]]
    cells.append(f"{same} of {len(first['files'])}")
    return f"| {' | '.join([*cells, datetime.date.today().isoformat()])} |"


def _selftest(report: dict[str, Any]) -> str:
    """How many files `hpcmref selftest` decoded, and how many pictures it coded again."""
    return f"{report['decoded'][0]} and {report['coded'][0]}"


def _sizes(row: dict[str, Any]) -> str:
    """Return the row of a corner in the table of sizes."""
    seen, packages = row["seen"], row["megabytes"]
    ours = {name: size for name, size in packages.items() if name not in seen["base"]}
    largest = sorted(ours.items(), key=lambda each: -each[1])[:6]
    added = seen["everything"] - seen["torch and numpy"]
    parts = ", ".join(f"{name} {size:.0f}" for name, size in largest)
    return f"| {row['name']} | {seen['torch and numpy']:.0f} | {added:.0f} | {parts} |"


def write_table(rows: Sequence[dict[str, Any]]) -> None:
    """Replace the rows of these corners in docs/platforms.md, or add them."""
    text = TABLE.read_text(encoding="utf-8")
    first = next((row for row in rows if "error" not in row), None)
    for marker, lines in (
        ("corners", [_line(row, first) for row in rows]),
        ("sizes", [_sizes(row) for row in rows if row.get("seen")]),
    ):
        start, end = f"<!-- {marker} -->\n", f"<!-- end of {marker} -->"
        head, _, rest = text.partition(start)
        before, _, tail = rest.partition(end)
        table = {line.split("|")[1]: line for line in (*before.splitlines(), *lines)}
        text = "".join([head, start, *(f"{line}\n" for line in table.values()), end, tail])
    TABLE.write_text(text, encoding="utf-8")


def _interpreter(version: str, known: dict[str, str]) -> str:
    """Return the path of a version of Python: one given by --python, in PATH, or of pyenv."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    of_pyenv = sorted((root / "versions").glob(f"{version}.*/bin/python3"))
    found = known.get(version) or (str(of_pyenv[-1]) if of_pyenv else shutil.which(f"python{version}"))
    if found is None:
        raise CornerError(f"there is no Python {version} here")
    return found


def _environment(interpreter: str, folder: Path) -> Path:
    _run([interpreter, "-m", "venv", folder])
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def _requirements(wheel: Path) -> list[str]:
    """Return the requirements of the wheel, without those of extras."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    found = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [line for line in found if "extra ==" not in line]


def _read_only(*folders: Path) -> list[str]:
    """Return a command prefix that makes folders read-only, for root too. It needs root and Linux."""
    if not (sys.platform.startswith("linux") and os.geteuid() == 0 and shutil.which("unshare")):
        raise CornerError("not run: read-only folders need root on Linux")
    mounts = [f'mount --bind "{each}" "{each}" && mount -o remount,bind,ro "{each}"' for each in folders]
    return ["unshare", "-m", "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"]


def _run(command: Sequence[Any], environment: dict[str, str] | None = None, folder: Path | None = None) -> str:
    """Run a command and return its output. Raises CornerError with its last line if it fails."""
    done = subprocess.run([*map(str, command)], env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"exit code {done.returncode}"]
        raise CornerError(lines[-1].replace("|", "/"))
    return done.stdout


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corners", nargs="*", help="all by default; the first is the one to compare with")
    parser.add_argument("--list", action="store_true", help="print the names of the corners")
    parser.add_argument("--plain", action="store_true", help="one process in each corner, without the variants")
    parser.add_argument("--pictures", type=Path, help="a folder of PNG files, of which 4 are taken")
    parser.add_argument("--python", action="append", default=[], metavar="VERSION=PATH")
    parser.add_argument("--table", action="store_true", help="write the rows into docs/platforms.md")
    arguments = parser.parse_args()
    known = {corner.name: corner for corner in CORNERS}
    if arguments.list:
        print("\n".join(known))
        return
    unknown = set(arguments.corners) - set(known)
    if unknown:
        parser.error(f"no such corner: {', '.join(sorted(unknown))}")
    chosen = [known[name] for name in arguments.corners] or list(CORNERS)
    if arguments.plain:
        chosen = [dataclasses.replace(corner, variants=()) for corner in chosen]
    interpreters = dict(each.split("=", 1) for each in arguments.python)
    rows, passed = run(chosen, arguments.pictures, interpreters)
    if arguments.table:
        write_table(rows)
    print("all corners agree" if passed else "SOMETHING FAILED OR DIFFERS")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
