"""The progressive context model: one pass over the schedule that predicts (scales, means) step by step.

          hyper scales and means (2M)
                |  on the lattice of s1; its first step uses them as they are
    s1  [ step 0 ][ prior -> step 1 -> attention ]
                |  up to s2, hyper parameters on the new positions, 1x1
    s2  [ prior -> step -> attention ] x 3
                |  up to s3, hyper parameters on the new positions, 1x1
    s3  [ prior -> step -> attention ] x 6          (no attention after the last step: nothing reads it)

The inputs of a prior are the results of the steps before it: context_next (2M channels) and y_hat so far (M channels,
zero where nothing is coded yet). Its output `context` holds the scales and means of this step. Cross attention, with
queries from `context` and keys and values from the last context_next, makes the new context_next. If a scale has a
memory bank (`memory_bank.py`), each context_next that is replaced is written to the bank, and the new one is combined
with what is read from it. The mode `state` works differently: priors have additional output channels, which are added
to a state that is kept from s1 to s3, and the adaptors read that state.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpcmref.model.coders import Coder
from hpcmref.model.config import HPCMConfig
from hpcmref.model.layers import DWConvRB, QualityTable, conv1x1
from hpcmref.model.schedule import S1, S2, STEPS_S1, STEPS_S2, STEPS_S3, Lattice, Step, displaced_source
from hpcmref.model.strips import POSITIONS, all_in_strips, in_strips


class SpatialPrior(nn.Module):
    """Predicts the context (2M) of one step.

    It consists of residual blocks, a factor that depends on the channel and the step, and more residual blocks.
    """

    def __init__(self, width: int, outputs: int, depth: tuple[int, int]) -> None:
        super().__init__()
        self.halo = sum(depth)
        """Rows above and below that a row of the result depends on."""
        self.branch_1 = nn.Sequential(*(DWConvRB(width) for _ in range(depth[0])))
        self.branch_2 = nn.Sequential(*(DWConvRB(width) for _ in range(depth[1])), conv1x1(width, outputs))

    def forward(self, x: Tensor, quant_step: Tensor) -> Tensor:
        """x: (B, width, h, w), quant_step: (B or 1, width, 1, 1) -> (B, outputs, h, w)."""
        return self.branch_2(self.branch_1(x) * quant_step)


class Attend(nn.Module):
    """softmax(query key^T / sqrt(channels)) value."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, inside: Tensor | None) -> Tensor:
        """query, key, value and the result: (B, windows, heads, tokens, channels).

        The caller hands over query, key and value: it must not use them afterwards, since the exact twin overwrites
        them. inside: which keys count, (windows, 1, 1, tokens) bool; None if all do.
        """
        return F.scaled_dot_product_attention(query, key, value, attn_mask=inside)


