"""Model files: the registry, reading and writing safetensors, fingerprints, and official checkpoints.

Importing this module does not import torch: `available` and `name_of` read only the headers of the files.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcmref.errors import CheckpointError, ConfigError, UnknownModelError, near
from hpcmref.format import tensorfile
from hpcmref.format.container import MAX_QUALITY
from hpcmref.format.tensorfile import TensorFile
from hpcmref.runtime.folders import model_files

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from PIL import Image

    from hpcmref.exact.convert import Grids
    from hpcmref.model import HPCM

DEFAULT_MODEL = "nano-2"
"""The name of the model that is used if none is given."""

_WEIGHTS = Path(__file__).parent / "weights"
_METADATA = "hpcmref"
_ENTROPY = "entropy."
_GRID = "exact."
_FLOATS, _INTEGERS = ("F16", "F32"), ("I8", "I16", "I32")
_SHIPPED = {"dde122eb3cb9a199f0e6774917b1fe2efba1a9d47266d93ee0d493f562c1b9e6"}
"""The SHA-256 of those shipped model files that do not contain a checksum."""

_TILES = Path(__file__).parent / "exact" / "tiles"


@dataclass(frozen=True)
class CheckpointInfo:
    """The header of a checkpoint.

    parameters: the number of weights. size: bytes of the file. default: whether it is the default model. qualities: how
    many qualities the model has; 1 for a model of one rate.
    """

    name: str
    preset: str
    path: Path
    fingerprint: bytes
    parameters: int
    size: int
    default: bool
    description: str
    qualities: int


def shipped() -> list[CheckpointInfo]:
    """Return the models that ship with the package, the default first.

    Raises CheckpointError if one of them is damaged.
    """
    found = [info(path) for path in sorted(_WEIGHTS.glob("*.safetensors"))]
    return sorted(found, key=lambda each: not each.default)


def available() -> list[CheckpointInfo]:
    """Return the models that ship with the package, the default first, and then those in the user's `models_folder`.

    Files in that folder that are not valid models are skipped, so that they do not prevent decoding with other models.
    """
    own = []
    for path in model_files():
        with contextlib.suppress(CheckpointError):
            own.append(info(path))
    return [*shipped(), *own]


def with_fingerprint(fingerprint: bytes) -> CheckpointInfo | None:
    """Return the available model with this fingerprint, or None."""
    return next((each for each in available() if each.fingerprint == fingerprint), None)


def name_of(fingerprint: bytes) -> str | None:
    """Return the name of the available model with this fingerprint, or None."""
    found = with_fingerprint(fingerprint)
    return None if found is None else found.name


def find(model: str | os.PathLike[str] | None) -> Path:
    """Return the file of a model.

    model: a name, a path, or None for the default. A name without a version, such as "nano", means the newest version.
    The name of a shipped model always means the shipped file. Raises UnknownModelError if no model has the name, and
    CheckpointError if there is no file with the path.
    """
    names = {each.name: each.path for each in reversed(available())}
    if model is None:
        model = DEFAULT_MODEL
    if str(model) in names:
        return names[str(model)]
    versions = [name for name in names if re.fullmatch(re.escape(str(model)) + r"-\d+", name)]
    if versions:
        return names[max(versions, key=lambda name: int(name.rpartition("-")[2]))]
    if Path(model).is_file():
        return Path(model)
    hint = near(str(model), names)
    listed = ", ".join(reversed(names))
    unknown = CheckpointError if _is_path(model) else UnknownModelError
    raise unknown(f"There is no model {str(model)!r}: neither a file nor one of {listed}{hint}.")


def _is_path(model: str | os.PathLike[str]) -> bool:
    """Return whether the user means the path of a model, and not its name."""
    return not isinstance(model, str) or Path(model).name != model or model.endswith(".safetensors")


def info(path: Path) -> CheckpointInfo:
    """Read the header of a checkpoint. Raises CheckpointError if the file is not a checkpoint of hpcmref."""
    with tensorfile.opened(path) as file:
        metadata = _metadata(file)
    try:
        return CheckpointInfo(
            name=path.stem,
            preset=metadata["config"]["preset"],
            path=path,
            fingerprint=_fingerprint_in(metadata),
            parameters=int(metadata["parameters"]),
            size=path.stat().st_size,
            default=path.resolve().parent == _WEIGHTS.resolve() and path.stem == DEFAULT_MODEL,
            description=str(metadata["description"]),
            qualities=MAX_QUALITY + 1 if metadata["config"].get("lambdas") else 1,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} lacks a field that the header of a checkpoint must have ({error}).") from error


def _metadata(file: TensorFile) -> dict[str, Any]:
    try:
        metadata = tensorfile.strict_json(file.metadata[_METADATA])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{file.path} is not a checkpoint of hpcmref.") from error
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file.path} is not a checkpoint of hpcmref.")
    return metadata


def _fingerprint_in(metadata: Mapping[str, Any]) -> bytes:
    """Return the 4 bytes of the fingerprint in a header. Raises KeyError, TypeError, ValueError."""
    fingerprint = bytes.fromhex(metadata["fingerprint"])
    if len(fingerprint) != 4:
        raise ValueError(f"its fingerprint has {len(fingerprint)} bytes, not 4")
    return fingerprint


def save(
    model: HPCM,
    path: Path,
    description: str,
    provenance: Mapping[str, Any],
    half: bool = True,
) -> CheckpointInfo:
    """Calibrate a model and write it as a checkpoint.

    The entropy path is stored as the integers that exact arithmetic computes with (`exact.storage`). g_a, h_a and g_s
    are stored in float16 if `half`, else in float32. The file is written completely or not at all.

    description: one line for `checkpoints list`. provenance: how the model was made, as JSON.
    Returns the header of the new file. Raises CheckpointError for weights that are not finite.
    """
    import torch

    from hpcmref.model import HPCM

    weights = {name: tensor.detach().cpu().float() for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        if not (tensor.half() if half and not name.startswith(_ENTROPY) else tensor).isfinite().all():
            raise CheckpointError(f"The model cannot be stored: {name} is not finite.")
    with torch.device("meta"):
        stored = HPCM(model.config)
    stored.load_state_dict(weights, assign=True)
    return _write(path, stored, calibrated(stored.eval()), description, provenance, half)


def convert(source: Path, target: Path) -> CheckpointInfo:
    """Rewrite a checkpoint in the present form, with a checksum and a compact entropy path.

    The source may have the older form without a checksum. The fingerprint and the decoded latents do not change.
    Returns the header of the new file. Raises CheckpointError if the source is damaged.
    """
    with tensorfile.opened(source) as file:
        half = file.entries["g_s.0.weight"].dtype == "F16" if "g_s.0.weight" in file.entries else True
        checkpoint, metadata = _loaded(file, any_file=True)
    fingerprint = checkpoint.fingerprint.hex(), metadata.get("fingerprint_rule", 1)
    described = str(metadata["description"]), metadata["provenance"]
    return _write(target, checkpoint.model, checkpoint.grids, *described, half, fingerprint)


def _write(
    path: Path,
    model: HPCM,
    grids: Grids,
    description: str,
    provenance: Mapping[str, Any],
    half: bool,
    fingerprint: tuple[str, int] | None = None,
) -> CheckpointInfo:
    """Write a compact checkpoint.

    fingerprint: its hexadecimal digits and the number of the rule that they were computed with. None computes it with
    rule 2.
    """
    import torch
    from safetensors.torch import save as to_bytes

    from hpcmref.exact import storage
    from hpcmref.runtime.files import atomic_write

    dtype = torch.float16 if half else torch.float32
    tensors = {
        name: tensor.detach().cpu().to(dtype)
        for name, tensor in model.state_dict().items()
        if not name.startswith(_ENTROPY)
    }
    tensors |= {_ENTROPY + name: tensor for name, tensor in storage.stored(model.entropy, grids).items()}
    tensors |= {f"{_GRID}{module}.{name}": grid for module, named in grids.items() for name, grid in named.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    digits, rule = fingerprint or (_fingerprint(model.config.to_dict(), arrays, 2).hex(), 2)
    metadata = {
        "config": model.config.to_dict(),
        "description": description,
        "fingerprint": digits,
        "fingerprint_rule": rule,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "provenance": dict(provenance),
    }
    metadata["sha256"] = _checksum(metadata, arrays)
    atomic_write(path, to_bytes(tensors, {_METADATA: json.dumps(metadata)}))
    return info(path)


def _checksum(metadata: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 of all tensors and of the metadata, without the checksum itself."""
    said = {name: value for name, value in metadata.items() if name != "sha256"}
    return tensorfile.digest(json.dumps(said, sort_keys=True), arrays).hexdigest()


