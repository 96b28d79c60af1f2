"""Measure the time of each stage of encoding and decoding, and count its multiplications and the bytes that it moves.

    pixels (Pillow)  g_a  h_a  h_s  s1, s2, s3 (adaptor, prior, attention, rest)  range coder  g_s  file  rest

Every call of a stage is timed, without the time of stages inside it. Multiplications (of convolutions and matrix
products) and bytes (of the operands and results of all tensor operations, in caches or in memory) are counted in a
separate run. They are compared with the best rates of the same process, in convolutions of float32, float64 and
bfloat16, in an int8 matrix product, and in a copy. The whole is compared with the same networks as plain PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import io
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hpcmref import checkpoints
from hpcmref.checkpoints import Checkpoint
from hpcmref.codec import Codec
from hpcmref.format import container, rangecoder
from hpcmref.model import HPCM, PRESETS
from hpcmref.model.coders import Estimator
from hpcmref.model.hpcm import STRIDE
from hpcmref.picture import images
from hpcmref.picture.render import render
from hpcmref.runtime.torch_names import int_mm
from hpcmref.training.profile import now

REST = "rest"


@dataclass
class StageProfile:
    """The time, the arithmetic and the memory traffic of one stage.

    seconds: its time. macs: multiplications, each with an addition. least: the seconds that these would take at the
    best rates of their types. moved: bytes read and written.
    """

    seconds: float = 0.0
    macs: int = 0
    least: float = 0.0
    moved: int = 0


Rates = dict[torch.dtype, float]
"""The best rate of multiplications per second, by the type of the numbers."""


@dataclass(frozen=True)
class Profile:
    """The stages of encoding and decoding in the order in which they begin, and the best rates of the process.

    bytes_per_second: bytes read and written in a copy of 64 MiB. plain_encode, plain_decode: the seconds that `plain`
    measures.
    """

    encode: dict[str, StageProfile]
    decode: dict[str, StageProfile]
    rates: Rates
    bytes_per_second: float
    plain_encode: float
    plain_decode: float


def profile(
    checkpoint: Checkpoint, device: torch.device, image: Image.Image, quality: int | None = None, repeat: int = 5
) -> Profile:
    """Encode and decode an image, from a PNG file to a PNG file in memory, and return the profiles of all stages.

    checkpoint: the model. device: where its networks run. quality: None means the default. repeat: the number of runs,
    of which the best time of each stage is used.
    """
    # A new process returns freed memory to the system, as research code does (see `hpcmref.runtime.heap`).
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        seconds = alone.submit(plain, checkpoint.model, device, image, quality, repeat).result()
    codec = Codec(checkpoint, "", device)
    png = render(image, "PNG")
    data = codec.encode(image, quality)
    rates = _best_rates(device)
    encode = _measured(codec, partial(_encode, codec, png, quality), repeat, rates)
    decode = _measured(codec, partial(_decode, codec, data), repeat, rates)
    return Profile(encode, decode, rates, _best_copy(device), *seconds)


def plain(
    model: HPCM, device: torch.device, image: Image.Image, quality: int | None = None, repeat: int = 5
) -> tuple[float, float]:
    """Measure the networks in plain PyTorch: (seconds of those that encode, seconds of those that decode).

    The networks are run as most research code runs them: in float32, in PyTorch's default memory format, on whole
    images instead of strips, and without a range coder. Each time is the best of `repeat` runs. quality: None means 0.
    `model` is copied and not changed.
    """
    model = copy.deepcopy(model).to(device)
    model.requires_grad_(False).train()  # in eval mode, modules save memory and time
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).to(device).permute(2, 0, 1)[None]
    height, width = pixels.shape[2:]
    x = F.pad(pixels.contiguous().float() / 255, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
    qualities = torch.tensor([float(quality or 0)], device=device)
    encode = decode = float("inf")
    for _ in range(repeat + 1):
        begun = now(device.type)
        y, z = model.latents(model.features(x), qualities)
        shape = (z.shape[2], z.shape[3])
        model.entropy(qualities, shape, Estimator(y, z, noise=False))
        encoded = now(device.type)
        model.synthesise(model.entropy(qualities, shape, Estimator(y, z, noise=False)), qualities)
        decode = min(decode, now(device.type) - encoded)
        encode = min(encode, encoded - begun)
    return encode, decode


def untrained(preset: str) -> Checkpoint:
    """Make a checkpoint of a preset with random weights. It is as fast as a trained one, except for the range coder."""
    torch.manual_seed(0)
    model = HPCM(PRESETS[preset]).initialise().eval()
    return Checkpoint(model, checkpoints.calibrated(model), bytes(4))


def photograph(width: int = 768, height: int = 512) -> Image.Image:
    """Make an image of the calibration tiles, side by side."""
    tiles = checkpoints.tiles()
    image = Image.new("RGB", (width, height))
    side = tiles[0].width
    cells = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
    for index, cell in enumerate(cells):
        image.paste(tiles[index % len(tiles)], cell)
    return image


class _Stages:
    """Adds seconds, and whatever is added to `current`, to the profile of the innermost stage that has begun."""

    def __init__(self, device: torch.device) -> None:
        self.profiles: dict[str, StageProfile] = defaultdict(StageProfile)
        self._device = device
        self._names = [REST]
        self._since = time.perf_counter()

    @property
    def current(self) -> StageProfile:
        return self.profiles[self._names[-1]]

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Begin a stage for this context. If its name begins with a space, that of the outer stage is prepended."""
        self._add_time()
        around = self._names[-1].removesuffix(f" {REST}")
        self._names.append(around + name if name.startswith(" ") else name)
        try:
            yield
        finally:
            self._add_time()
            self._names.pop()

    def _add_time(self) -> None:
        moment = now(self._device.type)
        self.current.seconds += moment - self._since
        self._since = moment


