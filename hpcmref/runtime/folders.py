"""The folder in which users keep their own model files."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "HPCMREF_MODELS"


def models_folder() -> Path:
    """Return the folder of the user's own models, which need not exist.

    It is the value of the environment variable HPCMREF_MODELS. Without it, it is ~/.local/share/hpcmref/models on
    Linux, and the folder that platformdirs returns on other systems.
    """
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser()
    from platformdirs import user_data_path

    return user_data_path("hpcmref", appauthor=False) / "models"


def model_files() -> list[Path]:
    """Return the model files in that folder, sorted by name."""
    return sorted(models_folder().glob("*.safetensors"))
