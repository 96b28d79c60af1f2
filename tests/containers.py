"""Containers for tests: with defaults, and with single fields changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hpcmref.format.container import Checksums, Container, Learned

_OF_LEARNED = ("arithmetic", "fingerprint", "quality", "checksums")


def learned_of(file: Container) -> Learned:
    """The header of a learned payload, which the file must have."""
    assert file.learned is not None
    return file.learned


def latent_checksum_of(file: Container) -> int:
    """The checksum over all latents."""
    return learned_of(file).checksums.all


def container(**fields: Any) -> Container:
    """A container of one grey pixel with a learned payload, but for `fields` (see `changed`)."""
    learned = Learned(1, b"abcd", 0, Checksums(0, 0, 0))
    return changed(Container(width=1, height=1, grey=True, learned=learned, payload=b""), **fields)


def changed(file: Container, **fields: Any) -> Container:
    """A container with other fields: its own, those of its learned header, and latent_checksum."""
    of_learned = {name: fields.pop(name) for name in _OF_LEARNED if name in fields}
    if "latent_checksum" in fields:
        of_learned["checksums"] = replace(learned_of(file).checksums, all=fields.pop("latent_checksum"))
    if of_learned:
        fields["learned"] = replace(learned_of(file), **of_learned)
    return replace(file, **fields)
