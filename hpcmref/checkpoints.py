"""Where do models come from? The registry, safetensors in and out, fingerprints, official checkpoints.

Importing this module does not import torch: `available` and `name_of` read only the headers of the files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from hpcmref.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from hpcmref.exact.convert import Grids
    from hpcmref.model import HPCM

DEFAULT_MODEL = "nano"
"""The registry name of the model that is used when none is asked for."""

_WEIGHTS = Path(__file__).parent / "weights"
_METADATA = "hpcmref"
_ENTROPY = "entropy."
_GRID = "exact."
_TILES = Path(__file__).parent / "exact" / "tiles"


@dataclass(frozen=True)
class CheckpointInfo:
    """What the header of a checkpoint says of it. size is in bytes; parameters counts numbers."""

    name: str
    preset: str
    path: Path
    fingerprint: bytes
    parameters: int
    size: int
    default: bool
    description: str


def available() -> list[CheckpointInfo]:
    """The models that ship with the package, the default first."""
    found = [info(path) for path in sorted(_WEIGHTS.glob("*.safetensors"))]
    return sorted(found, key=lambda each: not each.default)


def name_of(fingerprint: bytes) -> str | None:
    """The registry name of the model with this fingerprint, if there is one."""
    return next((each.name for each in available() if each.fingerprint == fingerprint), None)


def find(model: str | Path | None) -> Path:
    """The file of a model: a registry name, a path, or None for the default. Raises CheckpointError."""
    names = {each.name: each.path for each in available()}
    if model is None:
        model = DEFAULT_MODEL
    if str(model) in names:
        return names[str(model)]
    if Path(model).is_file():
        return Path(model)
    raise CheckpointError(f"There is no model {str(model)!r}: neither a file nor one of {', '.join(names) or 'none'}.")


def info(path: Path) -> CheckpointInfo:
    """Read the header of a checkpoint. Raises CheckpointError if it is not one of ours."""
    metadata = _metadata(path)
    try:
        return CheckpointInfo(
            name=path.stem,
            preset=metadata["config"]["preset"],
            path=path,
            fingerprint=bytes.fromhex(metadata["fingerprint"]),
            parameters=int(metadata["parameters"]),
            size=path.stat().st_size,
            default=path.resolve().parent == _WEIGHTS.resolve() and path.stem == DEFAULT_MODEL,
            description=str(metadata["description"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} lacks what an hpcmref checkpoint must say of itself ({error}).") from error


def _metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="np") as file:
            return json.loads(file.metadata()[_METADATA])
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as a safetensors file: {error}.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of hpcmref.") from error


def save(
    model: HPCM,
    path: Path,
    description: str,
    provenance: Mapping[str, Any],
    half: bool = True,
) -> CheckpointInfo:
    """Write a checkpoint with its exact grids, whole or not at all.

    half: weights in float16, else in float32. Raises CheckpointError for weights that are not finite.
    """
    import torch
    from safetensors.torch import save as to_bytes

    from hpcmref.model import HPCM
    from hpcmref.runtime.files import atomic_write

    dtype = torch.float16 if half else torch.float32
    tensors = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"The model cannot be stored: {bad[0]} is not finite as {dtype}.")
    with torch.device("meta"):
        stored = HPCM(model.config)
    stored.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    for module, grids in calibrated(stored.eval()).items():
        tensors |= {f"{_GRID}{module}.{name}": grid for name, grid in grids.items()}
    metadata = {
        "config": model.config.to_dict(),
        "description": description,
        "fingerprint": _fingerprint(model.config.to_dict(), tensors).hex(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "provenance": dict(provenance),
    }
    atomic_write(path, to_bytes(tensors, {_METADATA: json.dumps(metadata)}))
    return info(path)


def tiles() -> list[Image.Image]:
    """The photographs that grids are chosen with: 256x256 RGB."""
    from PIL import Image

    return [Image.open(path).convert("RGB") for path in sorted(_TILES.glob("*.webp"))]


def calibrated(model: HPCM) -> Grids:
    """Exact grids of a model, from the calibration tiles and a quality at each end and two between."""
    import numpy as np
    import torch

    from hpcmref.exact import calibrate

    images = [torch.from_numpy(np.array(tile)).permute(2, 0, 1)[None].float() / 255 for tile in tiles()]

    def run() -> None:
        for image in images:
            for quality in sorted({part * (model.config.qualities - 1) // 3 for part in range(4)}):
                model(image, torch.tensor([float(quality)]))

    return calibrate(model.entropy, run)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds: the model (float32, in eval mode), its exact grids and its fingerprint."""

    model: HPCM
    grids: Grids
    fingerprint: bytes