class CrossAttentionCell(nn.Module):
    """Attention inside windows. Queries come from this step's context, keys and values from earlier contexts."""

    def __init__(self, channels: int, window: int, heads: int, contexts: int = 1) -> None:
        """contexts: the largest number of earlier contexts."""
        super().__init__()
        self.window = window
        self.tokens = contexts * window**2
        self.heads = heads
        self.conv_q = conv1x1(channels, channels)
        self.conv_k = conv1x1(channels, channels)
        self.conv_v = conv1x1(channels, channels)
        self.conv_out = conv1x1(channels, channels)
        self.attend = Attend()

    def forward(self, context: Tensor, *contexts_prev: Tensor) -> Tensor:
        """All arguments and the result are (B, C, h, w). In windows across the edge, only positions inside count."""
        height, width = context.shape[2:]
        query = self._windows(self.conv_q(context))
        key, value = (
            _joined([self._windows(convolution(each)) for each in contexts_prev])
            for convolution in (self.conv_k, self.conv_v)
        )
        inside = self._inside(height, width, context.device)
        if inside is not None:
            inside = inside.repeat(1, 1, 1, len(contexts_prev))
        attended = self._plane(self.attend(query, key, value, inside), height, width)
        own: Tensor = self.conv_out(context)
        return attended + own if self.training else attended.add_(own)  # autograd still needs `attended`

    def _windows(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, windows, heads, tokens, C/heads), zero outside of the plane."""
        side = self.window
        height, width = x.shape[2:]
        if height % side or width % side:
            x = F.pad(x, (0, -width % side, 0, -height % side))
        x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side)).unflatten(1, (self.heads, -1))
        return x.permute(0, 3, 5, 1, 4, 6, 2).flatten(4, 5).flatten(1, 2)

    def _plane(self, x: Tensor, height: int, width: int) -> Tensor:
        """The inverse of `_windows`, channels last in memory."""
        side = self.window
        rows = -(-height // side)
        x = x.unflatten(3, (side, side)).unflatten(1, (rows, -1))  # (B, row, column, heads, row, column, C/heads)
        x = x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return x.permute(0, 3, 1, 2)[:, :, :height, :width]

    def _inside(self, height: int, width: int, device: torch.device) -> Tensor | None:
        """Which keys of each window lie in the plane: (windows, 1, 1, tokens) bool; None if all do."""
        side = self.window
        if height % side == 0 and width % side == 0:
            return None
        rows = (torch.arange(height + -height % side, device=device) < height).view(-1, 1, side, 1)
        cols = (torch.arange(width + -width % side, device=device) < width).view(1, -1, 1, side)
        return (rows & cols).view(-1, 1, 1, side * side)


def _joined(tokens: list[Tensor]) -> Tensor:
    """Tokens (B, windows, heads, tokens, channels) of several planes, one after the other."""
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=3)


class Bank(Protocol):
    """A memory bank. Its state is a value that the caller keeps (see `memory_bank.py`)."""

    before_prior: bool

    def start(self, quality: Tensor, before: Any) -> Any:
        """The state at the start of a scale. quality: (B,); before: the state at the end of the scale before."""

    def write(self, state: Any, context: Tensor) -> Any:
        """The state with one more context."""

    def read(self, state: Any, context: Tensor) -> Tensor:
        """The context joined with what the bank recalls."""


BankState = tuple[Bank, Any]
"""A memory bank and its state."""


class Carry(Protocol):
    """Keeps a state (B, width, h, w) from step to step (see `memory_bank.StateBank`)."""

    def start(self, context: Tensor) -> Tensor:
        """The state before the first step of s1, whose context is (B, 2M, h, w)."""

    def split(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """The result (B, 2M + width, h, w) of a prior as views: context (B, 2M, h, w), and what is written."""

    def write(self, state: Tensor, written: Tensor) -> Tensor:
        """The new state. written: (B, width, h, w)."""

    def write_(self, state: Tensor, written: Tensor) -> Tensor:
        """As `write`, but `state` itself is overwritten and returned."""

    def finer(self, state: Tensor) -> Tensor:
        """The state for the next scale: (B, width, 2h, 2w)."""


class Known(NamedTuple):
    """What the steps so far pass to the next one.

    context_next (B, 2M, h, w), y_hat (B, M, h, w) and state (B, width, h, w) are on the lattice of the next step.
    bank: the memory bank of the scale and its state.
    """

    context_next: Tensor
    y_hat: Tensor
    state: Tensor | None
    bank: BankState | None


class ContextModel(nn.Module):
    """HPCM's hierarchical progressive context model (paper section 3; official HPCM_Base.py, forward_hpcm).

    In train mode no tensor is overwritten, so that gradients reach everything. In eval mode y_hat, the context of each
    scale and the state are updated in place.
    """

    def __init__(self, config: HPCMConfig, banks: nn.ModuleDict, state: Carry | None = None) -> None:
        """banks: memory banks of some of the scales "s1", "s2" and "s3". state: for the mode `state`, else None."""
        super().__init__()
        width, both = config.context_width, 2 * config.M
        self.displaced_s2 = config.displaced_s2
        self.state = state

        def adaptors(steps: int) -> nn.ModuleList:
            return nn.ModuleList(conv1x1(3 * config.M + config.state_width, width) for _ in range(steps))

        def attention(window: int) -> CrossAttentionCell | None:
            return CrossAttentionCell(both, window, config.heads) if config.heads else None

        self.adaptor_s1, self.adaptor_s2, self.adaptor_s3 = adaptors(1), adaptors(3), adaptors(6)
        self.prior_s1_s2 = SpatialPrior(width, both + config.state_width, config.prior_s1_s2)
        self.prior_s3 = SpatialPrior(width, both + config.state_width, config.prior_s3)
        self.quant_steps = nn.ModuleList(QualityTable(torch.ones(config.anchors), width) for _ in range(10))
        self.attn_s1, self.attn_s2, self.attn_s3 = map(attention, config.windows)
        self.context_net = nn.ModuleList(conv1x1(both, both) for _ in range(2))
        self.banks = banks

    def forward(self, hyper: Tensor, quality: Tensor, coder: Coder) -> Tensor:
        """Code all steps of the schedule in order.

        hyper: (B, 2M, H, W), the scales and means that h_s predicts, where H and W are multiples of 4. The caller hands
        it over: in eval mode, the context of s3 overwrites it. quality: (B,). Returns y_hat (B, M, H, W).
        """
        rows = [table(quality) for table in self.quant_steps]

        hyper_s2 = _halves(S2, hyper, self.training)
        context = _halves(S1, hyper_s2, self.training)
        y_hat = torch.zeros_like(context[:, : context.shape[1] // 2])
        y_hat = self._code(STEPS_S1[0], context, y_hat, coder)
        state = None if self.state is None else self.state.start(context)
        known = Known(context, y_hat, state, self._bank("s1", quality, None))
        known = self._scale(STEPS_S1[1:], known, coder, self.adaptor_s1, self.prior_s1_s2, rows[:1], self.attn_s1)

        if self.displaced_s2:
            hyper_s2 = _displaced(hyper)
        known = self._finer(known, "s2", quality, S1, hyper_s2, self.context_net[0])
        known = self._scale(STEPS_S2, known, coder, self.adaptor_s2, self.prior_s1_s2, rows[1:4], self.attn_s2)

        known = self._finer(known, "s3", quality, S2, hyper, self.context_net[1])
        known = self._scale(STEPS_S3, known, coder, self.adaptor_s3, self.prior_s3, rows[4:], self.attn_s3)
        return known.y_hat

    def _scale(
        self,
        steps: tuple[Step, ...],
        known: Known,
        coder: Coder,
        adaptors: nn.ModuleList,
        prior: SpatialPrior,
        quant_steps: list[Tensor],
        attention: CrossAttentionCell | None,
    ) -> Known:
        """Run those steps of one scale that use networks. Returns what is known after them."""
        context_next, y_hat, state, bank = known
        replaced = spare = None
        for step, adaptor, quant_step in zip(steps, adaptors, quant_steps, strict=True):
            seen, bank = _remember(bank, replaced, context_next, before_prior=True)
            predict = partial(_predict, prior, adaptor, quant_step, self.state)
            inputs = (seen, y_hat) if state is None else (seen, y_hat, state)
            into = (spare,) if state is None else (spare, None)
            context, *written = all_in_strips(predict, *inputs, halo=prior.halo, into=into, whole=self.training)
            if self.state is not None and state is not None:
                state = (self.state.write if self.training else self.state.write_)(state, *written)
            y_hat = self._code(step, context, y_hat, coder)
            if step is STEPS_S3[-1]:
                break
            replaced = context_next
            if attention is None:
                # No step reads the replaced context again, unless a bank does, so the next one may overwrite it.
                spare = replaced if bank is None else None
                context_next = context
            else:
                # The strips are smaller here, since query, key, value and their products take ten times the memory of
                # the plane.
                context_next = in_strips(
                    attention,
                    context,
                    context_next,
                    halo=0,
                    unit=attention.window,
                    positions=POSITIONS // 4,
                    into=context_next if bank is None else None,
                    whole=self.training,
                )
            del context
            context_next, bank = _remember(bank, replaced, context_next, before_prior=False)
        return Known(context_next, y_hat, state, bank)

    def _finer(
        self, known: Known, scale: str, quality: Tensor, lattice: Lattice, hyper: Tensor, mix: nn.Module
    ) -> Known:
        """Transfer what is known to the next lattice, `scale`.

        hyper: (B, 2M, 2h, 2w), the scales and means from h_s on that lattice. In eval mode they are overwritten.
        """
        pairs = list(zip(hyper.chunk(2, dim=1), known.context_next.chunk(2, dim=1), strict=True))
        if self.training:
            context = mix(torch.cat([lattice.put(fine, coarse) for fine, coarse in pairs], dim=1))
        else:
            for fine, coarse in pairs:
                lattice.put_(fine, coarse)
            context = in_strips(mix, hyper, halo=0, into=hyper)
        state = known.state
        if self.state is not None and state is not None:
            state = self.state.finer(state)
        y_hat = lattice.up(known.y_hat, self.training)
        return Known(context, y_hat, state, self._bank(scale, quality, known.bank))

    def _code(self, step: Step, context: Tensor, y_hat: Tensor, coder: Coder) -> Tensor:
        """Code the latents of one step, and return y_hat (B, M, h, w) with them at their positions.

        In eval mode, that is `y_hat` itself.
        """
        scales, means = (step.select(half, self.training) for half in context.chunk(2, dim=1))
        put = step.put if self.training else step.put_
        return put(y_hat, coder.code(step, scales, means))

    def _bank(self, scale: str, quality: Tensor, before: BankState | None) -> BankState | None:
        """The bank of a scale and the state it starts with, or None if the scale has no bank."""
        if scale not in self.banks:
            return None
        bank: Any = self.banks[scale]
        return bank, bank.start(quality, None if before is None else before[1])


def _remember(
    bank: BankState | None, replaced: Tensor | None, context: Tensor, before_prior: bool
) -> tuple[Tensor, BankState | None]:
    """Write the replaced context to the bank, and combine the new one with what is read from it.

    Returns the combined context and the bank with its new state. before_prior: whether this call is just before the
    prior (or after attention). A bank does something in only one of the two places, and nothing in the other.
    """
    if bank is None or bank[0].before_prior != before_prior:
        return context, bank
    module, state = bank
    if replaced is not None:
        state = module.write(state, replaced)
    return module.read(state, context), (module, state)


def _predict(
    prior: SpatialPrior, adaptor: nn.Module, quant_step: Tensor, carry: Carry | None, *known: Tensor
) -> tuple[Tensor, ...]:
    """The context of one step (B, 2M, h, w), computed from the planes known before it, and what goes to the state."""
    out = prior(adaptor(torch.cat(known, dim=1)), quant_step)
    return (out,) if carry is None else carry.split(out)


def _halves(lattice: Lattice, x: Tensor, masked: bool) -> Tensor:
    """The scales and the means half of x (B, 2M, H, W) on the lattice: (B, 2M, H/2, W/2)."""
    return torch.cat([lattice.down(half, masked) for half in x.chunk(2, dim=1)], dim=1)


def _displaced(hyper: Tensor) -> Tensor:
    """The official hyper parameters of s2: (B, 2M, H, W) -> (B, 2M, H/2, W/2); see `schedule.displaced_source`."""
    batch, both, height, width = hyper.shape
    source = displaced_source(both // 2, height // 2, width // 2, hyper.device).repeat(2, 1)
    return hyper.flatten(2).gather(2, source.expand(batch, -1, -1)).unflatten(2, (height // 2, width // 2))
