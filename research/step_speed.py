"""How much faster is a training step than that of commit f85adeb? Both trainers have the same network, crops and seed.

    python research/step_speed.py train-000.tar --threads 1 --compile

The network is nano without attention and without a memory bank, which both versions know. The older trainer is taken
from the history of this repository. The two run in turns. With one thread, processor time is measured, so that other
work on the machine matters less. With more threads, elapsed time is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

OLD = "f85adeb"
ROOT = Path(__file__).parent.parent

WORKER = """
import dataclasses, json, sys, time
from pathlib import Path
import torch
import hpcmref
from hpcmref.model import PRESETS
from hpcmref.training import Phase, Trainer, TrainingConfig
from hpcmref.training.data import Tiles

data, threads, batch, crop, compiled, gradient = sys.argv[1:]
torch.set_num_threads(int(threads))
PRESETS["nano"] = dataclasses.replace(PRESETS["nano"], heads=0, memory=None)
config = TrainingConfig(
    data=(Path(data),), output=Path("unused"), phases=(Phase(0, int(batch), int(crop)),), bfloat16=False,
    compile=compiled == "True", steps=10**6, rescale=1.0, limit=60,
)
tiles = Tiles(config.data, int(crop), limit=60)
trainer = Trainer(config)
x, quality = trainer.sample(tiles)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each trainer in a round")
    parser.add_argument("--compile", action="store_true", help="for both")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", OLD, "hpcmref"], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        neutral = Path(folder) / "empty"  # Python imports from its working folder first, so that must have no code
        neutral.mkdir()
        workers = {}
        for name, code in (("old", folder), ("new", str(ROOT))):
            arguments = (
                options.data.resolve(),
                options.threads,
                options.batch,
                options.crop,
                options.compile,
                f"{folder}/{name}.pt",
            )
            environment = {**os.environ, "PYTHONPATH": code, "OMP_NUM_THREADS": str(options.threads)}
            workers[name] = subprocess.Popen(
                [sys.executable, "-c", WORKER, *map(str, arguments)],
                env=environment, cwd=neutral, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            if (found := read(workers[name]).strip()) != str(Path(code).resolve()):
                sys.exit(f"step_speed: the {name} trainer came from {found}")
        print(f"cosine of both gradients at the start: {cosine(folder):.8f}")
        ratios = []
        for _ in range(options.rounds):
            seconds = {}
            for name, worker in workers.items():
                assert worker.stdin is not None
                worker.stdin.write(f"{options.steps}\n")
                worker.stdin.flush()
                seconds[name] = json.loads(read(worker))
            ratios.append(seconds["old"] / seconds["new"])
            print(f"old {seconds['old']:.3f} s a step, new {seconds['new']:.3f} s, ratio {ratios[-1]:.2f}", flush=True)
        print(f"median ratio {median(ratios):.2f}")
        for worker in workers.values():
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait()


def read(worker: subprocess.Popen[str]) -> str:
    """The next line that a worker prints."""
    assert worker.stdout is not None
    if line := worker.stdout.readline():
        return line
    sys.exit("step_speed: a worker has ended")


def cosine(folder: str) -> float:
    """Return the cosine similarity of the gradients of both versions, with all parameters as one vector."""
    import torch

    old, new = (torch.cat([part.flatten() for part in torch.load(f"{folder}/{name}.pt")]) for name in ("old", "new"))
    return float(torch.nn.functional.cosine_similarity(old.double(), new.double(), dim=0))


if __name__ == "__main__":
    main()
