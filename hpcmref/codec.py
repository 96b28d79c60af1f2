"""Convert an image to a file and back: picture -> transforms -> latent codec -> container.

encode:  image -> pixels -> g_a, h_a -> y, z -> LatentCodec.compress -> container
decode:  container -> LatentCodec.decompress -> y_hat -> g_s -> pixels -> image
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hpcmref import DEFAULT_MAX_PIXELS, DEFAULT_QUALITY, __version__, arguments, checkpoints, lossless
from hpcmref.checkpoints import Checkpoint
from hpcmref.choice import Choice, Trial, is_flat, lambda_of, min_size, psnr_of, visible, visible_pixels
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
from hpcmref.format.container import METADATA, Container, Encoder, Learned, Tag
from hpcmref.latents import ARITHMETIC, SCALES, Compressed, LatentCodec
from hpcmref.model.hpcm import STRIDE, to_bytes_
from hpcmref.model.layers import in_bfloat16
from hpcmref.model.transforms import BLOCK
from hpcmref.picture import images
from hpcmref.picture.images import Picture
from hpcmref.picture.metadata import extras_of
from hpcmref.preview import FEW_STEPS, LinearSynthesis
from hpcmref.runtime.folders import models_folder
from hpcmref.runtime.forks import safe_after_fork
from hpcmref.runtime.heap import give_back
from hpcmref.runtime.torch_names import has_bfloat16_units
from hpcmref.search import Goal, Options, Watch, search
from hpcmref.search.synthesis import SimilarTarget, Target
from hpcmref.similarity import MS_SSIM_LEAST_SIDE, lambda_of_ms_ssim


@dataclass(frozen=True)
class _Header:
    """The header fields that describe the image: width, height, grey flag and metadata chunks."""

    width: int
    height: int
    grey: bool
    chunks: tuple[tuple[int, bytes], ...]


class Codec:
    """A model that is ready to encode and decode. It keeps no state between images, and threads may share it.

    `load` makes a codec.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, device: torch.device) -> None:
        """Take over the model of the checkpoint, and replace its entropy path by the exact one.

        Args:
            checkpoint: The model. It is changed, and must not be used otherwise.
            name: The name of the model, for messages.
            device: The device to compute on.

        Raises:
            CheckpointError: The entropy path cannot be computed exactly.
        """
        self.name = name
        self.fingerprint = checkpoint.fingerprint
        self.device = device
        self.model = checkpoint.model.eval().requires_grad_(False)
        self.model.entropy = attach(self.model.entropy, checkpoint.grids)
        self.model.to(device)
        if device.type == "cpu" and has_bfloat16_units():
            for network in (self.model.g_a, self.model.h_a, self.model.g_s):
                in_bfloat16(network)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for parameter in self.model.parameters():
            parameter.data = parameter.data.clone()  # releases the mapped file, most of which is not needed any more
        self.latents = LatentCodec(self.model.entropy, device)

    def encode(
        self,
        image: Image.Image | NDArray[Any],
        quality: int | None = None,
        *,
        verify: bool = False,
        keep_invisible: bool = False,
        choose: bool = False,
        effort: int = 0,
        metric: str = "mse",
        max_seconds: float | None = None,
        watch: Watch | None = None,
    ) -> bytes:
        """Encode an image and return the bytes of the file.

        Args:
            image: An image of Pillow, or an array as `hpcmref.encode` takes it.
            quality: 0 (smallest file) to 63 (best picture). None means 32. A model of one rate accepts only None.
            verify: Decode the latents with a second decoder, and compare them before the file is returned.
            keep_invisible: Keep the colours of pixels whose alpha is 0. They are otherwise replaced by a smooth
                continuation of the visible ones.
            choose: Use a lossless stream if it is better (see `hpcmref.choice`), as `hpcmref.encode` does.
            effort: 0 (fast) to 9: how long to search for a learned stream with a smaller bits + lambda * error.
            metric: The error that the search reduces, "mse" or "ms-ssim" (which needs sides of at least 161 pixels).
            max_seconds: End the search after this time and use its best result so far.
            watch: A function that observes the search, see `hpcmref.search.Watch`.

        Returns:
            The bytes of the file.

        Raises:
            ConfigError: An argument has a wrong value or type.
            ImageError: The format cannot hold the image.
            ModelChangedError: The weights in memory have changed since they were loaded, or the second decoder
                disagrees.
        """
        quality = self._checked(quality)
        arguments.flag("verify", verify)
        options = Options(effort, metric, max_seconds, watch)
        self._check_search(options)
        picture, header = self._with_header(image, keep_invisible)
        _check_sides(header, metric)
        if arguments.flag("choose", choose) and is_flat(picture):
            return _without_loss(picture, verify)
        with self._inference():
            x = self.model.features(_padded(picture.pixels, self.device), _to_unit)
            y, z = self.model.latents(x, self._quality(quality))
            del x  # large images need the room
            data, y_hat = self._encoded(header, y, z, quality, verify and not effort)
            if choose:
                made = self._choice(picture, header, {quality: (data, y_hat)})
                if made.is_lossless(quality, _stream_size(data)):
                    return _without_loss(picture, verify, made)
            if effort:
                del y_hat
                compressed = self._searched(picture, Goal(self.weight(quality, metric)), y, quality, options)
                data = self._written(header, compressed, quality, verify, effort)
        return data

    def encode_to(
        self,
        image: Image.Image | NDArray[Any],
        *,
        size: int | None = None,
        bpp: float | None = None,
        psnr: float | None = None,
        verify: bool = False,
        keep_invisible: bool = False,
        choose: bool = False,
        effort: int = 0,
        metric: str = "mse",
        max_seconds: float | None = None,
        watch: Watch | None = None,
    ) -> bytes:
        """Encode an image at the quality that comes closest to one target.

        Rate and PSNR rise with quality, so the quality is found by bisection in at most seven trials. g_a runs only
        once.

        Args:
            image: As in `encode`.
            size: The number of bytes that the file, with its metadata, must not exceed.
            bpp: The same in bits per pixel.
            psnr: The smallest permitted PSNR in dB, of RGB over all pixels whose alpha is above 0.
            verify: As in `encode`.
            keep_invisible: As in `encode`.
            choose: Use a lossless stream if it reaches the target. If the target is a PSNR, it must also be no larger
                than the learned stream.
            effort: Above 0, a search then improves the learned stream and keeps to the target. With size and bpp it
                improves the picture, and with psnr it makes the file smaller.
            metric: As in `encode`. With psnr it must be "mse".
            max_seconds: As in `encode`.
            watch: As in `encode`.

        Returns:
            The bytes of the file.

        Raises:
            ConfigError: There is not exactly one target, or an argument has a wrong value or type.
            HpcmrefError: No quality reaches the target. All other errors are those of `encode`.
        """
        _check_target(size, bpp, psnr, metric)
        arguments.flag("verify", verify)
        options = Options(effort, metric, max_seconds, watch)
        self._check_search(options)
        picture, header = self._with_header(image, keep_invisible)
        _check_sides(header, metric)
        limit = size if bpp is None else bpp * header.width * header.height / 8
        if arguments.flag("choose", choose) and (is_flat(picture) or (limit and min_size(picture) <= limit)):
            data = _without_loss(picture, verify)
            if limit is None or len(data) <= limit:
                return data
        with self._inference():
            features = self.model.features(_padded(picture.pixels, self.device), _to_unit)
            best, chosen = self._bisected(features, picture, header, limit, psnr, verify)
        if choose and limit is None and (best is None or min_size(picture) <= len(best)):
            data = _without_loss(picture, verify)
            if best is None or len(data) <= len(best):
                return data
        if best is None:
            wanted = f"{psnr} dB" if psnr is not None else f"{size} bytes" if bpp is None else f"{bpp} bits per pixel"
            raise HpcmrefError(_unreached(self.name, header, wanted, limit))
        if not effort:
            return best
        overhead = len(best) - len(container.parse(best).payload)
        goal = Goal(
            self.weight(chosen, metric),
            most_bytes=None if limit is None else limit - overhead,
            most_error=None if psnr is None else 255**2 * visible_pixels(picture) / 10 ** (psnr / 10),
        )
        with self._inference():
            y, _ = self.model.latents(features, self._quality(chosen))
            del features
            compressed = self._searched(picture, goal, y, chosen, options)
            return self._written(header, compressed, chosen, verify, effort)

    def _bisected(
        self,
        features: Tensor,
        picture: Picture,
        header: _Header,
        limit: float | None,
        psnr: float | None,
        verify: bool,
    ) -> tuple[bytes | None, int]:
        """Find the quality of a target by bisection: (bytes of the file, its quality), or (None, 0) if there is none.

        features: the output of g_a. limit: the most bytes; the largest file within it is returned. psnr: the smallest
        PSNR in dB, if limit is None; the smallest file that reaches it is returned.
        """
        best, chosen = None, 0
        low, high = 0, self.model.config.qualities - 1
        while low <= high:
            quality = (low + high) // 2
            y, z = self.model.latents(features, self._quality(quality))
            data, y_hat = self._encoded(header, y, z, quality, verify)
            if limit is not None:
                reached = len(data) <= limit
            else:
                assert psnr is not None
                reached = psnr_of(self._error(y_hat, quality, picture), 3 * visible_pixels(picture)) >= psnr
            if reached:
                best, chosen = data, quality
            if reached == (limit is not None):
                low = quality + 1
            else:
                high = quality - 1
        return best, chosen

    def _searched(self, picture: Picture, goal: Goal, y: Tensor, quality: int, options: Options) -> Compressed:
        """The best result of a search that starts from y. Invisible pixels do not count towards the error."""
        alpha, hidden = picture.extras.alpha, picture.is_filled or goal.most_error is not None
        seen = torch.from_numpy(alpha > 0).to(self.device) if alpha is not None and alpha.any() and hidden else None
        kind = SimilarTarget if options.metric == "ms-ssim" else Target
        pixels = _padded(picture.pixels, self.device)
        target = kind(self.model, self._quality(quality), pixels, picture.pixels.shape[:2], picture.grey, seen)
        return search(self.latents, target, goal, y, self.model.hyper_latents, quality, options)

    def _with_header(self, image: Image.Image | NDArray[Any], keep_invisible: bool) -> tuple[Picture, _Header]:
        """The pixels of an image, and the header fields."""
        picture = images.picture_of(image, arguments.flag("keep_invisible", keep_invisible))
        height, width = picture.pixels.shape[:2]
        return picture, _Header(width, height, picture.grey, picture.extras.chunks())

    def _choice(self, picture: Picture, header: _Header, made: dict[int, tuple[bytes, Tensor]]) -> Choice:
        """The possible streams of a picture. made: files and y_hat by quality, as far as they exist already."""

        @cache
        def features() -> Tensor:
            return self.model.features(_padded(picture.pixels, self.device), _to_unit)

        @cache
        def trial(quality: int) -> Trial:
            if quality not in made:
                y, z = self.model.latents(features(), self._quality(quality))
                made[quality] = self._encoded(header, y, z, quality, False)
            data, y_hat = made[quality]
            return Trial(_stream_size(data), self._error(y_hat, quality, picture))

        return Choice(picture, self.model.config.lambdas, self.model.config.qualities, trial)

    def _error(self, y_hat: Tensor, quality: int, picture: Picture) -> float:
        """The squared error of all visible samples, 0..255, of a picture that is decoded from y_hat."""
        height, width = picture.pixels.shape[:2]
        shown = self._pixels(y_hat, quality, _Header(width, height, picture.grey, ()))
        reference = torch.from_numpy(picture.pixels).to(self.device)
        alpha = picture.extras.alpha
        seen = None if alpha is None or not alpha.any() else torch.from_numpy(alpha > 0).to(self.device)
        return _squared_error(shown, reference, seen)

    def _encoded(self, header: _Header, y: Tensor, z: Tensor, quality: int, verify: bool) -> tuple[bytes, Tensor]:
        """The file of y (1, M, h, w) and z, and the y_hat that it decodes to."""
        compressed = self.latents.compress(y, z, quality)
        return self._written(header, compressed, quality, verify, 0), compressed.y_hat

    def _written(self, header: _Header, compressed: Compressed, quality: int, verify: bool, effort: int) -> bytes:
        """The file of coded latents."""
        if verify:
            self.latents.verify(compressed, (-(-header.height // STRIDE), -(-header.width // STRIDE)), quality)
        file = Container(
            width=header.width,
            height=header.height,
            grey=header.grey,
            learned=Learned(ARITHMETIC, self.fingerprint, quality, compressed.checksums[0]),
            payload=compressed.payloads[0],
            chunks=header.chunks,
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
        """Decode a file and return its image.

        Args:
            data: The bytes of a file, or the result of `container.parse`, which then has used `partial` and `damaged`.
            upto: The last scale (1, 2 or 3) whose latents are read. Those of later scales are set to their predicted
                means.
            partial: Decode a truncated file up to the last scale that is complete.
            max_pixels: Larger images are refused before memory is allocated for them.
            damaged: If the checksum of the file does not match, decode up to the last scale whose own checksum does.

        Returns:
            The image in the mode of the original (see `hpcmref.picture.images`), with its metadata in `info`.

        Raises:
            FormatError: The data is not an hpcmref file, or it is damaged or truncated.
            UnsupportedError: A newer version of hpcmref has written the file.
            ModelMismatchError: Another model has made the file.
            DecodeError: The decoded latents are not those that were encoded.
            ImageError: The image has more than `max_pixels` pixels.
            ConfigError: An argument has a wrong value or type.
        """
        arguments.integer("upto", upto, 1, SCALES)
        arguments.integer("max_pixels", max_pixels, 1)
        arguments.flag("partial", partial)
        arguments.flag("damaged", damaged)
        file = data if isinstance(data, Container) else container.parse(data, partial, damaged)
        if (pixels := file.width * file.height) > max_pixels:
            raise ImageError(f"the image has {pixels} pixels, more than the {max_pixels} that max_pixels allows")
        if file.learned is None:
            return lossless.decode(file, max_pixels)
        y_hat = self.y_hat(file, upto)
        with self._inference():
            shown = self._pixels(y_hat, self._learned(file).quality, file)
        return images.image_of(shown.cpu().numpy(), file.grey, extras_of(file))

    def thumbnail(
        self,
        data: bytes | Container,
        side: int,
        partial: bool = False,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        damaged: bool = False,
    ) -> Image.Image:
        """Decode a file to a small image that fits a square, and never enlarge it.

        If the picture is at least 12 times as large as the thumbnail, in pixels a side, this takes less than half the
        time of `decode`. The result is then an approximation, see `hpcmref.preview`.

        Args:
            data: As in `decode`.
            side: The side of the square in pixels.
            partial: As in `decode`.
            max_pixels: As in `decode`. It counts the pixels of the whole picture.
            damaged: As in `decode`.

        Returns:
            The small image.

        Raises:
            ConfigError: `side` is not a whole number above 0, or another argument has a wrong value or type.
            ImageError: The picture has more than `max_pixels` pixels.
            HpcmrefError: All other errors are those of `decode`.
        """
        arguments.integer("side", side, 1)
        file = data if isinstance(data, Container) else container.parse(data, partial, damaged)
        factor = max(file.width, file.height) / side
        if file.learned is None or factor < BLOCK or self.model.config.transform != "dct":
            return images.fitted(self.decode(file, max_pixels=max_pixels), side)
        if (pixels := file.width * file.height) > max_pixels:
            raise ImageError(f"the image has {pixels} pixels, more than the {max_pixels} that max_pixels allows")
        return self._preview(
            file, self._learned(file), images.fitting(file.width, file.height, side), factor >= FEW_STEPS
        )

    def _preview(self, file: Container, learned: Learned, size: tuple[int, int], few_steps: bool) -> Image.Image:
        """A picture of `size` (width, height), at most an eighth of the whole, from the linear part of g_s."""
        with self._inference():
            if few_steps and not (file.truncated or file.damaged):
                of_z = (-(-file.height // STRIDE), -(-file.width // STRIDE))
                y_hat = self.latents.preview(file.payload, learned.checksums, of_z, learned.quality)
            else:
                y_hat = self.y_hat(file)
            gain = self.model.log_inverse_gain
            small = self._linear(y_hat if gain is None else y_hat * gain(self._quality(learned.quality)).exp())
            small = to_bytes_(small)
        shown = Image.fromarray(small[0].permute(1, 2, 0).contiguous().cpu().numpy())
        area = (0.0, 0.0, file.width / BLOCK, file.height / BLOCK)
        pixels = np.asarray(shown.resize(size, Image.Resampling.LANCZOS, area))
        extras = extras_of(file)
        if extras.alpha is not None:
            alpha = Image.fromarray(extras.alpha).resize(size, Image.Resampling.BOX, reducing_gap=2)
            extras = replace(extras, alpha=np.asarray(alpha))
        return images.image_of(pixels, file.grey, replace(extras, mode=None) if extras.mode == "1" else extras)

    @cached_property
    def _linear(self) -> LinearSynthesis:
        return LinearSynthesis(self.model)

    def verify(self, data: bytes | Container) -> None:
        """Decode all latents and metadata of a file, and compare its checksums. The picture itself is not computed.

        Args:
            data: As in `decode`.

        Raises:
            HpcmrefError: The file is bad; the errors are those of `decode`.
        """
        file = data if isinstance(data, Container) else container.parse(data)
        self.y_hat(file)
        extras_of(file)

    def y_hat(self, file: Container, upto: int = SCALES) -> Tensor:
        """Decode the latents of a file. They have the same bits on every machine, except for the sign of zeros.

        Args:
            file: The result of `container.parse`.
            upto: The last scale (1, 2 or 3) that is read. In a damaged file, it is at most the last intact one.

        Returns:
            The latents (1, M, h, w) float32.

        Raises:
            HpcmrefError: The errors are those of `decode`.
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

    def _pixels(self, y_hat: Tensor, quality: int, header: _Header | Container) -> Tensor:
        """The visible pixels of the picture that is decoded from y_hat: (H, W, 3) uint8."""
        return _cropped(self.model.picture(y_hat, self._quality(quality)), header).contiguous()

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Run networks without gradients and in the precision of their weights, whatever the caller has set."""
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
        """Return the lambda of a quality, interpolated between the anchors: the bits that a unit of error is worth.

        Args:
            quality: 0 to 63.
            metric: "mse", whose unit is a squared error of 1 (one grey level) in one pixel, or "ms-ssim", whose unit is
                an MS-SSIM of 0 instead of 1 in one pixel.

        Returns:
            The lambda, or 0 for a model without lambdas.
        """
        found = lambda_of(self.model.config.lambdas, quality, self.model.config.qualities)
        return lambda_of_ms_ssim(found) if metric == "ms-ssim" else found

    def _quality(self, quality: int) -> Tensor:
        # Filled on the device: a copy from the host would make the host wait for a GPU.
        return torch.full((1,), float(quality), dtype=torch.float32, device=self.device)


_ENCODER = Encoder(*map(int, __version__.split(".")[:2]))


_loading = threading.Lock()


def load(model: str | os.PathLike[str] | None = None, device: str = "auto") -> Codec:
    """Load a model and return its codec. The last two codecs are cached.

    Args:
        model: The name of a model, the path of a .safetensors file, or None for the default that ships with hpcmref.
        device: "cpu", "cuda", or "auto" for CUDA if there is a CUDA device.

    Returns:
        The codec.

    Raises:
        CheckpointError: There is no such model, or its file is damaged.
        ConfigError: There is no such device, or an argument has a wrong type.
    """
    arguments.model(model)
    with _loading:  # threads that ask for a codec at once get the same one
        path = checkpoints.find(model)
        found = path.stat()
        return _kept(path, device_of(device), (found.st_mtime_ns, found.st_size, found.st_ino))


def fresh(model: str | os.PathLike[str] | None = None, device: str = "auto") -> Codec:
    """As `load`, but the codec is new and not cached, so that the caller has it alone."""
    return _made(checkpoints.find(model), device_of(device))


def _made(path: Path, device: torch.device) -> Codec:
    # Tensors that are made in the caller's inference mode could not be used by a search.
    with safe_after_fork(device.type), torch.inference_mode(False):
        checkpoint = checkpoints.load(path)
        give_back()
        codec = Codec(checkpoint, path.stem, device)
    give_back()
    return codec


@lru_cache(maxsize=2)
def _kept(path: Path, device: torch.device, version: tuple[int, ...]) -> Codec:
    """As `_made`. version: changes when the file is replaced, whose codec must not be used any more."""
    return _made(path, device)


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
    """The device for "auto", "cpu" or "cuda". Of several GPUs it is the current one. Raises ConfigError.

    The result names the GPU by its number, so that a codec stays on it even if the caller changes the current GPU.
    """
    if arguments.device(name) == "cpu" or not torch.cuda.is_available():
        if name == "cuda":
            raise ConfigError("there is no CUDA device here")
        return torch.device("cpu")
    with safe_after_fork("cuda"):
        return torch.device("cuda", torch.cuda.current_device())


def _padded(pixels: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Pixels (H, W, 3) uint8 -> (1, 3, H', W') uint8, the last row and column repeated up to multiples of 64."""
    height, width = pixels.shape[:2]
    pixels = np.pad(pixels, ((0, -height % STRIDE), (0, -width % STRIDE), (0, 0)), mode="edge")
    return torch.from_numpy(pixels).to(device).permute(2, 0, 1)[None]


def _to_unit(x: Tensor) -> Tensor:
    """0..255 uint8 -> 0..1."""
    return x.float().div_(255)


def _cropped(x: Tensor, header: _Header | Container) -> Tensor:
    """Cut planes (1, 3, H', W') to the size of the image: (H, W, 3)."""
    return x[0, :, : header.height, : header.width].permute(1, 2, 0)


def _check_target(size: int | None, bpp: float | None, psnr: float | None, metric: str) -> None:
    """Raise ConfigError unless exactly one target is given, with a value that it can have."""
    if sum(target is not None for target in (size, bpp, psnr)) != 1:
        raise ConfigError("exactly one of size, bits per pixel and PSNR can be the target")
    if size is not None:
        arguments.integer("size", size, 1)
    for name, value in (("bpp", bpp), ("psnr", psnr)):
        if value is not None:
            arguments.positive(name, value)
    if psnr is not None and metric != "mse":
        raise ConfigError("a target in PSNR goes with the metric mse alone")


def _check_sides(header: _Header, metric: str) -> None:
    if metric == "ms-ssim" and min(header.width, header.height) < MS_SSIM_LEAST_SIDE:
        raise ImageError(f"MS-SSIM needs images of at least {MS_SSIM_LEAST_SIDE} pixels a side")


def _squared_error(shown: Tensor, reference: Tensor, seen: Tensor | None) -> float:
    """The squared error between two pictures (H, W, 3) uint8. seen: (H, W) bool, the pixels that count (None: all)."""
    error = 0
    for top in range(0, len(shown), 64):  # in parts, to save memory
        rows = slice(top, top + 64)
        squares = (shown[rows].int() - reference[rows].int()).square_()
        error += int((squares if seen is None else squares[seen[rows]]).sum())
    return float(error)


def _stream_size(data: bytes) -> int:
    """The size of a learned payload together with the header fields that a lossless file does not have, in bytes."""
    return len(container.parse(data).payload) + container.LEARNED_BYTES


def _without_loss(picture: Picture, verify: bool, made: Choice | None = None) -> bytes:
    """The file with a lossless stream. With `verify`, raises DecodeError if it does not decode to the same picture."""
    coding, payload = lossless.pack(visible(picture)) if made is None else made.stream
    data = lossless.file_of(picture, coding, payload)
    if verify:
        lossless.compare(data, visible(picture))
    return data


def _unreached(name: str, header: _Header, wanted: str, limit: float | None) -> str:
    """The error message for a target that no quality reaches. limit: bytes, if the target is a size."""
    sizes = {Tag(tag).name: len(content) for tag, content in header.chunks if tag in {*METADATA, Tag.ALPHA}}
    alpha = sizes.pop("ALPHA", 0)
    if limit is not None and sum(sizes.values()) > limit:
        items = " and ".join(f"{name} data of {size} bytes" for name, size in sizes.items())
        return f"the image cannot have {wanted}: its metadata alone is larger ({items}); leave it out with --strip"
    if limit is not None and alpha > limit:
        return f"the image cannot have {wanted}: its transparency alone takes {alpha} bytes"
    return f"no quality of the model {name} reaches {wanted} with this image"
