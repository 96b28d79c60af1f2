"""Which files of a folder are read, and what are their outputs called?"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from hpcmref.cli import app
from hpcmref.cli.folders import find, name_outputs
from hpcmref.errors import HpcmrefError

posix = pytest.mark.skipif(os.name != "posix", reason="links and permissions of POSIX")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def named(*arguments: str, output: str = "out", suffixes: tuple[str, ...] = (".jpg", ".png")) -> dict[str, str]:
    """Source -> target, or the error that takes its place."""
    found = name_outputs(find(list(arguments), suffixes).sources, Path(output), ".hpcm")
    return {str(source.path): str(target) for source, target in found.items()}


@pytest.mark.usefixtures("folder")
class TestFind:
    def test_folders_are_walked_and_what_is_left_out_is_counted(self) -> None:
        make("in/b.png", "in/A.JPG", "in/x/y/c.png", "in/x/notes.txt", "in/film.mov", "in/README")
        make("in/.hidden.png", "in/.git/d.png")
        found = find(["in"], (".jpg", ".png"))
        assert [str(source.path) for source in found.sources] == ["in/A.JPG", "in/b.png", "in/x/y/c.png"]
        assert [str(source.folder) for source in found.sources] == [".", ".", "x/y"]
        assert found.describe_skipped() == "skipped in folders: 3 with other suffixes (.mov, .txt, none), 2 hidden"

    def test_not_recursive(self) -> None:
        make("in/a.png", "in/x/b.png", "in/y/c.png")
        found = find(["in"], (".png",), recursive=False)
        assert [str(source.path) for source in found.sources] == ["in/a.png"]
        assert found.describe_skipped() == "skipped in folders: 2 subfolders (--no-recursive)"

    @posix
    def test_links(self) -> None:
        """A link to a file is read, one to a folder is not entered, and a loop ends."""
        make("in/a.png", "elsewhere/b.png")
        Path("in/b.png").symlink_to("../elsewhere/b.png")
        Path("in/loop").symlink_to(".")
        Path("in/gone.png").symlink_to("nowhere")
        os.mkfifo("in/pipe.png")
        found = find(["in"], (".png",))
        assert [str(source.path) for source in found.sources] == ["in/a.png", "in/b.png"]
        assert dict(found.skipped) == {"links to folders": 1, "broken links, pipes or devices": 2}

    def test_the_output_is_not_entered(self) -> None:
        make("in/a.png", "in/out/b.png")
        assert [str(source.path) for source in find(["in"], (".png",), without="in/out").sources] == ["in/a.png"]

    def test_a_file_that_is_named_twice_is_read_once(self) -> None:
        make("in/a.png")
        assert len(find(["in", "in/a.png", "./in/a.png"], (".png",)).sources) == 1

    def test_a_folder_without_images_is_an_error_beside_the_others(self) -> None:
        make("in/a.png", "empty/notes.txt")
        found = find(["empty", "in"], (".png",))
        assert len(found.sources) == 1
        assert [str(problem) for problem in found.problems] == ["empty: no files here end with .png"]

    @posix
    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may list anything")
    def test_a_folder_that_cannot_be_listed(self) -> None:
        make("in/a.png", "in/x/b.png")
        Path("in/x").chmod(0)
        (problem,) = find(["in"], (".png",)).problems
        assert str(problem) == "cannot list in/x: Permission denied"


@pytest.mark.usefixtures("folder")
class TestNames:
    def test_the_tree_is_kept(self) -> None:
        make("in/a.png", "in/x/y/a.png")
        assert named("in") == {"in/a.png": "out/a.hpcm", "in/x/y/a.png": "out/x/y/a.hpcm"}

    def test_of_two_files_with_one_name_the_second_keeps_its_suffix(self) -> None:
        make("in/a.jpg", "in/a.png", "in/b.png")
        assert named("in") == {
            "in/a.jpg": "out/a.hpcm",
            "in/a.png": "out/a.png.hpcm",
            "in/b.png": "out/b.hpcm",
        }

    def test_a_newcomer_does_not_take_an_existing_name(self) -> None:
        """a.png became a.hpcm when it was alone; a.jpg, which comes first by name, was added later."""
        make("in/a.png", "out/a.hpcm")
        time.sleep(0.05)
        make("in/a.jpg")
        names = {"in/a.jpg": "out/a.jpg.hpcm", "in/a.png": "out/a.hpcm"}
        assert named("in") == names
        make("out/a.jpg.hpcm")
        assert named("in") == names
        Path("in/a.png").unlink()
        assert named("in") == {"in/a.jpg": "out/a.jpg.hpcm"}

    def test_an_interrupted_run_goes_on_with_the_same_names(self) -> None:
        make("in/a.jpg", "in/a.png")
        time.sleep(0.05)
        make("out/a.hpcm")
        assert named("in") == {"in/a.jpg": "out/a.hpcm", "in/a.png": "out/a.png.hpcm"}

    def test_a_preserved_time_says_whose_the_name_is(self) -> None:
        make("in/a.jpg", "in/a.png", "out/a.hpcm")
        os.utime("in/a.png", ns=(10**18, 10**18))
        os.utime("out/a.hpcm", ns=(10**18, 10**18))
        assert named("in")["in/a.png"] == "out/a.hpcm"

    def test_names_that_differ_in_case_only(self) -> None:
        make("in/A.JPG", "in/a.png")
        assert named("in") == {"in/A.JPG": "out/A.hpcm", "in/a.png": "out/a.png.hpcm"}

    def test_two_files_of_one_name_from_two_folders(self) -> None:
        make("x/a.png", "y/a.png", "y/b.png")
        found = name_outputs(find(["x", "y"], (".png",)).sources, Path("out"), ".hpcm")
        errors = [str(each) for each in found.values() if isinstance(each, HpcmrefError)]
        names = f"{Path('x/a.png')} and {Path('y/a.png')}"
        assert errors == [f"{names} have the same name, and would both be written to out"]
        assert len(found) == 3

    def test_an_output_that_is_an_input(self) -> None:
        make("in/a.png")
        found = name_outputs(find(["in"], (".png",)).sources, Path("in"), ".png")
        assert str(next(iter(found.values()))) == "in/a.png is an input; name another output with -o"


def test_a_folder_with_subfolders_there_and_back(folder: Path) -> None:
    """Two files of one name, a file that is no image, and a subfolder: one error stops nothing, names come back."""
    Path("in/deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "a.jpg", "b.jfif", "c.pbm", "deep/d.png")):
        image = Image.linear_gradient("L").resize((40 + number, 30))
        image.convert("1" if name.endswith("pbm") else "L").save(f"in/{name}", "JPEG" if name == "b.jfif" else None)
    Path("in/bad.png").write_text("no image")
    Path("in/notes.txt").write_text("notes")
    encoded = call("encode", "in", "-o", "out")
    assert encoded.exit_code == 1
    errors = encoded.stderr.splitlines()
    assert len([line for line in errors if "bad.png" in line]) == 1
    assert errors[-1] == "hpcmref: skipped in folders: 1 with other suffixes (.txt)"
    assert encoded.stdout.splitlines()[-1].startswith("5 files, ")
    assert encoded.stdout.endswith(" s, 1 failed\n")
    tree = sorted(str(path.relative_to("out")) for path in Path("out").rglob("*.hpcm"))
    assert tree == ["a.hpcm", "a.png.hpcm", "b.hpcm", "c.hpcm", "deep/d.hpcm"]
    decoded = call("decode", "out", "-o", "back", "--format", "bmp")
    assert decoded.exit_code == 0, decoded.output
    assert ":1)" not in decoded.stdout.splitlines()[-1]  # pictures are larger than files
    found = {str(path.relative_to("back")): Image.open(path).width for path in Path("back").rglob("*.bmp")}
    assert found == {"a.bmp": 41, "a.png.bmp": 40, "b.bmp": 42, "c.bmp": 43, "deep/d.bmp": 44}
    before = {path: path.stat().st_mtime_ns for path in [*Path("out").rglob("*"), *Path("back").rglob("*")]}
    assert call("encode", "in", "-o", "out", "--resume").stdout.endswith("5 kept, 1 failed\n")
    assert call("decode", "out", "-o", "back", "--format", "bmp", "--resume").stdout.endswith("5 kept\n")
    assert {path: path.stat().st_mtime_ns for path in before} == before


@posix
def test_a_long_name_stops_no_other_file(folder: Path) -> None:
    """The names of outputs are longer: those that are only tried for one file, and the one of the other."""
    Path("in").mkdir()
    fits, too_long = "y" * 248 + ".png", "z" * 251 + ".png"
    for name in ("a.png", fits, too_long):
        Image.new("L", (5, 4)).save(f"in/{name}")
    arguments = ["encode", "in", "-o", "out", "--lossless"]
    for options, summary in (([], "1 failed"), (["--resume"], "2 kept, 1 failed"), (["--force"], "1 failed")):
        result = call(*arguments, *options)
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1
        assert result.stderr.endswith(f"{too_long.replace('.png', '.hpcm')}: File name too long\n")
        assert result.stdout.endswith(f"{summary}\n")
        assert sorted(os.listdir("out")) == ["a.hpcm", fits.replace(".png", ".hpcm")]
    result = call(*arguments, "--resume", "--dry-run")
    assert result.exit_code == 1
    assert result.stdout.count("(kept)") == 2


def test_a_folder_that_cannot_be_seen_stops_no_other_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exists = Path.exists

    def without_permission(path: Path) -> bool:
        if str(path).startswith(str(Path("out/sub"))):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return exists(path)

    Path("in/sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.new("L", (5, 4)).save(f"in/{name}")
    monkeypatch.setattr(Path, "exists", without_permission)
    result = call("encode", "in", "-o", "out", "--lossless")
    assert result.exit_code == 1
    assert result.stderr == "hpcmref: in/sub/b.png: cannot write out/sub/b.hpcm: Permission denied\n"
    assert os.listdir("out") == ["a.hpcm"]


def test_a_dry_run_finds_what_would_fail(folder: Path) -> None:
    Image.new("L", (5, 4)).save("a.png")
    for code, *arguments in (
        (1, "encode", "nowhere.png"),
        (1, "decode", "nowhere.hpcm"),
        (1, "decode", "a.hpcm", "-o", "a.xyz"),
        (2, "decode", "a.hpcm", "-o", "b.png", "--output-quality", "5"),
        (2, "encode", "a.png", "-o", "b.hpcm", "--max-seconds", "5"),
        (2, "encode", "a.png", "-o", "b.hpcm", "--metric", "foo"),
        (2, "encode", "a.png", "-o", "b.hpcm", "--lossless", "--effort", "3"),
        (None, "encode", "a.png", "-o", "b.hpcm", "-m", "nowhere"),
        (None, "decode", "a.hpcm", "-o", "b.png", "-m", "nowhere"),
    ):
        if arguments[1] == "a.hpcm":
            call("encode", "a.png", "--lossless")
        real, dry = call(*map(str, arguments)), call(*map(str, arguments), "--dry-run")
        assert real.exit_code == dry.exit_code != 0, arguments
        assert code in (None, dry.exit_code), arguments
        assert real.stderr == dry.stderr or "nowhere.hpcm" in arguments, arguments


def test_dry_run_writes_nothing(folder: Path) -> None:
    make("in/x/a.png", "in/b.png", "out/b.hpcm")
    result = call("encode", "in", "-o", "out", "--dry-run")
    assert (result.exit_code, result.stdout) == (1, "in/x/a.png -> out/x/a.hpcm\n")
    assert result.stderr == "hpcmref: in/b.png: out/b.hpcm exists already (--force replaces it)\n"
    assert call("encode", "in", "-o", "out", "--dry-run", "--force").stdout == (
        "in/b.png -> out/b.hpcm (replaced)\nin/x/a.png -> out/x/a.hpcm\n"
    )
    assert not Path("out/x").exists()
