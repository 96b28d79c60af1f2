"""Convert latents to bytes and back. Only this module connects the entropy path, a coder and the range coder.

    compress:    y, z  --SymbolWriter-->  symbols, table indexes  --range encoder-->  payload, checksums
    decompress:  payload  --range decoder-->  symbols  --SymbolReader-->  y_hat

Both run the same entropy path (h_s and the context model) in exact arithmetic, so they get the same scales and means.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpcmref.errors import DecodeError, FormatError, ModelChangedError
from hpcmref.exact import exactly
from hpcmref.exact.unchanged import Unchanged
from hpcmref.format.container import Checksums
from hpcmref.format.rangecoder import SymbolDecoder, SymbolEncoder, scale_table
from hpcmref.model.coders import Part, SymbolReader, SymbolWriter
from hpcmref.model.hpcm import EntropyPath
from hpcmref.preview import PreviewReader, interpolated

ARITHMETIC = 1
"""Number of the arithmetic in a file's header: integers (`hpcmref.exact`). 0 was float32; no release has written it."""

SCALES = 3


@dataclass(frozen=True)
class Compressed:
    """What `LatentCodec.compress` returns: a payload and checksums for each image, and y_hat (B, M, h, w)."""

    payloads: list[bytes]
    checksums: list[Checksums]
    y_hat: Tensor


