"""The transforms g_a, g_s, h_a and h_s, and the DCT with which the "dct" transforms are initialised."""

import math

import torch
from torch import Tensor, nn

from hpcmref.model.config import HPCMConfig
from hpcmref.model.layers import Down, PConvRB, Up, conv1x1

BLOCK = 8
"""The dct transform rearranges blocks of BLOCK x BLOCK pixels as channels before its first convolution."""


def g_a(config: HPCMConfig) -> nn.Sequential:
    """Analysis transform: (B, 3, H, W) image in 0..1 -> (B, M, H/16, W/16)."""
    if config.transform == "dct":
        ((width, blocks),) = config.stages
        return nn.Sequential(
            nn.PixelUnshuffle(BLOCK),
            conv1x1(3 * BLOCK**2, width),
            *(PConvRB(width, config.ratio) for _ in range(blocks)),
            Down(width, config.M),
        )
    layers: list[nn.Module] = []
    inputs = 3
    for width, blocks in config.stages:
        layers.append(Down(inputs, width, kernel=4 if inputs == 3 else 2))
        layers += [PConvRB(width, config.ratio) for _ in range(blocks)]
        inputs = width
    return nn.Sequential(*layers, Down(inputs, config.M))


def g_s(config: HPCMConfig) -> nn.Sequential:
    """Synthesis transform: (B, M, H/16, W/16) -> (B, 3, H, W), not clamped."""
    if config.transform == "dct":
        ((width, blocks),) = config.synthesis
        return nn.Sequential(
            Up(config.M, width),
            *(PConvRB(width, config.ratio) for _ in range(blocks)),
            conv1x1(width, 3 * BLOCK**2),
            nn.PixelShuffle(BLOCK),
        )
    layers: list[nn.Module] = []
    inputs = config.M
    for width, blocks in config.synthesis:
        layers.append(Up(inputs, width))
        layers += [PConvRB(width, config.ratio) for _ in range(blocks)]
        inputs = width
    return nn.Sequential(*layers, Up(inputs, 3, kernel=4))


def h_a(config: HPCMConfig) -> nn.Sequential:
    """Hyper analysis: (B, M, h, w) -> (B, N, h/4, w/4)."""
    return nn.Sequential(
        PConvRB(config.M, config.hyper_ratio),
        Down(config.M, config.N),
        *(PConvRB(config.N, config.hyper_ratio) for _ in range(config.hyper_blocks)),
        Down(config.N, config.N),
    )


def h_s(config: HPCMConfig) -> nn.Sequential:
    """Hyper synthesis: (B, N, h/4, w/4) -> (B, 2 M, h, w), the hyper scales and means."""
    return nn.Sequential(
        Up(config.N, config.N),
        *(PConvRB(config.N, config.hyper_ratio) for _ in range(config.hyper_blocks)),
        Up(config.N, 2 * config.M),
        PConvRB(2 * config.M, config.hyper_ratio),
    )


def halo(config: HPCMConfig, stages: tuple[tuple[int, int], ...]) -> int:
    """Rows of the 1/16 lattice above and below that a row of g_a or g_s with these stages depends on."""
    if config.transform == "dct":
        return -(-sum(blocks for _, blocks in stages) * BLOCK // 16)
    # Each block is a 3x3 convolution at its stage's resolution; the 4x4 convolution adds a pixel.
    return -(-(1 + sum(blocks * 2**level for level, (_, blocks) in enumerate(sorted(stages), start=1))) // 16)


def hyper_halo(config: HPCMConfig) -> int:
    """Rows of the z lattice above and below that a row of h_a or h_s depends on."""
    return -(-(1 + 2 * config.hyper_blocks) // 4)


def start_as_dct(analysis: nn.Sequential, synthesis: nn.Sequential) -> None:
    """Initialise g_a as an orthonormal DCT of decorrelated colours, and g_s as its inverse.

    The 1x1 convolution becomes the 8x8 DCT, and the 2x2 convolution a Haar step that keeps the lowest frequencies. The
    residual branches are scaled so that they have nearly no effect. The output of g_a is then in units of the 0..1
    pixel range.
    """
    frequencies, dct = _dct_basis()
    to_channels, to_latents, from_latents, to_pixels = (
        module for module in (*analysis, *synthesis) if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    )
    kept, haar = _haar_basis(frequencies, len(to_latents.weight))
    with torch.no_grad():
        _set_leading_(to_channels.weight[:, :, 0, 0], dct)
        _set_leading_(_bias(to_channels), -0.5 * dct.sum(1))
        _set_leading_(to_pixels.weight[:, :, 0, 0].T, dct)
        _bias(to_pixels).fill_(0.5)
        for convolution in (to_latents, from_latents):
            convolution.weight.zero_()
            convolution.weight[torch.arange(len(kept)), kept] = haar
            _bias(convolution).zero_()
        for block in (*analysis, *synthesis):
            if isinstance(block, PConvRB):
                block.project.weight.mul_(0.02)
                _bias(block.project).zero_()


def _bias(convolution: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    assert convolution.bias is not None
    return convolution.bias


def _set_leading_(target: Tensor, values: Tensor) -> None:
    """Overwrite the first channels of `target`. The others, which the DCT does not need, start with small weights."""
    target.mul_(0.1)
    target[: len(values)] = values


def _dct_basis() -> tuple[Tensor, Tensor]:
    """The 192 frequencies (u, v, colour) from the most significant one on, and the basis (192, 192).

    The basis is for the channels that PixelUnshuffle makes from pixels.
    """
    position = torch.arange(BLOCK, dtype=torch.float64)
    cosines = torch.cos(math.pi * (position + 0.5) * position[:, None] / BLOCK) * math.sqrt(2 / BLOCK)
    cosines[0] /= math.sqrt(2)
    colours = torch.tensor([[1, 1, 1], [-1, -1, 2], [1, -1, 0]], dtype=torch.float64)
    colours /= colours.norm(dim=1, keepdim=True)
    basis = torch.einsum("kc,ur,vs->kuvcrs", colours, cosines, cosines).reshape(3 * BLOCK**2, 3 * BLOCK**2)
    colour, u, v = torch.meshgrid(position[:3], position, position, indexing="ij")
    frequencies = torch.stack((u.flatten(), v.flatten(), colour.flatten()), dim=1)
    order = _insignificance(frequencies).argsort(stable=True)
    return frequencies[order], basis[order].float()


def _haar_basis(frequencies: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` most significant outputs of the Haar steps of all frequencies.

    Returns their source channels (count,) and kernels (count, 2, 2).
    """
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    kernels = torch.einsum("ar,bs->abrs", signs, signs).reshape(4, 2, 2) / 2
    shift = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
    doubled = frequencies[:, None].repeat(1, 4, 1)
    doubled[:, :, :2] = 2 * doubled[:, :, :2] + shift
    kept = _insignificance(doubled.reshape(-1, 3)).argsort(stable=True)[:count]
    return kept // 4, kernels[kept % 4]


def _insignificance(frequencies: Tensor) -> Tensor:
    """A number that is the higher, the less a frequency matters.

    It is the radius for luma, and 2.2 times the radius plus 1.5 for chroma; both numbers are from a prototype.
    """
    radius = frequencies[:, :2].norm(dim=1)
    return torch.where(frequencies[:, 2] == 0, radius, 2.2 * radius + 1.5)
