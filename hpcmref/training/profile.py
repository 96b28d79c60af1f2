"""Where does the time of a training step go, and how much of what the machine can do is used?"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity
from torch.profiler import profile as trace

from hpcmref.model.macs import macs_per_pixel
from hpcmref.runtime.heap import peak_memory
from hpcmref.training.config import Phase, TrainingConfig
from hpcmref.training.data import Tiles, tiles_of
from hpcmref.training.loop import Trainer

PARTS = ("data", "forward", "backward", "update")
"""Of a step on a CPU. On a GPU a step is one graph, whose parts are the data and the rest."""


@dataclass(frozen=True)
class Profile:
    """A training step of one phase, on average.

    images and pixels: per second. seconds: of each part of a step. peak_memory: the most that was in use, of the GPU or
    of this process, in bytes; None where the system does not tell. flops: floating-point operations per second of the
    networks' convolutions and attention, the backward pass counted as two forward passes. kernels: what took most of
    the time, with its part of it.
    """

    phase: Phase
    images: float
    pixels: float
    seconds: dict[str, float]
    peak_memory: int | None
    flops: float
    kernels: list[tuple[str, float]]


def profile(config: TrainingConfig, steps: int = 5) -> list[Profile]:
    """Measure some steps of every phase of a run. Nothing is written."""
    tiles = tiles_of(config, config.device)
    return [_profile(config, phase, tiles, steps) for phase in config.phases]


def peak(device: str, dtype: torch.dtype) -> float:
    """The most floating-point operations per second that a matrix product or a convolution reaches here."""
    side, positions = (8192, 512) if device == "cuda" else (1024, 32)
    factor = torch.randn(side, side, device=device, dtype=dtype)
    x = torch.randn(1, 256, positions, positions, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    trials: list[tuple[Callable[[], object], int]] = [
        (lambda: factor @ factor, 2 * side**3),
        (lambda: F.conv2d(x, weight, padding=1), 2 * x.numel() * 256 * 9),
    ]
    best = 0.0
    with torch.no_grad():
        for run, operations in trials:
            run()
            for _ in range(5):
                begun = now(device)
                run()
                best = max(best, operations / (now(device) - begun))
    return best


def _profile(config: TrainingConfig, phase: Phase, tiles: Tiles, steps: int) -> Profile:
    trainer = Trainer(replace(config, phases=(replace(phase, begin=0.0),), steps=10**6))
    device = trainer.device.type
    for _ in range(2):  # compiles, and chooses kernels
        trainer.run_step(tiles)
    seconds = _in_graph(trainer, tiles, steps) if device == "cuda" else _in_parts(trainer, tiles, steps)
    images = phase.batch / sum(seconds.values())
    macs = sum(macs_per_pixel(trainer.model.config, phase.crop).values())
    return Profile(
        phase=phase,
        images=images,
        pixels=images * phase.crop**2,
        seconds=seconds,
        peak_memory=_peak_memory(device),
        flops=3 * 2 * macs * images * phase.crop**2,
        kernels=_kernels(trainer, tiles),
    )


def _in_parts(trainer: Trainer, tiles: Tiles, steps: int) -> dict[str, float]:
    """Seconds of each part of a step, on average."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for _ in range(steps):
        times = [now("cpu")]
        x, quality = trainer.sample(tiles)
        times.append(now("cpu"))
        loss, _ = trainer.objective(x, quality)
        times.append(now("cpu"))
        trainer.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        times.append(now("cpu"))
        trainer.update()
        times.append(now("cpu"))
        for part, (begun, ended) in zip(PARTS, pairwise(times), strict=True):
            seconds[part] += (ended - begun) / steps
    return seconds


def _in_graph(trainer: Trainer, tiles: Tiles, steps: int) -> dict[str, float]:
    """Seconds of data and of the rest of a step; nothing waits between steps, as in training."""
    begun = now("cuda")
    for _ in range(steps):
        trainer.sample(tiles)
    sampled = now("cuda")
    for _ in range(steps):
        trainer.run_step(tiles)
    data = (sampled - begun) / steps
    return {"data": data, "graph": max(0.0, (now("cuda") - sampled) / steps - data)}


def _kernels(trainer: Trainer, tiles: Tiles, count: int = 8) -> list[tuple[str, float]]:
    """The operations that take most of a step, by the time in them alone."""
    cuda = trainer.device.type == "cuda"
    with trace(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as traced:
        trainer.run_step(tiles)
    events = traced.key_averages()
    times = [(event.key, event.self_device_time_total if cuda else event.self_cpu_time_total) for event in events]
    total = sum(spent for _, spent in times) or 1.0
    times.sort(key=lambda each: -each[1])
    return [(name, spent / total) for name, spent in times[:count]]


def _peak_memory(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()


def now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
