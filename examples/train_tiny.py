"""Train a model for a few steps, and encode with it. It is far too few steps for a good model.

Run it with `python examples/train_tiny.py IMAGE FOLDER`.
"""

import sys
from pathlib import Path

from PIL import Image

import hpcmref
from hpcmref import checkpoints
from hpcmref.training import TrainingConfig, phases_of, train


def main(image: Path, folder: Path) -> None:
    config = TrainingConfig(data=(image,), output=folder, preset="nano", steps=2, phases=phases_of("1x64"))
    trainer = train(config, lambda report: print(report.kind, report.values))
    with trainer.averaged() as model:
        made = checkpoints.save(model, folder / "tiny.safetensors", "two steps", {"steps": trainer.step})
    codec = hpcmref.load(made.path)
    print(len(codec.encode(Image.open(image).convert("RGB"), 32)), "bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
