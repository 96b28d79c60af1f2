"""Training: data, loss and loop. Needs torch, numpy and Pillow alone."""

from hpcmref.training.loop import TrainingConfig, train

__all__ = ["TrainingConfig", "train"]
