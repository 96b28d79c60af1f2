"""Does a GPU code what a CPU codes, and refuse what it cannot compute?

    python -m pytest tests/test_gpu.py -m gpu -s

On a machine without a GPU all of it is skipped. It needs no more than hpcmref itself, pytest, and this folder; `-s`
shows how far the pictures of a CPU and a GPU differ. docs/cuda.md says what it proves, and what it does not.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import STATE, TINY, latents_of, model_of
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from hpcmref import checkpoints, selftest
from hpcmref.cli import app
from hpcmref.codec import Codec, load
from hpcmref.errors import UnsupportedError
from hpcmref.exact import attach, calibrate, exactly, guard
from hpcmref.exact.unchanged import digest
from hpcmref.format.rangecoder import implementation
from hpcmref.latents import Compressed, LatentCodec
from hpcmref.model import HPCM, PRESETS, HPCMConfig
from hpcmref.model.coders import SymbolReader, SymbolWriter
from hpcmref.model.config import MEMORY_BANKS
from hpcmref.model.hpcm import EntropyPath
from research.exactness_matrix import Configuration, decode, run, small_pictures

DEVICE = "cuda"
QUALITIES = (0, 63)
LEVELS = 3
"""How far pixels may differ: a GPU computes the transforms in TF32, a CPU in float32 or bfloat16."""

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def gpu() -> Codec:
    """The default model on the GPU."""
    return load(device=DEVICE)


@pytest.fixture(scope="module")
def pictures(sample: Image.Image) -> list[Image.Image]:
    """The smallest first: six awkward sizes, noise beyond all ranges, grey, alpha, and a photograph."""
    random = np.random.RandomState(0)
    noise = Image.fromarray(random.randint(0, 256, (128, 192, 3)).astype(np.uint8))
    blocks = random.randint(0, 2, (16, 24, 3)).repeat(8, 0).repeat(8, 1) * 255
    clear = sample.crop((0, 0, 130, 70))
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    return [
        *small_pictures(),
        noise,
        Image.fromarray(blocks.astype(np.uint8)),
        sample.convert("L").crop((10, 10, 110, 90)),
        clear,
        sample,
    ]


def say(text: str) -> None:
    """One line of a report, seen with `-s`."""
    print(f"\n[gpu] {text}", end="")


def test_what_computes_here() -> None:
    properties = torch.cuda.get_device_properties(0)
    say(
        f"{properties.name}, capability {properties.major}.{properties.minor}, torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, range coder {implementation()}"
    )
    with exactly(torch.device(DEVICE)):
        guard.check.__wrapped__(DEVICE)


def test_the_selftest_passes() -> None:
    """`hpcmref selftest --device cuda`: every file of the conformance set, and what the GPU writes, on the CPU too."""
    report = selftest.run(DEVICE)
    say(f"selftest: {report.decoded} decoded, {report.coded} coded again, pixels within {report.worst} levels")
    say(f"kernels: {report.kernels}")
    assert report.passed, report.failures


# --- waiting for the GPU ---------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"M": 32, "N": 16, "context_width": 40, "stages": ((16, 1),) * 3, "synthesis": ((16, 1),) * 3}
BANKS = {name: dataclasses.replace(bank, num_heads=4, value_resolution=3) for name, bank in MEMORY_BANKS.items()}
KINDS: dict[str, HPCMConfig] = {
    "attention": TINY,
    "base": dataclasses.replace(PRESETS["base"], **SMALL, heads=4),
    "phi": dataclasses.replace(PRESETS["phi"], **SMALL),
    "state": STATE,
    **{
        f"memory {name}": dataclasses.replace(TINY, memory=BANKS[name])
        for name in ("light", "linear", "global", "cross")
    },
    "memory per position": dataclasses.replace(TINY, memory=dataclasses.replace(BANKS["full"], per_position=True)),
    "memory linear relu": dataclasses.replace(TINY, memory=dataclasses.replace(BANKS["linear"], feature_map="relu")),
}
SIZE = (3, 2)
"""Of z, so that windows reach over the edge of the planes."""
SIZES = [SIZE, (1, 1)]
"""The second is that of pictures up to 64 x 64, where s1 is one position."""


def _exact(config: HPCMConfig) -> tuple[HPCM, EntropyPath]:
    """An untrained model whose memory is open, and its exact entropy path, on the CPU."""
    model = model_of(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".opening." in key:
                parameter.uniform_(0.3, 0.9)
    y, z = latents_of(model, 2, SIZE)

    def walk() -> None:
        for quality in (0.0, float(config.qualities - 1)):
            model.entropy(torch.full((2,), quality), SIZE, SymbolWriter(y, z, torch.empty(0), []))

    return model, attach(model.entropy, calibrate(model.entropy, walk))


def _bits(y_hat: Tensor) -> Tensor:
    return (y_hat.cpu() + 0.0).contiguous().view(torch.int32)


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_would_be_noticed() -> None:
    numbers = torch.ones(4, device=DEVICE)
    for wait in (lambda: numbers.sum().item(), lambda: torch.tensor([1.0, 2.0], device=DEVICE)):
        with pytest.raises(RuntimeError, match="synchroniz"), _waiting_is_an_error():
            wait()


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_never_waits_for_the_gpu(kind: str) -> None:
    """From y and z to the symbols on the device, with every memory bank: the host only gives orders."""
    model, exact = _exact(KINDS[kind])
    quality = float(min(20, model.config.qualities - 1))
    y, z = (each.to(DEVICE) for each in latents_of(model, 2, SIZE))
    exact.to(DEVICE)
    thresholds = LatentCodec(exact, torch.device(DEVICE)).thresholds
    for attempt in range(2):  # the first one loads kernels
        with torch.inference_mode(), exactly(torch.device(DEVICE)), ExitStack() as stack:
            if attempt:
                stack.enter_context(_waiting_is_an_error())
            qualities = torch.full((2,), quality, device=DEVICE)
            exact(qualities, SIZE, SymbolWriter(y, z, thresholds, []))


def test_the_transforms_never_wait_for_the_gpu(gpu: Codec) -> None:
    x = torch.zeros(1, 3, 128, 192, dtype=torch.uint8, device=DEVICE)
    for attempt in range(2):
        with gpu._inference(), ExitStack() as stack:
            if attempt:
                stack.enter_context(_waiting_is_an_error())
            qualities = gpu._quality(20)
            y, _ = gpu.model.latents(gpu.model.features(x, lambda part: part.float().div_(255)), qualities)
            gpu.model.synthesise(y, qualities)


# --- shipped models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [info.name for info in checkpoints.shipped()])
def test_from_the_cpu_to_the_gpu_and_back(name: str, pictures: list[Image.Image]) -> None:
    """Equal y_hat bit by bit, alone and in batches, at several qualities, and pictures that are nearly equal."""
    cpu, other = load(name, "cpu"), load(name, DEVICE)
    assert digest(other.latents.entropy) == digest(cpu.latents.entropy)
    qualities = [*QUALITIES] if cpu.model.config.qualities > 1 else [None]
    here = [cpu.encode(picture, quality) for quality in qualities for picture in pictures]
    there = [other.encode(picture, quality) for quality in qualities for picture in pictures]
    files = here + there
    expected = decode(cpu, files)
    assert decode(other, files) == expected
    assert decode(other, files, "batch") == expected
    assert decode(other, there[::-1])[::-1] == expected[len(here) :]
    other.latents.unchanged.check_all()
    worst, share = 0, 0.0
    for data in files[::2]:
        one, two = (np.asarray(each.decode(data)).astype(np.int16) for each in (cpu, other))
        difference = np.abs(one - two)
        worst, share = max(worst, int(difference.max())), max(share, float((difference > 0).mean()))
    same = sum(one == two for one, two in zip(here, there, strict=True))
    say(
        f"{name}: {len(files)} files equal in latents; {same} of {len(here)} files written alike; pixels differ by at "
        f"most {worst} levels, and at most {share:.1%} of them"
    )
    assert worst <= LEVELS


def test_parts_of_a_file_look_the_same_on_both(gpu: Codec, codec: Codec, sample: Image.Image) -> None:
    """Previews, a truncated file and a damaged one show the same on both."""
    data = codec.encode(sample, 40)
    for options in ({"upto": 1}, {"upto": 2}):
        one, two = (np.asarray(each.decode(data, **options)).astype(int) for each in (codec, gpu))
        assert np.abs(one - two).max() <= LEVELS
    cut = data[: len(data) * 2 // 3]
    one, two = (np.asarray(each.decode(cut, partial=True)).astype(int) for each in (codec, gpu))
    assert np.abs(one - two).max() <= LEVELS


def test_a_gpu_gives_the_same_twice(gpu: Codec, sample: Image.Image) -> None:
    """Transposed convolutions of cuDNN can add up in another order each time."""
    files = {gpu.encode(sample, 50) for _ in range(3)}
    assert len(files) == 1
    (data,) = files
    assert len({gpu.decode(data).tobytes() for _ in range(3)}) == 1
    begun = time.perf_counter()
    gpu.encode(sample, 50)
    middle = time.perf_counter()
    gpu.decode(data)
    say(f"450x330: {1000 * (middle - begun):.0f} ms to encode, {1000 * (time.perf_counter() - middle):.0f} to decode")


def test_a_second_decoder_verifies(gpu: Codec, pictures: list[Image.Image]) -> None:
    for picture in pictures[:3]:
        gpu.verify(gpu.encode(picture, 20, verify=True))


def test_threads_share_a_gpu(gpu: Codec, codec: Codec, pictures: list[Image.Image]) -> None:
    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(partial(gpu.encode, quality=30), pictures[:8] * 2))
        found = list(pool.map(lambda data: decode(gpu, [data])[0], files))
    assert found == decode(codec, files)


# --- the caller's settings -----------------------------------------------------------------------------------------


def _high_precision_is_off() -> Callable[[], None]:
    torch.set_float32_matmul_precision("high")
    return partial(torch.set_float32_matmul_precision, "highest")


def _cudnn_tries_kernels() -> Callable[[], None]:
    torch.backends.cudnn.benchmark = True
    return partial(setattr, torch.backends.cudnn, "benchmark", False)


def _deterministic_algorithms() -> Callable[[], None]:
    torch.use_deterministic_algorithms(True)
    return partial(torch.use_deterministic_algorithms, False)


def _without_cudnn() -> Callable[[], None]:
    torch.backends.cudnn.enabled = False
    return partial(setattr, torch.backends.cudnn, "enabled", True)


SETTINGS: dict[str, Callable[[], Callable[[], None]]] = {
    "TF32": _high_precision_is_off,
    "cuDNN tries kernels": _cudnn_tries_kernels,
    "deterministic algorithms": _deterministic_algorithms,
    "no cuDNN": _without_cudnn,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_caller_has_set_changes_no_latent(
    name: str, gpu: Codec, codec: Codec, pictures: list[Image.Image]
) -> None:
    undo = SETTINGS[name]()
    try:
        files = [gpu.encode(picture, 44) for picture in pictures[::2]]
        found = decode(gpu, files)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert decode(gpu, files) == found
        assert torch.backends.cudnn.benchmark == (name == "cuDNN tries kernels")
        assert torch.backends.cudnn.enabled == (name != "no cuDNN")
        assert torch.are_deterministic_algorithms_enabled() == (name == "deterministic algorithms")
        assert torch.get_float32_matmul_precision() == ("high" if name == "TF32" else "highest")
    finally:
        undo()
    assert found == decode(codec, files)


# --- refusing ------------------------------------------------------------------------------------------------------


def test_a_gpu_that_does_not_compute_exactly_is_refused(
    gpu: Codec, sample: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 that cannot be switched off, as a library might have it: an error and no file."""
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("this GPU has no TF32")

    def force(undo: ExitStack) -> None:
        undo.callback(torch.set_float32_matmul_precision, "highest")
        torch.set_float32_matmul_precision("high")

    data = gpu.encode(sample, 20)
    monkeypatch.setattr(guard, "use_full_precision", force)
    guard.check.cache_clear()
    try:
        for work in (lambda: gpu.encode(sample, 20), lambda: gpu.decode(data)):
            with pytest.raises(UnsupportedError, match="does not compute exactly"):
                work()
    finally:
        monkeypatch.undo()
        guard.check.cache_clear()
    gpu.decode(data)


