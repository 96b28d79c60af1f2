"""Where do training crops come from? Images are decoded once into one tensor, and cut, mirrored and rescaled there."""

import io
import math
import re
import tarfile
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from hpcmref.errors import ConfigError, ImageError
from hpcmref.training.config import TrainingConfig

SUFFIXES = (".avif", ".bmp", ".jpg", ".jpeg", ".png", ".ppm", ".tif", ".tiff", ".webp")
HELD_OUT = 64
"""One photograph in this many is kept for validation."""


class Tiles:
    """Images in memory: the training ones in one flat tensor, and `held_out` for validation, all (3, H, W) uint8.

    Whether a photograph is held out depends only on its name, so it is the same in every run; tiles of one photograph
    (names that differ in a first `<number>_` or a last `_<number>`) stay together.
    """

    def __init__(
        self, sources: Sequence[Path], smallest: int, limit: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """Decode all images of at least `smallest` pixels a side. Raises ConfigError when nothing is left.

        Crops are made on `device`. The pixels lie there too, unless they would take more than half of its free memory.
        """
        self.device = torch.device(device)
        self.held_out: list[Tensor] = []
        train: list[Tensor] = []
        files = _limited(_files(sources), limit)
        with ThreadPoolExecutor() as pool:
            for name, tile in pool.map(lambda file: (file[0], _decode(*file)), files):
                if min(tile.shape[1:]) >= smallest:
                    (self.held_out if _is_held_out(name) else train).append(tile)
        if not train:
            raise ConfigError(f"No image of at least {smallest} pixels a side in {', '.join(map(str, sources))}.")
        # The smallest first, so that those which are large enough for a crop are the last ones.
        train.sort(key=lambda tile: min(tile.shape[1:]))
        self._shapes = [tuple(tile.shape) for tile in train]
        self._least_sides = [min(shape[1:]) for shape in self._shapes]
        *self._offsets, total = accumulate(map(math.prod, self._shapes), initial=0)
        self._places = torch.tensor([(at, *shape[1:]) for at, shape in zip(self._offsets, self._shapes, strict=True)])
        self._pixels = torch.empty(total, dtype=torch.uint8)
        for offset in reversed(self._offsets):
            tile = train.pop()  # not kept: the tensor and the list together would need twice the memory
            self._pixels[offset : offset + tile.numel()] = tile.flatten()
        self._cut_on_gpu: Callable[[Tensor, Tensor, int, int, bool], Tensor] = _cut_on_gpu
        if self.device.type == "cuda" and total < torch.cuda.mem_get_info(self.device)[0] // 2:
            self._pixels = self._pixels.to(self.device)

    @property
    def train(self) -> list[Tensor]:
        """Views of the training images."""
        pieces = zip(self._offsets, self._shapes, strict=True)
        return [self._pixels[offset : offset + math.prod(shape)].view(shape) for offset, shape in pieces]

    def crops(
        self, count: int, side: int, generator: torch.Generator, rescale: float = 1.0, transpose: bool = False
    ) -> Tensor:
        """Random crops: (count, 3, side, side) uint8, on the device; half of them mirrored.

        Half of them are of larger parts of an image, made smaller by a factor between `rescale` and 1 (antialiased).
        transpose: rows and columns of half of them are swapped. All random numbers come from `generator`, on the CPU.
        Raises ConfigError if no image has room for a crop.
        """
        table = self._drawn(count, side, generator, rescale)
        if self.device.type != "cuda":
            return torch.stack([self._crop(part, side, transpose) for part in table.T.tolist()])
        largest = min(round(side / rescale), int(self._places[:, 1:].max()))
        pixels = self._pixels
        if not pixels.is_cuda:
            pixels, table = self._gathered(table, largest)
        pixels, table = (each.to(self.device, non_blocking=True) for each in (pixels, table))
        return self._cut_on_gpu(pixels, table, side, largest, transpose)

    def compile(self) -> None:
        """Compile the function that cuts crops on a GPU, so that it needs only a few kernels."""
        self._cut_on_gpu = torch.compile(_cut_on_gpu, dynamic=False)

    def _drawn(self, count: int, side: int, generator: torch.Generator, rescale: float) -> Tensor:
        """The parts of images of which crops are made, a column each: (6, count) int64.

        Rows: where a part begins in the flat pixels, its side, the pixels of a channel and of a row of the image, and
        whether the crop is mirrored and whether it is transposed.
        """
        first = bisect_left(self._least_sides, side)
        if first == len(self._shapes):
            raise ConfigError(f"No image has room for a crop of {side} pixels a side.")
        numbers = torch.rand(count, 6, generator=generator, dtype=torch.float64)
        which, shrink, top, left, mirrored, transposed = numbers.unbind(1)
        index = first + (which * (len(self._shapes) - first)).long()
        offset, height, width = self._places[index].unbind(1)
        size = (side / (1 - (1 - rescale) * (2 * shrink - 1).clamp_(min=0))).round_().long()
        size = size.minimum(height).minimum(width)
        corner = (top * (height - size + 1)).long() * width + (left * (width - size + 1)).long()
        return torch.stack((offset + corner, size, height * width, width, mirrored < 0.5, transposed < 0.5))

    def _part(self, start: int, size: int, plane: int, width: int) -> Tensor:
        """A square part of an image (3, size, size), as a view. The arguments are the first four rows of `_drawn`."""
        return self._pixels.as_strided((3, size, size), (plane, width, 1), start)

    def _crop(self, drawn: Sequence[int], side: int, transpose: bool) -> Tensor:
        """One crop (3, side, side) uint8. drawn: its column of `_drawn`."""
        *place, mirrored, transposed = drawn
        crop = self._part(*place)
        if (size := crop.shape[1]) != side:
            resampling = _resampling(torch.tensor([size]), side, size)[0]
            crop = _to_bytes_(resampling @ (crop.float() @ resampling.T))
        if mirrored:
            crop = crop.flip(2)
        return crop.mT if transposed and transpose else crop

    def _gathered(self, table: Tensor, largest: int) -> tuple[Tensor, Tensor]:
        """Flat pixels of the parts alone, in a tensor whose size follows from `largest`, and a table for them."""
        room = 3 * largest**2
        pixels = self._pixels.new_empty(table.shape[1] * room)
        for index, (start, size, plane, width) in enumerate(table[:4].T.tolist()):
            part = pixels[index * room :][: 3 * size**2].view(3, size, size)
            part.copy_(self._part(start, size, plane, width))
        size = table[1]
        return pixels, torch.stack((room * torch.arange(len(size)), size, size**2, size, *table[4:]))


def tiles_of(config: TrainingConfig, device: torch.device | str) -> Tiles:
    """The images of a run: all that have room for its smallest crops. Raises ConfigError as `Tiles` does."""
    tiles = Tiles(config.data, min(phase.crop for phase in config.phases), config.limit, device)
    if config.compile:
        tiles.compile()
    return tiles


def _cut_on_gpu(pixels: Tensor, table: Tensor, side: int, largest: int, transpose: bool) -> Tensor:
    """Crops (B, 3, side, side) uint8 from the flat pixels of all images, without a loop, as `Tiles._crop` makes them.

    table: see `Tiles._drawn`. No part is wider than `largest`. What lies beyond a part repeats its last pixel, and has
    no weight.
    """
    start, size, plane, width, mirrored, transposed = table[..., None]
    inside = torch.arange(largest, device=pixels.device).minimum(size - 1)
    channels = torch.arange(3, device=pixels.device) * plane
    first = start[:, :, None] + channels[:, :, None] + (inside * width)[:, None]
    windows = pixels[first[..., None] + inside[:, None, None]]
    rows = _resampling(table[1], side, largest)
    columns = torch.where(mirrored[..., None] > 0, rows.flip(1), rows)
    crops = rows[:, None] @ (windows.float() @ columns[:, None].mT)
    if transpose:
        crops = torch.where(transposed[..., None, None] > 0, crops.mT, crops)
    return _to_bytes_(crops)


def _to_bytes_(values: Tensor) -> Tensor:
    return values.round_().clamp_(0, 255).to(torch.uint8)


def _resampling(sizes: Tensor, side: int, largest: int) -> Tensor:
    """Matrices (B, side, largest) that bring the first `sizes` (B,) of `largest` samples to `side`.

    A triangle filter, as wide as two of the new samples, so nothing aliases; equal sizes give the identity.
    """
    ratio = (sizes / side)[:, None, None]
    centres = (torch.arange(side, device=sizes.device)[:, None] + 0.5) * ratio - 0.5
    samples = torch.arange(largest, device=sizes.device)
    weights = (1 - (samples - centres).abs() / ratio).clamp_(min=0) * (samples < sizes[:, None, None])
    return weights / weights.sum(2, keepdim=True)


def _files(sources: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every image in the folders, tar files and image files."""
    for source in sources:
        if source.is_dir():
            for path in sorted(source.rglob("*")):
                hidden = any(part.startswith(".") for part in path.relative_to(source).parts)  # "._a.jpg" is no image
                if path.suffix.lower() in SUFFIXES and not hidden:
                    yield path.name, path.read_bytes()
        elif source.suffix == ".tar":
            try:
                with tarfile.open(source) as archive:
                    for member in archive:
                        if member.isfile() and member.name.lower().endswith(SUFFIXES):
                            yield Path(member.name).name, archive.extractfile(member).read()  # type: ignore[union-attr]
            except tarfile.TarError as error:
                raise ImageError(f"{source} cannot be read as a tar file: {error}.") from error
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
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name} cannot be read as an image: {error}.") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _is_held_out(name: str) -> bool:
    photograph = re.sub(r"^\d+_|(_\d+)?\.\w+$", "", name)
    return zlib.crc32(photograph.encode()) % HELD_OUT == 0
