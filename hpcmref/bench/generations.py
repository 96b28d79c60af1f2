"""Measure the loss when an image is encoded and decoded repeatedly: quality after 1, 2, 5, 10, ... generations.

Generation 1 is the original after encoding and decoding, and generation k is generation k - 1 after encoding and
decoding at the same quality. Each measured generation is compared with the original.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from hpcmref.bench import metrics
from hpcmref.bench.codecs import Codec
from hpcmref.bench.measure import Failure, Setting, Target, Task, describe, name_of, reference
from hpcmref.bench.run import checked, names_of, read_each
from hpcmref.bench.search import nearest
from hpcmref.errors import CheckpointError, ConfigError, HpcmrefError
from hpcmref.picture import images
from hpcmref.runtime.executor import execute

MARKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def marks(generations: int) -> list[int]:
    """Return the generations that are measured: those of MARKS, and the last."""
    return sorted({mark for mark in MARKS if mark < generations} | {generations})


@dataclass(frozen=True)
class Generation:
    """The measurement of one generation. bpp: bits per pixel of its file. psnr, ms_ssim_db: dB. cvvdp: JOD."""

    image: str
    codec: str
    setting: str
    quality: int
    generation: int
    bpp: float
    psnr: float
    ms_ssim_db: float | None
    ssimulacra2: float | None
    cvvdp: float | None


@dataclass
class Losses:
    """The results of a run, in the order of images, codecs, settings and generations."""

    found: list[Generation] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


@dataclass(frozen=True)
class _Work:
    """A task, and the number of generations."""

    task: Task
    generations: int


def run(
    paths: Sequence[Path],
    codecs: Sequence[Codec],
    settings: Mapping[str, Sequence[Setting]],
    generations: int,
    optional: frozenset[str],
    jobs: int = 1,
    ray: str | None = None,
    listener: Callable[[str, Sequence[Failure]], None] = lambda image, failed: None,
    threads: int | None = None,
) -> Losses:
    """Encode and decode every image `generations` times with every codec at its settings.

    settings: the settings by codec name. optional: metrics besides PSNR. jobs, ray, threads: see
    `hpcmref.runtime.executor.execute`. listener: a function that is called after each image with its name and failures.
    Raises ConfigError and CheckpointError, which concern all images. Any other error is a Failure.
    """
    losses = Losses()
    points = [(codec, settings[codec.name]) for codec in codecs]

    def note(name: str, found: Sequence[Generation], failed: Sequence[Failure]) -> None:
        losses.found += found
        losses.failures += failed
        listener(name, failed)

    def tasks() -> Iterator[_Work]:
        for name, data in read_each(paths, lambda failure: note(failure.image, [], [failure])):
            yield _Work(Task(name, data, points, metrics=optional), generations)

    for work, result in execute(_generations, tasks(), jobs, ray, threads):
        note(work.task.image, *checked(result, work.task.image))
    place = {name: index for index, name in enumerate(names_of(paths).values())}
    losses.found.sort(key=lambda each: place[each.image])
    losses.failures.sort(key=lambda each: place[each.image])
    return losses


def _generations(work: _Work) -> tuple[list[Generation], list[Failure]]:
    found: list[Generation] = []
    failures: list[Failure] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is lost when an image is read concerns all codecs alike
        image, original = reference(work.task)
        for codec, settings in work.task.points:
            for setting in settings:
                try:
                    found += _of_codec(work, codec, setting, image, original)
                except (CheckpointError, ConfigError):
                    raise
                except Exception as error:
                    failures.append(Failure(work.task.image, codec.name, name_of(setting), describe(error)))
    return found, failures


def _of_codec(
    work: _Work, codec: Codec, setting: Setting, image: Image.Image, original: metrics.Pixels
) -> list[Generation]:
    quality = nearest(codec, image, setting.bpp, {}) if isinstance(setting, Target) else setting
    found = []
    measured_at = marks(work.generations)
    for generation in range(1, work.generations + 1):
        data = codec.encode(image, quality)
        pixels, grey = images.pixels_of(codec.decode(data))
        if pixels.shape != original.shape:
            raise HpcmrefError(f"the decoded image has shape {pixels.shape}, and the original {original.shape}")
        image = images.image_of(pixels, grey)
        if generation in measured_at:
            values = metrics.measured(original, pixels, work.task.metrics)
            similarity = metrics.decibels(values.pop("ms_ssim"))
            bpp = 8 * len(data) / (image.width * image.height)
            found.append(
                Generation(
                    work.task.image, codec.name, name_of(setting), quality, generation, bpp,
                    ms_ssim_db=similarity, **values,
                )
            )  # fmt: skip
    return found


def averages(losses: Losses) -> list[tuple[str, str, list[Generation]]]:
    """Return (codec, setting, the mean of each generation), over the images on which no codec has failed."""
    failed = {each.image for each in losses.failures}
    table: dict[tuple[str, str], dict[int, list[Generation]]] = {}
    for each in losses.found:
        if each.image not in failed:
            table.setdefault((each.codec, each.setting), {}).setdefault(each.generation, []).append(each)
    return [
        (codec, setting, [_mean(codec, setting, generation, each) for generation, each in sorted(rows.items())])
        for (codec, setting), rows in table.items()
    ]


def _mean(codec: str, setting: str, generation: int, each: Sequence[Generation]) -> Generation:
    def mean(name: str) -> Any:
        values = [getattr(one, name) for one in each]
        return None if None in values else fmean(values)

    numbers = {name: mean(name) for name in ("bpp", "psnr", "ms_ssim_db", "ssimulacra2", "cvvdp")}
    return Generation(f"(mean of {len(each)})", codec, setting, each[0].quality, generation, **numbers)


def as_json(losses: Losses, title: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all results of a run as values that JSON can represent."""
    return {
        "dataset": title,
        "settings": dict(settings),
        "averages": [asdict(row) for _, _, rows in averages(losses) for row in rows],
        "generations": [asdict(each) for each in losses.found],
        "failures": [asdict(each) for each in losses.failures],
    }


def as_csv(losses: Losses, separator: str = ",") -> str:
    """Return a table of the averages (image "(mean of N)"), followed by every image."""
    file = io.StringIO()
    columns = [field.name for field in fields(Generation)]
    writer = csv.DictWriter(file, columns, delimiter=separator, lineterminator="\n")
    writer.writeheader()
    for row in (*(row for _, _, rows in averages(losses) for row in rows), *losses.found):
        cells = asdict(row).items()
        writer.writerow({key: f"{value:.4f}" if isinstance(value, float) else value for key, value in cells})
    return file.getvalue()
