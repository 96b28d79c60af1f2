"""How does a run survive its process? Its state in parts of a given size, and a manifest that is written last."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch

from hpcmref.errors import CheckpointError
from hpcmref.runtime.files import atomic_write

MANIFEST = "state.json"
LARGEST_MANIFEST = 10**6
"""Bytes; a manifest has about 120 a part."""


def has_state(folder: Path) -> bool:
    """Whether a run has left its state here."""
    return (folder / MANIFEST).exists()


def write_state(folder: Path, state: dict[str, Any], name: str, part_mb: float | None = None) -> None:
    """Write a state as state-<name>-<number>.part files of at most `part_mb` 10^6 bytes (one file by default).

    `name` must differ from that of the state before, which stays whole until the manifest names the new one; its parts
    are removed after that.
    """
    stream = io.BytesIO()
    torch.save(state, stream)
    data = stream.getbuffer()
    length = len(data) if part_mb is None else max(1, int(part_mb * 10**6))
    parts: list[dict[str, Any]] = []
    for start in range(0, len(data), length):
        part = data[start : start + length]
        path = folder / f"state-{name}-{len(parts):03d}.part"
        atomic_write(path, bytes(part))
        parts.append({"name": path.name, "size": len(part), "sha256": hashlib.sha256(part).hexdigest()})
    atomic_write(folder / MANIFEST, json.dumps({"parts": parts}, indent=1).encode())
    kept = {part["name"] for part in parts}
    for path in folder.glob("state-*.part"):
        if path.name not in kept:
            path.unlink()


def read_state(folder: Path, device: torch.device) -> dict[str, Any]:
    """The state that `write_state` left. Raises CheckpointError if a part is missing or damaged."""
    manifest = folder / MANIFEST
    try:
        if manifest.stat().st_size > LARGEST_MANIFEST:
            raise CheckpointError(f"{manifest} is too large to be the manifest of a state.")
        parts = [(str(part["name"]), int(part["size"]), str(part["sha256"])) for part in _parts(manifest)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{manifest} is not the manifest of a state, or is damaged: {error!r}.") from error
    stream = io.BytesIO()
    for name, size, digest in parts:
        path = folder / name
        if path.parent != folder or not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{path} is missing, or is not the part of {size} bytes that {manifest} names.")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(f"{path} is damaged.")
        stream.write(data)
    stream.seek(0)
    try:
        return dict(torch.load(stream, weights_only=True, map_location=device))
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises whatever damaged bytes lead it to
        raise CheckpointError(f"{folder} does not hold the state of a run.") from error


def _parts(manifest: Path) -> list[dict[str, Any]]:
    return list(json.loads(manifest.read_text(encoding="utf-8"))["parts"])
