"""The multi-reference memory bank, through which a coding step can use the contexts of all steps before it.

    context after attention --> read: recall what resembles it --> gate * recalled + (1 - gate) * context --> next step
    context that was replaced --> write: a reference for the steps that follow

What a bank has stored of an image is a value, a `State`: `write` and `read` take it as an argument, and `write` returns
a new one. No module holds a state. References are on the lattice of s1 in all scales (`cell` x `cell` positions of s1,
s2 or s3 become one position), so a scale can take over the references of the scale before. When training begins, the
gate is 0, so that a bank has no effect at first. The modes are:

light   A reference consists of a key, made from the mean of a context, and a value, made from the context itself on the
        lattice of s1. Of the last max_refs references, the topk are recalled whose keys are the most similar to the
        query from the current context. (A 1x1 convolution of a mean equals the mean of the 1x1 convolution, and is
        cheaper.)
full    As light, but values have fewer channels, and one for each of at most r x r cells. They are expanded again when
        recalled.
linear  All references together are kept as two sums over such cells. Every position reads them by linear attention.
global  As linear, but over whole planes instead of cells, and with softmax as the feature map.
cross   A reference is a context with fewer channels. Every position attends to its window in the last max_refs.

The mode `state` is simpler, and takes the place of attention. It keeps a few channels at every position. Each prior
adds to them what the next steps need, and the adaptors of those steps read them (`StateBank`).

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
from hpcmref.model.layers import QualityTable, conv1x1
from hpcmref.model.strips import in_strips


class State(NamedTuple):
    """What a bank has stored of a batch: its qualities (B,), and the references, with the oldest first."""

    quality: Tensor
    references: tuple[tuple[Tensor, ...], ...] = ()


class Pool(nn.Module):
    """Divides a plane into cells of cell x cell positions, and computes the mean of each."""

    def __init__(self, cell: int) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, h, w) -> (B, C, h/cell, w/cell)."""
        return x if self.cell == 1 else F.avg_pool2d(x, self.cell)


class CellMean(nn.Module):
    """Divides a plane into at most side x side rectangular cells, and computes the mean of each."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of each cell, (B, C, min(side, h), min(side, w)), of x (B, C, h, w), in the type of x.

        Where the number of cells does not divide a length, cells differ by one row or column. Sums are in float64.
        """
        rows, columns = (_membership(length, self.side, x.device) for length in x.shape[2:])
        sums = rows.T @ x.double() @ columns
        return (sums / (rows.sum(0)[:, None] * columns.sum(0))).to(x.dtype)


def from_cells(x: Tensor, size: torch.Size, side: int) -> Tensor:
    """Give every position the value of its cell of `CellMean`: x (B, C, rows, columns) -> (B, C, *size)."""
    rows, columns = (_cells(length, side, x.device) for length in size)
    return x.index_select(2, rows).index_select(3, columns)


def _cells(length: int, side: int, device: torch.device) -> Tensor:
    """The index of the cell, of at most `side` cells, that each position is in: (length,) int64."""
    cells = min(side, length)
    return torch.arange(length, device=device) * cells // length


def _membership(length: int, side: int, device: torch.device) -> Tensor:
    """1 where a position is in a cell, and 0 elsewhere: (length, cells) float64."""
    cells = torch.arange(min(side, length), device=device)
    return (_cells(length, side, device)[:, None] == cells).double()


def top(similarity: Tensor, k: int) -> Tensor:
    """Which k references are the most similar; of equal ones, the oldest. (B, R, ...) -> bool (B, R, ...)."""
    order = torch.arange(similarity.shape[1], device=similarity.device)
    older = (order[:, None] > order).view(len(order), len(order), *[1] * (similarity.dim() - 2))
    one, other = similarity.unsqueeze(2), similarity.unsqueeze(1)
    return ((other > one) | ((other == one) & older)).sum(2) < k


