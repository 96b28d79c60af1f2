"""What do several test files share? Threads that do not spin, the sample photograph, and the shipped codec."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything loads OpenMP: on a busy machine, threads that spin while they wait for each other make the float64
# models of the parity tests twenty times slower (measured: 78 s instead of 3 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Models that the person who runs the tests has added are none of their business.
os.environ["HPCMREF_MODELS"] = str(Path(__file__).parent / "no models")

import pytest
from PIL import Image

if TYPE_CHECKING:
    from hpcmref.codec import Codec

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def sample() -> Image.Image:
    """The sample photograph, 450 x 330 RGB."""
    with Image.open(DATA / "sample.png") as image:
        return image.convert("RGB")


@pytest.fixture(scope="session")
def codec() -> Codec:
    """The codec that ships with the package, on the CPU."""
    from hpcmref.codec import load

    return load(device="cpu")
