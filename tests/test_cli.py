"""Does the command line do what its help says, and fail in one line when it cannot?

Planning, failures and messages run in this process on a codec that stores PNGs; what a user's shell sees (start-up
time, streams, exit codes, files left behind) runs as real processes with the shipped model.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import types
import warnings
import zlib
from pathlib import Path

import containers
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner, Result

from hpcmref import DEFAULT_QUALITY
from hpcmref.cli import app
from hpcmref.cli.failures import OUT_OF_GPU_MEMORY, describe
from hpcmref.errors import CheckpointError, ImageError, ModelMismatchError
from hpcmref.format.container import Container, parse, write

FINGERPRINT = b"fake"


class FakeCodec:
    """Stores a PNG in a container; the text a colour stands for chooses how it fails."""

    name = "fake"

    def encode(self, image: Image.Image, quality: int | None = None, **_: object) -> bytes:
        failure = FAILURES.get(image.convert("RGB").getpixel((0, 0)))
        if isinstance(failure, Warning):
            warnings.warn(failure, stacklevel=2)
        elif failure is not None:
            raise failure
        png = io.BytesIO()
        image.save(png, "PNG")
        return write(
            containers.container(
                arithmetic=1,
                fingerprint=FINGERPRINT,
                quality=DEFAULT_QUALITY if quality is None else quality,
                width=image.width,
                height=image.height,
                grey=image.mode == "L",
                latent_checksum=0,
                payload=png.getvalue(),
            )
        )

    def decode(self, file: Container, upto: int = 3, max_pixels: int = 2**27) -> Image.Image:
        if file.width * file.height > max_pixels:
            raise ImageError(f"more than {max_pixels} pixels")
        image = Image.open(io.BytesIO(file.payload))
        image.load()
        return image


GOOD = (9, 9, 9)
WARNS, CRASHES, NO_MEMORY, NO_GPU_MEMORY, INTERRUPTED, BAD_MODEL = ((value, 0, 0) for value in range(6))
FAILURES: dict[tuple[int, int, int], BaseException] = {
    WARNS: UserWarning("the palette\n was expanded"),
    CRASHES: ZeroDivisionError("division\nby zero"),
    NO_MEMORY: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    NO_GPU_MEMORY: type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory.\nTried to allocate 2 GiB"),
    INTERRUPTED: KeyboardInterrupt(),
    BAD_MODEL: CheckpointError("the weights are damaged"),
}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Puts FakeCodec in the place of the real one; the list records what was loaded."""
    loaded: list[object] = []

    def load(model: str | None = None, device: str = "auto") -> FakeCodec:
        loaded.append((model, device))
        return FakeCodec()

    def codec_for(file: Container, device: str = "auto", model: str | None = None) -> FakeCodec:
        fingerprint = containers.learned_of(file).fingerprint
        loaded.append(fingerprint)
        if fingerprint != FINGERPRINT:
            raise ModelMismatchError(f"written by {fingerprint.hex()}, and {FINGERPRINT.hex()} is here")
        return FakeCodec()

    fake = types.ModuleType("hpcmref.codec")
    fake.__dict__.update(load=load, codec_for=codec_for)
    monkeypatch.setitem(sys.modules, "hpcmref.codec", fake)
    return loaded


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(path: str, colour: tuple[int, int, int] = GOOD, size: tuple[int, int] = (8, 4)) -> str:
    """An image file that is larger than what FakeCodec makes of it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = PngInfo()
    text.add_text("Comment", "x" * 200)
    Image.new("RGB", size, colour).save(path, pnginfo=text)
    return path


def call(*arguments: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


# --- which output belongs to which input ---------------------------------------------------------------------------


@pytest.mark.usefixtures("folder", "loads")
class TestPlan:
    def test_one_file_to_one_file(self) -> None:
        assert call("encode", picture("a.png"), "-o", "new/b.xyz").exit_code == 0
        assert files() == ["a.png", "new/b.xyz"]

    def test_by_default_next_to_the_input(self) -> None:
        assert call("encode", picture("in/a.b.png")).exit_code == 0
        Path("in/a.b.png").unlink()
        assert call("decode", "in/a.b.hpcm").exit_code == 0
        assert files() == ["in/a.b.hpcm", "in/a.b.png"]

    @pytest.mark.parametrize("output", ["there", "new/", "new/deep/"])
    def test_one_file_to_a_folder(self, output: str) -> None:
        Path("there").mkdir()
        assert call("encode", picture("in/a.png"), "-o", output).exit_code == 0
        assert files() == sorted(["in/a.png", str(Path(output, "a.hpcm"))])

    def test_several_and_folders(self) -> None:
        picture("in/b.png"), picture("in/a.JPG"), picture("in/._c.png"), picture("in/deeper/d.png")
        Path("in/notes.txt").write_text("no image")
        result = call("encode", picture("z.png"), "in", "-o", "out")
        assert result.exit_code == 0
        assert [line.split(" -> ")[1].split(":")[0] for line in result.stdout.splitlines()[:-1]] == [
            "out/z.hpcm",
            "out/a.hpcm",
            "out/b.hpcm",
            "out/deeper/d.hpcm",
        ]
        assert result.stderr == "hpcmref: skipped in folders: 1 hidden, 1 with other suffixes (.txt)\n"
        assert call("decode", "out", "-o", "back").exit_code == 0
        assert [name for name in files() if name.startswith("back")] == [
            "back/a.png",
            "back/b.png",
            "back/deeper/d.png",
            "back/z.png",
        ]

    @pytest.mark.parametrize("arguments", [["a.png", "-o", "a.png"], ["./a.png", "-o", "b/../a.png", "--force"]])
    def test_an_input_is_never_overwritten(self, arguments: list[str]) -> None:
        picture("a.png"), picture("b/c.png")
        result = call("encode", *arguments)
        assert result.exit_code == 1
        assert "is an input" in result.stderr
        Image.open("a.png").load()

    def test_existing_outputs_are_kept(self, loads: list[object]) -> None:
        picture("a.png")
        Path("a.hpcm").write_text("precious")
        result = call("encode", "a.png")
        assert result.exit_code == 1
        assert result.stderr == "hpcmref: a.png: a.hpcm exists already (--force replaces it)\n"
        assert Path("a.hpcm").read_text() == "precious"
        assert loads == []
        assert call("encode", "a.png", "--force").exit_code == 0
        assert parse(Path("a.hpcm").read_bytes()).width == 8

    def test_a_folder_without_images(self) -> None:
        Path("in").mkdir()
        result = call("encode", "in", "-o", "out")
        assert result.exit_code == 1
        assert result.stderr.startswith("hpcmref: in: no files here end with .avif, .bmp")
        assert result.stderr.count("\n") == 1

    def test_a_device_is_written_to_and_not_replaced(self) -> None:
        assert call("encode", picture("a.png"), "-o", os.devnull).exit_code == 0
        assert not Path(os.devnull).is_file()

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["a.png", "b.png"],
            ["a.png", "b.png", "-o", "-"],
            ["a.png", "b.png", "-o", "in/a.png"],
            ["in"],
            ["-", "a.png", "-o", "out"],
            ["-", "-o", "out/"],
            ["a.png", "-q", "64"],
            ["a.png", "-q", "-1"],
            ["a.png", "--device", "tpu"],
            ["a.png", "--unknown"],
            ["a.png", "--jobs", "0"],
            ["a.png", "--jobs", "many"],
            ["a.png", "--threads", "0"],
            ["a.png", "--bpp", "nan"],
            ["a.png", "--bpp", "-1"],
            ["a.png", "--psnr", "inf"],
            ["a.png", "--size", "0"],
            ["a.png", "--size", ""],
            ["a.png", "-o", ""],
            [""],
            ["a.png", "-o", "-", "--json"],
            ["a.png", "--force", "--resume"],
        ],
    )
    def test_wrong_usage_exits_2(self, arguments: list[str]) -> None:
        picture("in/a.png")
        result = call("encode", *arguments)
        assert result.exit_code == 2
        assert "Usage:" in result.stderr
        assert files() == ["in/a.png"]


# --- what happens when one of them fails ---------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
class TestRun:
    def test_a_failure_does_not_stop_the_rest(self, loads: list[object]) -> None:
        Path("b.png").write_text("no image")
        picture("a.png"), picture("c.png", CRASHES), picture("d.png")
        result = call("encode", "a.png", "b.png", "c.png", "missing.png", "d.png", "-o", "out")
        assert result.exit_code == 1
        assert files() == ["a.png", "b.png", "c.png", "d.png", "out/a.hpcm", "out/d.hpcm"]
        lines = result.stderr.splitlines()
        assert len(lines) == 3
        assert lines[0].startswith("hpcmref: b.png is not an image")
        assert lines[1].startswith("hpcmref: c.png: unexpected ZeroDivisionError: division by zero")
        assert lines[2] == "hpcmref: cannot read missing.png: No such file or directory"
        assert len(loads) == 1

    def test_one_codec_a_fingerprint(self, loads: list[object]) -> None:
        for name in "abc":
            picture(f"{name}.png")
        assert call("encode", "a.png", "b.png", "c.png", "-o", "out").exit_code == 0
        loads.clear()
        assert call("decode", "out", "-o", "back").exit_code == 0
        assert loads == [FINGERPRINT]

    @pytest.mark.parametrize(
        ("colour", "sentence"),
        [
            (NO_MEMORY, "hpcmref: a.png: not enough memory; try a smaller image\n"),
            (NO_GPU_MEMORY, "hpcmref: a.png: not enough memory on the GPU; try --device cpu\n"),
        ],
    )
    def test_out_of_memory(self, loads: list[object], colour: tuple[int, int, int], sentence: str) -> None:
        result = call("encode", picture("a.png", colour))
        assert (result.exit_code, result.stderr) == (1, sentence)

    @pytest.mark.parametrize(
        "text",
        [
            "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        ],
    )
    def test_a_full_gpu_by_any_name(self, text: str) -> None:
        assert describe(RuntimeError(text)) == OUT_OF_GPU_MEMORY

    def test_a_bad_model_ends_the_run(self, loads: list[object]) -> None:
        result = call("encode", picture("a.png"), picture("b.png"), "-o", "out", "-m", "nowhere", "--device", "cpu")
        assert result.stderr.startswith("hpcmref: There is no model 'nowhere': neither a file nor one of ")
        assert (result.exit_code, result.stderr.count("\n"), loads) == (2, 1, [])

    def test_an_interrupt_ends_the_run(self, loads: list[object]) -> None:
        result = call("encode", picture("a.png", INTERRUPTED), picture("b.png"), "-o", "out")
        assert (result.exit_code, result.stderr) == (130, "hpcmref: interrupted after 0 of 2 files\n")
        assert files() == ["a.png", "b.png"]

    def test_a_model_that_is_not_here(self, loads: list[object]) -> None:
        call("encode", picture("a.png"))
        container = parse(Path("a.hpcm").read_bytes())
        Path("b.hpcm").write_bytes(write(containers.changed(container, fingerprint=b"gone")))
        result = call("decode", "a.hpcm", "b.hpcm", "-o", "out")
        assert (result.exit_code, result.stderr) == (1, "hpcmref: b.hpcm: written by 676f6e65, and 66616b65 is here\n")
        assert Path("out/a.png").exists()

    def test_a_folder_is_searched_for_both_suffixes(self, loads: list[object]) -> None:
        call("encode", picture("a.png"), "-o", "in/a.bin")
        call("encode", "a.png", "-o", "in/b.hpcm")
        call("encode", "a.png", "-o", "in/c.dat")
        assert call("decode", "in", "-o", "out").exit_code == 0
        assert files() == ["a.png", "in/a.bin", "in/b.hpcm", "in/c.dat", "out/a.png", "out/b.png"]
        assert "c.dat" not in call("info", "in").stdout

    def test_a_limit_of_pixels(self, loads: list[object]) -> None:
        call("encode", picture("a.png", size=(10, 10)), picture("b.png", size=(10, 11)), "-o", "out")
        result = call("decode", "out", "-o", "back", "--max-pixels", "100")
        assert (result.exit_code, result.stderr) == (1, "hpcmref: out/b.hpcm: more than 100 pixels\n")
        assert Path("back/a.png").exists()

    def test_debug_shows_the_traceback(self, loads: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HPCMREF_DEBUG", "1")
        result = call("encode", picture("a.png", CRASHES))
        assert result.exit_code == 1
        assert "Traceback" in result.stderr

    def test_warnings_are_lines(self, loads: list[object]) -> None:
        result = call("encode", picture("a.png", WARNS), picture("b.png", WARNS), "-o", "out")
        assert result.exit_code == 0
        assert result.stderr == "".join(f"hpcmref: {name}.png: the palette was expanded\n" for name in "ab")

    def test_quiet_says_nothing_but_errors(self, loads: list[object]) -> None:
        result = call("encode", picture("a.png", WARNS), picture("b.png", CRASHES), "-o", "out", "--quiet")
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1

    def test_what_is_printed(self, loads: list[object]) -> None:
        result = call("encode", picture("a.png", size=(100, 50)), "-q", "7")
        size = Path("a.hpcm").stat().st_size
        start = (
            f"a.png -> a.hpcm: {size} bytes, {8 * size / 5000:.3f} bpp, {15000 / size:.1f}:1 to raw, quality 7, "
            f"{Path('a.png').stat().st_size / size:.1f}:1 to the input file, "
        )
        assert result.stdout.startswith(start)
        assert re.fullmatch(r"\d+\.\d\d s, \d+\.\d\d MP/s\n", result.stdout.removeprefix(start))
        assert containers.learned_of(parse(Path("a.hpcm").read_bytes())).quality == 7
        assert call("decode", "a.hpcm", "-o", "b.png").stdout == "a.hpcm -> b.png: 100x50 RGB\n"

    def test_an_unknown_image_format_is_refused_before_decoding(self, loads: list[object]) -> None:
        call("encode", picture("a.png"))
        loads.clear()
        result = call("decode", "a.hpcm", "-o", "a.xyz")
        assert result.exit_code == 1
        assert result.stderr.startswith("hpcmref: a.hpcm: cannot tell the image format of a.xyz")
        assert loads == []

    def test_names_are_not_markup(self, loads: list[object]) -> None:
        assert call("encode", picture("[red]a.png")).stdout.startswith("[red]a.png -> [red]a.hpcm: ")

    def test_standard_input_and_output_are_streams(self, loads: list[object]) -> None:
        source = Path(picture("a.png")).read_bytes()
        encoded = call("encode", "-", stdin=source)
        assert encoded.exit_code == 0
        assert parse(encoded.stdout_bytes).width == 8
        assert encoded.stderr.startswith("standard input -> standard output: ")
        decoded = call("decode", "-", "-o", "-", stdin=encoded.stdout_bytes)
        assert Image.open(io.BytesIO(decoded.stdout_bytes)).format == "PNG"
        assert call("decode", "-", "-o", "b.png", stdin=encoded.stdout_bytes).exit_code == 0
        assert files() == ["a.png", "b.png"]


# --- the other commands --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder", "loads")
class TestInfo:
    def test_text(self) -> None:
        call("encode", picture("a.png"), "-q", "5")
        result = call("info", "a.hpcm")
        assert result.exit_code == 0
        for text in (
            "8x4 colour",
            "version 2",
            "coding learned",
            "exact integers",
            FINGERPRINT.hex(),
            "quality  5",
            "header",
            "payload",
        ):
            assert text in result.stdout

    def test_json(self) -> None:
        call("encode", picture("a.png"), picture("b.png"), "-o", "out")
        Path("out/c.hpcm").write_bytes(b"\x89HPC")
        result = call("info", "out", "--json")
        assert result.exit_code == 1
        assert result.stderr.startswith("hpcmref: out/c.hpcm: ")
        facts = json.loads(result.stdout)
        assert [fact["file"] for fact in facts] == ["out/a.hpcm", "out/b.hpcm"]
        assert sum(facts[0]["parts"].values()) == facts[0]["size"] == Path("out/a.hpcm").stat().st_size
        assert facts[0]["fingerprint"] == FINGERPRINT.hex()
        assert facts[0]["model"] is None


class TestCheckpoints:
    def test_list(self) -> None:
        models = json.loads(call("checkpoints", "list", "--json").stdout)
        assert [model["default"] for model in models].count(True) == 1
        table = call("checkpoints", "list").stdout
        assert len(table.splitlines()) == 1 + len(models)  # a line a model, however long, where no terminal is
        for model in models:
            assert model["fingerprint"] in table
            assert Path(model["path"]).is_file()

    def test_presets_are_those_of_the_document(self) -> None:
        printed = call("checkpoints", "presets").stdout
        document = (Path(__file__).parent.parent / "checkpoints.md").read_text()
        assert printed.startswith("preset")
        assert all(f"    {line.rstrip()}\n" in document for line in printed.splitlines())

    def test_convert_refuses_what_is_not_a_checkpoint(self, folder: Path) -> None:
        Path("official.pth.tar").write_bytes(b"no checkpoint")
        result = call("checkpoints", "convert", "official.pth.tar", "-o", "x.safetensors", "--preset", "base")
        assert result.exit_code == 1
        assert result.stderr.startswith("hpcmref: ")
        assert result.stderr.count("\n") == 1
        assert "unexpected" not in result.stderr
        assert files() == ["official.pth.tar"]

    def test_convert_needs_a_known_preset(self) -> None:
        assert call("checkpoints", "convert", "x", "-o", "y", "--preset", "huge").exit_code == 2


def test_an_unexpected_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ValueError("no\nluck")

    monkeypatch.setattr("hpcmref.checkpoints.available", broken)
    result = call("checkpoints", "list")
    assert result.exit_code == 1
    assert result.stderr == "hpcmref: unexpected ValueError: no luck (HPCMREF_DEBUG=1 shows where)\n"


# --- what a shell sees ---------------------------------------------------------------------------------------------


def python(*arguments: str, stdin: bytes = b"", stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
    # The path of this process, so that the package that is tested is the same one, installed or not.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *arguments], input=stdin, stdout=stdout, stderr=subprocess.PIPE, env=environment, timeout=120
    )


def shell(*arguments: str, stdin: bytes = b"", stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
    return python("-m", "hpcmref", *arguments, stdin=stdin, stdout=stdout)


def test_version() -> None:
    from hpcmref import __version__

    assert shell("--version").stdout.decode() == f"hpcmref {__version__}{os.linesep}"


def test_help_is_fast_and_plain() -> None:
    before = os.times()
    result = shell("--help")
    after = os.times()
    assert result.returncode == 0
    assert b"\x1b" not in result.stdout
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 2  # 0.3 s where it was measured; seconds of a core, so that a busy machine changes little


@pytest.mark.parametrize("arguments", [["--help"], ["encode", "--help"], ["info", "a.hpcm"], ["checkpoints", "list"]])
def test_torch_is_not_imported(folder: Path, arguments: list[str]) -> None:
    container = containers.container(
        arithmetic=1,
        fingerprint=FINGERPRINT,
        quality=0,
        width=1,
        height=1,
        grey=True,
        latent_checksum=0,
        payload=b"",
    )
    Path("a.hpcm").write_bytes(write(container))
    script = "import sys; from hpcmref.cli import app; app(sys.argv[1:], standalone_mode=False); print(*sys.modules)"
    result = python("-c", script, *arguments)
    assert b"hpcmref.cli" in result.stdout, result.stderr
    assert "torch" not in result.stdout.decode().split()


def test_encoding_imports_nothing_that_is_slow(folder: Path) -> None:
    """Parts of torch that it imports when they are first needed take longer than encoding does."""
    Image.new("RGB", (8, 8)).save("small.png")
    script = "import sys; from hpcmref.cli import app; app(sys.argv[1:], standalone_mode=False); print(*sys.modules)"
    result = python("-c", script, "encode", "small.png", "--quiet")
    imported = set(result.stdout.decode().split())
    assert "torch.nn" in imported, result.stderr
    slow = {"sympy", "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "compressai", "matplotlib", "scipy"}
    assert not imported & slow


def unread(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run with a standard output that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return shell(*arguments, stdout=writer)
    finally:
        os.close(writer)


def test_text_that_nobody_reads_is_no_error(folder: Path) -> None:
    picture("in/a.png"), picture("in/b.png")
    for arguments in (["--help"], ["checkpoints", "list"]):  # Rich ends the process with 1, in silence
        assert unread(*arguments).stderr == b""
    for arguments in (
        ["encode", "in", "-o", "out", "--lossless"],
        ["info", "out"],
        ["verify", "--quick", "out", "--json"],
    ):
        result = unread(*arguments)
        assert (result.returncode, result.stderr) == (0, b""), arguments
    assert files() == ["in/a.png", "in/b.png", "out/a.hpcm", "out/b.hpcm"]


def test_data_that_nobody_reads_is_an_error(folder: Path) -> None:
    result = unread("encode", picture("a.png"), "-o", "-", "--lossless")
    assert result.returncode == 1
    assert result.stderr == b"hpcmref: a.png: standard output was closed before everything was written\n"


def test_data_never_goes_to_a_terminal(folder: Path) -> None:
    pytest.importorskip("pty")
    _, terminal = os.openpty()
    result = shell("encode", picture("a.png"), "-o", "-", stdout=terminal)
    assert result.returncode == 2
    assert result.stderr.startswith(b"hpcmref: standard output is a terminal")


def test_round_trip(folder: Path) -> None:
    """The shipped model, files and streams: one file decodes to the same pixels on every path."""
    Image.linear_gradient("L").resize((70, 45)).convert("RGB").save("a.png")
    Path("broken.png").write_bytes(Path("a.png").read_bytes()[:60])
    encoded = shell("encode", "a.png", "broken.png", "-o", "out")
    assert encoded.returncode == 1
    assert encoded.stderr.startswith(b"hpcmref: ")
    assert b"broken.png" in encoded.stderr
    assert encoded.stderr.count(b"\n") == 1
    assert encoded.stdout.startswith(f"a.png -> {Path('out/a.hpcm')}: ".encode())
    streamed = shell("encode", "-", "-o", "-", "--quiet", stdin=Path("a.png").read_bytes())
    assert (streamed.returncode, streamed.stderr) == (0, b"")
    assert streamed.stdout == Path("out/a.hpcm").read_bytes()

    assert shell("decode", "out/a.hpcm", "-o", "back.png").returncode == 0
    decoded = shell("decode", "-", stdin=streamed.stdout)
    assert decoded.returncode == 0
    with Image.open("back.png") as back, Image.open(io.BytesIO(decoded.stdout)) as image, Image.open("a.png") as a:
        assert image.size == a.size
        assert image.tobytes() == back.tobytes()
    assert files() == ["a.png", "back.png", "broken.png", "out/a.hpcm"]


@pytest.mark.parametrize("damage", ["cut", "flip", "payload"])
def test_a_damaged_file_is_one_line(folder: Path, damage: str, coded: bytes) -> None:
    data = bytearray(coded)
    if damage == "cut":
        del data[-9:]
    else:
        data[-9] ^= 1
    if damage == "payload":  # with a checksum that fits, so that only the decoder can notice
        data[-4:] = zlib.crc32(data[4:-4]).to_bytes(4, "little")
    Path("a.hpcm").write_bytes(data)
    result = shell("decode", "a.hpcm", "-o", "a.png")
    assert result.returncode == 1
    assert result.stderr.startswith(b"hpcmref: a.hpcm")
    assert result.stderr.count(b"\n") == 1
    assert b"unexpected" not in result.stderr
    assert files() == ["a.hpcm"]


@pytest.fixture(scope="module")
def coded() -> bytes:
    """A small image, encoded with the shipped model."""
    from hpcmref.codec import load

    return load(device="cpu").encode(Image.linear_gradient("L").resize((70, 45)).convert("RGB"), 32)