class MemoryBank(nn.Module, ABC):
    """The base class of all modes but `state`. It has the lattice of s1, the gate, and `start`, `write` and `read`."""

    def __init__(self, config: HPCMConfig, memory: MemoryConfig, scale: int) -> None:
        super().__init__()
        channels = 2 * config.M
        self.transfer = memory.transfer
        self.before_prior = memory.before_prior
        self.pool = Pool(2 ** (scale - 1))
        self.gate = nn.Sequential(conv1x1(2 * channels, channels), nn.Sigmoid())
        self.opening = QualityTable(torch.zeros(config.anchors), channels)

    def start(self, quality: Tensor, before: State | None = None) -> State:
        """The state before the first step of a scale. before: the state at the end of the scale before."""
        return State(quality, before.references if before is not None and self.transfer else ())

    def write(self, state: State, context: Tensor) -> State:
        """The state with one more context (B, 2M, h, w)."""
        return state._replace(references=self._with(state, _full(context, state)))

    def read(self, state: State, context: Tensor) -> Tensor:
        """The context (B, 2M, h, w), combined by the gate with what the bank recalls.

        Without references, the result is the context itself.
        """
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
        return torch.empty_like(context).copy_(joined)  # keeps the memory layout, on which rounding in kernels depends

    def _on_lattice(self, x: Tensor) -> Tensor:
        return in_strips(self.pool, x, halo=0, unit=self.pool.cell, whole=self.training)

    @abstractmethod
    def _with(self, state: State, context: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """The references with one more context."""

    @abstractmethod
    def _recall(self, state: State, context: Tensor, lattice: Tensor) -> Tensor:
        """What the references hold for a context (B, 2M, h, w).

        lattice: the means of the context on the lattice of s1. The result has the shape of either of the two.
        """


def _full(context: Tensor, state: State) -> Tensor:
    """Convert a context to full precision; in training, attention may have been computed in bfloat16."""
    return context.to(state.quality.dtype)


class Recall(nn.Module):
    """Adds up the values of the topk references whose keys have the largest cosine similarity to the query.

    The weight of a value is the softmax of the similarities, times the similarity itself. Without that factor, keys and
    queries would get no gradient if topk is 1, because the softmax of a single reference is always 1.
    """

    def __init__(self, topk: int, temperature: float) -> None:
        super().__init__()
        self.topk = topk
        self.temperature = temperature

    def forward(self, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """query and every key: (B, d, h, w), or (B, d, 1, 1) for all positions at once.

        Values and the result: (B, C, H, W).
        """
        similarity = torch.stack([F.cosine_similarity(query, key, dim=1) for key in keys], dim=1)
        chosen = top(similarity, self.topk)
        weights = (similarity / self.temperature).masked_fill(~chosen, -torch.inf).softmax(1) * similarity
        return torch.stack([weights[:, i, None] * value for i, value in enumerate(values)]).sum(0)


class ReferenceBank(MemoryBank):
    """The modes light and full: keeps the last contexts, and recalls those most similar to the current one."""

    def __init__(self, config: HPCMConfig, memory: MemoryConfig, scale: int) -> None:
        super().__init__(config, memory, scale)
        channels, narrow = 2 * config.M, 2 * config.M // memory.compress_ratio
        self.max_refs = memory.max_refs[scale - 1]
        self.side = memory.value_resolution if memory.mode == "full" else None
        # cells: values are kept on the lattice of s1, or as the means of its cells. mean: keys and queries are made
        # from every position, or from the mean of all.
        self.cells = CellMean(self.side) if self.side else nn.Identity()
        self.mean = nn.Identity() if memory.per_position else CellMean(1)
        self.conv_q = conv1x1(channels, narrow)
        self.conv_k = conv1x1(channels, narrow)
        self.conv_v = conv1x1(channels, narrow if self.side else channels)
        self.widen = conv1x1(narrow, channels) if self.side else nn.Identity()
        self.recall = Recall(memory.topk[scale - 1], memory.temperature)

    def _with(self, state: State, context: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        plane = self.cells(self._on_lattice(context))
        reference = (self.conv_k(self.mean(plane)), self.conv_v(plane))
        return (*state.references, reference)[-self.max_refs :]

    def _recall(self, state: State, context: Tensor, lattice: Tensor) -> Tensor:
        keys, values = zip(*state.references, strict=True)
        query = self.conv_q(self.mean(self.cells(lattice)))
        recalled = self.widen(self.recall(query, list(keys), list(values)))
        return from_cells(recalled, lattice.shape[2:], self.side) if self.side else recalled


class LinearAttend(nn.Module):
    """Linear attention: phi(query) sum(phi(key)^T value) / phi(query) sum(phi(key)).

    The time of a query does not grow with the number of keys. phi is elu + 1, relu or softmax. The softmax is over the
    tokens for keys, and over the channels for queries.
    """

    def __init__(self, heads: int, feature_map: str) -> None:
        super().__init__()
        self.heads = heads
        self.feature_map = feature_map

    def summary(self, key: Tensor, value: Tensor, sharpness: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what `forward` needs of key (B, d, h, w) and value (B, e, h, w); sharpness: (B, heads, 1, 1).

        Returns phi(key)^T value (B, heads, d/heads, e/heads), and the sum of phi(key) (B, heads, d/heads, 1). The
        summaries of several contexts may be added.
        """
        key, value = self.tokens(key) * sharpness, self.tokens(value)
        if self.feature_map == "softmax":
            return key.softmax(2).transpose(2, 3) @ value, torch.ones_like(key[:, :, 0, :, None])
        phi = self._phi(key)
        return phi.transpose(2, 3) @ value, phi.sum(2)[..., None]

    def forward(self, query: Tensor, values: Tensor, weights: Tensor, sharpness: Tensor) -> Tensor:
        """query: (B, d, h, w); values, weights: from `summary`; sharpness: (B, heads, 1, 1). Returns (B, e, h, w)."""
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
    """The mode linear: every position attends linearly to all contexts so far, each reduced to the means of its cells.

    Only the sums over these contexts are kept.
    """

    def __init__(self, config: HPCMConfig, memory: MemoryConfig, scale: int) -> None:
        super().__init__(config, memory, scale)
        channels, narrow = 2 * config.M, 2 * config.M // memory.compress_ratio
        self.cells: nn.Module = CellMean(memory.value_resolution)
        self.conv_q = conv1x1(channels, narrow)
        self.conv_k = conv1x1(channels, narrow)
        self.conv_v = conv1x1(channels, narrow)
        self.widen = conv1x1(narrow, channels)
        self.sharpness = QualityTable(torch.ones(config.anchors), memory.num_heads)
        self.attend = LinearAttend(memory.num_heads, memory.feature_map)

    def _with(self, state: State, context: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        plane = self.cells(self._on_lattice(context))
        sums = self.attend.summary(self.conv_k(plane), self.conv_v(plane), self.sharpness(state.quality))
        if state.references:
            (old,) = state.references
            sums = (old[0] + sums[0], old[1] + sums[1])
        return (sums,)

    def _recall(self, state: State, context: Tensor, lattice: Tensor) -> Tensor:
        ((values, weights),) = state.references
        sharpness = self.sharpness(state.quality)

        def attend(part: Tensor) -> Tensor:
            return self.widen(self.attend(self.conv_q(part), values, weights, sharpness))

        return in_strips(attend, context, halo=0, whole=self.training)


class LinearGlobalInterContext(LinearBank):
    """The mode global, which is the global context of MLIC++ (arXiv 2307.15421).

    The softmax is over the channels for queries, and over the plane for keys.
    """

    def __init__(self, config: HPCMConfig, memory: MemoryConfig, scale: int) -> None:
        super().__init__(config, memory, scale)
        self.cells = nn.Identity()
        self.attend = LinearAttend(memory.num_heads, "softmax")


class MultiRefCrossAttentionCell(MemoryBank):
    """The mode cross: window attention whose keys and values come from the last max_refs contexts, not from one."""

    def __init__(self, config: HPCMConfig, memory: MemoryConfig, scale: int) -> None:
        super().__init__(config, memory, scale)
        channels, narrow = 2 * config.M, 2 * config.M // memory.compress_ratio
        self.max_refs = memory.max_refs[scale - 1]
        self.narrow = conv1x1(channels, narrow)
        self.cell = CrossAttentionCell(narrow, config.windows[scale - 1], memory.num_heads, self.max_refs)
        self.widen = conv1x1(narrow, channels)

    def _with(self, state: State, context: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        return (*state.references, (in_strips(self.narrow, context, halo=0, whole=self.training),))[-self.max_refs :]

    def _recall(self, state: State, context: Tensor, lattice: Tensor) -> Tensor:
        def attend(context: Tensor, *references: Tensor) -> Tensor:
            return self.widen(self.cell(self.narrow(context), *references).to(context.dtype))

        references = [reference for (reference,) in state.references]
        return in_strips(attend, context, *references, halo=0, unit=self.cell.window, whole=self.training)


class StateBank(nn.Module):
    """The mode `state`: the sum of what all priors have written, on the lattice of the current scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def start(self, context: Tensor) -> Tensor:
        """Return a state of zeros, (B, width, h, w) in the layout channels-last, for a context (B, 2M, h, w)."""
        batch, _, height, columns = context.shape
        return context.new_zeros(batch, height, columns, self.width).permute(0, 3, 1, 2)

    def split(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Split the result `out` (B, 2M + width, h, w) of a prior into views: the context, and what is written."""
        context, written = out.split((out.shape[1] - self.width, self.width), dim=1)
        return context, written

    def write(self, state: Tensor, written: Tensor) -> Tensor:
        """The state with `written` (B, width, h, w) added to it."""
        return state + written

    def write_(self, state: Tensor, written: Tensor) -> Tensor:
        """As `write`, but `state` itself is overwritten and returned."""
        return state.add_(written)

    def finer(self, state: Tensor) -> Tensor:
        """(B, width, h, w) -> (B, width, 2h, 2w): every value is repeated 2 x 2 times."""
        batch, width, height, columns = state.shape
        rows = state.permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
        # With one position, the reshaped tensor is still a view in which all positions share their memory.
        return rows.reshape(batch, 2 * height, 2 * columns, width).contiguous().permute(0, 3, 1, 2)


MODES: dict[str, type[ReferenceBank | LinearBank | MultiRefCrossAttentionCell]] = {
    "light": ReferenceBank,
    "full": ReferenceBank,
    "linear": LinearBank,
    "global": LinearGlobalInterContext,
    "cross": MultiRefCrossAttentionCell,
}


def banks(config: HPCMConfig) -> nn.ModuleDict:
    """The banks of a model by scale ("s1", "s2", "s3").

    There are none if the configuration has no memory, or the mode `state`.
    """
    memory = config.memory
    if memory is None or memory.mode == "state":
        return nn.ModuleDict()
    return nn.ModuleDict({f"s{scale}": MODES[memory.mode](config, memory, scale) for scale in memory.scales})


def state(config: HPCMConfig) -> StateBank | None:
    """The `StateBank` of a model with the mode `state`, and None for all other models."""
    return StateBank(config.state_width) if config.state_width else None
