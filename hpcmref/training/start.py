"""Start a training run from a trained model, which may have fewer latent channels or smaller networks."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hpcmref.errors import ConfigError
from hpcmref.model import HPCM
from hpcmref.model.config import HPCMConfig
from hpcmref.model.layers import ResidualBlock
from hpcmref.model.schedule import STEPS_S2, STEPS_S3

GROUPS = 8
"""s3 codes the channels of y in this many groups. If M grows, new channels are added to each group."""

GROWING = ("stages", "synthesis", "ratio", "hyper_ratio", "hyper_blocks", "context_width", "prior_s1_s2", "prior_s3")
"""Settings of widths and depths, which may be larger than in the trained model."""


def start_from(model: HPCM, trained: HPCM) -> None:
    """Copy the weights of `trained` into `model`, which `HPCM.initialise` has prepared and which may be larger.

    These differences are allowed; any other raises ConfigError:

    - `model` has more latent channels (M). In each of the 8 channel groups of y, the new channels follow the trained
      ones. At first only g_s uses the new channels, and adds what they mean to the picture.
    - `model` has wider or deeper networks (`GROWING`), and the same M. At first it computes what `trained` computes: no
      trained channel reads a new one, and new residual blocks add nothing. Blocks are added after the trained ones.
    - `model` has a state (a memory bank) and `trained` has none. At first no layer reads it.
    - `model` lacks the attention of `trained`. It then predicts as `without_attention` describes, and not as `trained`.

    Parts that only `model` has keep their initial weights, except the last layer of new residual blocks, which is zero.
    """
    ours, theirs = model.config, trained.config
    _check(ours, theirs)
    source: dict[str, Tensor] = dict(trained.named_parameters())
    if theirs.heads and not ours.heads:
        source = without_attention(source)
    names = _names(trained)
    source = {_renamed(name, names): tensor for name, tensor in source.items()}
    names = _names(model)
    targets = {_renamed(name, names): parameter for name, parameter in model.named_parameters()}
    if unknown := sorted(set(source) - set(targets)):
        raise ConfigError(f"The trained model has {unknown[0]}, which the preset {ours.preset!r} has not.")
    if ours.M > theirs.M and ours.transform == "dct":
        _order_frequencies(model, theirs.M)
    convolutions = {
        _renamed(f"{name}.weight", names) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)
    }
    with torch.no_grad():
        for name, target in targets.items():
            if name in source:
                _copy_(name, target, source[name], ours, theirs, name in convolutions)
            elif ".project." in name:
                target.zero_()  # a new residual block


def _copy_(name: str, whole: Tensor, trained: Tensor, ours: HPCMConfig, theirs: HPCMConfig, convolution: bool) -> None:
    """Copy one parameter into the larger one. convolution: it is the kernel of a convolution, outputs first."""
    before, after = theirs.M // GROUPS, ours.M // GROUPS
    axis = _state_axis(name)
    parts: list[tuple[Tensor, Tensor]] = [(whole, trained)]
    if axis is not None:
        parts = list(zip(_split(whole, axis, ours.state_width), _split(trained, axis, theirs.state_width), strict=True))
    for target, part in parts:
        if target.shape != part.shape and 0 in part.shape:
            if axis == 1:
                target.zero_()  # the state is not read at first; that it is written changes nothing
            continue
        places = _places(name, target, part, before, after)
        query = ".conv_q." in name
        if query and after > before:
            target.zero_()  # the new channels of a head count for nothing at first
        if convolution and target.shape[1] != part.shape[1]:
            target[places[0].flatten()] = 0  # a trained output sees no new input
        # Attention divides by the square root of the channels of a head.
        target[places] = part.to(target) * (math.sqrt(after / before) if query else 1)


@torch.no_grad()
def without_attention(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model with attention for one without: each adaptor reads the context itself.

    Attention gives attended + conv_out(context). conv_out is folded into the adaptors that read its result, which are
    all but the first of s2 and of s3. The term `attended` is lost, and so is conv_out where a context goes to the next
    scale.
    """
    folded = {name: tensor.detach().clone() for name, tensor in weights.items() if ".attn_s" not in name}
    for scale, steps in ((2, len(STEPS_S2)), (3, len(STEPS_S3))):
        conv_out = f"entropy.context.attn_s{scale}.conv_out"
        weight, bias = weights[f"{conv_out}.weight"][:, :, 0, 0], weights[f"{conv_out}.bias"]
        for step in range(1, steps):
            adaptor = f"entropy.context.adaptor_s{scale}.{step}"
            reads = folded[f"{adaptor}.weight"][:, : len(bias), 0, 0]
            folded[f"{adaptor}.bias"] += reads @ bias
            reads.copy_(reads @ weight)
    return folded


