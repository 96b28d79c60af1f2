"""The HPCM networks: PyTorch modules only, no files, no printing, no global state."""

from hpcmref.model.config import PRESETS, HPCMConfig
from hpcmref.model.hpcm import HPCM

__all__ = ["HPCM", "PRESETS", "HPCMConfig"]
