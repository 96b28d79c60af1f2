"""Training: data, loss and loop. Needs torch, numpy and Pillow alone."""

from hpcmref.training.loop import Report, TrainingConfig, train

__all__ = ["Report", "TrainingConfig", "train"]