@pytest.mark.parametrize(
    "environment",
    [
        {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "NVIDIA_TF32_OVERRIDE": "1"},
        {
            "CUBLAS_EMULATE_SINGLE_PRECISION": "1",
            "CUBLAS_EMULATE_DOUBLE_PRECISION": "1",
            "CUBLAS_EMULATION_STRATEGY": "eager",
        },
    ],
    ids=["TF32 by force", "emulated precision"],
)
def test_a_process_that_is_told_to_be_inexact(
    environment: dict[str, str], codec: Codec, sample: Image.Image, tmp_path: Path
) -> None:
    """It decodes the same latents, or refuses."""
    path = tmp_path / "sample.bin"
    path.write_bytes(codec.encode(sample, 44))
    answer = run(Configuration("told", environment, "cuda"), [path], None)
    if isinstance(answer, str):
        say(f"{' '.join(environment)}: refused")
        assert "does not compute exactly" in answer
    else:
        say(f"{' '.join(environment)}: equal")
        assert answer.latents == decode(codec, [path.read_bytes()])


def test_too_little_memory_is_one_sentence(gpu: Codec, sample: Image.Image, tmp_path: Path) -> None:
    """And the codec goes on with a smaller picture."""
    large, small = tmp_path / "large.png", tmp_path / "small.png"
    sample.resize((6000, 4000)).save(large, compress_level=0)
    sample.save(small)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    try:
        result = CliRunner().invoke(app, ["encode", str(large), str(small), "-o", str(tmp_path), "--device", DEVICE])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("hpcmref: ")
    assert line.endswith("large.png: not enough memory on the GPU; try --device cpu")
    assert not (tmp_path / "large.bin").exists()
    gpu.verify((tmp_path / "small.bin").read_bytes())


