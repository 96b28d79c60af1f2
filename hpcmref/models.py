"""Install and remove the user's own models. They are kept in one folder, where `-m NAME` and all decoders find them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hpcmref import checkpoints
from hpcmref.checkpoints import CheckpointInfo
from hpcmref.errors import CheckpointError
from hpcmref.runtime.files import atomic_write
from hpcmref.runtime.folders import model_files, models_folder

# A name must not contain a comma, which separates names in `bench --models`, or a separator of folders.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
"""Names of devices on Windows, with any suffix. They are refused everywhere, as a folder of models may be copied."""


def add(source: str | os.PathLike[str], name: str | None = None, force: bool = False) -> CheckpointInfo:
    """Check a model file completely, copy it into the folder of models, and return the header of the copy.

    name: the name of the model, without suffix; None means that of the file. force: replace a model of the same name.
    Raises CheckpointError if the file is damaged, if the name is invalid or taken, or if another model has the same
    fingerprint, since a decoder could not tell them apart.
    """
    source = Path(source)
    name = source.name.removesuffix(".safetensors") if name is None else name
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{name!r} is not a valid name of a model: use letters, digits, dots, - and _.")
    if _DEVICE.fullmatch(name):
        raise CheckpointError(f"{name!r} cannot be the name of a model: on Windows it is the name of a device.")
    checkpoints.verify(source)
    found = checkpoints.info(source)
    target = models_folder() / f"{name}.safetensors"
    for other in checkpoints.available():
        is_replaced = force and other.path == target
        if other.name.casefold() == name.casefold() and not is_replaced:
            fixed = is_shipped(other) or other.name != name
            way = "choose another with --name" if fixed else "--force replaces it, --name gives another"
            raise CheckpointError(f"There is a model {other.name} already ({other.path}): {way}.")
        if other.fingerprint == found.fingerprint and not is_replaced:
            raise CheckpointError(f"{source} has the fingerprint {found.fingerprint.hex()} of the model {other.name}.")
    if target.exists() and not force:
        raise CheckpointError(f"{target} exists already, and is not a model: --force replaces it.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"The folder {target.parent} cannot be made: {error.strerror or error}.") from error
    atomic_write(target, source.read_bytes())
    return checkpoints.info(target)


def remove(name: str) -> Path:
    """Delete a model from the folder of models, and return the path of the deleted file.

    The file may be damaged. Raises CheckpointError if there is no such model, or if it ships with hpcmref.
    """
    found = {path.stem: path for path in model_files()}
    if name not in found:
        shipped = any(each.name == name and is_shipped(each) for each in checkpoints.available())
        raise CheckpointError(
            f"The model {name} ships with hpcmref, and cannot be removed."
            if shipped
            else f"There is no model {name!r} in {models_folder()}, but {', '.join(found) or 'none'}."
        )
    try:
        found[name].unlink()
    except OSError as error:
        raise CheckpointError(f"{found[name]} cannot be removed: {error.strerror or error}.") from error
    return found[name]


def is_shipped(model: CheckpointInfo) -> bool:
    """Return whether a model ships with hpcmref, and is not in the user's folder."""
    return model.path not in model_files()


def unreadable() -> dict[Path, CheckpointError]:
    """Return the files in the folder of models that are not valid models, each with the reason."""
    found = {}
    for path in model_files():
        try:
            checkpoints.info(path)
        except CheckpointError as error:
            found[path] = error
    return found