def _encode(codec: Codec, png: bytes, quality: int | None, stages: _Stages) -> None:
    with stages.stage("pixels"):
        image = images.open_image(io.BytesIO(png))
    codec.encode(image, quality)


def _decode(codec: Codec, data: bytes, stages: _Stages) -> None:
    image = codec.decode(data)
    with stages.stage("pixels"):
        render(image, "PNG")


def _measured(codec: Codec, run: Callable[[_Stages], None], repeat: int, rates: Rates) -> dict[str, StageProfile]:
    run(_Stages(codec.device))  # the first run is slower
    clocked = [_run_once(codec, run) for _ in range(repeat)]
    counted = _run_once(codec, run, rates)
    for name, stage in counted.items():
        stage.seconds = min(profiles[name].seconds for profiles in clocked)
    return counted


def _run_once(codec: Codec, run: Callable[[_Stages], None], count: Rates | None = None) -> dict[str, StageProfile]:
    stages = _Stages(codec.device)
    with _watched(codec, stages), _Counter(stages, count) if count else contextlib.nullcontext(), stages.stage(REST):
        run(stages)
    return stages.profiles


class _Counter(TorchDispatchMode):
    """Counts the multiplications and bytes of every tensor operation. Views move no bytes."""

    def __init__(self, stages: _Stages, rates: Rates) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stages = stages
        self._rates = rates

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        multiplies = operation.overloadpacket in flop_registry or operation.overloadpacket is _INT_MM
        if not multiplies:
            with self:  # in inference mode, composite operations arrive here undecomposed
                result = operation.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = operation(*args, **(kwargs or {}))
        stage = self._stages.current
        if multiplies:
            counted = flop_registry[_MM if operation.overloadpacket is _INT_MM else operation.overloadpacket]
            macs = counted(*args, **(kwargs or {}), out_val=result) // 2
            stage.macs += macs
            stage.least += macs / self._rates[args[0].dtype]
        if not operation.is_view and not operation.name().startswith("aten::empty"):
            tensors = [x for x in pytree.tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            stage.moved += sum(x.numel() * x.element_size() for x in tensors)
        return result


_MM, _INT_MM = torch.ops.aten.mm, torch.ops.aten._int_mm


@contextlib.contextmanager
def _watched(codec: Codec, stages: _Stages) -> Iterator[None]:
    """In this context, add the time of each module and function that belongs to a stage to that stage."""
    model, entropy = codec.model, codec.latents.entropy
    context = entropy.context
    modules: dict[str, list[nn.Module | None]] = {
        "g_a": [model.g_a],
        "h_a": [model.h_a],
        "h_s": [entropy.h_s],
        "g_s": [model.g_s],
        "context_net": [*context.context_net],
        " adaptor": [*context.adaptor_s1, *context.adaptor_s2, *context.adaptor_s3],
        " prior": [context.prior_s1_s2, context.prior_s3],
        " attention": [context.attn_s1, context.attn_s2, context.attn_s3],
    }
    functions: list[tuple[Any, str, str | Callable[..., str]]] = [
        (module, "forward", name) for name, each in modules.items() for module in each if module is not None
    ]
    functions += [
        (context, "_scale", lambda steps, *rest: f"s{steps[0].scale} {REST}"),
        *((rangecoder.SymbolEncoder, name, "range coder") for name in ("put", "payload")),
        *((rangecoder.SymbolDecoder, name, "range coder") for name in ("__init__", "get")),
        *((container, name, "file") for name in ("write", "parse")),
        *((images, name, "pixels") for name in ("picture_of", "image_of")),
    ]
    with contextlib.ExitStack() as undo:
        for owner, name, stage in functions:
            if name in vars(owner):
                undo.callback(setattr, owner, name, vars(owner)[name])
            else:
                undo.callback(delattr, owner, name)
            setattr(owner, name, _staged(getattr(owner, name), stage, stages))
        yield


def _staged(function: Callable[..., Any], stage: str | Callable[..., str], stages: _Stages) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        with stages.stage(stage if isinstance(stage, str) else stage(*args)):
            return function(*args, **options)

    return call


def _best_rates(device: torch.device) -> Rates:
    """Measure the best rate of convolutions of every floating-point type, and of int8 matrix products."""
    rates = dict.fromkeys((torch.float32, torch.bfloat16, torch.float64, torch.int8), 0.0)
    with torch.inference_mode():
        for channels, side, kernel in ((640, 32, 1), (256, 64, 1), (256, 32, 3)):
            x = torch.randn(1, channels, side, side, device=device).contiguous(memory_format=torch.channels_last)
            weight = torch.randn(channels, channels, kernel, kernel, device=device)
            weight = weight.contiguous(memory_format=torch.channels_last)
            macs = x.numel() * weight[0].numel()
            for dtype in rates:
                if dtype.is_floating_point:
                    work = partial(F.conv2d, x.to(dtype), weight.to(dtype), padding="same")
                elif kernel == 1:
                    rows = x[0].flatten(1).T.to(dtype)
                    work = partial(int_mm, rows, weight[:, :, 0, 0].T.to(dtype))
                else:
                    continue
                rates[dtype] = max(rates[dtype], macs / _seconds(work, device))
    return rates


def _best_copy(device: torch.device) -> float:
    """Measure the rate of a copy in bytes per second, read and written."""
    source = torch.zeros(2**26, dtype=torch.uint8, device=device)
    return 2 * source.numel() / _seconds(partial(torch.empty_like(source).copy_, source), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(8):
        begun = now(device.type)
        work()
        best = min(best, now(device.type) - begun)
    return best