# --- every kind of network -------------------------------------------------------------------------------------------


def test_a_preview_reads_no_more_than_it_must(gpu: Codec) -> None:
    """What is not read is taken as predicted, on the GPU: nothing is asked of the host for it."""
    entropy, thresholds = gpu.latents.entropy, gpu.latents.thresholds
    asked = []

    class Source:
        def get(self, indexes: np.ndarray) -> np.ndarray:
            asked.append(indexes.size)
            return np.zeros(indexes.size, np.int32)

    with torch.inference_mode(), exactly(torch.device(DEVICE)):
        entropy(torch.full((1,), 20.0, device=DEVICE), (1, 1), SymbolReader(thresholds, [Source()], 1))
    assert len(asked) == 3  # z, and the two steps of s1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_codes_the_same(kind: str, size: tuple[int, int]) -> None:
    """Payloads and y_hat of a batch are equal, whichever side wrote them."""
    model, exact = _exact(KINDS[kind])
    quality = min(20, model.config.qualities - 1)
    y, z = latents_of(model, 2, size)
    sides = {name: LatentCodec(copy.deepcopy(exact).to(name), torch.device(name)) for name in ("cpu", DEVICE)}
    written: dict[str, Compressed] = {
        name: side.compress(y.to(name), z.to(name), quality) for name, side in sides.items()
    }
    one, other = written["cpu"], written[DEVICE]
    assert one.payloads == other.payloads
    assert one.checksums == other.checksums
    assert torch.equal(_bits(one.y_hat), _bits(other.y_hat))
    for side in sides.values():
        read = side.decompress(one.payloads, one.checksums, size, quality)
        assert torch.equal(_bits(read), _bits(one.y_hat))
        side.unchanged.check_all()
