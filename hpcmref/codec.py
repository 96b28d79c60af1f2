"""An image to a file and back: picture -> transforms -> latent codec -> container.

encode:  image -> pixels -> g_a, h_a -> y, z -> LatentCodec.compress -> container
decode:  container -> LatentCodec.decompress -> y_hat -> g_s -> pixels -> image
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hpcmref import DEFAULT_MAX_PIXELS, DEFAULT_QUALITY, __version__, arguments, checkpoints
from hpcmref.checkpoints import Checkpoint
from hpcmref.errors import (
    ConfigError,
    DecodeError,
    HpcmrefError,
    ImageError,
    ModelMismatchError,
    UnsupportedError,
)
from hpcmref.exact import attach, repeatably
from hpcmref.format import container
from hpcmref.format.container import Container, Encoder, Learned
from hpcmref.latents import ARITHMETIC, SCALES, Compressed, LatentCodec
from hpcmref.lossless import decode as decode_lossless
from hpcmref.model.hpcm import STRIDE
from hpcmref.model.layers import anchor_weights, in_bfloat16
from hpcmref.picture import images
from hpcmref.picture.metadata import extras_of
from hpcmref.runtime.folders import models_folder
from hpcmref.runtime.forks import safe_after_fork
from hpcmref.runtime.torch_names import has_bfloat16_units
from hpcmref.search import Goal, Options, Watch, search
from hpcmref.search.synthesis import Picture, SimilarPicture
from hpcmref.similarity import MS_SSIM_LEAST_SIDE, lambda_of_ms_ssim


@dataclass(frozen=True)
class _Frame:
    """The header fields that describe the image: width, height, grey flag and metadata chunks."""

    width: int
    height: int
    grey: bool
    chunks: tuple[tuple[int, bytes], ...]


class Codec:
    """One model, ready to encode and decode. Keeps no state between images."""

    def __init__(self, checkpoint: Checkpoint, name: str, device: torch.device) -> None:
        """Takes over the checkpoint's model, with an exact entropy path instead of its own.

        Raises CheckpointError if there can be none.
        """
        self.name = name
        self.fingerprint = checkpoint.fingerprint
        self.device = device
        self.model = checkpoint.model.eval()
        self.model.entropy = attach(self.model.entropy, checkpoint.grids)
        self.model.to(device)
        if device.type == "cpu" and has_bfloat16_units():
            for network in (self.model.g_a, self.model.h_a, self.model.g_s):
                in_bfloat16(network)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for parameter in self.model.parameters():
            parameter.data = parameter.data.clone()  # lets go of the mapped file, most of which is not needed any more
        self.latents = LatentCodec(self.model.entropy, device)

    def encode(
        self,
        image: Image.Image | np.ndarray,
        quality: int | None = None,
        *,
        verify: bool = False,
        keep_invisible: bool = False,
        effort: int = 0,
        metric: str = "mse",
        max_seconds: float | None = None,
        watch: Watch | None = None,
    ) -> bytes:
        """The file of an image.

        quality: 0 (smallest) to 63 (best); None is the default. A model of one rate knows only None.
        verify: decode the latents with a second decoder and compare, before anything is returned.
        keep_invisible: code the colours of pixels whose alpha is 0, which are otherwise replaced by a smooth
            continuation of the visible ones.
        effort: 0 (fast) to 9: how long to search for a better file, one of fewer bits + lambda * error.
        metric: what a search takes for the error, "mse" or "ms-ssim" (which needs sides of 161 pixels).
        max_seconds: end the search after them, with what it has found. watch: see `hpcmref.search.Watch`.

        Raises ConfigError for another quality or effort, ImageError for an image that the format cannot hold, and
        ModelChangedError if the model in memory is not the one that was loaded or the second decoder disagrees.
        """
        quality = self._checked(quality)
        arguments.flag("verify", verify)
        options = Options(effort, metric, max_seconds, watch)
        self._check_search(options)
        frame, x = self._framed(image, keep_invisible)
        _check_sides(frame, metric)
        with self._inference():
            y, z = self.model.latents(self.model.features(x, _to_unit), self._rate(quality))
            if effort:
                goal = Goal(self.weight(quality, metric))
                compressed = self._searched(frame, x, goal, y, quality, options)
            else:
                del x  # large images need the room
                compressed = self.latents.compress(y, z, quality)
            return self._written(frame, compressed, quality, verify, effort)

    def encode_to(
        self,
        image: Image.Image | np.ndarray,
        *,
        size: int | None = None,
        bpp: float | None = None,
        psnr: float | None = None,
        verify: bool = False,
        keep_invisible: bool = False,
        effort: int = 0,
        metric: str = "mse",
        max_seconds: float | None = None,
        watch: Watch | None = None,
    ) -> bytes:
        """The file of an image at the quality that comes closest to one target, in at most seven trials.

        size: bytes, or bpp: bits per pixel, that the file does not exceed; psnr: dB of RGB that the picture has at
        least. Rate and PSNR rise with quality, so the trials halve the range of qualities; g_a runs once. With an
        effort, the search then makes that file better (size and bpp: the picture; psnr: the file), and keeps to the
        target. Raises ConfigError unless there is exactly one target, HpcmrefError if no quality reaches it, and as
        `encode` does.
        """
        if sum(target is not None for target in (size, bpp, psnr)) != 1:
            raise ConfigError("exactly one of size, bits per pixel and PSNR can be the target")
        if size is not None:
            arguments.integer("size", size, 1)
        for name, value in (("bpp", bpp), ("psnr", psnr)):
            if value is not None:
                arguments.positive(name, value)
        if psnr is not None and metric != "mse":
            raise ConfigError("a target in PSNR goes with the metric mse alone")
        arguments.flag("verify", verify)
        options = Options(effort, metric, max_seconds, watch)
        self._check_search(options)
        frame, x = self._framed(image, keep_invisible)
        _check_sides(frame, metric)
        limit = size if bpp is None else bpp * frame.width * frame.height / 8

        def reached(compressed: Compressed, quality: int) -> bool:
            if limit is not None:
                return len(self._written(frame, compressed, quality, False, 0)) <= limit
            assert psnr is not None
            return _psnr(self._pixels(compressed.y_hat, quality, frame), _cropped(x, frame)) >= psnr

        with self._inference():
            features = self.model.features(x, _to_unit)
            nearest = self._nearest(features, reached, limit is not None)
            if nearest is None:
                wanted = f"{psnr} dB" if psnr is not None else f"{limit:.0f} bytes"
                raise HpcmrefError(f"no quality of the model {self.name} reaches {wanted} with this image")
            quality, compressed = nearest
            if effort:
                y, _ = self.model.latents(features, self._rate(quality))
                del features
                overhead = len(self._written(frame, compressed, quality, False, 0)) - len(compressed.payloads[0])
                goal = Goal(
                    self.weight(quality, metric),
                    most_bytes=None if limit is None else limit - overhead,
                    most_error=None if psnr is None else 255**2 * frame.width * frame.height / 10 ** (psnr / 10),
                )
                compressed = self._searched(frame, x, goal, y, quality, options)
            return self._written(frame, compressed, quality, verify, effort)

    def _nearest(
        self, features: Tensor, reached: Callable[[Compressed, int], bool], highest: bool
    ) -> tuple[int, Compressed] | None:
        """The highest (or lowest) quality whose coded latents reach a target, and these latents; None if none does."""
        low, high = 0, self.model.config.qualities - 1
        best: tuple[int, Compressed] | None = None
        while low <= high:
            quality = (low + high) // 2
            compressed = self.latents.compress(*self.model.latents(features, self._rate(quality)), quality)
            if is_one := reached(compressed, quality):
                best = quality, compressed
            low, high = (quality + 1, high) if is_one == highest else (low, quality - 1)
        return best

    def _searched(self, frame: _Frame, x: Tensor, goal: Goal, y: Tensor, quality: int, options: Options) -> Compressed:
        """The best that a search finds for the picture x (1, 3, H', W') uint8 from y on."""
        kind = SimilarPicture if options.metric == "ms-ssim" else Picture
        picture = kind(self.model, self._rate(quality), x, (frame.height, frame.width), frame.grey)
        return search(self.latents, picture, goal, y, self.model.hyper_latents, quality, options)

    def _framed(self, image: Image.Image | np.ndarray, keep_invisible: bool) -> tuple[_Frame, Tensor]:
        """The header fields of an image, and its pixels (1, 3, H', W') uint8, padded to multiples of 64."""
        picture = images.picture_of(image, arguments.flag("keep_invisible", keep_invisible))
        height, width = picture.pixels.shape[:2]
        frame = _Frame(width, height, picture.grey, picture.extras.chunks())
        return frame, _padded(picture.pixels, self.device)

    def _written(self, frame: _Frame, compressed: Compressed, quality: int, verify: bool, effort: int) -> bytes:
        """The file of coded latents."""
        if verify:
            self.latents.verify(compressed, (-(-frame.height // STRIDE), -(-frame.width // STRIDE)), quality)
        file = Container(
            width=frame.width,
            height=frame.height,
            grey=frame.grey,
            learned=Learned(ARITHMETIC, self.fingerprint, quality, compressed.checksums[0]),
            payload=compressed.payloads[0],
            chunks=frame.chunks,
            encoder=replace(_ENCODER, effort=effort),
        )
        return container.write(file)

    def decode(
        self,
        data: bytes | Container,
        upto: int = SCALES,
        partial: bool = False,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        damaged: bool = False,
    ) -> Image.Image:
        """The image of a file, in the mode of the original (see `hpcmref.picture.images`), with its metadata in `info`.

        data: the bytes of a file, or what `container.parse` made of them (partial and damaged are its arguments then).
        upto: the last scale (1, 2 or 3) whose latents are read; those of later scales are taken as predicted.
        partial: decode a truncated file up to the last scale that is whole.
        max_pixels: larger images are refused, before there is room made for them.
        damaged: decode a file whose checksum does not match up to the last scale whose latents verify.

        Raises FormatError or UnsupportedError for what is not such a file, ImageError for too large an image,
        ModelMismatchError for the file of another model, DecodeError where the decoded latents are not those that were
        encoded, and ConfigError for another scale.
        """
        arguments.integer("upto", upto, 1, SCALES)
        arguments.integer("max_pixels", max_pixels, 1)
        arguments.flag("partial", partial)
        arguments.flag("damaged", damaged)
        file = data if isinstance(data, Container) else container.parse(data, partial, damaged)
        if (pixels := file.width * file.height) > max_pixels:
            raise ImageError(f"the image has {pixels} pixels, more than the {max_pixels} that max_pixels allows")
        if file.learned is None:
            return decode_lossless(file, max_pixels)
        y_hat = self.y_hat(file, upto)
        with self._inference():
            shown = self._pixels(y_hat, self._learned(file).quality, file)
        return images.image_of(shown.cpu().numpy(), file.grey, extras_of(file))

    def verify(self, data: bytes | Container) -> None:
        """Decode all latents and metadata of a file and compare its checksums; the picture itself is not made.

        Raises as `decode` does.
        """
        file = data if isinstance(data, Container) else container.parse(data)
        self.y_hat(file)
        extras_of(file)

    def y_hat(self, file: Container, upto: int = SCALES) -> Tensor:
        """The latents (1, M, h, w) float32 up to a scale: `upto`, or of a damaged file the last intact one.

        The same bits on every machine, but for the sign of zeros. Raises as `decode` does.
        """
        learned = self._learned(file)
        size = (-(-file.height // STRIDE), -(-file.width // STRIDE))
        with self._inference():
            if file.truncated or file.damaged:
                return self.latents.decompress_intact(file.payload, learned.checksums, size, learned.quality, upto)[0]
            return self.latents.decompress([file.payload], [learned.checksums], size, learned.quality, upto)

    def _learned(self, file: Container) -> Learned:
        """The header of a file's learned payload, if this codec can decode it; raises as `decode` does."""
        learned = file.learned
        if learned is None:
            raise UnsupportedError(f"the file is coded without loss ({file.coding.name}), and needs no model")
        if learned.arithmetic != ARITHMETIC:
            raise UnsupportedError(f"the file uses arithmetic {learned.arithmetic}, which this hpcmref does not know")
        if learned.fingerprint != self.fingerprint:
            raise ModelMismatchError(_mismatch(learned.fingerprint, self.name, self.fingerprint))
        if learned.quality >= self.model.config.qualities:
            raise DecodeError(f"the file has quality {learned.quality}, which the model {self.name} does not")
        return learned

    def _pixels(self, y_hat: Tensor, quality: int, frame: _Frame | Container) -> Tensor:
        """What is seen of y_hat: (H, W, 3) uint8."""
        return _cropped(self.model.picture(y_hat, self._rate(quality)), frame).contiguous()

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Networks run without gradients and in the precision of their weights, whatever the caller has set."""
        with (
            safe_after_fork(self.device.type),
            torch.inference_mode(),
            torch.autocast(self.device.type, enabled=False),
            repeatably(self.device),
        ):
            yield

    def _checked(self, quality: int | None) -> int:
        qualities = self.model.config.qualities
        if quality is None:
            return DEFAULT_QUALITY if qualities > 1 else 0
        if qualities == 1:
            raise ConfigError(f"the model {self.name} has one rate: encode without a quality")
        return arguments.integer("quality", quality, 0, qualities - 1)

    def _check_search(self, options: Options) -> None:
        arguments.effort(options.effort, options.max_seconds)
        arguments.metric(options.metric, options.effort)
        if options.effort and not self.model.config.lambdas:
            raise ConfigError(f"the model {self.name} does not say what bits are worth: encode with effort 0")

    def weight(self, quality: int, metric: str = "mse") -> float:
        """Lambda of a quality, between those of the anchors: bits for a unit of the search's error.

        That is a squared error of one grey level in one pixel, or for "ms-ssim" an MS-SSIM of 0 instead of 1 in one.
        """
        lambdas = torch.tensor(self.model.config.lambdas, device=self.device)
        found = float((anchor_weights(self._rate(quality), len(lambdas)) @ lambdas.log()).exp())
        return lambda_of_ms_ssim(found) if metric == "ms-ssim" else found

    def _rate(self, quality: int) -> Tensor:
        # Filled and not copied from the host, which would have to wait for a GPU.
        return torch.full((1,), float(quality), dtype=torch.float32, device=self.device)


_ENCODER = Encoder(*map(int, __version__.split(".")[:2]))


_loading = threading.Lock()


def load(model: str | os.PathLike[str] | None = None, device: str = "auto") -> Codec:
    """The codec of a model: a name, a .safetensors file, or None for the default that ships with hpcmref.

    device: "cpu", "cuda", or "auto" for CUDA where there is one. The last two codecs are kept, since loading takes
    longer than encoding a small image. Raises CheckpointError, ConfigError.
    """
    arguments.model(model)
    with _loading:  # threads that ask for a codec at once get the same one
        return _kept(checkpoints.find(model), device_of(device))


def fresh(model: str | os.PathLike[str] | None = None, device: str = "auto") -> Codec:
    """As `load`, but a codec of the caller's own, which is not kept."""
    return _made(checkpoints.find(model), device_of(device))


