"""The multi-reference memory bank: every coding step looks back at the contexts of all steps before it.

    context after attention --> read: recall what resembles it --> gate * recalled + (1 - gate) * context --> next step
    context that was replaced --> write: a reference for the steps that follow

What a bank knows of an image is a value (`State`) that `write` and `read` take and `write` returns; nothing stays on a
module. References of all scales live on the lattice of s1 (one position for `cell` x `cell` of s1, s2 or s3), so those
of one scale can be handed to the next. The gate is closed when training begins: a bank changes nothing at first.

light   a reference is a key, its mean, and a value, itself on the lattice of s1; recalled are the topk of the last
        max_refs whose keys are the most similar to that of the present context (a 1x1 convolution of the mean is the
        mean of the 1x1 convolution, and cheaper)
full    the same, with values narrowed to fewer channels on a fixed grid, and widened again
linear  all references together are two sums over such grids; every position attends to them linearly
global  the same, over whole planes and with softmax as feature map
cross   a reference is the context, narrowed; every position attends to its window in the last max_refs

The mode `state` is simpler, and takes the place of attention: a few channels at every position, to which each prior
adds what the next steps should know, and which their adaptors read (`StateBank`).

    prior --> scales, means --> code --> y_hat --+
      |                                          v
      +--> + state --------------------------> adaptor --> next prior          (each value repeated 2 x 2 to s2, to s3)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpcmref.model.config import HPCMConfig, MemoryConfig
from hpcmref.model.context import CrossAttentionCell
from hpcmref.model.layers import RateTable, conv1x1
from hpcmref.model.strips import in_strips


class State(NamedTuple):
    """What a bank knows of a batch: numbers of its quality, and references, the oldest first."""

    quality: Tensor
    references: tuple[tuple[Tensor, ...], ...] = ()


class Pool(nn.Module):
    """Means over cells of cell x cell positions."""

    def __init__(self, cell: int) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, h, w) -> (B, C, h/cell, w/cell)."""
        return x if self.cell == 1 else F.avg_pool2d(x, self.cell)


class GridMean(nn.Module):
    """Means over a grid of at most side x side cells."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, h, w) -> (B, C, min(side, h), min(side, w)); summed in float64."""
        rows, columns = (_membership(length, self.side, x.device) for length in x.shape[2:])
        sums = rows.T @ x.double() @ columns
        return (sums / (rows.sum(0)[:, None] * columns.sum(0))).to(x.dtype)


def from_grid(x: Tensor, size: torch.Size, side: int) -> Tensor:
    """The cell of `GridMean` that every position is in: x (B, C, rows, columns) -> (B, C, *size)."""
    rows, columns = (_cells(length, side, x.device) for length in size)
    return x.index_select(2, rows).index_select(3, columns)


def _cells(length: int, side: int, device: torch.device) -> Tensor:
    """Which of at most `side` cells each position is in: (length,) int64."""
    cells = min(side, length)
    return torch.arange(length, device=device) * cells // length


def _membership(length: int, side: int, device: torch.device) -> Tensor:
    """Which positions are in which cell: (length, cells) float64 of 0 and 1."""
    cells = torch.arange(min(side, length), device=device)
    return (_cells(length, side, device)[:, None] == cells).double()


def top(similarity: Tensor, k: int) -> Tensor:
    """Which k references are the most similar; of equal ones the oldest. similarity: (B, R, ...) -> bool, the same."""
    order = torch.arange(similarity.shape[1], device=similarity.device)
    older = (order[:, None] > order).view(len(order), len(order), *[1] * (similarity.dim() - 2))
    one, other = similarity.unsqueeze(2), similarity.unsqueeze(1)
    return ((other > one) | ((other == one) & older)).sum(2) < k


