"""Where does the time of a training step go, and how much of what the machine can do is used?"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity
from torch.profiler import profile as trace

from hpcmref.model.cost import macs_per_pixel
from hpcmref.runtime.heap import peak_memory
from hpcmref.training.config import Phase, TrainingConfig
from hpcmref.training.data import Tiles
from hpcmref.training.loop import Trainer

PARTS = ("data", "forward", "backward", "update")


@dataclass(frozen=True)
class Profile:
    """A training step of one phase, on average.

    images and pixels: per second. seconds: of each part of a step. memory: the most that was in use, of the GPU or of
    this process, in bytes; None where the system does not tell. flops: floating-point operations per second of the
    networks' convolutions and attention, the backward pass counted as two forward passes. kernels: what took most of
    the time, with its part of it.
    """

    phase: Phase
    images: float
    pixels: float
    seconds: dict[str, float]
    memory: int | None
    flops: float
    kernels: list[tuple[str, float]]


def profile(config: TrainingConfig, steps: int = 5) -> list[Profile]:
    """Measure some steps of every phase of a run. Nothing is written."""
    tiles = Tiles(config.data, min(phase.crop for phase in config.phases), config.limit, config.device)
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
    seconds = [0.0] * len(PARTS)
    for _ in range(steps):
        times = [now(device)]
        x, quality = trainer.sample(tiles)
        times.append(now(device))
        loss, _ = trainer.objective(x, quality)
        times.append(now(device))
        trainer.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        times.append(now(device))
        trainer.update()
        times.append(now(device))
        for part in range(len(PARTS)):
            seconds[part] += (times[part + 1] - times[part]) / steps
    images = phase.batch / sum(seconds)
    macs = sum(macs_per_pixel(trainer.model.config, phase.crop).values())
    return Profile(
        phase=phase,
        images=images,
        pixels=images * phase.crop**2,
        seconds=dict(zip(PARTS, seconds, strict=True)),
        memory=_memory(device),
        flops=3 * 2 * macs * images * phase.crop**2,
        kernels=_kernels(trainer, tiles),
    )


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


def _memory(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()


def now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
