"""The command `info`: show the header and the metadata of encoded files."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from hpcmref.cli.batch import Done, Made, run_spread
from hpcmref.cli.jobs import ENCODED_SUFFIXES, Job, inputs
from hpcmref.cli.options import RecursiveOption

ARITHMETIC = {1: "exact integers"}


def info(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE", help="Encoded files, folders of .hpcm and .bin files, or - for standard input."),
    ],
    exif: Annotated[bool, typer.Option("--exif", help="List every tag of the EXIF data.")] = False,
    recursive: RecursiveOption = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON array with one object a file, on standard output.")
    ] = False,
) -> None:
    """Show what encoded files contain, without decoding them."""
    described: list[dict[str, Any]] = []

    def work(job: Job, content: bytes) -> Made:
        described.append(_facts(job, content))
        return Made(b"")

    try:
        run_spread(
            inputs(files, ENCODED_SUFFIXES, recursive), Job.read, work, lambda job, outcome: Done(), totals=False
        )
    finally:
        if as_json:
            print(json.dumps(described, indent=2))
        elif described:
            print("\n".join(_text(each, exif) for each in described))


def _facts(job: Job, data: bytes) -> dict[str, Any]:
    """Return the facts of a file for JSON. Sizes are in bytes, and bits per pixel are of the whole file."""
    from hpcmref.api import info as info_of

    found = info_of(data)
    facts: dict[str, Any] = {
        "file": job.name,
        "width": found.width,
        "height": found.height,
        "channels": "grey" if found.grey else "colour",
        "format": found.version,
        "coding": found.coding,
        "encoder": found.encoder,
        "effort": found.effort,
    }
    if found.arithmetic is not None:
        facts |= {
            "model": found.model,
            "fingerprint": found.fingerprint,
            "quality": found.quality,
            "arithmetic": ARITHMETIC.get(found.arithmetic, f"number {found.arithmetic}"),
        }
    sizes = {"size": found.size, "parts": found.parts, "bits_per_pixel": found.bits_per_pixel}
    return {**facts, **sizes, "metadata": found.metadata_sizes, "about": found.about, "exif": dict(found.exif)}


def _text(facts: dict[str, Any], exif: bool) -> str:
    parts = ", ".join(f"{name} {size}" for name, size in facts["parts"].items())
    lines = {
        "image": f"{facts['width']}x{facts['height']} {facts['channels']}",
        "format": f"version {facts['format']}, coding {facts['coding']}",
    }
    if facts["encoder"] is not None:
        lines["format"] += f", written by hpcmref {facts['encoder']} with effort {facts['effort']}"
    if "model" in facts:
        lines["format"] += f", arithmetic {facts['arithmetic']}"
        lines["model"] = f"{facts['model'] or 'unknown here'} (fingerprint {facts['fingerprint']})"
        lines["quality"] = str(facts["quality"])
    lines |= {
        "size": f"{facts['size']} bytes ({parts})",
        "rate": f"{facts['bits_per_pixel']:.3f} bits per pixel",
    }
    if facts["metadata"]:
        lines["metadata"] = ", ".join(f"{name} {size} bytes" for name, size in facts["metadata"].items())
    about = [f"  {name:8} {value}" for name, value in facts["about"].items()]
    if exif:
        about += [f"    {name} = {value}" for name, value in facts["exif"].items()]
    return "\n".join([f"{facts['file']}:", *(f"  {name:8} {value}" for name, value in lines.items()), *about])