class MemoryBank(nn.Module, ABC):
    """What every mode shares: the lattice of s1, the gate, and the contract `start`, `write` and `read`."""

    def __init__(self, config: HPCMConfig, memory: MemoryConfig, scale: int) -> None:
        super().__init__()
        channels = 2 * config.M
        self.transfer = memory.transfer
        self.before_prior = memory.before_prior
        self.pool = Pool(2 ** (scale - 1))
        self.gate = nn.Sequential(conv1x1(2 * channels, channels), nn.Sigmoid())
        self.opening = RateTable(torch.zeros(config.anchors), channels)

    def start(self, quality: Tensor, before: State | None = None) -> State:
        """The state before a scale's first step: quality (B,); `before`: how the scale before it ended."""
        return State(quality, before.references if before is not None and self.transfer else ())

    def write(self, state: State, context: Tensor) -> State:
        """The state with one more context (B, 2M, h, w)."""
        return state._replace(references=self._with(state, _full(context, state)))

    def read(self, state: State, context: Tensor) -> Tensor:
        """The context (B, 2M, h, w), joined by the gate with what the bank recalls; as it is if there is nothing."""
        if not state.references:
            return context
        context = _full(context, state)
        lattice = self._on_lattice(context)
        recalled = self._recall(state, context, lattice)
        small = recalled if recalled.shape == lattice.shape else self._on_lattice(recalled)
        gate = self.opening(state.quality) * self.gate(torch.cat((lattice, small), dim=1))
        cell = self.pool.cell
        blocks = context.unflatten(3, (-1, cell)).unflatten(2, (-1, cell))
        coarse = recalled.shape == lattice.shape
        recalled = recalled[:, :, :, None, :, None] if coarse else recalled.view_as(blocks)
        change = (recalled - blocks).mul_(gate[:, :, :, None, :, None])
        joined = change.add_(blocks).flatten(4, 5).flatten(2, 3)
        return torch.empty_like(context).copy_(joined)  # in its layout: kernels round by layout

    def _on_lattice(self, x: Tensor) -> Tensor:
        return in_strips(self.pool, x, halo=0, unit=self.pool.cell)

    @abstractmethod
    def _with(self, state: State, context: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """The references with one more context."""

    @abstractmethod
    def _recall(self, state: State, context: Tensor, lattice: Tensor) -> Tensor:
        """What the references hold for a context: (B, 2M, h, w), or on the lattice of s1 as `lattice`, its means."""


def _full(context: Tensor, state: State) -> Tensor:
    """Attention may have been computed in bfloat16 (training), also inside a bank."""
    return context.to(state.quality.dtype)


class Recall(nn.Module):
    """The values of the references whose keys are the most similar to the query (cosine): softmax, times similarity.

    Without that factor keys and queries would learn nothing where one reference is chosen: its softmax is 1.
    """

    def __init__(self, topk: int, temperature: float) -> None:
        super().__init__()
        self.topk = topk
        self.temperature = temperature

    def forward(self, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """query and every key: (B, d, h, w), where 1 x 1 holds for all positions; values: (B, C, H, W), the result."""
        similarity = torch.stack([F.cosine_similarity(query, key, dim=1) for key in keys], dim=1)
        chosen = top(similarity, self.topk)
        weights = (similarity / self.temperature).masked_fill(~chosen, -torch.inf).softmax(1) * similarity
        return torch.stack([weights[:, i, None] * value for i, value in enumerate(values)]).sum(0)


class ReferenceBank(MemoryBank):
    """The last contexts one by one, and those of them that resemble the present one: light and full."""

    def __init__(self, config: HPCMConfig, memory: MemoryConfig, scale: int) -> None:
        super().__init__(config, memory, scale)
        channels, narrow = 2 * config.M, 2 * config.M // memory.compress_ratio
        self.max_refs = memory.max_refs[scale - 1]
        self.side = memory.value_resolution if memory.mode == "full" else None
        # Where values are kept (the lattice of s1, or a fixed grid over it), and what keys and queries are made of.
        self.grid = GridMean(self.side) if self.side else nn.Identity()
        self.mean = nn.Identity() if memory.per_position else GridMean(1)
        self.conv_q = conv1x1(channels, narrow)
        self.conv_k = conv1x1(channels, narrow)
        self.conv_v = conv1x1(channels, narrow if self.side else channels)
        self.widen = conv1x1(narrow, channels) if self.side else nn.Identity()
        self.recall = Recall(memory.topk[scale - 1], memory.temperature)

    def _with(self, state: State, context: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        plane = self.grid(self._on_lattice(context))
        reference = (self.conv_k(self.mean(plane)), self.conv_v(plane))
        return (*state.references, reference)[-self.max_refs :]

    def _recall(self, state: State, context: Tensor, lattice: Tensor) -> Tensor:
        keys, values = zip(*state.references, strict=True)
        query = self.conv_q(self.mean(self.grid(lattice)))
        recalled = self.widen(self.recall(query, list(keys), list(values)))
        return from_grid(recalled, lattice.shape[2:], self.side) if self.side else recalled


class LinearAttend(nn.Module):
    """phi(query) sum(phi(key)^T value) / phi(query) sum(phi(key)): attention whose cost does not grow with its tokens.

    phi is elu + 1, relu, or softmax: over the tokens for keys and over the channels for queries.
    """

    def __init__(self, heads: int, feature_map: str) -> None:
        super().__init__()
        self.heads = heads
        self.feature_map = feature_map

    def summary(self, key: Tensor, value: Tensor, sharpness: Tensor) -> tuple[Tensor, Tensor]:
        """key (B, d, h, w), value (B, e, h, w), sharpness (B, heads, 1, 1) -> what `forward` needs of them.

        That is phi(key)^T value (B, heads, d/heads, e/heads), and the sum of phi(key) (B, heads, d/heads, 1); both of
        several contexts may be added.
        """
        key, value = self.tokens(key) * sharpness, self.tokens(value)
        if self.feature_map == "softmax":
            return key.softmax(2).transpose(2, 3) @ value, torch.ones_like(key[:, :, 0, :, None])
        phi = self._phi(key)
        return phi.transpose(2, 3) @ value, phi.sum(2)[..., None]

    def forward(self, query: Tensor, values: Tensor, weights: Tensor, sharpness: Tensor) -> Tensor:
        """query (B, d, h, w), what `summary` gave, sharpness (B, heads, 1, 1) -> (B, e, h, w)."""
        phi = self._phi(self.tokens(query) * sharpness)
        return self.plane(phi @ values / (phi @ weights).clamp(min=1e-6), query.shape)

    def tokens(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, heads, h w, C/heads)."""
        return x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)

    def plane(self, x: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `tokens`: (B, heads, h w, e/heads) -> (B, e, h, w); shape: of any tensor (B, C, h, w)."""
        return x.transpose(2, 3).flatten(1, 2).unflatten(2, shape[2:])

    def _phi(self, x: Tensor) -> Tensor:
        if self.feature_map == "softmax":
            return x.softmax(3)
        return F.relu(x) if self.feature_map == "relu" else F.elu(x) + 1


class LinearBank(MemoryBank):
    """Linear attention of every position over a fixed grid of every context so far, whose sums are all that is kept."""

    def __init__(self, config: HPCMConfig, memory: MemoryConfig, scale: int) -> None:
        super().__init__(config, memory, scale)
        channels, narrow = 2 * config.M, 2 * config.M // memory.compress_ratio
        self.grid: nn.Module = GridMean(memory.value_resolution)
        self.conv_q = conv1x1(channels, narrow)
        self.conv_k = conv1x1(channels, narrow)
        self.conv_v = conv1x1(channels, narrow)
        self.widen = conv1x1(narrow, channels)
        self.sharpness = RateTable(torch.ones(config.anchors), memory.num_heads)
        self.attend = LinearAttend(memory.num_heads, memory.feature_map)

    def _with(self, state: State, context: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        plane = self.grid(self._on_lattice(context))
        sums = self.attend.summary(self.conv_k(plane), self.conv_v(plane), self.sharpness(state.quality))
        if state.references:
            (old,) = state.references
            sums = (old[0] + sums[0], old[1] + sums[1])
        return (sums,)

    def _recall(self, state: State, context: Tensor, lattice: Tensor) -> Tensor:
        ((values, weights),) = state.references
        sharpness = self.sharpness(state.quality)
        return in_strips(
            lambda part: self.widen(self.attend(self.conv_q(part), values, weights, sharpness)), context, halo=0
        )


class LinearGlobalInterContext(LinearBank):
    """The global context of MLIC++ (arXiv 2307.15421): softmax over channels for queries, over the plane for keys."""

    def __init__(self, config: HPCMConfig, memory: MemoryConfig, scale: int) -> None:
        super().__init__(config, memory, scale)
        self.grid = nn.Identity()
        self.attend = LinearAttend(memory.num_heads, "softmax")


class MultiRefCrossAttentionCell(MemoryBank):
    """Window attention whose keys and values come from the last contexts, not from one."""

    def __init__(self, config: HPCMConfig, memory: MemoryConfig, scale: int) -> None:
        super().__init__(config, memory, scale)
        channels, narrow = 2 * config.M, 2 * config.M // memory.compress_ratio
        self.max_refs = memory.max_refs[scale - 1]
        self.narrow = conv1x1(channels, narrow)
        self.cell = CrossAttentionCell(narrow, config.windows[scale - 1], memory.num_heads, self.max_refs)
        self.widen = conv1x1(narrow, channels)

    def _with(self, state: State, context: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        return (*state.references, (in_strips(self.narrow, context, halo=0),))[-self.max_refs :]

    def _recall(self, state: State, context: Tensor, lattice: Tensor) -> Tensor:
        def attend(context: Tensor, *references: Tensor) -> Tensor:
            return self.widen(self.cell(self.narrow(context), *references).to(context.dtype))

        references = [reference for (reference,) in state.references]
        return in_strips(attend, context, *references, halo=0, unit=self.cell.window)


class StateBank(nn.Module):
    """The mode `state`: the sum of what all priors wrote, on the lattice of the present scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def start(self, context: Tensor) -> Tensor:
        """context: (B, 2M, h, w) -> zeros (B, width, h, w)."""
        return torch.zeros_like(context[:, : self.width])

    def write(self, state: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """out: (B, 2M + width, h, w), of a prior -> the context (B, 2M, h, w), a view of it, and the new state.

        Without gradients it is `state` itself that is added to.
        """
        context, written = out.split((out.shape[1] - self.width, self.width), dim=1)
        return context, torch.add(state, written, out=None if torch.is_grad_enabled() else state)

    def finer(self, state: Tensor) -> Tensor:
        """(B, width, h, w) -> (B, width, 2h, 2w): every value 2 x 2 times."""
        batch, width, height, columns = state.shape
        rows = state.permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
        # Of one position, the reshaped tensor is still a view in which all positions share their memory.
        return rows.reshape(batch, 2 * height, 2 * columns, width).contiguous().permute(0, 3, 1, 2)


MODES: dict[str, type[ReferenceBank | LinearBank | MultiRefCrossAttentionCell]] = {
    "light": ReferenceBank,
    "full": ReferenceBank,
    "linear": LinearBank,
    "global": LinearGlobalInterContext,
    "cross": MultiRefCrossAttentionCell,
}


def banks(config: HPCMConfig) -> nn.ModuleDict:
    """The banks of a model by scale ("s1", "s2", "s3"); none where the configuration has no memory, or a state."""
    memory = config.memory
    if memory is None or memory.mode == "state":
        return nn.ModuleDict()
    return nn.ModuleDict({f"s{scale}": MODES[memory.mode](config, memory, scale) for scale in memory.scales})


def state(config: HPCMConfig) -> StateBank | None:
    """What carries the state of a model of the mode `state`; None for all others."""
    return StateBank(config.state_width) if config.state_width else None
