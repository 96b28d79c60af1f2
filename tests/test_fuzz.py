"""A minute of each fuzzer that has a file of its own, with seeds that stay. SECURITY.md has the figures of longer runs.

`fuzz.py`, of our own files, has its tests in `test_hostile.py`.
"""

from __future__ import annotations

import warnings

import fuzz_commands
import fuzz_images
import fuzz_models
import pytest

from hpcmref.picture import images


def test_hostile_model_files() -> None:
    outcomes, slowest = fuzz_models.fuzz(seed=3, mutations=150)
    assert outcomes.total() == 150
    assert outcomes["CheckpointError"] > 50
    assert outcomes["loaded"] + outcomes["coded"] > 10
    assert slowest < 5


@pytest.mark.parametrize("metadata", [False, True])
def test_hostile_images(metadata: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", fuzz_images.MOST_PIXELS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes, slowest = fuzz_images.fuzz(seed=4, mutations=600, metadata=metadata)
    assert outcomes.total() == 600
    assert outcomes["a picture"] > 50
    assert metadata or outcomes["ImageError"] > 50
    assert slowest < 10


def test_hostile_command_lines() -> None:
    outcomes, slowest = fuzz_commands.fuzz(seed=5, mutations=60)
    assert outcomes.total() == 60
    assert {"exit code 0", "exit code 1", "exit code 2"} <= set(outcomes)
    assert slowest < 20