def _made(path: Path, device: torch.device) -> Codec:
    with safe_after_fork(device.type):
        return Codec(checkpoints.load(path), path.stem, device)


_kept = lru_cache(maxsize=2)(_made)


def codec_for(file: Container, device: str = "auto", model: str | os.PathLike[str] | None = None) -> Codec:
    """The codec whose model wrote a file: one of the available models (`checkpoints.available`), or `model`.

    Raises ModelMismatchError if it is none of them, and UnsupportedError for a file without a learned payload.
    """
    if file.learned is None:
        raise UnsupportedError(f"the file is coded without loss ({file.coding.name}), and needs no model")
    fingerprint = file.learned.fingerprint
    if model is None:
        if (found := checkpoints.with_fingerprint(fingerprint)) is None:
            known = ", ".join(f"{each.name} ({each.fingerprint.hex()})" for each in checkpoints.available())
            raise ModelMismatchError(
                f"the file was made with the model {fingerprint.hex()}, and only {known} are here: name its file with "
                f"-m, or put it into {models_folder()} (hpcmref checkpoints add)"
            )
        return load(found.path, device)
    codec = load(model, device)
    if codec.fingerprint != fingerprint:
        raise ModelMismatchError(_mismatch(fingerprint, codec.name, codec.fingerprint))
    return codec


