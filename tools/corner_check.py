"""Check that the installed hpcmref works in this environment, and writes and reads the same files as in others.

    python corner_check.py WORK NAME OTHER...

`matrix.py` runs this script in each of its environments ("corners"), with a copy of tests/ and research/ in PYTHONPATH.
The sample and the pictures in WORK/pictures, if there are any, are encoded to WORK/files/NAME. The files of the corners
OTHER are decoded. It prints one line of JSON, and fails with an exception.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import conformance
import PIL
import torch
from PIL import Image

import hpcmref
from hpcmref.codec import Codec
from hpcmref.format import container, rangecoder

HERE = Path(__file__).resolve().parent
QUALITIES = (0, 32, 63)
CROP = (256, 192)


class CheckError(Exception):
    """A check has failed. It is used instead of assertions, because `python -O` removes those."""


def require(condition: bool, otherwise: object) -> None:
    if not condition:
        raise CheckError(otherwise)


def facts() -> dict[str, Any]:
    """Describe this environment, with the megabytes of each package in it."""
    packages = {each.metadata["Name"]: each for each in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "pillow": PIL.__version__,
        "coder": rangecoder.implementation(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "megabytes": {name: round(_size(package) / 1e6, 1) for name, package in sorted(packages.items())},
    }


def golden_files() -> int:
    """Decode all golden files, and encode those again whose latents are known. Returns their number."""
    expected = json.loads(conformance.EXPECTED.read_text())
    for preset, answer in expected.items():
        require(conformance.decoded(preset) == answer, f"the golden file {preset} decodes to something else")
    for preset in conformance.SIZES:
        config = conformance.CONFIGS[preset]
        codec = conformance.exact_codec(preset, conformance.weights_of(config))
        written = codec.compress(*conformance.latents(preset, config), conformance.made_up_quality(config))
        file = container.parse((conformance.FOLDER / f"{preset}.bin").read_bytes())
        require(written.payloads == [file.payload], f"the golden file {preset} is written with other bytes")
    return len(expected)


def entropy_bytes(codec: Codec) -> str:
    """Return the CRC-32 of the payload that the shipped model writes for generated latents."""
    config, crc = codec.model.config, 0
    for quality in QUALITIES:
        y, z = (conformance.noise(f"{kind} {quality}", shape) for kind, shape in _shapes(config))
        tensors = (torch.from_numpy((20 * each * each * each).astype("float32")) for each in (y, z))
        crc = zlib.crc32(codec.latents.compress(*tensors, quality).payloads[0], crc)
    return f"{crc:08x}"


def pictures(folder: Path) -> dict[str, Image.Image]:
    """Return the sample, small parts of it in several modes, and the middle of each picture in the folder, by name."""
    with Image.open(HERE / "tests" / "data" / "sample.png") as image:
        sample = image.convert("RGB")
    masked = sample.crop((120, 90, 185, 153))
    masked.putalpha(Image.linear_gradient("L").resize(masked.size))
    images = {
        "sample": sample,
        "grey": sample.crop((200, 100, 300, 170)).convert("L"),
        "alpha": masked,
        "dot": sample.crop((0, 0, 1, 1)),
    }
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            left, top = (image.width - CROP[0]) // 2, (image.height - CROP[1]) // 2
            images[path.stem] = image.convert("RGB").crop((left, top, left + CROP[0], top + CROP[1]))
    return images


def encode_pictures(codec: Codec, images: dict[str, Image.Image], target: Path) -> dict[str, str]:
    """Encode every picture and decode its file. Returns the CRC-32 of each file."""
    target.mkdir(parents=True, exist_ok=True)
    crcs = {}
    for stem, image in images.items():
        for quality in QUALITIES:
            data = codec.encode(image, quality)
            decoded = codec.decode(data)
            require((decoded.size, decoded.mode) == (image.size, image.mode), stem)
            name = f"{stem}-{quality}.bin"
            (target / name).write_bytes(data)
            crcs[name] = f"{zlib.crc32(data):08x}"
    return crcs


def decode_files(codec: Codec, folders: list[Path]) -> int:
    """Decode all files in the folders, and check that they have the encoded latents. Returns their number."""
    files = [file for folder in folders for file in sorted(folder.glob("*.bin"))]
    for file in files:
        codec.decode(file.read_bytes())
    return len(files)


def commands() -> dict[str, Any]:
    """Run the command line with file names that are not ASCII. Returns the report of the self-test, which must pass."""
    with tempfile.TemporaryDirectory() as folder:
        picture, file = (os.fsdecode(f"Größe 写.{suffix}".encode()) for suffix in ("png", "bin"))
        shutil.copy(HERE / "tests" / "data" / "sample.png", Path(folder, picture))
        _run(folder, "--version", "--verbose")
        _run(folder, "encode", picture, "-o", file)
        _run(folder, "info", file)
        _run(folder, "decode", file, "-o", os.fsdecode("écran.png".encode()))
        report = json.loads(_run(folder, "selftest", "--json"))
    require(report["passed"] is True, report["failures"])
    return {name: report[name] for name in ("passed", "decoded", "coded", "worst", "kernels")}


def _run(folder: str, *arguments: str) -> str:
    process = subprocess.run([sys.executable, "-m", "hpcmref", *arguments], cwd=folder, capture_output=True)
    require(process.returncode == 0, (arguments, process.stderr.decode(errors="replace")))
    return process.stdout.decode(errors="replace")


def _shapes(config: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return ("y", (1, config.M, 8, 12)), ("z", (1, config.N, 2, 3))


def _size(package: importlib.metadata.Distribution) -> int:
    paths = (Path(str(package.locate_file(file))) for file in package.files or [])
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> None:
    """Run all checks."""
    work, name, *others = sys.argv[1:]
    files = Path(work, "files")
    require(HERE not in Path(hpcmref.__file__).resolve().parents, "this is not the installed package")
    found = facts()
    found["golden"] = golden_files()
    codec = hpcmref.load(device="cpu")
    found["entropy"] = entropy_bytes(codec)
    found["files"] = encode_pictures(codec, pictures(Path(work, "pictures")), files / name)
    found["decoded"] = decode_files(codec, [files / other for other in others])
    found["selftest"] = commands()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
