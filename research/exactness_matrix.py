"""Does every configuration of the machine decode the same latents? `python -m research.exactness_matrix FOLDER`.

One process encodes the images of a folder and a set of small pictures of unusual sizes, the smallest first. Then other
processes, each with a different configuration (instruction sets, threads, kernels, precision modes, batches, a GPU),
decode all files and encode all pictures, in two orders. Every decoded y_hat must have the same bits, every file that
such a process writes must decode in the first process, and no process may change its model.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from hpcmref.codec import Codec, load
from hpcmref.errors import HpcmrefError
from hpcmref.format.container import Container, parse
from hpcmref.latents import LatentCodec
from hpcmref.model.hpcm import STRIDE

Latents = tuple[int, int]
"""The CRC-32 of an image's symbols, and that of the bits of its y_hat (float32, with positive zeros)."""


@dataclass(frozen=True)
class Configuration:
    """A configuration: environment variables of a process, and a mode of `MODES` that it enters."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    mode: str = "plain"


def _one(*names: str, **environment: str) -> Configuration:
    return Configuration(" ".join((*names, *(f"{name}={value}" for name, value in environment.items()))), environment)


CONFIGURATIONS = (
    Configuration("a fresh process"),
    *(_one(ATEN_CPU_CAPABILITY=value) for value in ("default", "avx2", "avx512")),
    *(_one(ONEDNN_MAX_CPU_ISA=value) for value in ("SSE41", "AVX2", "AVX512_CORE", "ALL")),
    *(_one(MKL_ENABLE_INSTRUCTIONS=value) for value in ("SSE4_2", "AVX2")),
    _one(MKL_CBWR="COMPATIBLE"),
    *(_one(OMP_NUM_THREADS=value) for value in ("1", "2")),
    _one(ONEDNN_DEFAULT_FPMATH_MODE="BF16"),
    _one(ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41", MKL_CBWR="COMPATIBLE", OMP_NUM_THREADS="1"),
    Configuration("torch.backends.mkldnn.enabled = False", mode="without oneDNN"),
    Configuration("contiguous, not channels last", mode="contiguous"),
    Configuration("inside torch.autocast(bfloat16)", mode="autocast"),
    Configuration('set_float32_matmul_precision("medium")', mode="medium precision"),
    Configuration("denormals flushed to zero", mode="no denormals"),
    Configuration("all images of a size in one batch", mode="batch"),
    Configuration("in one batch, without oneDNN", mode="batch without oneDNN"),
    Configuration("the fallback kernels of a PyTorch without oneDNN", mode="fallback kernels"),
)

ON_A_GPU = Configuration("CUDA", mode="cuda")


@contextlib.contextmanager
def _medium_precision(codec: Codec) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _no_denormals(codec: Codec) -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def _without_onednn(codec: Codec) -> Iterator[None]:
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True  # type: ignore[assignment]


@contextlib.contextmanager
def _fallback_kernels(codec: Codec) -> Iterator[None]:
    """Behave as a PyTorch that was built without oneDNN."""
    available = torch.backends.mkldnn.is_available
    torch.backends.mkldnn.is_available = lambda: False
    try:
        with _without_onednn(codec):
            yield
    finally:
        torch.backends.mkldnn.is_available = available


@contextlib.contextmanager
def _contiguous(codec: Codec) -> Iterator[None]:
    codec.latents.entropy.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    try:
        yield
    finally:
        codec.latents.entropy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _nothing(codec: Codec) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


MODES: dict[str, Callable[[Codec], AbstractContextManager[Any]]] = {
    "plain": _nothing,
    "cuda": _nothing,
    "batch": _nothing,
    "contiguous": _contiguous,
    "without oneDNN": _without_onednn,
    "batch without oneDNN": _without_onednn,
    "fallback kernels": _fallback_kernels,
    "autocast": lambda codec: torch.autocast(codec.device.type, torch.bfloat16),
    "medium precision": _medium_precision,
    "no denormals": _no_denormals,
}
"""Contexts in which files are decoded. "batch..." decode all files of a size at once, and "cuda" uses a GPU."""


SIZES = ((1, 1), (7, 33), (64, 64), (65, 63), (64, 200), (300, 200))
"""Width and height of the small pictures. They are coded in this order and then in the opposite one."""


def small_pictures() -> list[Image.Image]:
    """Return one picture of each of SIZES, with waves and noise in colour."""
    random = np.random.RandomState(0)
    pictures = []
    for width, height in SIZES:
        y, x = np.mgrid[:height, :width]
        planes = np.dstack([128 + 90 * np.sin(x / 9), 128 + 90 * np.cos(y / 7), (3 * x + 2 * y) % 256])
        noisy = planes + random.uniform(-20, 20, planes.shape)
        pictures.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    return pictures


def decode(codec: Codec, files: Sequence[bytes], mode: str = "plain") -> list[Latents]:
    """Decode files of one model in a mode of MODES, and return their latents. Raises an HpcmrefError on a mismatch."""
    groups = [[index] for index in range(len(files))]
    if mode.startswith("batch"):
        shapes = [_shape(parse(file)) for file in files]
        groups = [[index for index, each in enumerate(shapes) if each == shape] for shape in sorted(set(shapes))]
    found: dict[int, Latents] = {}
    with MODES[mode](codec):
        for group in groups:
            latents = latents_of(codec.latents, [files[index] for index in group])
            found |= dict(zip(group, latents, strict=True))
    return [found[index] for index in range(len(files))]


def latents_of(codec: LatentCodec, files: Sequence[bytes]) -> list[Latents]:
    """Decode files of one size and quality in one batch."""
    parsed = [parse(file) for file in files]
    quality, rows, columns = _shape(parsed[0])
    checksums = [file.learned.checksums for file in parsed if file.learned is not None]
    y_hat = codec.decompress([file.payload for file in parsed], checksums, (rows, columns), quality) + 0.0  # no -0
    codec.unchanged.check_all()
    hashes = [zlib.crc32(image.cpu().contiguous().numpy().tobytes()) for image in y_hat]
    return list(zip((each.all for each in checksums), hashes, strict=True))


def _shape(file: Container) -> tuple[int, int, int]:
    """Return the quality of a file, and the rows and columns of its z."""
    assert file.learned is not None
    return file.learned.quality, -(-file.height // STRIDE), -(-file.width // STRIDE)


def encode(codec: Codec, images: Sequence[Image.Image], quality: int | None, mode: str = "plain") -> list[bytes]:
    """Encode images in a mode of MODES. Raises ModelChangedError if the model changes."""
    files = []
    with MODES[mode](codec):
        for image in images:
            files.append(codec.encode(image, quality))
            codec.latents.unchanged.check_all()
    return files


@dataclass(frozen=True)
class Answer:
    """The result of a process: the latents of the files that it was given, and its own files of the same pictures."""

    latents: list[Latents]
    files: list[bytes]


def run(
    configuration: Configuration, files: Sequence[Path], model: str | None, images: Sequence[Path] = ()
) -> Answer | str:
    """Decode files and encode images in a new process. Return its result, or its last line of output if it fails."""
    request = {
        "files": [str(file) for file in files],
        "images": [str(image) for image in images],
        "mode": configuration.mode,
        "model": model,
    }
    process = subprocess.run(
        [sys.executable, "-c", "from research.exactness_matrix import work; work()"],
        input=json.dumps(request),
        cwd=Path(__file__).parent.parent,
        env=os.environ | configuration.environment,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        return (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    answer = json.loads(process.stdout)
    latents = [(symbols, y_hat) for symbols, y_hat in answer["latents"]]
    return Answer(latents, [base64.b64decode(file) for file in answer["files"]])


def work() -> None:
    """The main function of the process of `run`: read a request from standard input, and print the result."""
    request = json.load(sys.stdin)
    mode = request["mode"]
    codec = load(request["model"], "cuda" if mode == "cuda" else "cpu")
    files = [Path(file).read_bytes() for file in request["files"]]
    images = [Image.open(image) for image in request["images"]]
    encoded = encode(codec, images, None, mode)
    latents = decode(codec, files, mode)
    backwards = encode(codec, images[::-1], None, mode)[::-1]
    latents_backwards = decode(codec, files[::-1], mode)[::-1]
    if latents != latents_backwards:
        sys.exit("the order of the files changes their latents")
    answer = [base64.b64encode(file).decode() for file in (*encoded, *backwards)]
    print(json.dumps({"latents": latents, "files": answer}))


def main(
    folder: Annotated[Path, typer.Argument(help="Images to encode; those of one size are also decoded in a batch.")],
    quality: Annotated[int | None, typer.Option(help="Of all files; by default the model's default.")] = None,
    model: Annotated[str | None, typer.Option(help="A registry name or a .safetensors file.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first images.")] = None,
    crop: Annotated[int | None, typer.Option(help="Use only the middle of each image, so many pixels a side.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Configurations whose names contain this. Repeatable.")] = None,
) -> None:
    """Decode the images of a folder in every configuration. The exit code is 1 if any image differs."""
    images = [*small_pictures(), *images_of(folder, limit, crop)]
    console = Console()
    codec = load(model, "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        files, pictures = [], []
        for number, image in enumerate(images):
            files.append(Path(temporary, f"{number}.hpcm"))
            files[-1].write_bytes(codec.encode(image, quality))
            if number < len(SIZES):
                pictures.append(Path(temporary, f"{number}.png"))
                image.save(pictures[-1])
        expected = decode(codec, [file.read_bytes() for file in files])
        passed = True
        table = Table("configuration", "files equal", "its files decode", "seconds", title=f"{codec.name}, {machine()}")
        for configuration in (*CONFIGURATIONS, *([ON_A_GPU] if torch.cuda.is_available() else [])):
            if not any(text in configuration.name for text in only or [""]):
                continue
            begun = time.monotonic()
            found = run(configuration, files, model, pictures)
            if isinstance(found, str):
                equal, readable, passed = f"refused: {found}", "", False
            else:
                same = sum(map(lambda one, other: one == other, found.latents, expected))
                good = sum(_decodes(codec, file) for file in found.files)
                equal, readable = f"{same} / {len(expected)}", f"{good} / {len(found.files)}"
                passed &= same == len(expected) and good == len(found.files)
            console.print(f"{configuration.name}: {equal}, {readable}", style="dim", soft_wrap=True)
            table.add_row(configuration.name, equal, readable, f"{time.monotonic() - begun:.1f}")
    console.print(table)
    if not passed:
        raise typer.Exit(1)


def _decodes(codec: Codec, file: bytes) -> bool:
    try:
        codec.verify(file)
    except HpcmrefError:
        return False
    return True


def images_of(folder: Path, limit: int | None = None, crop: int | None = None) -> list[Image.Image]:
    """Return the first images of a folder in RGB, each cropped to at most `crop` pixels a side in the middle."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    images = [Image.open(path).convert("RGB") for path in paths[:limit]]
    if not images:
        raise typer.BadParameter(f"there is no image in {folder}")
    return images if crop is None else [_middle(image, crop) for image in images]


def _middle(image: Image.Image, side: int) -> Image.Image:
    left, top = max(0, (image.width - side) // 2), max(0, (image.height - side) // 2)
    return image.crop((left, top, min(image.width, left + side), min(image.height, top + side)))


def machine() -> str:
    """Describe the machine for the title of a table."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    try:
        typer.run(main)
    except HpcmrefError as error:
        sys.exit(f"selftest: {error}")
