"""Test whether this machine codes correctly: decode files with known results, and encode their pictures again.

    conformance/set.json    for each case the file, a hash of its latents, and the decoded picture
    conformance/*.hpcm      files of every shipped model, and a lossless one
    conformance/*.png       the pictures, decoded in float32

Latents must be equal to the last bit, and pixels within `tolerance` levels. tools/build_conformance.py makes the set.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image

from hpcmref import __version__, checkpoints, lossless
from hpcmref.checkpoints import CheckpointInfo
from hpcmref.codec import Codec, device_of, fresh
from hpcmref.errors import HpcmrefError
from hpcmref.exact import int16_matmul
from hpcmref.format import container, rangecoder
from hpcmref.format.container import Container
from hpcmref.runtime.torch_names import has_bfloat16_units

FOLDER = Path(__file__).parent / "conformance"

CODED_AGAIN = 1.0
"""How much the mean absolute error (levels of 0..255) of a picture coded here may exceed the recorded one."""


@dataclass(frozen=True)
class Case:
    """One decoding whose result is known.

    file, picture: names of files in the folder of the set.
    model: the name of the model, or None for a lossless file, whose pixels must be exact.
    upto: the last scale that is read.
    length: the number of bytes of the file that are used, to test truncated files; None for all.
    latents: the expected result of `latents_of`.
    error: the recorded mean absolute error, in levels of 0..255, of the picture after it is encoded and decoded again.
        None if it is not encoded again.
    """

    name: str
    file: str
    picture: str
    model: str | None = None
    upto: int = 3
    length: int | None = None
    latents: str | None = None
    error: float | None = None


@dataclass(frozen=True)
class ConformanceSet:
    """The cases, and the largest permitted difference of a pixel in levels of 0..255."""

    tolerance: int
    cases: tuple[Case, ...]


@dataclass
class Report:
    """The result of a self-test.

    versions, kernels: see the functions of these names. models: fingerprint of each tested model by name.
    tolerance: the permitted difference of pixels in levels of 0..255, and worst: the largest that was found.
    decoded, coded: the number of cases that passed, and of all cases, in decoding and in encoding again.
    failures: one sentence for each failure.
    """

    versions: dict[str, str]
    kernels: dict[str, str]
    models: dict[str, str] = field(default_factory=dict)
    tolerance: int = 0
    worst: int = 0
    decoded: list[int] = field(default_factory=lambda: [0, 0])
    coded: list[int] = field(default_factory=lambda: [0, 0])
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing failed, and at least one case was decoded and one encoded."""
        return not self.failures and self.decoded[1] > 0 and self.coded[1] > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary that can be written as JSON."""
        return {"passed": self.passed, **asdict(self)}


def run(device: str = "auto", folder: Path = FOLDER) -> Report:
    """Test this machine with all cases of a folder, which takes some seconds.

    Failures of the machine, a model or the set do not raise an error: they are in the report's `failures`. Raises
    ConfigError if the device does not exist.
    """
    where = device_of(device)
    report = Report(versions(), kernels(where))
    try:
        known = read_set(folder)
    except HpcmrefError as error:
        report.failures.append(str(error))
        return report
    report.tolerance = known.tolerance
    for case in known.cases:
        if case.model is None:
            _check(report, case, folder, [])
    try:
        shipped = checkpoints.shipped()
    except HpcmrefError as error:
        report.failures.append(str(error))
        return report
    for info in shipped:
        report.models[info.name] = info.fingerprint.hex()
        try:
            _check_model(report, known, folder, info, where.type)
        except HpcmrefError as error:
            report.failures.append(f"{info.name}: {error}")
    return report


def _check_model(report: Report, known: ConformanceSet, folder: Path, info: CheckpointInfo, device: str) -> None:
    """Test all cases of a model, and add the results to the report.

    Raises HpcmrefError if there are no cases, if the model cannot be loaded, or if its weights change meanwhile.
    """
    cases = [case for case in known.cases if case.model == info.name]
    if not cases:
        raise HpcmrefError("the conformance set has no file of this model")
    codecs = [fresh(info.path, each) for each in dict.fromkeys((device, "cpu"))]
    for case in cases:
        _check(report, case, folder, codecs)
    for codec in codecs:
        codec.latents.unchanged.check_all()


def read_set(folder: Path) -> ConformanceSet:
    """Read the conformance set of a folder. Raises HpcmrefError if it is missing or damaged."""
    try:
        content = json.loads((folder / "set.json").read_text(encoding="utf-8"))
        cases = tuple(Case(**case) for case in content["cases"])
        return ConformanceSet(int(content["tolerance"]), cases)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HpcmrefError(f"the conformance set of this installation is missing or damaged: {error}") from error


def container_of(case: Case, folder: Path) -> Container:
    """Read the file of a case, or its first `length` bytes. Raises HpcmrefError."""
    try:
        data = (folder / case.file).read_bytes()
    except OSError as error:
        raise HpcmrefError(f"{case.file} cannot be read: {error.strerror}") from error
    return container.parse(data[: case.length], partial=case.length is not None)


def latents_of(codec: Codec, file: Container, upto: int = 3) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the decoded latents (float32). Raises HpcmrefError."""
    y_hat = codec.y_hat(file, upto).cpu().contiguous() + 0.0  # no negative zeros
    return hashlib.sha256(y_hat.numpy().astype("<f4").tobytes()).hexdigest()[:16]


