"""How much faster is a training step than that of f85adeb? Both trainers, the same network, crops and seed, in turns.

    python -m research.step_speed train-000.tar --threads 1 --compile

The network is nano-1 without its memory bank, which both know. The older trainer comes from the history of this
repository. Gradients are compared on one batch that the older version draws, from the same weights, summed over four
draws of noise. Speed is measured on batches that each version draws itself. Time is the processor's with one thread, so
that other work on the machine counts less; with more threads it is the clock's.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from research.in_turns import Worker, versions

COMMIT = "f85adeb"

WORKER = """
import dataclasses, json, sys, time
from pathlib import Path
import torch
import hpcmref
from hpcmref.model import PRESETS
from hpcmref.training import Phase, Trainer, TrainingConfig
from hpcmref.training.data import Tiles
try:
    from hpcmref.runtime.heap import keep_memory
except ImportError:  # the older version
    from hpcmref.heap import keep_memory

keep_memory()  # as the command does
data, threads, batch, crop, compiled, bfloat16, sample, gradient = sys.argv[1:]
torch.set_num_threads(int(threads))
PRESETS["nano"] = dataclasses.replace(
    PRESETS["nano"], heads=0, memory=None, stages=((192, 4),), synthesis=((192, 4),),
    prior_s1_s2=(2, 1), prior_s3=(2, 1),
)
config = TrainingConfig(
    data=(Path(data),), output=Path("unused"), phases=(Phase(0, int(batch), int(crop)),), bfloat16=bfloat16 == "True",
    compile=compiled == "True", steps=10**6, rescale=1.0, limit=60,
)
tiles = Tiles(config.data, int(crop), limit=60)
trainer = Trainer(config)
x, quality = trainer.sample(tiles)
if Path(sample).exists():  # the other version has drawn it
    x, quality = torch.load(sample)
torch.save((x, quality), sample)
for _ in range(4):  # with four draws of noise
    trainer.objective(x, quality)[0].backward()
torch.save([parameter.grad.clone() for parameter in trainer.model.parameters()], gradient)
for _ in range(2):
    trainer.run_step(tiles)
clock = time.process_time if int(threads) == 1 else time.perf_counter
print(Path(hpcmref.__file__).parent.parent, flush=True)
for count in sys.stdin:
    begun = clock()
    for _ in range(int(count)):
        trainer.run_step(tiles)
    print(json.dumps((clock() - begun) / int(count)), flush=True)
"""


def main(
    data: Annotated[Path, typer.Argument(help="Training images: a tar file or a folder.")],
    commit: Annotated[str, typer.Option(help="The older version.")] = COMMIT,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    crop: Annotated[int, typer.Option(min=64)] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Of each trainer in a round.")] = 3,
    compiled: Annotated[bool, typer.Option("--compile", help="For both.")] = False,
    bfloat16: Annotated[bool, typer.Option(help="For both, as in training; otherwise all is in float32.")] = False,
) -> None:
    """Print the cosine of both gradients, seconds a step, and ratios of the old version to the new one."""
    with versions(commit) as folders, ExitStack() as stack:
        workers, gradients = {}, []
        for side in ("old", "new"):
            gradients.append(folders["empty"] / f"{side}.pt")
            arguments = (data.resolve(), threads, batch, crop, compiled, bfloat16, folders["empty"] / "sample.pt")
            worker = Worker(WORKER, (*arguments, gradients[-1]), folders[side], threads, folders["empty"])
            workers[side] = stack.enter_context(worker)
        print(f"cosine of both gradients at the start: {cosine(*gradients):.8f}")
        ratios = []
        for _ in range(rounds):
            seconds = {side: worker.ask(steps) for side, worker in workers.items()}
            ratios.append(seconds["old"] / seconds["new"])
            print(f"old {seconds['old']:.3f} s a step, new {seconds['new']:.3f} s, ratio {ratios[-1]:.2f}", flush=True)
        print(f"median ratio {median(ratios):.2f}")


def cosine(*gradients: Path) -> float:
    """Between the gradients that both left: all parameters as one vector."""
    import torch

    old, new = (torch.cat([part.flatten() for part in torch.load(path)]) for path in gradients)
    return float(torch.nn.functional.cosine_similarity(old.double(), new.double(), dim=0))


if __name__ == "__main__":
    typer.run(main)
