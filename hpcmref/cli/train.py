"""The command `train`: train a model and export it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpcmref.cli.options import QuietOption, ThreadsOption, use_threads

if TYPE_CHECKING:
    from hpcmref.training import Report, TrainingConfig


def train(
    data: Annotated[
        list[Path], typer.Argument(metavar="DATA...", help="Folders, tar files or image files to train on.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="The folder for state, log and weights. An existing state is continued.",
        ),
    ] = Path("run"),
    preset: Annotated[str, typer.Option("--preset", help="The architecture: nano or light.")] = "nano",
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="NAME",
            help="Use this memory bank instead of the preset's: none, state, light, full, linear, global, cross, "
            "memory-saving, accurate or fast.",
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="Start with the weights of a trained model, which may be smaller, or of another run.",
        ),
    ] = None,
    minutes: Annotated[float, typer.Option("--minutes", help="Time budget; the schedule follows it.")] = 60.0,
    steps: Annotated[int | None, typer.Option("--steps", help="Budget in steps, instead of minutes.")] = None,
    crops: Annotated[
        str,
        typer.Option(
            "--crops",
            metavar="NxSIDE[@PART],...",
            help="The number of crops in a step of each process, their side in pixels, and the part of the budget from "
            "which on this holds.",
        ),
    ] = "12x128,4x256@0.85",
    metric: Annotated[str, typer.Option("--metric", help="The distortion to minimise: mse or ms-ssim.")] = "mse",
    rate: Annotated[
        float | None, typer.Option("--lambda", help="Train for one rate only, with this lambda of the MSE.")
    ] = None,
    rescale: Annotated[
        float,
        typer.Option("--rescale", help="The smallest scale of crops, which are scaled at random; 1 does not scale."),
    ] = 0.5,
    transpose: Annotated[bool, typer.Option("--transpose", help="Transpose half of the crops.")] = False,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="The largest learning rate.")] = 1e-3,
    schedule: Annotated[
        str, typer.Option("--schedule", help="The schedule of the learning rate: cosine, constant, or decay at once.")
    ] = "cosine",
    seed: Annotated[int, typer.Option("--seed", help="The seed of weights, crops, qualities and noise.")] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    bfloat16: Annotated[bool, typer.Option(help="Compute inside residual blocks and attention in bfloat16.")] = True,
    compile_: Annotated[bool, typer.Option("--compile", help="Use torch.compile; needs a C++ compiler.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", help="Read only the first images, this many.")] = None,
    part_mb: Annotated[
        float | None,
        typer.Option("--shard-mb", help="Split the state into files of at most this many megabytes (10^6 bytes)."),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="Do not train; measure the time of some steps and the peak speed of the machine."
        ),
    ] = False,
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train a model and export it: DIR/PRESET.safetensors, for use with -m."""
    use_threads(threads)  # before torch is imported
    from hpcmref import checkpoints
    from hpcmref.training import TrainingConfig, phases_of
    from hpcmref.training import train as run
    from hpcmref.training.state import has_state

    config = TrainingConfig(
        data=tuple(data), output=output, preset=preset, memory=memory, start=start, minutes=minutes, steps=steps,
        phases=phases_of(crops), metric=metric, rate=rate, rescale=rescale, transpose=transpose,
        learning_rate=learning_rate, schedule=schedule, seed=seed, device=device, bfloat16=bfloat16, compile=compile_,
        limit=limit, part_mb=part_mb,
    )  # fmt: skip
    if profile:
        _profile(config)
        return
    target = output / f"{preset}.safetensors"
    if target.exists() and not has_state(output):
        raise typer.BadParameter(
            f"{target} exists already, and {output} has no run to continue; name another folder.", param_hint="-o"
        )
    trainer = run(config, (lambda _: None) if quiet else _print)
    if not trainer.ranks.leads:
        return
    provenance = {
        "minutes": trainer.seconds / 60, "steps": trainer.step, "processes": trainer.ranks.count, "seed": seed,
        "metric": metric, "lambda": rate, "memory": memory, "from": trainer.start, "schedule": schedule,
    }  # fmt: skip
    with trainer.averaged() as model:
        made = checkpoints.save(
            model,
            target,
            description=f"{config.name}, {trainer.seconds / 60:.0f} minutes of training",
            provenance=provenance,
        )
    if not quiet:
        print(f"{made.path}: {made.parameters} parameters, {made.size} bytes, fingerprint {made.fingerprint.hex()}")


def _print(report: Report) -> None:
    values = "  ".join(f"{name} {value:.3f}" for name, value in report.values.items())
    print(f"{report.minutes:6.1f} min  step {report.step:6d}  {report.kind:10s}  {values}", flush=True)


def _profile(config: TrainingConfig) -> None:
    import torch

    from hpcmref.training import profile

    peaks = {str(dtype)[6:]: profile.peak(config.device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    print("peak here  " + "  ".join(f"{name} {peak / 1e9:.0f} GFLOP/s" for name, peak in peaks.items()))
    used = peaks["bfloat16" if config.bfloat16 else "float32"]
    for each in profile.profile(config):
        step = sum(each.seconds.values())
        print(f"{each.phase.batch} crops of {each.phase.crop} x {each.phase.crop}: {1e3 * step:.1f} ms a step")
        memory = "" if each.peak_memory is None else f", {each.peak_memory / 1e9:.2f} GB"
        print(f"  {each.images:.1f} images/s, {each.pixels / 1e6:.2f} megapixels/s{memory}")
        print(f"  {each.flops / 1e9:.0f} GFLOP/s, {each.flops / used:.0%} of the peak")
        print("  " + "  ".join(f"{part} {spent / step:.1%}" for part, spent in each.seconds.items()))
        for name, part in each.kernels:
            print(f"  {part:6.1%}  {name}")
