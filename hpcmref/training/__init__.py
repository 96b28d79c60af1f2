"""Training: data, objective and loop. Needs torch, numpy, Pillow and safetensors alone."""

from hpcmref.training.config import Phase, TrainingConfig, phases_of
from hpcmref.training.loop import Report, Trainer, train

__all__ = ["Phase", "Report", "Trainer", "TrainingConfig", "phases_of", "train"]
