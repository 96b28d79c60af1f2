"""Measure the size, quality, time and memory of a codec on one image.

- The size is that of the whole file.
- Seconds are from pixels in memory to the file in memory, and back, without reading the image and writing files. Both
  ends are in host memory, so a GPU has finished when the clock stops. A codec's first encoding and decoding in a
  process is not counted. Of several repetitions, the median is used.
- Seconds of separate programs (`external`) include their start, and reading and writing their files.
- Memory is the peak of the process (on a GPU: of torch) during encoding and decoding, minus what it held before. This
is
  the working memory, without the program and the weights. It is None on systems other than Linux, and for separate
  programs.
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
    """The measurement of one image with one codec at one quality.

    size: bytes. bpp: bits per pixel. psnr: dB. ms_ssim: 0..1. memory: bytes. cvvdp: JOD. target: the bits per pixel for
    which the quality was chosen, or None. A metric is None if it was not measured, or if the image is too small for it.
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
        """The MS-SSIM in dB, or None if it was not measured."""
        return metrics.decibels(self.ms_ssim)


@dataclass(frozen=True)
class Target:
    """A size in bits per pixel at which codecs are compared. Each uses the quality whose file is nearest to it."""

    bpp: float

    def __str__(self) -> str:
        return f"{self.bpp:g} bpp"


Setting = int | Target
"""A quality, or a target size."""


@dataclass(frozen=True)
class Failure:
    """The failure of one codec at one setting, or of the whole image (codec and setting are None)."""

    image: str
    codec: str | None
    setting: str | None
    message: str

    def __str__(self) -> str:
        where = "" if self.codec is None else f" ({self.codec}, {self.setting})"
        return f"{self.image}{where}: {self.message}"


@dataclass(frozen=True)
class Task:
    """One image and what to measure on it.

    data: the bytes of the image file, so that a worker needs no access to the disk. points: codecs with their settings.
    repeat: how often times are measured. metrics: the metrics besides PSNR.
    """

    image: str
    data: bytes
    points: Sequence[tuple[Codec, Sequence[Setting]]]
    repeat: int = 1
    metrics: frozenset[str] = frozenset({"ms-ssim"})


def name_of(setting: Setting) -> str:
    """Return the text of a setting: "quality 32" or "0.5 bpp"."""
    return str(setting) if isinstance(setting, Target) else f"quality {setting}"


def measure(task: Task) -> tuple[list[Measurement], list[Failure]]:
    """Measure all codecs and settings of a task, and return the measurements and the failures.

    Raises CheckpointError and ConfigError, which concern all images.
    """
    measured: list[Measurement] = []
    failures: list[Failure] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is lost when an image is read concerns all codecs alike
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
    """Describe an error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, HpcmrefError) else f"{type(error).__name__}: {text}"


def reference(task: Task) -> tuple[Image.Image, metrics.Pixels]:
    """Return the image that every codec encodes (upright, 8-bit RGB or grey, no metadata), and its pixels (H, W, 3)."""
    file = io.BytesIO(task.data)
    file.name = task.image
    pixels, grey = images.pixels_of(images.open_image(file))
    return images.image_of(pixels, grey), pixels


def _measure(
    task: Task, codec: Codec, setting: Setting, image: Image.Image, pixels: metrics.Pixels, known: Mapping[int, float]
) -> Measurement:
    """Measure one codec at one setting. known: quality -> bits per pixel, of this image and codec so far."""
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
    """Return the result of `work`, and the median of the seconds of `repeat` calls."""
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


class PeakMemory:
    """A context that measures working memory: `with PeakMemory("cpu") as peak: ...`, then `peak.bytes`.

    bytes: the peak inside the context minus the memory before it, or None if it cannot be measured.
    """

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
                Path("/proc/self/clear_refs").write_text("5")  # resets the peak
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
    """Return freed memory to the system (glibc only). Otherwise the next call would seem to need no memory."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