def _check(ours: HPCMConfig, theirs: HPCMConfig) -> None:
    """Raise ConfigError if the configurations differ in another way than `start_from` allows."""
    if ours.M < theirs.M:
        raise ConfigError(f"A model of M = {ours.M} cannot start from one of M = {theirs.M}.")
    for setting in ("transform", "N", "heads", "windows", "displaced_s2"):
        if getattr(ours, setting) != getattr(theirs, setting) and (setting != "heads" or ours.heads):
            raise ConfigError(f"The trained model and the preset {ours.preset!r} differ in {setting}.")
    for setting in GROWING:
        new, old = getattr(ours, setting), getattr(theirs, setting)
        if new == old:
            continue
        if ours.M != theirs.M:
            raise ConfigError(f"A model grows in M or in {setting}, but not in both at once.")
        if len(_flat(new)) != len(_flat(old)) or any(a < b for a, b in zip(_flat(new), _flat(old), strict=True)):
            raise ConfigError(f"The preset {ours.preset!r} has the {setting} {new}, and the trained model {old}.")
    if ours.M > theirs.M and ours.heads and 2 * GROUPS % ours.heads:
        raise ConfigError(f"With {ours.heads} heads a model cannot grow: a head would see parts of channel groups.")
    if theirs.state_width not in (0, ours.state_width):
        raise ConfigError(f"The trained model's state has {theirs.state_width} channels, and not {ours.state_width}.")


def _flat(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else [number for part in value for number in _flat(part)]


def _names(model: HPCM) -> dict[str, str]:
    """Names for the parts of each sequence that do not change when residual blocks are added.

    Residual blocks between two other layers are counted from 0, and so are the other layers: "g_a.2" becomes
    "g_a.block 2.0", and "g_a.6" becomes "g_a.layer 2".
    """
    names = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            layers = blocks = 0
            for child, part in module.named_children():
                if isinstance(part, ResidualBlock):
                    names[f"{name}.{child}"] = f"{name}.block {layers}.{blocks}"
                    blocks += 1
                else:
                    names[f"{name}.{child}"] = f"{name}.layer {layers}"
                    layers, blocks = layers + 1, 0
    return names


def _renamed(parameter: str, names: Mapping[str, str]) -> str:
    """The name of a parameter, of which a part may be replaced by one of `names`."""
    parts = parameter.split(".")
    for end in range(len(parts)):
        if new := names.get(".".join(parts[:end])):
            return ".".join([new, *parts[end:]])
    return parameter


def _state_axis(name: str) -> int | None:
    """Which axis of a parameter has the channels of a state at its end: inputs of adaptors, outputs of priors."""
    if re.fullmatch(r"entropy\.context\.adaptor_s\d\.\d\.weight", name):
        return 1
    return 0 if re.fullmatch(r"entropy\.context\.prior_s\w+\.branch_2\.layer \d\.(weight|bias)", name) else None


def _split(tensor: Tensor, axis: int, state: int) -> tuple[Tensor, Tensor]:
    """Views of all but the last `state` channels, and of those."""
    return tensor.narrow(axis, 0, tensor.shape[axis] - state), tensor.narrow(axis, tensor.shape[axis] - state, state)


def _places(name: str, target: Tensor, source: Tensor, before: int, after: int) -> tuple[Tensor, ...]:
    """The index that picks, from `target`, the numbers which `source` has; ConfigError if it does not fit.

    before, after: the channels of a group of y in both models.
    """
    places = []
    for axis, (new, old) in enumerate(zip(target.shape, source.shape, strict=True)):
        place = torch.arange(old, device=target.device)
        if new != old and after != before:
            if old % before or new != old // before * after:
                shapes = f"{tuple(source.shape)} in the trained model and {tuple(target.shape)} in this one"
                raise ConfigError(f"{name} has the shape {shapes}.")
            place = place // before * after + place % before
        elif new != old and not _is_inner(name, axis):
            # A partial convolution mixes the first quarter of the channels, so new ones are added to it and after it.
            place[old // 4 :] += new // 4 - old // 4
        places.append(place.view([-1 if axis == other else 1 for other in range(source.dim())]))
    return tuple(places)


def _is_inner(name: str, axis: int) -> bool:
    """Whether an axis has channels inside a residual block: the mixed ones, or those of its wide middle layer."""
    return ".spatial.conv." in name or (".expand." in name and axis == 0) or (".project.weight" in name and axis == 1)


def _order_frequencies(model: HPCM, kept: int) -> None:
    """Move the latents of a DCT start so that the `kept` lowest frequencies lie where trained channels will."""
    channels = model.config.M
    before, after = kept // GROUPS, channels // GROUPS
    place = torch.arange(channels)
    trained = place % after < before
    order = torch.empty_like(place)
    order[trained] = torch.arange(kept)
    order[~trained] = torch.arange(kept, channels)
    analysis, synthesis = model.g_a[-1], model.g_s[0]
    assert isinstance(analysis, nn.Conv2d)
    assert isinstance(synthesis, nn.ConvTranspose2d)
    with torch.no_grad():
        analysis.weight.copy_(analysis.weight[order])
        synthesis.weight.copy_(synthesis.weight[order])