def tiles() -> list[Image.Image]:
    """Return the photographs that calibration uses, each 256 x 256 RGB."""
    from PIL import Image

    return [Image.open(path).convert("RGB") for path in sorted(_TILES.glob("*.webp"))]


def calibrated(model: HPCM) -> Grids:
    """Choose the quantisation scales (grids) of exact arithmetic for a model.

    The model runs on the calibration tiles at four qualities: the lowest, the highest, and two between them.
    """
    import numpy as np
    import torch

    from hpcmref.exact import calibrate

    images = [torch.from_numpy(np.array(tile)).permute(2, 0, 1)[None].float() / 255 for tile in tiles()]

    def run() -> None:
        for image in images:
            for quality in sorted({part * (model.config.qualities - 1) // 3 for part in range(4)}):
                model(image, torch.tensor([float(quality)], dtype=torch.float32, device="cpu"))

    return calibrate(model.entropy, run)


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file: the model (float32, in eval mode), its quantisation scales, its fingerprint."""

    model: HPCM
    grids: Grids
    fingerprint: bytes


def load(path: Path) -> Checkpoint:
    """Read a checkpoint and check it completely. Raises CheckpointError if it is damaged."""
    with tensorfile.opened(path) as file:
        return _loaded(file)[0]


def _loaded(file: TensorFile, any_file: bool = False) -> tuple[Checkpoint, dict[str, Any]]:
    """Read a checkpoint and its metadata. any_file: accept files without a checksum that were not shipped, too."""
    import torch

    from hpcmref.exact import storage
    from hpcmref.model import HPCM, HPCMConfig

    path, metadata = file.path, _metadata(file)
    sealed = "sha256" in metadata
    try:
        config = HPCMConfig.from_dict(metadata["config"])
        fingerprint, rule = _fingerprint_in(metadata), metadata.get("fingerprint_rule", 1)
        if rule not in (1, 2) or (rule == 2 and not sealed):
            raise CheckpointError(f"{path} has a fingerprint rule that this hpcmref does not know.")
        with torch.device("meta"):
            model = HPCM(config)
    except (ConfigError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    _check_header(file, model, sealed)
    if not sealed and not any_file and file.sha256() not in _SHIPPED:
        raise CheckpointError(
            f"{path} has the old form without a checksum. Convert it with: hpcmref checkpoints convert."
        )
    arrays = file.read()
    if sealed and _checksum(metadata, arrays) != metadata["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 does not match the one in its header.")
    # Rule 1 hashes float weights, which a compact file does not contain. The checksum then covers the fingerprint.
    if not (sealed and rule == 1) and _fingerprint(config.to_dict(), arrays, rule) != fingerprint:
        raise CheckpointError(f"{path} is damaged: its weights are not those of fingerprint {fingerprint.hex()}.")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if bad := [name for name, each in tensors.items() if each.is_floating_point() and not each.isfinite().all()]:
        raise CheckpointError(f"{path} is damaged: {bad[0]} has numbers that are not finite.")
    grids: Grids = {}
    for key in [key for key in tensors if key.startswith(_GRID)]:
        module, name = key.removeprefix(_GRID).rsplit(".", 1)
        grids.setdefault(module, {})[name] = tensors.pop(key)
    try:
        storage.check_grids(model.entropy, grids)
        if sealed:
            names = [name for name in tensors if name.startswith(_ENTROPY)]
            entropy = {name.removeprefix(_ENTROPY): tensors.pop(name) for name in names}
            exact = storage.restored(model.entropy, entropy, grids)
            tensors |= {_ENTROPY + name: tensor for name, tensor in exact.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return Checkpoint(model.eval(), grids, fingerprint), metadata


def _check_header(file: TensorFile, model: HPCM, sealed: bool) -> None:
    """Raise CheckpointError unless the header has the tensors of `model` (on meta), with their shapes and types."""
    from hpcmref.exact import storage

    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    grids = {
        f"{_GRID}{module}.{name}": shape
        for module, named in storage.grid_shapes(model.entropy).items()
        for name, shape in named.items()
    }
    _compare({name: entry.shape for name, entry in file.entries.items()}, shapes | grids, str(file.path))
    integers = {_ENTROPY + name for name in storage.convolution_names(model.entropy)} if sealed else set()
    for name, entry in file.entries.items():
        types: tuple[str, ...] = _INTEGERS if name in integers else _FLOATS
        if name in grids:
            types = ("I32",) if name.rsplit(".", 1)[1].startswith("limit") else ("I8",)
        if entry.dtype not in types:
            raise CheckpointError(f"{file.path} has {name} of type {entry.dtype}, not {' or '.join(types)}.")


def verify(path: Path) -> None:
    """Check a checkpoint completely, and that its layers can be computed exactly. Raises CheckpointError."""
    from hpcmref.exact import attach

    checkpoint = load(path)
    attach(checkpoint.model.entropy, checkpoint.grids)


def load_official(state_dict: Mapping[str, torch.Tensor], preset: str) -> HPCM:
    """Make a model, in eval mode, from a state_dict of the official HPCM code (github.com/lyq133/LIC-HPCM).

    preset: "base", "large" or "phi" (HPCM_Base, HPCM_Large, HPCM_Base_PhiContext). Keys may begin with "module.". The
    buffers that the official code computes (CDF tables, bounds) are ignored. Raises CheckpointError with the name of a
    key that is missing, unknown, or of another shape.
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
    """Convert a .pth.tar file of HPCM's authors to a model file of hpcmref in float32, and return its description.

    source: read with `weights_only=True`, so that it cannot run code. target: replaced if it exists. preset: base,
    large or phi.

    Raises CheckpointError if the preset is another one, or the source is missing, damaged or not of the preset.
    """
    import torch

    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged bytes can make the unpickler raise any exception
        advises = "weights_only" in str(error)  # to load the file in the way that can run code in it
        reason = "" if advises else ": " + (str(error).partition("\n")[0] or type(error).__name__)
        raise CheckpointError(f"{source} is not a PyTorch checkpoint that can be read safely{reason}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise CheckpointError(f"{source} does not contain a state_dict (names with tensors).")
    model = load_official(state, preset)
    return save(model, target, f"Official HPCM {preset}", {"source": source.name}, half=False)


def _compare(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], owner: str) -> None:
    """Raise CheckpointError unless two sets of tensor names and shapes are equal. owner: the file, for the message."""
    if missing := sorted(set(expected) - set(found)):
        raise CheckpointError(f"{owner} lacks {missing[0]} ({len(missing)} tensors in all).")
    if unknown := sorted(set(found) - set(expected)):
        raise CheckpointError(
            f"{owner} has {unknown[0]:.100}, which the model does not have ({len(unknown)} tensors in all)."
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(f"{owner} has {name} of shape {found[name]}, not {shape}.")


def _filled(model: HPCM, tensors: Mapping[str, torch.Tensor], keys: Mapping[str, str], owner: str) -> HPCM:
    """Assign weights to a model that was built on the meta device. keys: name in the model -> key in `tensors`."""
    shapes = {keys[name]: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    _compare({key: tuple(tensor.shape) for key, tensor in tensors.items()}, shapes, owner)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.is_sparse:
            raise CheckpointError(f"{owner} has {key} of {tensor.dtype}, not floating-point numbers.")
    model.load_state_dict({name: tensors[key] for name, key in keys.items()}, assign=True)
    return model


def _fingerprint(config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], rule: int) -> bytes:
    """Return the first 4 bytes of the SHA-256 over the configuration, weights and grids of the entropy path.

    rule: 1 hashes weights and grids as float32. 2 hashes them as a compact file stores them.
    """
    import hashlib

    settings = json.dumps(_settings(config), sort_keys=True)
    arrays = {name: array for name, array in arrays.items() if name.startswith((_ENTROPY, _GRID))}
    if rule == 2:
        return tensorfile.digest(f"rule 2 {settings}", arrays).digest()[:4]
    digest = hashlib.sha256(settings.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape}".encode())
        digest.update(arrays[name].astype("<f4").tobytes())
    return digest.digest()[:4]


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that latents depend on. A setting newer than rule 1 is left out if it has its default."""
    from hpcmref.model.config import HPCMConfig, MemoryConfig

    def kept(values: Mapping[str, Any], owner: type[HPCMConfig] | type[MemoryConfig]) -> dict[str, Any]:
        fields = owner.__dataclass_fields__
        return {name: each for name, each in values.items() if name in _OF_RULE_1 or each != fields[name].default}

    settings = {name: each for name, each in config.items() if name not in ("preset", *_TRANSFORM_SETTINGS)}
    if settings.get("memory"):
        settings["memory"] = kept(settings["memory"], MemoryConfig)
    return kept(settings, HPCMConfig)


_OF_RULE_1 = frozenset(
    [
        "M",
        "N",
        "hyper_blocks",
        "hyper_ratio",
        "context_width",
        "prior_s1_s2",
        "prior_s3",
        "heads",
        "windows",
        "displaced_s2",
        "lambdas",
        "memory",
        "mode",
        "scales",
        "transfer",
        "before_prior",
        "max_refs",
        "topk",
        "compress_ratio",
        "temperature",
        "num_heads",
        "value_resolution",
        "feature_map",
        "per_position",
    ]
)
"""Settings of HPCMConfig and MemoryConfig that are always part of the fingerprint."""

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
    """Map the number of an adaptor: step i of hpcmref uses the official adaptor i - 1, and the first step the last."""
    scale, step = match.groups()
    steps = {"1": 1, "2": 3, "3": 6}[scale]
    return f"y_spatial_prior_adaptor_list_s{scale}.{(int(step) - 1) % steps}"
