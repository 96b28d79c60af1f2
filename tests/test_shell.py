"""Do shells and desktops know hpcmref: completion, man page, MIME type, file(1) and thumbnails?

Each is tried with the real program where it is installed.
"""

from __future__ import annotations

import configparser
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA
from PIL import Image

import hpcmref

ROOT = Path(__file__).parent.parent
CONTRIB = ROOT / "contrib"


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of every kind, with usual, unusual and no suffixes."""
    made = tmp_path_factory.mktemp("files")
    with Image.open(DATA / "sample.png") as image:
        small = image.convert("RGB").crop((0, 0, 90, 60))
    (made / "photo.hpcm").write_bytes(hpcmref.encode(small, 20))
    (made / "photo.bin").write_bytes(hpcmref.encode(small.convert("L"), 20))
    (made / "nothing").write_bytes(hpcmref.encode(small.convert("LA"), lossless=True))
    shutil.copy(DATA / "conformance" / "light.bin", made / "old.bin")  # version 1
    (made / "other.bin").write_bytes(b"\x89HPX other data")
    shutil.copy(DATA / "sample.png", made / "photo.png")
    return made


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A PATH on which `hpcmref` is the package that is tested."""
    place = tmp_path_factory.mktemp("bin")
    program = place / "hpcmref"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m hpcmref "$@"\n')
    program.chmod(0o755)
    return {
        "PATH": f"{place}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }


# --- completion ------------------------------------------------------------------------------------------------------

WORDS = [
    ("hpcmref enc", "encode"),
    ("hpcmref encode --keep", "--keep-invisible"),
    ("hpcmref encode --device cu", "cuda"),
    ("hpcmref decode -m na", "nano"),
    ("hpcmref checkpoints rem", "remove"),
]


@pytest.mark.skipif(os.name == "nt", reason="a shell of Unix")
@pytest.mark.parametrize(
    ("shell", "line", "wanted"), [*(("bash", *each) for each in WORDS), ("zsh", *WORDS[1]), ("fish", *WORDS[1])]
)
def test_what_a_shell_is_answered(installed: dict[str, str], shell: str, line: str, wanted: str) -> None:
    """The protocol of each shell, as its completion script speaks it."""
    asked = {
        "COMP_WORDS": line,
        "COMP_CWORD": str(line.count(" ")),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    result = run("hpcmref", _HPCMREF_COMPLETE=f"complete_{shell}", **asked, **installed)
    assert wanted in result.stdout
    assert result.stderr == ""


@needs("bash")
@pytest.mark.skipif(os.name == "nt", reason="a shell of Unix")
@pytest.mark.parametrize(("line", "wanted"), WORDS[:2])
def test_bash_completes(installed: dict[str, str], line: str, wanted: str) -> None:
    """With its own completion machinery, and the script that packagers install."""
    words = " ".join(map(shlex.quote, line.split()))
    script = (
        'eval "$(_HPCMREF_COMPLETE=source_bash hpcmref)"\n'
        f"COMP_WORDS=({words}); COMP_CWORD={line.count(' ')}\n"
        'function=$(complete -p hpcmref | sed "s/.*-F \\([^ ]*\\).*/\\1/"); $function hpcmref; echo "${COMPREPLY[@]}"'
    )
    result = run("bash", "--norc", "-c", script, **installed)
    assert result.stdout.split() == [wanted], result.stderr


@needs("bash")
@pytest.mark.skipif(os.name == "nt", reason="a shell of Unix")
def test_completion_is_shown_and_installed(installed: dict[str, str], tmp_path: Path) -> None:
    home = {**installed, "HOME": str(tmp_path)}
    shown = run("bash", "--norc", "-c", "hpcmref --show-completion; true", **home)
    assert "hpcmref" in shown.stdout
    assert "_HPCMREF_COMPLETE=complete_bash" in shown.stdout
    result = run("bash", "--norc", "-c", "hpcmref --install-completion; true", **home)
    assert "bash completion installed" in result.stdout, result.stderr
    script = tmp_path / ".bash_completions" / "hpcmref.sh"
    assert "_HPCMREF_COMPLETE=complete_bash" in script.read_text()
    assert str(script) in (tmp_path / ".bashrc").read_text()


# --- the man page ----------------------------------------------------------------------------------------------------


def build_man() -> Any:
    spec = importlib.util.spec_from_file_location("build_man", ROOT / "tools" / "build_man.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_man_page_says_what_the_help_says() -> None:
    from hpcmref.cli import load

    if not load("info").params[0].help:
        pytest.skip("this Typer and this click do not keep the help of arguments")
    tool = build_man()
    assert tool.TARGET.read_text() == tool.page(), "python tools/build_man.py writes it anew"


@needs("groff")
def test_the_man_page_is_well_formed() -> None:
    result = run("groff", "-man", "-Tascii", "-ww", CONTRIB / "hpcmref.1", GROFF_NO_SGR="1")
    assert result.stderr == ""
    text = " ".join(result.stdout.replace("\b", "").split())
    for part in ("encode", "decode", "checkpoints", "EXIT", "HPCMREF_MODELS"):
        assert part in text or "".join(2 * letter for letter in part) in text  # bold is typed twice


# --- the MIME type ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MIME database with the file of contrib."""
    if shutil.which("update-mime-database") is None:
        pytest.skip("update-mime-database is not installed")
    share = tmp_path_factory.mktemp("share")
    packages = share / "mime" / "packages"
    packages.mkdir(parents=True)
    shutil.copy(CONTRIB / "hpcmref.xml", packages)
    result = run("update-mime-database", share / "mime", XDG_DATA_HOME=str(share))
    assert (result.returncode, result.stderr) == (0, "")
    return share


def test_the_database_knows_magic_and_suffix(mime: Path) -> None:
    assert (mime / "mime" / "image" / "x-hpcm.xml").is_file()
    assert "50:image/x-hpcm:*.hpcm" in (mime / "mime" / "globs2").read_text()
    magic = (mime / "mime" / "magic").read_bytes()
    assert b"[80:image/x-hpcm]\n>0=\x00\x04\x89HPC" in magic


@needs("gio")
def test_desktops_know_files_by_their_first_bytes(mime: Path, folder: Path) -> None:
    """With the library that GNOME's programs use; also where the suffix says something else, or nothing."""
    paths = [str(folder / name) for name in ("photo.hpcm", "photo.bin", "nothing", "old.bin", "other.bin", "photo.png")]
    shares = f"{mime}{os.pathsep}/usr/local/share{os.pathsep}/usr/share"
    result = run("gio", "info", "-a", "standard::content-type", *paths, XDG_DATA_HOME=str(mime), XDG_DATA_DIRS=shares)
    found = [line.split()[-1] for line in result.stdout.splitlines() if "standard::content-type:" in line]
    assert found[:4] == 4 * ["image/x-hpcm"], result.stderr
    assert "image/x-hpcm" not in found[4:]
    assert len(found) == 6


def file_says(folder: Path, magic: Path, *options: str) -> dict[str, str]:
    names = sorted(path.name for path in folder.iterdir())
    result = run("file", "-b", *options, "-m", magic, *(folder / name for name in names))
    assert result.stderr == ""
    return dict(zip(names, result.stdout.splitlines(), strict=True))


@needs("file")
def test_file_knows_every_version(folder: Path, tmp_path: Path) -> None:
    magic = CONTRIB / "hpcmref.magic"
    said = file_says(folder, magic)
    assert said["photo.hpcm"] == "HPCM image data, version 2, learned"
    assert said["photo.bin"] == "HPCM image data, version 2, grey, learned"
    assert said["nothing"].startswith("HPCM image data, version 2, grey, lossless ")
    quality = hpcmref.info(folder / "old.bin").quality
    assert said["old.bin"] == f"HPCM image data, version 1, quality {quality}"
    assert "HPCM" not in said["other.bin"] + said["photo.png"]
    types = file_says(folder, magic, "--mime-type")
    assert [name for name, kind in types.items() if kind == "image/x-hpcm"] == [
        "nothing", "old.bin", "photo.bin", "photo.hpcm",
    ]  # fmt: skip
    compiled = subprocess.run(["file", "-C", "-m", magic], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (compiled.returncode, compiled.stderr) == (0, "")
    assert file_says(folder, tmp_path / "hpcmref.magic.mgc") == said


@needs("file")
def test_file_knows_them_from_the_home_folder(folder: Path, tmp_path: Path) -> None:
    """As docs/shell.md installs it; other files are known as before."""
    shutil.copy(CONTRIB / "hpcmref.magic", tmp_path / ".magic")
    result = run("file", "-b", "--mime-type", folder / "photo.hpcm", folder / "photo.png", HOME=str(tmp_path))
    assert result.stdout.split() == ["image/x-hpcm", "image/png"]


# --- thumbnails ------------------------------------------------------------------------------------------------------


def call_thumbnailer(path: Path, output: Path, size: int, installed: dict[str, str]) -> Any:
    """As a file manager calls it: the line of the entry, with its placeholders filled in, without a shell."""
    entry = configparser.ConfigParser(interpolation=None)
    entry.optionxform = str  # type: ignore[assignment, method-assign]
    entry.read(CONTRIB / "hpcmref.thumbnailer")
    (name,) = entry.sections()
    assert name == "Thumbnailer Entry"
    assert entry[name]["MimeType"] == "image/x-hpcm;"
    values = {"%i": str(path), "%o": str(output), "%s": str(size), "%u": path.as_uri(), "%%": "%"}
    command = [values.get(word, word) for word in shlex.split(entry[name]["Exec"])]
    program = shutil.which(command[0], path=installed["PATH"])
    assert shutil.which(entry[name]["TryExec"], path=installed["PATH"]) == program
    assert program is not None
    return run(program, *command[1:], **installed)


@pytest.mark.skipif(os.name == "nt", reason="a desktop of Unix")
def test_the_thumbnailer_entry_works(folder: Path, tmp_path: Path, installed: dict[str, str]) -> None:
    path = folder / "photo.hpcm"
    output = tmp_path / "made by mkstemp"  # there already, and without a suffix
    output.touch()
    result = call_thumbnailer(path, output, 64, installed)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    with Image.open(output) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 43))
        assert image.info["Thumb::URI"] == path.as_uri()
        assert image.info["Thumb::MTime"] == str(int(path.stat().st_mtime))
        assert (image.info["Thumb::Image::Width"], image.info["Thumb::Image::Height"]) == ("90", "60")


def thumbnail(arguments: Sequence[str], stdin: bytes | None = None) -> Any:
    from typer.testing import CliRunner

    from hpcmref.cli import app

    return CliRunner().invoke(app, ["thumbnail", *arguments], input=stdin)


@pytest.mark.parametrize(
    ("mode", "size", "wanted", "shown"),
    [
        ("RGB", (5, 4), "RGB", (5, 4)), ("L", (300, 2), "RGB", (32, 1)), ("LA", (40, 80), "RGBA", (16, 32)),
        ("RGBA", (1, 1), "RGBA", (1, 1)), ("1", (64, 64), "RGB", (32, 32)),
    ],
)  # fmt: skip
def test_a_thumbnail_fits_and_is_never_enlarged(
    tmp_path: Path, mode: str, size: tuple[int, int], wanted: str, shown: tuple[int, int]
) -> None:
    (tmp_path / "a.hpcm").write_bytes(hpcmref.encode(Image.new(mode, size), lossless=True))
    assert thumbnail([str(tmp_path / "a.hpcm"), "-o", str(tmp_path / "a.png"), "-s", "32"]).exit_code == 0
    with Image.open(tmp_path / "a.png") as image:
        assert (image.mode, image.size) == (wanted, shown)


def test_a_thumbnail_of_16_bits_is_not_white(tmp_path: Path) -> None:
    grey = Image.linear_gradient("L").convert("I;16").point(lambda value: value * 257)
    with pytest.warns(UserWarning, match="16-bit"):
        (tmp_path / "a.hpcm").write_bytes(hpcmref.encode(grey, 40))
    assert hpcmref.decode(tmp_path / "a.hpcm").mode == "I;16"
    assert thumbnail([str(tmp_path / "a.hpcm"), "-o", str(tmp_path / "a.png")]).exit_code == 0
    with Image.open(tmp_path / "a.png") as image:
        low, high = image.convert("L").getextrema()
    assert low < 20
    assert high > 235
    assert 100 < sum(image.convert("L").resize((1, 1)).getextrema()) / 2 < 155


def test_what_has_no_thumbnail_leaves_none(tmp_path: Path) -> None:
    bad = tmp_path / "a.hpcm"
    bad.write_bytes(b"no file")
    for source, reason in (
        (bad, "this is not an hpcmref file"),
        (tmp_path, "(Is a directory|Permission denied)"),
        (tmp_path / "x", "No such file or directory"),
    ):
        result = thumbnail([str(source), "-o", str(tmp_path / "a.png")])
        assert result.exit_code == 1
        assert re.fullmatch(f"hpcmref: {re.escape(str(source))}: {reason}\n", result.stderr)
        assert not (tmp_path / "a.png").exists()


@pytest.fixture
def archive(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The content of the encoded file a.hpcm, which lies in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "photo.hpcm", "a.hpcm")
    return Path("a.hpcm").read_bytes()


@pytest.mark.parametrize("output", ["a.hpcm", "./a.hpcm", "link.png", "A.HPCM"])
def test_a_thumbnail_never_replaces_its_file(archive: bytes, output: str) -> None:
    """Nor where another name or other letters lead to it."""
    if output == "link.png":
        Path(output).symlink_to("a.hpcm")
    if output == "A.HPCM" and not Path(output).exists():  # as where the file system sees no difference in letters
        Path(output).hardlink_to("a.hpcm")
    result = thumbnail(["a.hpcm", "-o", output])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("hpcmref: a.hpcm")
    assert result.stderr.endswith(f"{Path(output)} is an input; name another output with -o\n")
    assert Path("a.hpcm").read_bytes() == archive


@pytest.mark.parametrize("output", ["b.hpcm", "notes.txt", "photo.jpg"])
def test_a_thumbnail_replaces_nothing_but_a_png(archive: bytes, output: str) -> None:
    Path(output).write_bytes(b"precious")
    result = thumbnail(["a.hpcm", "-o", output])
    assert (result.exit_code, result.stderr) == (
        1, f"hpcmref: a.hpcm: {output} exists already, and is not a PNG; name another output with -o\n"
    )  # fmt: skip
    assert Path(output).read_bytes() == b"precious"
    Image.new("L", (1, 1)).save("old", "PNG")
    assert thumbnail(["a.hpcm", "-o", "old"]).exit_code == 0
    with Image.open("old") as image:
        assert image.size == (90, 60)


def test_thumbnails_go_through_pipes(archive: bytes) -> None:
    """What has no name and no time has none in the PNG, unless the caller knows its URI."""
    named = thumbnail(["a.hpcm", "-o", "-"]).stdout_bytes
    assert thumbnail(["a.hpcm", "-o", "a.png"]).exit_code == 0
    assert Path("a.png").read_bytes() == named
    result = thumbnail(["-", "-o", "-", "-s", "20"], stdin=archive)
    assert (result.exit_code, result.stderr) == (0, "")
    with Image.open(io.BytesIO(result.stdout_bytes)) as image:
        assert image.size == (20, 13)
        assert {name for name in image.info if name.startswith("Thumb::")} == {
            "Thumb::Mimetype", "Thumb::Image::Width", "Thumb::Image::Height",
        }  # fmt: skip
    result = thumbnail(["-", "-o", "-", "--uri", "file:///a"], stdin=archive)
    with Image.open(io.BytesIO(result.stdout_bytes)) as image:
        assert image.info["Thumb::URI"] == "file:///a"
    assert sorted(path.name for path in Path().iterdir()) == ["a.hpcm", "a.png"]
    result = thumbnail(["-", "-o", "-"], stdin=b"no file")
    assert (result.exit_code, result.stderr) == (1, "hpcmref: standard input: this is not an hpcmref file\n")


# --- what is shipped -------------------------------------------------------------------------------------------------


def test_every_file_of_contrib_is_shipped_and_described() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    document = (ROOT / "docs" / "shell.md").read_text()
    names = sorted(path.name for path in CONTRIB.iterdir())
    assert names == ["hpcmref.1", "hpcmref.magic", "hpcmref.thumbnailer", "hpcmref.xml"]
    for name in names:
        assert f'"contrib/{name}"' in project
        assert f"contrib/{name}" in document
