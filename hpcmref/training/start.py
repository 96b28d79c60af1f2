"""Where does a run begin that does not begin from nothing? From a trained model, which may be smaller."""

import math

import torch
from torch import Tensor, nn

from hpcmref.errors import ConfigError
from hpcmref.model import HPCM

GROUPS = 8
"""s3 codes the channels of y in so many groups, so a model grows inside each of them."""


def start_from(model: HPCM, trained: HPCM) -> None:
    """Give `model` (initialised) the weights of `trained`, so that it begins as the same function.

    `model` may have more latent channels (M): each of the 8 channel groups of y keeps its trained channels first, and
    new ones follow. What is trained does not see the new channels at first, except that g_s adds them to the picture.
    Parts that only `model` has keep their start. Raises ConfigError when the two differ in anything else.
    """
    ours, theirs = model.config, trained.config
    before, after = theirs.M // GROUPS, ours.M // GROUPS
    if after < before:
        raise ConfigError(f"A model of M = {ours.M} cannot start from one of M = {theirs.M}.")
    for setting in ("transform", "ratio", "hyper_ratio", "N", "context_width", "heads", "windows", "displaced_s2"):
        if getattr(ours, setting) != getattr(theirs, setting):
            raise ConfigError(f"The trained model and the preset {ours.preset!r} differ in {setting}.")
    if after > before and ours.heads and 2 * GROUPS % ours.heads:
        raise ConfigError(f"With {ours.heads} heads a model cannot grow: a head would see parts of channel groups.")
    source = dict(trained.named_parameters())
    targets = dict(model.named_parameters())
    if unknown := sorted(set(source) - set(targets)):
        raise ConfigError(f"The trained model has {unknown[0]}, which the preset {ours.preset!r} has not.")
    places = {name: _places(name, targets[name], tensor, before, after) for name, tensor in source.items()}
    if after > before and ours.transform == "dct":
        _order_frequencies(model, theirs.M)
    convolutions = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    with torch.no_grad():
        for name, tensor in source.items():
            target = targets[name]
            query = ".conv_q." in name
            if query and after > before:
                target.zero_()  # the new channels of a head count for nothing at first
            if name in convolutions and target.shape[1] != tensor.shape[1]:
                target[places[name][0].flatten()] = 0  # a trained output sees no new input
            # Attention divides by the square root of the channels of a head.
            target[places[name]] = tensor.to(target) * (math.sqrt(after / before) if query else 1)


def _places(name: str, target: Tensor, source: Tensor, before: int, after: int) -> tuple[Tensor, ...]:
    """The index that picks, from `target`, the numbers which `source` has; ConfigError if it does not fit."""
    places = []
    for axis, (new, old) in enumerate(zip(target.shape, source.shape, strict=True)):
        place = torch.arange(old, device=target.device)
        if new != old:
            if old % before or new != old // before * after:
                shapes = f"{tuple(source.shape)} in the trained model and {tuple(target.shape)} in this one"
                raise ConfigError(f"{name} has the shape {shapes}.")
            place = place // before * after + place % before
        places.append(place.view([-1 if axis == other else 1 for other in range(source.dim())]))
    return tuple(places)


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