class LatentCodec:
    """An exact entropy path together with the range coder. It keeps no state between calls."""

    def __init__(self, entropy: EntropyPath, device: torch.device) -> None:
        """entropy: in exact arithmetic (`hpcmref.exact.attach`), on the device."""
        self.entropy = entropy
        self.device = device
        self.unchanged = Unchanged(entropy)
        self.thresholds = thresholds().to(device)

    def compress(self, y: Tensor, z: Tensor, quality: int) -> Compressed:
        """Code a batch: y (B, M, 4h, 4w) and z (B, N, h, w), not quantised.

        Raises ModelChangedError if the entropy path is not as it was when this object was made.
        """
        return self._compress(y, z, quality, keep=False)[0]

    def compress_and_predict(self, y: Tensor, z: Tensor, quality: int) -> tuple[Compressed, list[Part]]:
        """As `compress`, but also return the symbols of every step and the tables they were coded with.

        y: (B, M, 4h, 4w) and z: (B, N, h, w) as in `compress`. Returns what it returns, and the parts in coding order.
        """
        return self._compress(y, z, quality, keep=True)

    def _compress(self, y: Tensor, z: Tensor, quality: int, keep: bool) -> tuple[Compressed, list[Part]]:
        encoders = [SymbolEncoder() for _ in y]
        writer = SymbolWriter(y, z, self.thresholds, encoders)
        with torch.inference_mode(), exactly(self.device):
            y_hat = self.entropy(self._quality(len(y), quality), (z.shape[2], z.shape[3]), writer)
            parts = writer.flush() if keep else writer.flush()[:0]  # frees memory for the encoders
        self.unchanged.check()
        payloads = [encoder.payload() for encoder in encoders]
        return Compressed(payloads, list(map(_checksums, writer.checksums)), y_hat), parts

    def decompress(
        self,
        payloads: Sequence[bytes],
        checksums: Sequence[Checksums],
        size: tuple[int, int],
        quality: int,
        upto: int = SCALES,
    ) -> Tensor:
        """y_hat (B, M, 4h, 4w) of a batch.

        payloads, checksums: one of each for every image. size: (h, w) of z. quality: the one that was encoded. upto:
        the last scale (1, 2 or 3) whose latents are read; later ones are set to their means.

        Raises DecodeError if the latents are not those that were encoded, FormatError if a payload is damaged
        (TruncatedError if it is too short), and ModelChangedError as `compress` does.
        """
        reader, _ = self._reader(payloads, size, upto)
        y_hat = self._read(reader, size, quality)
        for expected, crcs in zip(checksums, reader.checksums, strict=True):
            if not _agree(expected, _checksums(crcs), upto):
                raise DecodeError("the decoded latents are not the encoded ones: the file is damaged or forged")
        return y_hat

    def decompress_intact(
        self, payload: bytes, checksums: Checksums, size: tuple[int, int], quality: int, upto: int = SCALES
    ) -> tuple[Tensor, int]:
        """y_hat (1, M, 4h, 4w) of a truncated or damaged payload, and the last scale (at most `upto`) that is intact.

        size: (h, w) of z. quality: the one that was encoded.

        A scale is intact if its checksum matches. Files of version 1 have no checksums of s1 and s2. There, these
        scales are intact if all their symbols certainly came from before the end of the payload. Raises DecodeError if
        not even s1 is intact.
        """
        for scale in range(upto, 0, -1):
            try:
                reader, (source,) = self._reader([payload], size, scale)
                y_hat = self._read(reader, size, quality)
            except FormatError:
                continue
            unknown = checksums.of(scale) is None
            if _agree(checksums, _checksums(reader.checksums[0]), scale) and (source.is_whole or not unknown):
                return y_hat, scale
            del y_hat
        raise DecodeError("the file is damaged or ends before its first scale does: nothing of it can be shown")

    def preview(self, payload: bytes, checksums: Checksums, size: tuple[int, int], quality: int) -> Tensor:
        """y_hat (1, M, 4h, 4w), read up to the first steps of s3 and interpolated elsewhere (see `hpcmref.preview`).

        size: (h, w) of z. quality: the one that was encoded. Raises DecodeError if the latents up to s2 are not those
        that were encoded, and as `decompress` does.
        """
        symbols = size[0] * size[1] * self.entropy.symbols_per_position
        reader = PreviewReader(self.thresholds, [SymbolDecoder(payload, symbols)])
        with torch.inference_mode(), exactly(self.device):
            reader.run(self.entropy, self._quality(1, quality), size)
            self.unchanged.check()
            if not _agree(checksums, _checksums(reader.checksums[0]), 2):
                raise DecodeError("the decoded latents are not the encoded ones: the file is damaged or forged")
            return interpolated(reader.y_hat, reader.known)

    def verify(self, compressed: Compressed, size: tuple[int, int], quality: int) -> None:
        """Decode what `compress` returned with a copy of the entropy path that no earlier call has used, on the CPU.

        size: (h, w) of z. quality: the one that was encoded. Raises ModelChangedError if the copy, this object or the
        latents differ.
        """
        self.unchanged.check_all()
        with torch.inference_mode(False):  # for the version counters of the copy
            other = LatentCodec(copy.deepcopy(self.entropy).to("cpu"), torch.device("cpu"))
        if other.unchanged.digest != self.unchanged.digest:
            raise ModelChangedError("a copy of the model differs from the model: nothing was returned")
        try:
            y_hat = other.decompress(compressed.payloads, compressed.checksums, size, quality)
        except (DecodeError, FormatError) as error:
            raise ModelChangedError(f"a second decoder cannot read what was encoded: {error}") from error
        if not torch.equal(y_hat, compressed.y_hat.cpu()):
            raise ModelChangedError("a second decoder reads other latents than were encoded: nothing was returned")
        other.unchanged.check_all()

    def _reader(
        self, payloads: Sequence[bytes], size: tuple[int, int], upto: int
    ) -> tuple[SymbolReader, list[SymbolDecoder]]:
        symbols = size[0] * size[1] * self.entropy.symbols_per_position
        sources = [SymbolDecoder(payload, symbols) for payload in payloads]
        return SymbolReader(self.thresholds, sources, upto), sources

    def _read(self, reader: SymbolReader, size: tuple[int, int], quality: int) -> Tensor:
        with torch.inference_mode(), exactly(self.device):
            y_hat = self.entropy(self._quality(len(reader.checksums), quality), size, reader)
        self.unchanged.check()
        return y_hat

    def _quality(self, batch: int, quality: int) -> Tensor:
        return torch.full((batch,), float(quality), dtype=torch.float32, device=self.device)


def thresholds() -> Tensor:
    """Bounds (59,) float32 between the scales of the 60 tables. A scale uses the table that is nearest in ratio."""
    scales = scale_table().astype(np.float64)
    return torch.from_numpy(np.sqrt(scales[1:] * scales[:-1]).astype(np.float32))


def _agree(expected: Checksums, found: Checksums, upto: int) -> bool:
    """Whether the checksums of all scales up to `upto` match; version 1 of the format has none of s1 and s2."""
    return all(expected.of(scale) in (None, found.of(scale)) for scale in range(1, upto + 1))


def _checksums(crcs: dict[int, int]) -> Checksums:
    """The checksums of a file from the CRC-32 at the end of each scale that was coded; 0 for one that was not."""
    s1, s2, s3 = (crcs.get(scale, 0) for scale in range(1, SCALES + 1))
    return Checksums(s1 & 0xFFFF, s2 & 0xFFFF, s3)
