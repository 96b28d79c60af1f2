"""The folder in which a user keeps model files of their own."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "HPCMREF_MODELS"


def models_folder() -> Path:
    """The folder of one's own models: that of the environment variable HPCMREF_MODELS, or else the usual place.

    It need not exist. The usual place is ~/.local/share/hpcmref/models on Linux, and what platformdirs says elsewhere.
    """
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser()
    from platformdirs import user_data_path

    return user_data_path("hpcmref", appauthor=False) / "models"


def model_files() -> list[Path]:
    """The model files in that folder, by name."""
    return sorted(models_folder().glob("*.safetensors"))