def difference(one: Image.Image, other: Image.Image) -> NDArray[Any]:
    """Return the absolute differences of the samples of two pictures: (H, W) or (H, W, C) int16.

    Raises HpcmrefError if their size or mode differs.
    """
    if (one.size, one.mode) != (other.size, other.mode):
        raise HpcmrefError(f"the picture is {one.size} {one.mode}, and should be {other.size} {other.mode}")
    found: NDArray[Any] = np.abs(np.asarray(one).astype(np.int16) - np.asarray(other).astype(np.int16))
    return found


def _check(report: Report, case: Case, folder: Path, codecs: list[Codec]) -> None:
    """Test one case and count it. codecs: that of the device and that of the CPU, or none for a lossless file."""
    for counts, step in ((report.decoded, _decode), (report.coded, _code_again)):
        if step is _code_again and case.error is None:
            continue
        counts[1] += 1
        try:
            wrong = list(step(report, case, folder, codecs))
        except HpcmrefError as error:
            wrong = [str(error)]
        counts[0] += not wrong
        report.failures += [f"{case.name}: {sentence}" for sentence in wrong]


def _decode(report: Report, case: Case, folder: Path, codecs: list[Codec]) -> Iterator[str]:
    """Decode the file of a case, and yield a sentence for each difference of its latents and pixels."""
    file = container_of(case, folder)
    expected = _picture(case, folder)
    if case.model is None:
        if difference(lossless.decode(file), expected).any():
            yield "its pixels differ, and should be exact"
        return
    codec = codecs[0]
    if latents_of(codec, file, case.upto) != case.latents:
        yield "its latents are not the expected ones"
    worst = int(difference(codec.decode(file, case.upto), expected).max())
    report.worst = max(report.worst, worst)
    if worst > report.tolerance:
        yield f"its pixels differ by up to {worst} levels; {report.tolerance} are allowed"


def _code_again(report: Report, case: Case, folder: Path, codecs: list[Codec]) -> Iterator[str]:
    """Encode and decode the picture of a case, and yield a sentence for each thing that is wrong."""
    assert case.error is not None
    source = _picture(case, folder)
    learned = container_of(case, folder).learned
    codec = codecs[0]
    variable = learned is not None and codec.model.config.qualities > 1
    data = codec.encode(source, learned.quality if learned and variable else None, verify=True)
    file = container.parse(data)
    if len({latents_of(each, file) for each in codecs}) > 1:
        yield "after it is encoded here, it decodes to other latents on the CPU"
    error = float(difference(codec.decode(data), source).mean())
    if error > case.error + CODED_AGAIN:
        yield f"after it is encoded here, it differs by {error:.1f} levels on average instead of {case.error:.1f}"


def _picture(case: Case, folder: Path) -> Image.Image:
    try:
        image: Image.Image
        with Image.open(folder / case.picture, formats=["PNG"]) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError) as error:
        raise HpcmrefError(f"{case.picture} cannot be read: {error}") from error


def versions() -> dict[str, str]:
    """Return the versions of hpcmref and of the software that takes part in coding, by name."""
    return {
        "hpcmref": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "NumPy": np.__version__,
        "Pillow": PIL.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def kernels(device: torch.device) -> dict[str, str]:
    """Return the name of a device, and the kernels that each kind of operation uses on it."""
    coder = rangecoder.implementation()
    if device.type == "cuda":
        cudnn: Any = torch.backends.cudnn
        precision = "TF32" if cudnn.allow_tf32 else "float32"
        return {
            "device": torch.cuda.get_device_name(device),
            "exact sums": f"float32 and float64 of CUDA {torch.version.cuda}",
            "transforms": f"{precision} of cuDNN {cudnn.version()}" if cudnn.is_available() else "float32 of CUDA",
            "range coder": coder,
        }
    onednn: Any = torch.backends.mkldnn
    present = onednn.is_available() and onednn.enabled
    units = "int8 units" if int16_matmul.has_units("cpu") else "float32, without int8 units"
    return {
        "device": f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads of "
        f"{os.cpu_count()} processors",
        "exact sums": f"{units}; {'oneDNN' if present else 'PyTorch without oneDNN'}",
        "transforms": "bfloat16 and float32" if device.type == "cpu" and has_bfloat16_units() else "float32",
        "range coder": coder,
    }
