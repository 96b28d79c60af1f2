"""Where does the time of encoding and decoding go? Stages with seconds, multiplications and bytes moved.

    pixels (Pillow)  g_a  h_a  h_s  s1, s2, s3 (adaptor, prior, attention, rest)  range coder  g_s  file  rest

Every call of a stage is timed; what it spends in stages inside it is theirs. Multiplications and bytes are counted in
a run of their own: of convolutions and matrix products, and of the operands and results of all tensor operations,
wherever they were (a cache or memory). They are compared with the best that the same process reaches: a float32
convolution, and a copy; and the whole with the same networks as plain PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import io
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
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

from hpcmref import checkpoints, container, imageio, rangecoder
from hpcmref.checkpoints import Checkpoint
from hpcmref.codec import Codec, device_of
from hpcmref.model import HPCM, PRESETS
from hpcmref.model.coders import Estimator
from hpcmref.model.hpcm import STRIDE
from hpcmref.render import render
from hpcmref.training.profile import now

REST = "rest"


@dataclass
class Cost:
    """What a stage takes: seconds, multiplications (each with an addition), bytes read and written."""

    seconds: float = 0.0
    macs: int = 0
    moved: int = 0


@dataclass(frozen=True)
class Profile:
    """Stages of encoding and decoding in the order in which they first begin, and the best rates of the process.

    macs_per_second is of a float32 convolution, bytes_per_second (read and written) of a copy of 64 MiB. plain_encode
    and plain_decode are the seconds that `plain` measures.
    """

    encode: dict[str, Cost]
    decode: dict[str, Cost]
    macs_per_second: float
    bytes_per_second: float
    plain_encode: float
    plain_decode: float


def profile(codec: Codec, image: Image.Image, quality: int | None = None, repeat: int = 5) -> Profile:
    """Encode and decode an image, from a PNG file to a PNG file in memory; of each stage the best of `repeat` runs."""
    png = render(image, "PNG")
    data = codec.encode(image, quality)
    encode = _measured(codec, partial(_encode, codec, png, quality), repeat)
    decode = _measured(codec, partial(_decode, codec, data), repeat)
    return Profile(encode, decode, *_best_rates(codec.device), *plain(codec, image, quality, repeat))


def plain(codec: Codec, image: Image.Image, quality: int | None = None, repeat: int = 5) -> tuple[float, float]:
    """Seconds that the networks of encoding and of decoding take as plain PyTorch; the best of `repeat` runs.

    All in float32, in PyTorch's own layout, whole planes, one operation after the other, and nothing coded: the same
    modules as research code runs them.
    """
    model = copy.deepcopy(codec.model).float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.requires_grad_(False)  # and gradients stay enabled, for without them modules save memory and time
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).to(codec.device).permute(2, 0, 1)[None]
    height, width = (side // STRIDE * STRIDE for side in pixels.shape[2:])
    x = pixels[:, :, :height, :width].contiguous().float() / 255
    rate = torch.tensor([float(quality or 0)], device=codec.device)
    encode = decode = float("inf")
    for _ in range(repeat + 1):
        begun = now(codec.device.type)
        y, z = model.latents(model.features(x), rate)
        shape = (z.shape[2], z.shape[3])
        model.entropy(rate, shape, Estimator(y, z, noise=False))
        encoded = now(codec.device.type)
        model.synthesise(model.entropy(rate, shape, Estimator(y, z, noise=False)), rate)
        decode = min(decode, now(codec.device.type) - encoded)
        encode = min(encode, encoded - begun)
    return encode, decode


def untrained(preset: str, device: str) -> Codec:
    """A codec of a preset without trained weights: as fast as a trained one, but for the range coder."""
    torch.manual_seed(0)
    model = HPCM(PRESETS[preset]).initialise().eval()
    return Codec(Checkpoint(model, checkpoints.calibrated(model, torch.float32), bytes(4)), preset, device_of(device))


def photograph(width: int = 768, height: int = 512) -> Image.Image:
    """The tiles that models are calibrated with, side by side."""
    tiles = checkpoints.tiles()
    image = Image.new("RGB", (width, height))
    side = tiles[0].width
    cells = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
    for index, cell in enumerate(cells):
        image.paste(tiles[index % len(tiles)], cell)
    return image


class _Stages:
    """Books seconds, or whatever `current` is used for, to the innermost stage that has begun."""

    def __init__(self, device: torch.device) -> None:
        self.costs: dict[str, Cost] = defaultdict(Cost)
        self._device = device
        self._names = [REST]
        self._since = time.perf_counter()

    @property
    def current(self) -> Cost:
        return self.costs[self._names[-1]]

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A name that begins with a space belongs to the stage around it."""
        self._book()
        around = self._names[-1].removesuffix(f" {REST}")
        self._names.append(around + name if name.startswith(" ") else name)
        try:
            yield
        finally:
            self._book()
            self._names.pop()

    def _book(self) -> None:
        moment = now(self._device.type)
        self.current.seconds += moment - self._since
        self._since = moment


