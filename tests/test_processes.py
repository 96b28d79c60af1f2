"""Does a run of several processes train one model, and does training need no more than it says?"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import DATA
from models import TRAINABLE
from torch import Tensor

from hpcmref.model import PRESETS
from hpcmref.training import Phase, Trainer, TrainingConfig
from hpcmref.training.data import Tiles
from hpcmref.training.ranks import Ranks
from hpcmref.training.state import read_state

CONFIG = TrainingConfig(
    data=(DATA / "sample.png",), output=Path("unused"), phases=(Phase(0, 2, 64),), steps=3, learning_rate=0.2
)
CODE = """
import sys, time
sys.path.insert(0, sys.argv[1])
for name in ("compressai", "bjontegaard", "matplotlib", "pytorch_msssim", "scipy", "ray", "torchvision"):
    sys.modules[name] = None
import torch
from models import TRAINABLE
from hpcmref import training
from hpcmref.cli import app
from hpcmref.model import PRESETS
PRESETS["nano"] = TRAINABLE
run_step, train = training.Trainer.run_step, training.train
def slow(trainer, tiles):
    time.sleep(0.02 * trainer.ranks.rank)  # another clock in every process
    return run_step(trainer, tiles)
def kept(config, report):
    trainer = train(config, report)
    end = [trainer.step, trainer.average, list(trainer.model.parameters())]
    torch.save(end, config.output / f"end-{trainer.ranks.rank}.pt")
    return trainer
training.Trainer.run_step, training.train = slow, kept
app(["train", *sys.argv[2:]])
"""


@dataclass
class End:
    """What a process has when a run is over."""

    step: int
    average: list[Tensor]
    weights: list[Tensor]
    printed: str


def run_two(output: Path, *options: str) -> tuple[End, End]:
    """`hpcmref train` in two processes, with the environment that `torchrun` gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    arguments = [str(Path(__file__).parent), str(CONFIG.data[0]), "-o", str(output), "--crops", "2x64", *options]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, *arguments, "--learning-rate", str(CONFIG.learning_rate)],
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    ends = []
    for rank, process in enumerate(processes):
        printed, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        ends.append(End(*torch.load(output / f"end-{rank}.pt"), printed))
    return ends[0], ends[1]


@torch.no_grad()
def test_two_processes_train_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of one process whose batch is both of theirs; one writes; compressai is not needed."""
    first, second = run_two(tmp_path, "--steps", "3")
    assert first.step == second.step == 3
    assert all(map(torch.equal, first.weights, second.weights))
    assert all(map(torch.equal, first.average, second.average))
    assert "fingerprint" in first.printed
    assert second.printed == ""
    assert (tmp_path / "nano.safetensors").is_file()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["ranks"]) for line in log] == [("start", 2)]

    monkeypatch.setitem(PRESETS, "nano", TRAINABLE)
    alone = Trainer(CONFIG)
    begin = [parameter.clone() for parameter in alone.model.parameters()]
    tiles = Tiles(CONFIG.data, 64)
    for _ in range(3):
        alone.optimiser.zero_grad()
        alone.set_learning_rate()
        for rank in range(2):
            alone.ranks = Ranks(rank)
            with torch.enable_grad():
                loss, _ = alone.objective(*alone.sample(tiles))
                (loss / 2).backward()
        assert bool(alone.update().isfinite())
        alone.step += 1
    end = list(alone.model.parameters())
    moved = sum(float((a - b).abs().sum()) for a, b in zip(end, begin, strict=True))
    apart = sum(float((a - b).abs().sum()) for a, b in zip(end, first.weights, strict=True))
    assert apart < 0.01 * moved

    # They go on with the state that one wrote, and end a budget of time, by one clock, after the same step.
    spent = read_state(tmp_path, torch.device("cpu"))["clock"]["seconds"]
    first, second = run_two(tmp_path, "--minutes", str((spent + 0.6) / 60))
    assert first.step == second.step > 3
    assert all(map(torch.equal, first.weights, second.weights))
