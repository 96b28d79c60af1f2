"""How do time and memory grow with the size of the image? `python -m research.growth` measures it, and draws a figure.

Every size is encoded in a new process and decoded in another, so that memory of one is not counted for the next.
Seconds are from pixels in memory to the file in memory and back, after a small image. Memory is the peak of the
process, with Python, torch and the weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

SIZES = "0.1,0.4,1,2,4,8,12,16,24,50,100"
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Point:
    """The measurement of one image of width x height pixels: bytes of its file, and seconds and memory (bytes) of both
    directions.
    """

    width: int
    height: int
    size: int
    encode_seconds: float
    decode_seconds: float
    encode_memory: int
    decode_memory: int

    @property
    def megapixels(self) -> float:
        return 1e-6 * self.width * self.height


def measure(megapixels: float, model: str | None = None, quality: int | None = None) -> Point:
    """Encode and decode an image of 3:2. Raises RuntimeError with the last line of a process that fails."""
    height = round((megapixels * 1e6 * 2 / 3) ** 0.5)
    width = round(megapixels * 1e6 / height)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "image.bin")
        request = {"model": model, "quality": quality, "size": (width, height), "file": str(file)}
        encoded, decoded = (_in_a_process({**request, "direction": each}) for each in ("encode", "decode"))
        return Point(
            width,
            height,
            file.stat().st_size,
            encoded["seconds"],
            decoded["seconds"],
            encoded["memory"],
            decoded["memory"],
        )


def _in_a_process(request: dict[str, Any]) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, "-c", "from research.growth import work; work()"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    if process.returncode:
        said = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        raise RuntimeError(f"{request['direction']} of {request['size']} pixels: {said[-1]}")
    return dict(json.loads(process.stdout))


def work() -> None:
    """The main function of a measuring process: read a request from stdin, and write seconds and bytes to stdout."""
    from hpcmref.bench.profile import photograph
    from hpcmref.codec import load
    from hpcmref.runtime.heap import keep_memory, peak_memory

    keep_memory()
    request = json.load(sys.stdin)
    codec, file = load(request["model"], "cpu"), Path(request["file"])
    small = codec.encode(photograph(64, 64), request["quality"])
    if request["direction"] == "encode":
        image = photograph(*request["size"])
        begun = time.perf_counter()
        data = codec.encode(image, request["quality"])
        seconds = time.perf_counter() - begun
        file.write_bytes(data)
    else:
        codec.decode(small)
        data = file.read_bytes()
        begun = time.perf_counter()
        codec.decode(data)
        seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "memory": peak_memory()}))


def figure(points: list[Point], title: str) -> bytes:
    """Draw seconds and memory against megapixels as PNG, with lines through the origin and the largest image."""
    import io

    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    drawn.suptitle(title)
    panels: Any = drawn.subplots(1, 2)
    megapixels = [point.megapixels for point in points]
    for axes, quantity, scale, label in zip(panels, ("seconds", "memory"), (1, 1e-9), ("seconds", "GB"), strict=True):
        for direction in ("encode", "decode"):
            values = [scale * getattr(point, f"{direction}_{quantity}") for point in points]
            (line,) = axes.loglog(megapixels, values, "o-", label=direction, markersize=4)
            if quantity == "seconds":
                slope = values[-1] / megapixels[-1]
                axes.loglog(megapixels, [slope * x for x in megapixels], ":", color=line.get_color(), lw=1)
        axes.set_xlabel("megapixels")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25, which="both")
        axes.legend(frameon=False)
    file = io.BytesIO()
    drawn.savefig(file, format="png")
    return file.getvalue()


def main(
    sizes: Annotated[str, typer.Option(help="Megapixels, with commas between.")] = SIZES,
    model: Annotated[str | None, typer.Option("-m", "--model", help="A registry name or a file.")] = None,
    quality: Annotated[int | None, typer.Option("-q", help="By default the model's default.")] = None,
    output: Annotated[Path, typer.Option("-o", help="Folder for growth.json and growth.png.")] = Path("results"),
) -> None:
    """Measure time and memory from small images to large ones."""
    from hpcmref._version import __version__
    from hpcmref.runtime.files import atomic_write

    output.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    title = f"hpcmref {__version__}, {model or 'default model'}"
    for megapixels in map(float, sizes.split(",")):
        try:
            point = measure(megapixels, model, quality)
        except RuntimeError as error:
            sys.exit(f"growth: {error}")
        points.append(point)
        print(
            f"{point.megapixels:8.2f} MP  encode {point.encode_seconds:7.2f} s {point.encode_memory / 2**20:7.0f} MiB"
            f"  decode {point.decode_seconds:7.2f} s {point.decode_memory / 2**20:7.0f} MiB",
            flush=True,
        )
        found = {"title": title, "points": [asdict(each) for each in points]}
        atomic_write(output / "growth.json", (json.dumps(found, indent=1) + "\n").encode())
        atomic_write(output / "growth.png", figure(points, title))


if __name__ == "__main__":
    typer.run(main)