def load(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises CheckpointError."""
    import torch
    from safetensors.torch import load_file

    from hpcmref.model import HPCM, HPCMConfig

    metadata = _metadata(path)
    try:
        config = HPCMConfig.from_dict(metadata["config"])
        fingerprint = bytes.fromhex(metadata["fingerprint"])
        with torch.device("meta"):
            model = HPCM(config)
        tensors = load_file(path)
    except (ConfigError, AttributeError, KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    if _fingerprint(config.to_dict(), tensors) != fingerprint:
        raise CheckpointError(f"{path} is damaged: its weights are not those of fingerprint {fingerprint.hex()}.")
    grids: Grids = {}
    for key in [key for key in tensors if key.startswith(_GRID)]:
        module, name = key.removeprefix(_GRID).rsplit(".", 1)
        grids.setdefault(module, {})[name] = tensors.pop(key)
    keys = {name: name for name in model.state_dict()}
    model = _filled(model, {name: tensor.float() for name, tensor in tensors.items()}, keys, str(path))
    return Checkpoint(model.eval(), grids, fingerprint)


def load_official(state_dict: Mapping[str, torch.Tensor], preset: str) -> HPCM:
    """A model from the state_dict of the official HPCM code (github.com/lyq133/LIC-HPCM), in eval mode.

    preset: "base", "large" or "phi" (HPCM_Base, HPCM_Large, HPCM_Base_PhiContext). Keys may begin with "module.";
    the buffers that the official code computes (CDF tables, bounds) are accepted in any size and not used. Raises
    CheckpointError that names the key if one is missing, unknown or of another shape.
    """
    import torch

    from hpcmref.model import HPCM, PRESETS

    if preset not in PRESETS or PRESETS[preset].lambdas:
        raise CheckpointError(f"{preset!r} is not a preset of the official code: base, large or phi.")
    tensors = {key.removeprefix("module."): tensor for key, tensor in state_dict.items()}
    tensors = {key: tensor for key, tensor in tensors.items() if key not in _OFFICIAL_BUFFERS}
    with torch.device("meta"):
        model = HPCM(PRESETS[preset])
    keys = {name: _official_key(name) for name in model.state_dict()}
    return _filled(model, tensors, keys, f"The official checkpoint for {preset!r}").eval()


def convert_official(source: Path, target: Path, preset: str) -> CheckpointInfo:
    """Convert a .pth.tar of the official code to a checkpoint of ours (float32). Raises CheckpointError."""
    import torch

    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises whatever damaged bytes lead it to
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{source} cannot be read as a PyTorch checkpoint: {reason}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise CheckpointError(f"{source} does not hold a state_dict: names with their tensors.")
    model = load_official(state, preset)
    return save(model, target, f"Official HPCM {preset}", {"source": source.name}, half=False)


def _filled(model: HPCM, tensors: Mapping[str, torch.Tensor], keys: Mapping[str, str], owner: str) -> HPCM:
    """A model built on the meta device, with its weights; `keys`: name in the model -> key in `tensors`."""
    if missing := sorted(set(keys.values()) - set(tensors)):
        raise CheckpointError(f"{owner} lacks {missing[0]} ({len(missing)} tensors in all).")
    if unknown := sorted(set(tensors) - set(keys.values())):
        raise CheckpointError(f"{owner} has {unknown[0]}, which the model has not ({len(unknown)} tensors in all).")
    for name, parameter in model.state_dict().items():
        tensor = tensors[keys[name]]
        if tensor.shape != parameter.shape:
            found, expected = tuple(tensor.shape), tuple(parameter.shape)
            raise CheckpointError(f"{owner} has {keys[name]} of shape {found}, not {expected}.")
        if not tensor.is_floating_point() or tensor.is_sparse:
            raise CheckpointError(f"{owner} has {keys[name]} of {tensor.dtype}, not floating-point numbers.")
    model.load_state_dict({name: tensors[key] for name, key in keys.items()}, assign=True)
    return model


def _fingerprint(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The first 4 bytes of the SHA-256 of the entropy path: its configuration, weights (as float32) and exact grids."""
    relevant = {name: value for name, value in config.items() if name not in ("preset", *_TRANSFORM_SETTINGS)}
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode())
    for name in sorted(name for name in tensors if name.startswith((_ENTROPY, _GRID))):
        tensor = tensors[name].float().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().astype("<f4", copy=False).tobytes())
    return digest.digest()[:4]


_TRANSFORM_SETTINGS = ("transform", "stages", "synthesis", "ratio")

_OFFICIAL_BUFFERS = {
    *("scale_table", "quantized_cdf_z", "cdf_length_z", "offset_z", "quantized_cdf_y", "cdf_length_y", "offset_y"),
    "entropy_estimation.beta",
    "entropy_estimation.scale_lower_bound.bound",
    "entropy_estimation.likelihood_lower_bound.bound",
}

# Our name -> official key, applied in order.
_RENAMES = (
    (r"^entropy\.(context\.)?", ""),
    (r"^([gh]_[as])\.", r"\1.branch."),
    (r"\.spatial\.conv\.", ".branch.0.pconv."),
    (r"\.spatial\.", ".branch.0."),
    (r"\.expand\.", ".branch.1."),
    (r"\.project\.", ".branch.3."),
    (r"^prior_", "y_spatial_prior_"),
    (r"^quant_steps\.", "adaptive_params_list."),
    (r"\.values$", ""),
)


def _official_key(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^adaptor_s(\d)\.(\d)", _official_adaptor, name)


def _official_adaptor(match: re.Match[str]) -> str:
    """Ours are in the order of the steps; the official code uses adaptor i - 1 in step i, the last one in step 0."""
    scale, step = match.groups()
    steps = {"1": 1, "2": 3, "3": 6}[scale]
    return f"y_spatial_prior_adaptor_list_s{scale}.{(int(step) - 1) % steps}"
