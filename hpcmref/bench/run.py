"""Measure many images in several processes, and continue an interrupted run.

The journal of `--resume` has one JSON object in each line: a measurement and its key. The key contains everything that
the numbers depend on: the bytes of the image, the codec with its version and settings, device, quality or target,
metrics, repetitions, and whether there were other processes. So only what has changed is measured again. An incomplete
line is skipped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, TypeVar

from hpcmref.bench.codecs import Codec
from hpcmref.bench.measure import Failure, Measurement, Setting, Target, Task, describe, measure, name_of
from hpcmref.errors import CheckpointError, ConfigError, HpcmrefError
from hpcmref.runtime.executor import execute

R = TypeVar("R")


@dataclass
class Outcome:
    """The results of a run, in the order of images, codecs and qualities, even if several processes were used."""

    measurements: list[Measurement] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


Listener = Callable[[Sequence[Measurement], Sequence[Failure]], None]


def run(
    images: Sequence[Path],
    codecs: Sequence[Codec],
    settings: Mapping[str, Sequence[Setting]],
    repeat: int = 1,
    jobs: int = 1,
    ray: str | None = None,
    journal: Path | None = None,
    listener: Listener = lambda measured, failed: None,
    metrics: frozenset[str] = frozenset({"ms-ssim"}),
    threads: int | None = None,
) -> Outcome:
    """Measure every image with every codec at its settings.

    settings: the settings by codec name. repeat: how often times are measured. metrics: metrics besides PSNR.
    jobs, ray, threads: see `hpcmref.runtime.executor.execute`. journal: the file of --resume, or None.
    listener: a function that is called after each image with its measurements and failures.

    Raises ConfigError and CheckpointError, which concern all images. Any other error is a Failure.
    """
    outcome = Outcome()
    by_name = {codec.name: codec for codec in codecs}
    keys = _Keys(codecs, repeat, metrics, alone=jobs == 1 and ray is None)

    def note(measured: Sequence[Measurement], failed: Sequence[Failure]) -> None:
        outcome.measurements += measured
        outcome.failures += failed
        listener(measured, failed)

    with _Journal(journal) as known:

        def tasks() -> Iterator[Task]:
            for name, data in read_each(images, lambda failure: note([], [failure])):
                found, missing = known.split(keys, name, data, [(codec, settings[codec.name]) for codec in codecs])
                if found or not missing:
                    note(found, [])
                if missing:
                    yield Task(name, data, missing, repeat, metrics)

        with contextlib.closing(execute(measure, tasks(), jobs, ray, threads)) as results:
            for task, result in results:
                measured, failed = checked(result, task.image)
                for each in measured:
                    setting = each.quality if each.target is None else Target(each.target)
                    known.add(keys.of(task.data, by_name[each.codec], setting), each)
                note(measured, failed)
    place = {name: index for index, name in enumerate(names_of(images).values())}
    order = {codec.name: index for index, codec in enumerate(codecs)}
    outcome.measurements.sort(key=lambda each: (place[each.image], order[each.codec], each.target or 0, each.quality))
    outcome.failures.sort(key=lambda each: place[each.image])
    return outcome


def read_each(images: Sequence[Path], fail: Callable[[Failure], None]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of each image file. `fail` is called for each that cannot be read."""
    names = names_of(images)
    for path in images:
        try:
            data = path.read_bytes()
        except OSError as error:
            fail(Failure(names[path], None, None, error.strerror or describe(error)))
        else:
            yield names[path], data


def checked(result: tuple[list[R], list[Failure]] | Exception, image: str) -> tuple[list[R], list[Failure]]:
    """Return what a worker has measured of an image, and its failures. An exception becomes a failure.

    Raises ConfigError and CheckpointError, which concern all images.
    """
    if isinstance(result, CheckpointError | ConfigError):
        raise result
    return ([], [Failure(image, None, None, describe(result))]) if isinstance(result, Exception) else result


def names_of(images: Sequence[Path]) -> dict[Path, str]:
    """Return the name of each image in the results: its file name, or its path if several have the same name."""
    files = [path.name for path in images]
    return {path: path.name if files.count(path.name) == 1 else str(path) for path in images}


class _Keys:
    def __init__(self, codecs: Sequence[Codec], repeat: int, metrics: frozenset[str], alone: bool) -> None:
        self._how = f"{' '.join(sorted(metrics))} repeat {repeat} {'alone' if alone else 'among others'}"
        self._identities = {codec.name: f"{codec.identity} on {codec.device}" for codec in codecs}
        self._last: tuple[bytes, str] = (b"", "")

    def of(self, data: bytes, codec: Codec, setting: Setting) -> str:
        if self._last[0] is not data:
            self._last = data, hashlib.sha256(data).hexdigest()[:24]
        return f"{self._last[1]} {self._identities[codec.name]} {name_of(setting)} {self._how}"


class _Journal:
    """A context with the measurements of a file by key. New ones are appended at once. Without a path, it is empty."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Measurement] = {}
        self._file: IO[str] | None = None

    def __enter__(self) -> _Journal:
        if self._path is None:
            return self
        try:
            torn = False
            if self._path.exists():
                text = self._path.read_text(encoding="utf-8")
                torn = bool(text) and not text.endswith("\n")
                self._load(text)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
            if torn:
                self._file.write("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise HpcmrefError(f"cannot use {self._path} to resume from: {error}") from error
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def _load(self, text: str) -> None:
        names = {each.name for each in fields(Measurement)}
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                entry = json.loads(line)
                key = entry.pop("key")
                if set(entry) == names:
                    self._known[key] = Measurement(**entry)
        if "\n" in text and not self._known:  # not even one valid line
            raise HpcmrefError(f"{self._path} is not a file that --resume wrote")

    def split(
        self, keys: _Keys, name: str, data: bytes, points: Sequence[tuple[Codec, Sequence[Setting]]]
    ) -> tuple[list[Measurement], list[tuple[Codec, list[Setting]]]]:
        """Return the known measurements of an image, and the points that are still to be measured.

        name, data: the name and the bytes of the image. points: codecs with their settings.
        """
        found: list[Measurement] = []
        missing: list[tuple[Codec, list[Setting]]] = []
        for codec, settings in points:
            known = {each: self._known.get(keys.of(data, codec, each)) for each in settings}
            found += [replace(old, image=name, codec=codec.name) for old in known.values() if old]
            if left := [each for each, old in known.items() if old is None]:
                missing.append((codec, left))
        return found, missing

    def add(self, key: str, measurement: Measurement) -> None:
        if self._file is not None:
            # Python's JSON writes an infinite PSNR as Infinity, and reads it back
            self._file.write(json.dumps({"key": key, **asdict(measurement)}) + "\n")
            self._file.flush()
