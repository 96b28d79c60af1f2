"""Do the three coders agree, bit for bit, through the real range coder?"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
import torch
from models import latents_of, model_of
from torch import Tensor

from hpcmref import checkpoints
from hpcmref.exact import attach
from hpcmref.format.rangecoder import SymbolDecoder, SymbolEncoder, scale_table
from hpcmref.model import HPCM
from hpcmref.model.coders import Coder, Estimator, SymbolReader, SymbolWriter
from hpcmref.model.entropy import likelihood
from hpcmref.model.schedule import STEPS, Step

THRESHOLDS = torch.from_numpy(scale_table()[:-1])
KINDS = pytest.mark.parametrize(
    "changes", [{}, {"displaced_s2": True}, {"heads": 0}], ids=["plain", "displaced", "phi"]
)


class Tape:
    """A range coder that compresses nothing: remembers what was put, and gives it back."""

    def __init__(self) -> None:
        self.symbols: list[np.ndarray] = []
        self.indexes: list[np.ndarray] = []
        self.next = 0

    def put(self, symbols: np.ndarray, indexes: np.ndarray) -> None:
        self.symbols.append(symbols)
        self.indexes.append(indexes)

    def get(self, indexes: np.ndarray) -> np.ndarray:
        np.testing.assert_array_equal(indexes, self.indexes[self.next])
        self.next += 1
        return self.symbols[self.next - 1]


def run(model: HPCM, quality: Tensor, size: tuple[int, int], coder: Coder) -> Tensor:
    with torch.inference_mode():
        y_hat = model.entropy(quality, size, coder)
    if isinstance(coder, SymbolWriter):
        coder.flush()
    return y_hat


def count(model: HPCM, size: tuple[int, int]) -> int:
    """Symbols of an image."""
    return size[0] * size[1] * (model.config.N + 16 * model.config.M)


@KINDS
@pytest.mark.parametrize(("size", "spread"), [((1, 1), 4.0), ((2, 3), 4.0), ((3, 1), 300.0)])
def test_the_three_coders_agree(changes: dict[str, Any], size: tuple[int, int], spread: float) -> None:
    """For three images at once, and where most symbols are escapes (the last size)."""
    model = model_of(**changes)
    y, z = latents_of(model, 3, size, spread)
    quality = torch.tensor([1.0, 30.0, 62.5])

    encoders = [SymbolEncoder() for _ in range(3)]
    writer = SymbolWriter(y, z, THRESHOLDS, encoders)
    written = run(model, quality, size, writer)
    payloads = [encoder.payload() for encoder in encoders]
    reader = SymbolReader(THRESHOLDS, [SymbolDecoder(payload, count(model, size)) for payload in payloads])
    read = run(model, quality, size, reader)
    estimated = run(model, quality, size, Estimator(y, z, noise=False))

    assert torch.equal(written, read)
    assert torch.equal(written, estimated)
    assert written.std() > 0.5 * spread
    assert (written - y).abs().max() <= 0.5 + 1e-3 * spread
    assert writer.checksums == reader.checksums
    assert len({tuple(each.values()) for each in writer.checksums}) == 3
    assert [set(each) for each in writer.checksums] == [{1, 2, 3}] * 3


def test_a_batch_writes_what_each_image_writes_alone() -> None:
    """In float64, whose rounding does not move a symbol here."""
    model = model_of().double()
    y, z = latents_of(model, 3, (2, 2))
    quality = torch.tensor([0.0, 25.0, 63.0], dtype=torch.float64)
    together = [Tape() for _ in range(3)]
    run(model, quality, (2, 2), SymbolWriter(y, z, THRESHOLDS.double(), together))
    for image, tape in enumerate(together):
        alone = Tape()
        part = slice(image, image + 1)
        run(model, quality[part], (2, 2), SymbolWriter(y[part], z[part], THRESHOLDS.double(), [alone]))
        for found, expected in ((tape.symbols, alone.symbols), (tape.indexes, alone.indexes)):
            assert len(found) == len(expected) == 12
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, other)
    assert not np.array_equal(together[0].symbols[0], together[1].symbols[0])


def test_what_is_written_in_which_order() -> None:
    """z, then the 11 steps: each image's tensor (C/G, h, w) with its rows first, all into one range coder."""
    model = model_of()
    config = model.config
    y, z = latents_of(model, 2, (1, 2))
    seen: list[tuple[Step | None, Tensor, Tensor]] = []

    class Observed(SymbolWriter):
        def code(self, step: Step | None, scales: Tensor, means: Tensor) -> Tensor:
            quantised = super().code(step, scales, means)
            seen.append((step, quantised - means, scales))
            return quantised

    tapes = [Tape(), Tape()]
    writer = Observed(y, z, THRESHOLDS, tapes)
    run(model, torch.tensor([10.0, 20.0]), (1, 2), writer)

    assert [step for step, *_ in seen] == [None, *STEPS]
    M, N = config.M, config.N
    shapes = [(N, 1, 2), *[(M // 2, 1, 2)] * 2, *[(M // 4, 2, 4)] * 3, *[(M // 8, 4, 8)] * 6]
    assert [symbols.shape[1:] for _, symbols, _ in seen] == shapes
    for image, tape in enumerate(tapes):
        for written, rows, (_, symbols, scales) in zip(tape.symbols, tape.indexes, seen, strict=True):
            np.testing.assert_array_equal(written, symbols[image].numpy().round().reshape(-1))
            np.testing.assert_array_equal(rows, np.searchsorted(THRESHOLDS, scales[image].numpy().reshape(-1)))
        everything = np.concatenate(tape.symbols)
        assert everything.size == count(model, (1, 2))
        ends = np.cumsum([symbols.size for symbols in tape.symbols])[[2, 5, 11]]  # z and 2, then 3, then 6 steps
        for scale, end in zip((1, 2, 3), ends, strict=True):
            assert writer.checksums[image][scale] == zlib.crc32(everything[:end].astype("<i2").tobytes())


def test_the_reader_asks_for_what_the_writer_wrote() -> None:
    """Table by table: Tape fails at the first index that differs."""
    model = model_of()
    y, z = latents_of(model, 2, (2, 1))
    quality = torch.tensor([10.0, 50.0])
    tapes = [Tape(), Tape()]
    written = run(model, quality, (2, 1), SymbolWriter(y, z, THRESHOLDS, tapes))
    assert torch.equal(run(model, quality, (2, 1), SymbolReader(THRESHOLDS, tapes)), written)
    assert all(tape.next == 12 for tape in tapes)


def test_a_writer_leaves_everything_on_the_device() -> None:
    """On the meta device, where there are no numbers, whatever would read one fails: at every step a GPU would wait."""
    model = model_of()
    exact = attach(model.entropy, checkpoints.calibrated(model)).to("meta")
    y, z = (x.to("meta") for x in latents_of(model, 2, (2, 3)))
    writer = SymbolWriter(y, z, THRESHOLDS.to("meta"), [Tape(), Tape()])
    with torch.inference_mode():
        assert exact(torch.zeros(2, device="meta"), (2, 3), writer).shape == y.shape
        with pytest.raises(NotImplementedError, match="meta"):
            writer.flush()


def test_one_changed_symbol_changes_the_checksum() -> None:
    model = model_of()
    y, z = latents_of(model, 1, (1, 1))
    tape = Tape()
    writer = SymbolWriter(y, z, THRESHOLDS, [tape])
    run(model, torch.tensor([30.0]), (1, 1), writer)
    tape.symbols[-1] = tape.symbols[-1] + np.eye(1, tape.symbols[-1].size, 17, dtype=np.int32)[0]
    reader = SymbolReader(THRESHOLDS, [tape])  # the last step has no successor whose tables could differ
    run(model, torch.tensor([30.0]), (1, 1), reader)
    assert reader.checksums != writer.checksums


# --- the estimator -------------------------------------------------------------------------------------------------


def test_the_estimator_collects_the_likelihoods_of_the_symbols() -> None:
    y, z = torch.randn(2, 8, 4, 4) * 3, torch.randn(2, 5, 1, 1) * 3
    estimator = Estimator(y, z, noise=False)
    scales, means = torch.rand(2, 5, 1, 1) + 0.5, torch.randn(2, 5, 1, 1)
    quantised = estimator.code(None, scales, means)
    symbols = (z - means).round()
    torch.testing.assert_close(quantised, symbols + means)
    torch.testing.assert_close(estimator.z_likelihoods, likelihood(symbols, scales).flatten(1))
    parts = []
    for step in STEPS[-2:]:
        scales, means = torch.rand(2, 1, 4, 4) + 0.5, torch.randn(2, 1, 4, 4)
        symbols = (step.select(y) - means).round()
        torch.testing.assert_close(estimator.code(step, scales, means), symbols + means)
        parts.append(likelihood(symbols, scales).flatten(1))
    torch.testing.assert_close(estimator.y_likelihoods, torch.cat(parts, dim=1))


def test_noise_and_straight_through_gradients() -> None:
    """In training, likelihoods are of the residual and uniform noise, and rounding is the identity for gradients."""
    z = (torch.randn(1, 4000, 1, 1) * 3).requires_grad_()
    scales = torch.full_like(z, 2.0).requires_grad_()
    means = torch.zeros_like(z).requires_grad_()
    torch.manual_seed(7)
    estimator = Estimator(torch.zeros(1, 8, 4, 4), z, noise=True)
    quantised = estimator.code(None, scales, means)
    torch.testing.assert_close(quantised, z.round())
    quantised.sum().backward(retain_graph=True)
    assert z.grad is not None
    assert torch.equal(z.grad, torch.ones_like(z))

    torch.manual_seed(7)
    noise = torch.empty_like(z).uniform_(-0.5, 0.5)
    torch.testing.assert_close(estimator.z_likelihoods, likelihood(z + noise, scales).flatten(1))
    z.grad = None
    estimator.z_likelihoods.log().sum().backward()
    for tensor in (z, scales, means):
        assert tensor.grad is not None
        assert tensor.grad.count_nonzero() > 3900
    torch.testing.assert_close(z.grad, -means.grad)
