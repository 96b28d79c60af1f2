"""How does an image become a file, and a file an image? Padding, quality, model, range coder and container together."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hpcmref import DEFAULT_QUALITY, checkpoints, container, imageio
from hpcmref.checkpoints import Checkpoint
from hpcmref.container import Container
from hpcmref.errors import ConfigError, DecodeError, ModelMismatchError, UnsupportedError
from hpcmref.exact import attach, exactly
from hpcmref.model.coders import SymbolReader, SymbolWriter
from hpcmref.model.hpcm import STRIDE
from hpcmref.rangecoder import SymbolDecoder, SymbolEncoder, scale_table

EXACT = 1
"""Arithmetic id of an entropy path on integers (`hpcmref.exact`). 0 was float32, which no release has written."""


class Codec:
    """One model, ready to encode and decode. Keeps no state between images."""

    def __init__(self, checkpoint: Checkpoint, name: str, device: torch.device) -> None:
        """Raises CheckpointError if the checkpoint's entropy path cannot be made exact."""
        self.name = name
        self.fingerprint = checkpoint.fingerprint
        self.device = device
        self.model = checkpoint.model.to(device).eval()
        self.entropy = attach(checkpoint.model.entropy, checkpoint.grids).to(device)
        for part in (self.model, self.entropy):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # A scale takes the table whose scale is nearest to it in ratio.
        scales = torch.from_numpy(scale_table())
        self._thresholds = (scales[1:] * scales[:-1]).sqrt().to(device)

    def encode(self, image: Image.Image, quality: int | None = None) -> bytes:
        """The file of an image.

        quality: 0 (smallest) to 63 (best); None is the default. A model of one rate knows only None. Raises ConfigError
        for another quality and ImageError for an image that the format cannot hold.
        """
        quality = self._checked(quality)
        pixels, grey = imageio.pixels_of(image)
        height, width = pixels.shape[:2]
        encoder = SymbolEncoder()
        with torch.inference_mode(), exactly(self.device):
            rate = self._rate(quality)
            y, z = self.model.analyse(_padded(pixels, self.device), rate)
            writer = SymbolWriter(y, z, self._thresholds, [encoder])
            self.entropy(rate, (z.shape[2], z.shape[3]), writer)
        return container.write(
            Container(
                arithmetic=EXACT,
                fingerprint=self.fingerprint,
                quality=quality,
                width=width,
                height=height,
                grey=grey,
                latent_checksum=writer.checksums[0],
                payload=encoder.finish(),
            )
        )

    def decode(self, data: bytes) -> Image.Image:
        """The image of a file: RGB, or L where the original was grey.

        Raises FormatError or UnsupportedError for what is not such a file, ModelMismatchError for the file of another
        model, and DecodeError where the decoded latents are not those that were encoded.
        """
        file = container.parse(data)
        if file.arithmetic != EXACT:
            raise UnsupportedError(f"the file uses arithmetic {file.arithmetic}, which this hpcmref does not know")
        if file.fingerprint != self.fingerprint:
            raise ModelMismatchError(_mismatch(file.fingerprint, self.name, self.fingerprint))
        if file.quality >= self.model.config.qualities:
            raise DecodeError(f"the file has quality {file.quality}, which the model {self.name} does not")
        config = self.model.config
        size = (-(-file.height // STRIDE), -(-file.width // STRIDE))
        symbols = size[0] * size[1] * (config.N + 16 * config.M)
        with torch.inference_mode(), exactly(self.device):
            rate = self._rate(file.quality)
            reader = SymbolReader(self._thresholds, [SymbolDecoder(file.payload, symbols)])
            y_hat = self.entropy(rate, size, reader)
            if reader.checksums[0] != file.latent_checksum:
                raise DecodeError("the decoded latents are not the encoded ones: the file is damaged or forged")
            x_hat = self.model.synthesise(y_hat, rate)
        return imageio.image_of(_pixels(x_hat[:, :, : file.height, : file.width]), file.grey)

    def _checked(self, quality: int | None) -> int:
        qualities = self.model.config.qualities
        if quality is None:
            return DEFAULT_QUALITY if qualities > 1 else 0
        if qualities == 1:
            raise ConfigError(f"the model {self.name} has one rate: encode without a quality")
        if not 0 <= quality < qualities:
            raise ConfigError(f"the quality is {quality}, and must be 0 to {qualities - 1}")
        return quality

    def _rate(self, quality: int) -> Tensor:
        return torch.tensor([float(quality)], device=self.device)


@lru_cache(maxsize=2)
def load(model: str | Path | None = None, device: str = "auto") -> Codec:
    """The codec of a model: a registry name, a .safetensors file, or None for the default that ships with hpcmref.

    device: "cpu", "cuda", or "auto" for CUDA where there is one. The last two codecs are kept, since loading takes
    longer than encoding a small image. Raises CheckpointError, ConfigError.
    """
    path = checkpoints.find(model)
    return Codec(checkpoints.load(path), path.stem, _device(device))


def codec_for(fingerprint: bytes, device: str = "auto", model: str | Path | None = None) -> Codec:
    """The codec whose model wrote files with this fingerprint: among the shipped ones, or `model`.

    Raises ModelMismatchError if it is none of them.
    """
    if model is None:
        if (name := checkpoints.name_of(fingerprint)) is None:
            known = ", ".join(f"{each.name} ({each.fingerprint.hex()})" for each in checkpoints.available())
            raise ModelMismatchError(
                f"the file was made with the model {fingerprint.hex()}, and only {known} ship with hpcmref: "
                "name its file with -m"
            )
        return load(name, device)
    codec = load(model, device)
    if codec.fingerprint != fingerprint:
        raise ModelMismatchError(_mismatch(fingerprint, codec.name, codec.fingerprint))
    return codec


def encode(
    image: Image.Image, quality: int | None = None, model: str | Path | None = None, device: str = "auto"
) -> bytes:
    """The file of an image; see `Codec.encode` and `load`."""
    return load(model, device).encode(image, quality)


def decode(data: bytes, device: str = "auto", model: str | Path | None = None) -> Image.Image:
    """The image of a file; see `Codec.decode` and `codec_for`."""
    return codec_for(container.parse(data).fingerprint, device, model).decode(data)


def _mismatch(wanted: bytes, name: str, found: bytes) -> str:
    known = checkpoints.name_of(wanted)
    return f"the file was made with the model {known or 'of fingerprint'} ({wanted.hex()}), not {name} ({found.hex()})"


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"the device is {name!r}, and must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here")
    return torch.device(name)


def _padded(pixels: np.ndarray, device: torch.device) -> Tensor:
    """Pixels (H, W, 3) uint8 -> (1, 3, H', W') in 0..1, the last row and column repeated up to multiples of 64."""
    x = torch.tensor(pixels, device=device).permute(2, 0, 1)[None].float() / 255
    height, width = pixels.shape[:2]
    x = F.pad(x, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
    return x.contiguous(memory_format=torch.channels_last)


def _pixels(x: Tensor) -> np.ndarray:
    """(1, 3, H, W) in 0..1 -> (H, W, 3) uint8."""
    return x[0].clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
