"""Do other processes decode the same latents? `python -m hpcmref.exact.selftest FOLDER` tries all that a machine can.

One process encodes the images of a folder. Then one process after the other, each made to compute differently (other
instruction sets, threads, kernels, precision modes, batches, a GPU), decodes the files and hashes what it decoded: the
symbols, and the bits of y_hat.
"""

from __future__ import annotations

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
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from hpcmref.errors import HpcmrefError

if TYPE_CHECKING:
    from hpcmref.codec import Codec

Latents = tuple[int, int]
"""CRC-32 of an image's symbols, and of the bits of its y_hat (float32, with positive zeros)."""


@dataclass(frozen=True)
class Configuration:
    """A way to compute: environment variables of a process, and a mode of `MODES` that it enters."""

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
def _contiguous(codec: Codec) -> Iterator[None]:
    codec.entropy.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    try:
        yield
    finally:
        codec.entropy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _nothing(codec: Codec) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


MODES: dict[str, Callable[[Codec], AbstractContextManager[Any]]] = {
    "plain": _nothing,
    "cuda": _nothing,
    "batch": _nothing,
    "contiguous": _contiguous,
    "without oneDNN": _without_onednn,
    "batch without oneDNN": _without_onednn,
    "autocast": lambda codec: torch.autocast(codec.device.type, torch.bfloat16),
    "medium precision": _medium_precision,
    "no denormals": _no_denormals,
}
"""What surrounds decoding. Those named "batch..." decode all files of a size at once, "cuda" on a GPU."""


def decode(codec: Codec, files: Sequence[bytes], mode: str = "plain") -> list[Latents]:
    """The latents of files of one model, in a mode of MODES."""
    groups = [[index] for index in range(len(files))]
    if mode.startswith("batch"):
        shapes = [_shape(file) for file in files]
        groups = [[index for index, each in enumerate(shapes) if each == shape] for shape in sorted(set(shapes))]
    found: dict[int, Latents] = {}
    with MODES[mode](codec):
        for group in groups:
            latents, _ = y_hat_of(codec, [files[index] for index in group])
            found |= dict(zip(group, latents, strict=True))
    return [found[index] for index in range(len(files))]


def y_hat_of(codec: Codec, files: Sequence[bytes]) -> tuple[list[Latents], torch.Tensor]:
    """Decode files of one size and quality in one batch: what `decode` returns, and y_hat (B, M, h, w)."""
    from hpcmref.exact import exactly
    from hpcmref.format import container
    from hpcmref.format.rangecoder import SymbolDecoder
    from hpcmref.model.coders import SymbolReader

    quality, *size = _shape(files[0])
    config = codec.model.config
    symbols = size[0] * size[1] * (config.N + 16 * config.M)
    sources = [SymbolDecoder(container.parse(file).payload, symbols) for file in files]
    reader = SymbolReader(codec._thresholds, sources)
    with torch.inference_mode(), exactly(codec.device):
        rate = torch.full((len(files),), float(quality), device=codec.device)
        y_hat = codec.entropy(rate, (size[0], size[1]), reader) + 0.0  # -0 becomes 0
    hashes = [zlib.crc32(image.cpu().contiguous().numpy().tobytes()) for image in y_hat]
    return list(zip(reader.checksums, hashes, strict=True)), y_hat


def _shape(file: bytes) -> tuple[int, int, int]:
    """Quality, rows and columns of z."""
    from hpcmref.format import container

    header = container.parse(file)
    return header.quality, -(-header.height // 64), -(-header.width // 64)


def run(configuration: Configuration, files: Sequence[Path], model: str | None) -> list[Latents] | str:
    """The latents of files, decoded by a process of its own; or the last line of what it said when it failed."""
    request = {"files": [str(file) for file in files], "mode": configuration.mode, "model": model}
    process = subprocess.run(
        [sys.executable, "-c", "from hpcmref.exact.selftest import work; work()"],
        input=json.dumps(request),
        env=os.environ | configuration.environment,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        return (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    return [(symbols, y_hat) for symbols, y_hat in json.loads(process.stdout)]


def work() -> None:
    """What the process of `run` does: a request on stdin, latents on stdout."""
    from hpcmref.codec import load

    request = json.load(sys.stdin)
    codec = load(request["model"], "cuda" if request["mode"] == "cuda" else "cpu")
    print(json.dumps(decode(codec, [Path(file).read_bytes() for file in request["files"]], request["mode"])))


def main(
    folder: Annotated[Path, typer.Argument(help="Images to encode; those of one size are also decoded in a batch.")],
    quality: Annotated[int | None, typer.Option(help="Of all files; by default the model's default.")] = None,
    model: Annotated[str | None, typer.Option(help="A registry name or a .safetensors file.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first images.")] = None,
    crop: Annotated[int | None, typer.Option(help="Use only the middle of each image, so many pixels a side.")] = None,
) -> None:
    """Decode the images of a folder in every configuration; exit code 1 if any image differs."""
    from hpcmref.codec import load
    from hpcmref.format.container import parse

    images = images_of(folder, limit, crop)
    console = Console()
    codec = load(model, "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        files = []
        for number, image in enumerate(images):
            files.append(Path(temporary, f"{number}.bin"))
            files[-1].write_bytes(codec.encode(image, quality))
        expected = decode(codec, [file.read_bytes() for file in files])
        passed = [symbols for symbols, _ in expected] == [parse(file.read_bytes()).latent_checksum for file in files]
        table = Table("configuration of the decoder", "images equal", "seconds", title=f"{codec.name}, {machine()}")
        for configuration in (*CONFIGURATIONS, *([ON_A_GPU] if torch.cuda.is_available() else [])):
            begun = time.monotonic()
            found = run(configuration, files, model)
            if isinstance(found, str):
                equal, passed = f"refused: {found}", False
            else:
                same = sum(map(lambda one, other: one == other, found, expected))
                equal, passed = f"{same} / {len(expected)}", passed and same == len(expected)
            console.print(f"{configuration.name}: {equal}", style="dim", soft_wrap=True)
            table.add_row(configuration.name, equal, f"{time.monotonic() - begun:.1f}")
    console.print(table)
    if not passed:
        raise typer.Exit(1)


def images_of(folder: Path, limit: int | None = None, crop: int | None = None) -> list[Image.Image]:
    """The first images of a folder, RGB; of each no more than the middle, `crop` pixels a side."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    images = [Image.open(path).convert("RGB") for path in paths[:limit]]
    if not images:
        raise typer.BadParameter(f"there is no image in {folder}")
    return images if crop is None else [_middle(image, crop) for image in images]


def _middle(image: Image.Image, side: int) -> Image.Image:
    left, top = max(0, (image.width - side) // 2), max(0, (image.height - side) // 2)
    return image.crop((left, top, min(image.width, left + side), min(image.height, top + side)))


def machine() -> str:
    """What computes here, for the title of a table."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    try:
        typer.run(main)
    except HpcmrefError as error:
        sys.exit(f"selftest: {error}")
