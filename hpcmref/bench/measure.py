"""What does a codec cost, and give, on one image? Size, quality, seconds and memory, each measured the same way.

- Sizes are of whole files, as bytes in memory that could be written to disk.
- Seconds: from pixels in memory to the file in memory, and back; reading the image and writing files is not in them.
  Both ends are in host memory, so a GPU has finished when the clock stops. A codec's first encode and decode in a
  process is not counted. Of several repetitions the median counts.
- Seconds of programs outside (`external`) have their start and their reading and writing of files in them.
- Memory: the most that the process (or, on a GPU, torch) held during encode and decode, above what it held before: the
  working memory, without the program and the weights. None where the system does not tell (only Linux does) and for
  programs outside.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from hpcmref.bench import metrics
from hpcmref.bench.codecs import Codec
from hpcmref.bench.external import PROCESS
from hpcmref.bench.search import nearest
from hpcmref.errors import CheckpointError, ConfigError, HpcmrefError
from hpcmref.picture import images
from hpcmref.runtime.heap import resident

T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """One image through one codec at one quality.

    size: bytes. bpp: bits per pixel. psnr: dB. ms_ssim: 0..1. memory: bytes. cvvdp: JOD. target: the bits per pixel for
    which the quality was chosen, if it was. None is what was not measured, or cannot be: of images too small for a
    metric, for one.
    """

    image: str
    codec: str
    quality: int
    width: int
    height: int
    size: int
    bpp: float
    psnr: float
    ms_ssim: float | None
    encode_seconds: float
    decode_seconds: float
    memory: int | None
    ssimulacra2: float | None = None
    cvvdp: float | None = None
    target: float | None = None

    @property
    def ms_ssim_db(self) -> float | None:
        """MS-SSIM in dB."""
        return metrics.decibels(self.ms_ssim)


@dataclass(frozen=True)
class Target:
    """A size to compare codecs at, in bits per pixel: each uses the quality whose file comes nearest to it."""

    bpp: float

    def __str__(self) -> str:
        return f"{self.bpp:g} bpp"


Setting = int | Target
"""A quality, or a size."""


@dataclass(frozen=True)
class Failure:
    """What could not be measured: a codec at a setting, or (both None) the whole image."""

    image: str
    codec: str | None
    setting: str | None
    message: str

    def __str__(self) -> str:
        where = "" if self.codec is None else f" ({self.codec}, {self.setting})"
        return f"{self.image}{where}: {self.message}"


@dataclass(frozen=True)
class Task:
    """One image and what to measure on it. `data` is its file, so that a worker needs no access to the disk."""

    image: str
    data: bytes
    points: Sequence[tuple[Codec, Sequence[Setting]]]
    repeat: int = 1
    metrics: frozenset[str] = frozenset({"ms-ssim"})


def name_of(setting: Setting) -> str:
    """A setting in words."""
    return str(setting) if isinstance(setting, Target) else f"quality {setting}"


def measure(task: Task) -> tuple[list[Measurement], list[Failure]]:
    """All points of a task. A point that fails is reported, and the others are measured.

    Raises CheckpointError and ConfigError, which would fail every image alike.
    """
    measured: list[Measurement] = []
    failures: list[Failure] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what reading an image loses is lost before anything is compared
        try:
            image, pixels = reference(task)
        except Exception as error:
            return [], [Failure(task.image, None, None, describe(error))]
        for codec, settings in task.points:
            known: dict[int, float] = {}
            for setting in settings:
                try:
                    found = _measure(task, codec, setting, image, pixels, known)
                except (CheckpointError, ConfigError):
                    raise
                except Exception as error:
                    failures.append(Failure(task.image, codec.name, name_of(setting), describe(error)))
                else:
                    known[found.quality] = found.bpp
                    measured.append(found)
    return measured, failures


def describe(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, HpcmrefError) else f"{type(error).__name__}: {text}"


def reference(task: Task) -> tuple[Image.Image, metrics.Pixels]:
    """What every codec gets: upright 8-bit RGB or grey without metadata; and its pixels (H, W, 3)."""
    file = io.BytesIO(task.data)
    file.name = task.image
    pixels, grey = images.pixels_of(images.open_image(file))
    return images.image_of(pixels, grey), pixels


def _measure(
    task: Task, codec: Codec, setting: Setting, image: Image.Image, pixels: metrics.Pixels, known: Mapping[int, float]
) -> Measurement:
    """One point. known: quality -> bits per pixel of the same image and codec, as far as measured."""
    quality = nearest(codec, image, setting.bpp, known) if isinstance(setting, Target) else setting
    _warm_up(codec, image, quality)
    with PeakMemory(codec.device) as peak:
        data, encode_seconds = _timed(lambda: codec.encode(image, quality), task.repeat)
        decoded, decode_seconds = _timed(lambda: codec.decode(data), task.repeat)
    result, _ = images.pixels_of(decoded)
    if result.shape != pixels.shape:
        raise HpcmrefError(f"the decoded image has shape {result.shape}, and the original {pixels.shape}")
    height, width = pixels.shape[:2]
    return Measurement(
        image=task.image,
        codec=codec.name,
        quality=quality,
        width=width,
        height=height,
        size=len(data),
        bpp=8 * len(data) / (width * height),
        encode_seconds=encode_seconds,
        decode_seconds=decode_seconds,
        memory=peak.bytes,
        target=setting.bpp if isinstance(setting, Target) else None,
        **metrics.measured(pixels, result, task.metrics),
    )


_warm: set[str] = set()  # identities of the codecs that have run in this process


def _warm_up(codec: Codec, image: Image.Image, quality: int) -> None:
    key = f"{codec.identity} {codec.device}"
    if codec.device != PROCESS and key not in _warm:
        codec.decode(codec.encode(image, quality))
        _warm.add(key)


def _timed(work: Callable[[], T], repeat: int) -> tuple[T, float]:
    """What `work` returns, and the median of its seconds."""
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


class PeakMemory:
    """`with PeakMemory("cpu") as peak: ...`, then peak.bytes: the most held inside, above what was held before."""

    def __init__(self, device: str) -> None:
        self.bytes: int | None = None
        self._cuda = device == "cuda"
        self._elsewhere = device == PROCESS
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._elsewhere:
            return self
        if self._cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            _return_free_memory()
            try:
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
                self._before = resident("VmRSS")
            except OSError:
                self._before = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is None:
            return
        if self._cuda:
            import torch

            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resident("VmHWM")
        self.bytes = max(0, peak - self._before)


def _return_free_memory() -> None:
    """Have the allocator give back what it holds unused, or the next call would seem to need nothing (glibc only)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
