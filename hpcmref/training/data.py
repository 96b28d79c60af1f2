"""Where do training crops come from? Folders and tar files of images, decoded once, cropped at random."""

import io
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hpcmref.errors import ConfigError, ImageError

SUFFIXES = (".avif", ".bmp", ".jpg", ".jpeg", ".png", ".ppm", ".tif", ".tiff", ".webp")
HELD_OUT = 64
"""One photograph in this many is kept for validation."""


class Tiles:
    """Images in memory: `train` for crops, `held_out` for validation, both lists of (3, H, W) uint8.

    Which photograph is held out follows from its name alone, so that it never changes sides; tiles of one photograph
    (names that differ in a first `<number>_` or a last `_<number>`) stay together.
    """

    def __init__(self, sources: Sequence[Path], smallest: int, limit: int | None = None) -> None:
        """Decode all images of at least `smallest` pixels a side. Raises ConfigError when nothing is left."""
        self.train: list[Tensor] = []
        self.held_out: list[Tensor] = []
        files = _limited(_files(sources), limit)
        with ThreadPoolExecutor() as pool:
            for name, tile in pool.map(lambda file: (file[0], _decode(*file)), files):
                if min(tile.shape[1:]) >= smallest:
                    (self.held_out if _is_held_out(name) else self.train).append(tile)
        if not self.train:
            raise ConfigError(f"No image of at least {smallest} pixels a side in {', '.join(map(str, sources))}.")

    def crops(self, count: int, side: int, generator: torch.Generator) -> Tensor:
        """Random crops, half of them mirrored: (count, 3, side, side) uint8."""
        return torch.stack([self._crop(side, generator) for _ in range(count)])

    def _crop(self, side: int, generator: torch.Generator) -> Tensor:
        def below(limit: int) -> int:
            return int(torch.randint(limit, (), generator=generator))

        tile = self.train[below(len(self.train))]
        top, left = below(tile.shape[1] - side + 1), below(tile.shape[2] - side + 1)
        crop = tile[:, top : top + side, left : left + side]
        return crop.flip(2) if below(2) else crop


def _files(sources: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every image in the folders, tar files and image files."""
    for source in sources:
        if source.is_dir():
            for path in sorted(source.rglob("*")):
                if path.suffix.lower() in SUFFIXES:
                    yield path.name, path.read_bytes()
        elif source.suffix == ".tar":
            with tarfile.open(source) as archive:
                for member in archive:
                    if member.isfile() and member.name.lower().endswith(SUFFIXES):
                        yield Path(member.name).name, archive.extractfile(member).read()  # type: ignore[union-attr]
        elif source.is_file():
            yield source.name, source.read_bytes()
        else:
            raise ConfigError(f"{source} is neither a folder nor a file.")


def _limited(files: Iterator[tuple[str, bytes]], limit: int | None) -> Iterator[tuple[str, bytes]]:
    for index, file in enumerate(files):
        if index == limit:
            return
        yield file


def _decode(name: str, data: bytes) -> Tensor:
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"{name} cannot be read as an image: {error}.") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _is_held_out(name: str) -> bool:
    photograph = re.sub(r"^\d+_|(_\d+)?\.\w+$", "", name)
    return zlib.crc32(photograph.encode()) % HELD_OUT == 0