def _encode(codec: Codec, png: bytes, quality: int | None, stages: _Stages) -> None:
    with stages.stage("pixels"):
        image = imageio.open_image(io.BytesIO(png))
    codec.encode(image, quality)


def _decode(codec: Codec, data: bytes, stages: _Stages) -> None:
    image = codec.decode(data)
    with stages.stage("pixels"):
        render(image, "PNG")


def _measured(codec: Codec, run: Callable[[_Stages], None], repeat: int) -> dict[str, Cost]:
    run(_Stages(codec.device))  # the first run is slower
    clocked = [_costs(codec, run) for _ in range(repeat)]
    counted = _costs(codec, run, count=True)
    for name, cost in counted.items():
        cost.seconds = min(costs[name].seconds for costs in clocked)
    return counted


def _costs(codec: Codec, run: Callable[[_Stages], None], count: bool = False) -> dict[str, Cost]:
    stages = _Stages(codec.device)
    with _watched(codec, stages), _Counter(stages) if count else contextlib.nullcontext(), stages.stage(REST):
        run(stages)
    return stages.costs


class _Counter(TorchDispatchMode):
    """Counts the multiplications and bytes of every operation. Views move nothing."""

    def __init__(self, stages: _Stages) -> None:
        super().__init__()
        self._stages = stages

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.overloadpacket not in flop_registry:
            with self:  # in inference mode, what consists of other operations arrives whole
                result = operation.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = operation(*args, **(kwargs or {}))
        cost = self._stages.current
        if operation.overloadpacket in flop_registry:
            cost.macs += flop_registry[operation.overloadpacket](*args, **(kwargs or {}), out_val=result) // 2
        if not operation.is_view and not operation.name().startswith("aten::empty"):
            tensors = [x for x in pytree.tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            cost.moved += sum(x.numel() * x.element_size() for x in tensors)
        return result


@contextlib.contextmanager
def _watched(codec: Codec, stages: _Stages) -> Iterator[None]:
    """Every call of what belongs to a stage is booked there, while inside."""
    model, entropy = codec.model, codec.entropy
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
        *((rangecoder.SymbolEncoder, name, "range coder") for name in ("put", "finish")),
        *((rangecoder.SymbolDecoder, name, "range coder") for name in ("__init__", "get")),
        *((container, name, "file") for name in ("write", "parse")),
        *((imageio, name, "pixels") for name in ("picture_of", "image_of")),
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


def _best_rates(device: torch.device) -> tuple[float, float]:
    """Multiplications a second of the fastest float32 convolution here, bytes a second of a copy."""

    def seconds(work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(8):
            begun = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begun)
        return best

    with torch.inference_mode():
        rates = []
        for channels, side, kernel in ((640, 32, 1), (256, 64, 1), (256, 32, 3)):
            x = torch.randn(1, channels, side, side, device=device).contiguous(memory_format=torch.channels_last)
            weight = torch.randn(channels, channels, kernel, kernel, device=device)
            weight = weight.contiguous(memory_format=torch.channels_last)
            macs = x.numel() * weight[0].numel()
            rates.append(macs / seconds(lambda x=x, weight=weight: F.conv2d(x, weight, padding="same")))  # type: ignore[misc]
        source = torch.zeros(2**26, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return max(rates), 2 * source.numel() / seconds(lambda: target.copy_(source))
