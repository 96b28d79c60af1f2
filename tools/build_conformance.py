"""Build the conformance set of `hpcmref selftest`: files of every shipped model, hashes of their latents, and pictures.

    python tools/build_conformance.py [FOLDER]

Run it after a model was added. Files that FOLDER has of a shipped model stay, so that later versions must still decode
what earlier ones wrote. The photographs are the calibration tiles (CC0). Pictures are decoded in float32. The largest
difference to pictures decoded in bfloat16 is measured on the set and on all tiles. The tolerance of `hpcmref selftest`
is twice that difference, and at least 2 levels.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image

from hpcmref import checkpoints, lossless
from hpcmref.codec import Codec, fresh
from hpcmref.format import container
from hpcmref.selftest import FOLDER, Case, container_of, difference, latents_of, read_set

MOST_BYTES = 400_000
PARTIAL = 0.75
"""The part of the file that is kept in the case of a truncated file."""


def sources() -> dict[str, tuple[Image.Image, int]]:
    """Name -> picture and quality: colour, grey, alpha, one pixel, and sides that are not multiples of 64."""
    tiles = {path.stem: tile for path, tile in zip(_tile_paths(), checkpoints.tiles(), strict=True)}
    transparent = tiles["sand"].crop((30, 40, 80, 76))
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    y, x = np.mgrid[:33, :7]
    drawn = np.dstack([8 * y % 256, 36 * x % 256, (5 * y + 20 * x) % 256]).astype(np.uint8)
    return {
        "colour": (tiles["flowers"].crop((60, 60, 210, 170)), 0),
        "wide": (tiles["guitar"].crop((20, 90, 150, 130)), 21),
        "preview": (tiles["wall"].crop((40, 70, 136, 142)), 42),
        "fine": (tiles["sand"].crop((90, 90, 218, 154)), 63),
        "grey": (tiles["night"].crop((80, 80, 145, 143)).convert("L"), 50),
        "alpha": (transparent, 30),
        "narrow": (Image.fromarray(drawn), 32),
        "one pixel": (Image.new("RGB", (1, 1), (200, 90, 30)), 32),
    }


def cases_of(codec: Codec, folder: Path) -> Iterator[Case]:
    """Return the cases of one model, computed in float32, and write their files and pictures."""
    variable = codec.model.config.qualities > 1
    for name, (source, quality) in sources().items():
        stem = f"{codec.name}-{name.replace(' ', '-')}"
        data = codec.encode(source, quality if variable else None, verify=True)
        (folder / f"{stem}.hpcm").write_bytes(data)
        case = Case(f"{codec.name}, {name}", f"{stem}.hpcm", f"{stem}.png", codec.name)
        yield _answered(case, codec, folder, again=True)
        if name != "preview":
            continue
        for upto in (1, 2):
            preview = replace(case, name=f"{case.name} up to {upto}", picture=f"{stem}-{upto}.png", upto=upto)
            yield _answered(preview, codec, folder)
        partial = replace(case, name=f"{case.name}, truncated", picture=f"{stem}-part.png")
        yield _answered(replace(partial, length=int(PARTIAL * len(data))), codec, folder)


def lossless_case(folder: Path) -> Case:
    """Return the case of the lossless file, and write it."""
    case = Case("without loss", "lossless.hpcm", "lossless.png")
    source = sources()["alpha"][0].crop((0, 0, 32, 24))
    source.save(folder / case.picture, optimize=True)
    (folder / case.file).write_bytes(lossless.encode(source))
    return case


def build(folder: Path) -> int:
    """Write what is missing of the set, remove what does not belong to it, and return its size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    listing = folder / "set.json"
    old = read_set(folder).cases if listing.exists() else ()
    worst = json.loads(listing.read_text(encoding="utf-8"))["measured"] if old else 0
    cases = [case for case in old if case.model is None] or [lossless_case(folder)]
    for info in checkpoints.shipped():
        if known := cases_kept(old, folder, info):
            cases += known
            continue
        exact, coarse = (_codec(info.path, bfloat16) for bfloat16 in (False, True))
        cases += cases_of(exact, folder)
        worst = max(worst, spread(exact, coarse))
    defaults = {each.name: each.default for each in fields(Case)}
    listed = [{name: value for name, value in asdict(case).items() if value != defaults[name]} for case in cases]
    content = {"tolerance": max(2, 2 * worst), "measured": worst, "cases": listed}
    listing.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    used = {listing.name, *(name for case in cases for name in (case.file, case.picture))}
    for path in folder.iterdir():
        if path.name not in used:
            path.unlink()
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > MOST_BYTES:
        raise SystemExit(f"the set has {size} bytes, more than {MOST_BYTES}")
    return size


def cases_kept(old: Iterable[Case], folder: Path, info: checkpoints.CheckpointInfo) -> list[Case]:
    """Return the cases of a model in an older set, or none if its files are of another model of that name."""
    cases = [case for case in old if case.model == info.name]
    files = [container.parse((folder / case.file).read_bytes()) for case in cases]
    same = all(file.learned is not None and file.learned.fingerprint == info.fingerprint for file in files)
    return cases if same else []


def spread(exact: Codec, coarse: Codec) -> int:
    """Return the largest difference, in levels, between pictures of two codecs, on the set and on all tiles."""
    qualities = (0, 21, 42, 63) if exact.model.config.qualities > 1 else (None,)
    pictures = [*checkpoints.tiles(), *(source for source, _ in sources().values())]
    files = [exact.encode(picture, quality) for picture in pictures for quality in qualities]
    return max(int(difference(exact.decode(data), coarse.decode(data)).max()) for data in files)


def _answered(case: Case, codec: Codec, folder: Path, again: bool = False) -> Case:
    """Return a case with its latents and its error, and write its decoded picture."""
    file = container_of(case, folder)
    picture = codec.decode(file, case.upto)
    picture.info.clear()
    picture.save(folder / case.picture, optimize=True)
    error = None
    if again:
        quality = file.learned.quality if file.learned and codec.model.config.qualities > 1 else None
        second = codec.decode(container.parse(codec.encode(picture, quality)))
        error = round(float(difference(second, picture).mean()), 2)
    return replace(case, latents=latents_of(codec, file, case.upto), error=error)


def _codec(path: Path, bfloat16: bool) -> Codec:
    with patch("hpcmref.codec.has_bfloat16_units", return_value=bfloat16):
        return fresh(path, "cpu")


def _tile_paths() -> list[Path]:
    return sorted((Path(checkpoints.__file__).parent / "exact" / "tiles").glob("*.webp"))


def main() -> None:
    """Run from the command line."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    print(f"{folder}: {build(folder)} bytes")


if __name__ == "__main__":
    main()
