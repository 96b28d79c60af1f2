"""How much time do encoding and decoding take, against an older commit? Both versions work in turns.

    python -m research.codec_speed kodim01.png kodim02.png                        the same networks: base, untrained
    python -m research.codec_speed kodim01.png --model nano.safetensors           the same model file in both
    python -m research.codec_speed kodim01.png --model old:nano --model new:nano  each its own model

Printed are the medians over all rounds and images, and the ratios of the new version to the old one. Times are of
pixels to bytes and back inside a process, without the files.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from research.in_turns import Worker, versions

COMMIT = "f85adeb"
"""Before exact arithmetic was hardened, and before nano-1."""

WORKER = """
import json, sys, time
from pathlib import Path
import torch
from PIL import Image
import hpcmref
from hpcmref.codec import Codec, load

model, quality = sys.argv[1], int(sys.argv[2])
images = [Image.open(path).convert("RGB") for path in sys.argv[3:]]
if model == "base":
    from hpcmref.bench.profile import untrained

    codec = Codec(untrained("base"), "base", torch.device("cpu"))
    quality = None
else:
    codec = load(None if model == "default" else model)
print(Path(hpcmref.__file__).parent.parent, flush=True)
for line in sys.stdin:
    image = images[json.loads(line)]
    begun = time.perf_counter()
    data = codec.encode(image, quality)
    encoded = time.perf_counter()
    codec.decode(data)
    print(json.dumps([encoded - begun, time.perf_counter() - encoded]), flush=True)
"""


def main(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Photographs; 768x512 is usual.")],
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="[old:|new:]NAME|FILE", help="A model, base (untrained), or default (what ships)."),
    ] = None,
    commit: Annotated[str, typer.Option(help="The older version.")] = COMMIT,
    quality: Annotated[int, typer.Option(help="0 to 63.")] = 31,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Of all images; one more comes first, to warm up.")] = 7,
) -> None:
    """Print seconds and ratios."""
    models = {"old": "base", "new": "base"}
    for each in model or ():
        side, colon, name = each.partition(":")
        chosen = {side: name} if colon and side in models else dict.fromkeys(models, each)
        models.update({side: _absolute(name) for side, name in chosen.items()})
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    with versions(commit) as folders, ExitStack() as stack:
        workers = {}
        for side, name in models.items():
            arguments = (name, quality, *(image.resolve() for image in images))
            worker = Worker(WORKER, arguments, folders[side], threads, folders["empty"])
            workers[side] = stack.enter_context(worker)
        for turn in range(rounds + 1):
            for index in range(len(images)):
                for side, worker in workers.items():
                    times = worker.ask(index)
                    if turn:
                        for what, taken in zip(("encode", "decode"), times, strict=True):
                            seconds[side, what].append(taken)
    print(f"old: {models['old']} at {commit}, new: {models['new']}, {threads} threads, {rounds} rounds")
    for what in ("encode", "decode"):
        old, new = median(seconds["old", what]), median(seconds["new", what])
        ratio = median(b / a for a, b in zip(seconds["old", what], seconds["new", what], strict=True))
        print(f"{what}: old {old:.3f} s, new {new:.3f} s, median of the ratios {ratio:.3f}")


def _absolute(model: str) -> str:
    """A path is made absolute, as the workers run in another folder."""
    return str(Path(model).resolve()) if Path(model).is_file() else model


if __name__ == "__main__":
    typer.run(main)