def _mismatch(wanted: bytes, name: str, found: bytes) -> str:
    known = checkpoints.name_of(wanted)
    return f"the file was made with the model {known or 'of fingerprint'} ({wanted.hex()}), not {name} ({found.hex()})"


def device_of(name: str) -> torch.device:
    """The device of "auto", "cpu" or "cuda"; of several GPUs the present one, by its number. Raises ConfigError.

    With the number a codec stays on its GPU when the caller makes another one the present one.
    """
    if arguments.device(name) == "cpu" or not torch.cuda.is_available():
        if name == "cuda":
            raise ConfigError("there is no CUDA device here")
        return torch.device("cpu")
    with safe_after_fork("cuda"):
        return torch.device("cuda", torch.cuda.current_device())


def _padded(pixels: np.ndarray, device: torch.device) -> Tensor:
    """Pixels (H, W, 3) uint8 -> (1, 3, H', W') uint8, the last row and column repeated up to multiples of 64."""
    height, width = pixels.shape[:2]
    pixels = np.pad(pixels, ((0, -height % STRIDE), (0, -width % STRIDE), (0, 0)), mode="edge")
    return torch.from_numpy(pixels).to(device).permute(2, 0, 1)[None]


def _to_unit(x: Tensor) -> Tensor:
    """0..255 uint8 -> 0..1."""
    return x.float().div_(255)


def _cropped(x: Tensor, frame: _Frame | Container) -> Tensor:
    """Planes (1, 3, H', W') -> what is seen of them, (H, W, 3)."""
    return x[0, :, : frame.height, : frame.width].permute(1, 2, 0)


def _check_sides(frame: _Frame, metric: str) -> None:
    if metric == "ms-ssim" and min(frame.width, frame.height) < MS_SSIM_LEAST_SIDE:
        raise ImageError(f"MS-SSIM needs images of at least {MS_SSIM_LEAST_SIDE} pixels a side")


def _psnr(shown: Tensor, reference: Tensor) -> float:
    """dB, of (H, W, 3) uint8; infinite for equal ones."""
    rows = zip(shown.split(64), reference.split(64), strict=True)
    error = sum(int((x.int() - y.int()).square_().sum()) for x, y in rows)
    return 10 * math.log10(255**2 * shown.numel() / error) if error else math.inf
