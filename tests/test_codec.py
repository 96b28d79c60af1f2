"""Does an image survive its file, and does everything that is not a file of this model end in one typed error?"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import containers
import numpy as np
import pytest
import torch
from containers import changed, latent_checksum_of, learned_of
from models import TINY, model_of, psnr
from PIL import Image
from torch import Tensor

import hpcmref
from hpcmref import checkpoints
from hpcmref.codec import Codec, codec_for, device_of, fresh, load
from hpcmref.errors import (
    CheckpointError,
    ConfigError,
    DecodeError,
    FormatError,
    HpcmrefError,
    ImageError,
    ModelMismatchError,
    UnsupportedError,
)
from hpcmref.format import container
from hpcmref.format.rangecoder import SymbolEncoder, scale_table
from hpcmref.model.coders import SymbolWriter
from hpcmref.model.entropy import likelihood
from hpcmref.model.schedule import Step

QUALITIES = (0, 16, 32, 48, 63)


@pytest.fixture(scope="module")
def files(codec: Codec, sample: Image.Image) -> dict[int, bytes]:
    """The sample at five qualities."""
    return {quality: codec.encode(sample, quality) for quality in QUALITIES}


@pytest.fixture(scope="module")
def small(sample: Image.Image) -> Image.Image:
    """A part of the sample, 70 x 45."""
    return sample.crop((150, 60, 220, 105))


def forged(data: bytes, **changes: Any) -> bytes:
    """A file with some fields changed and a checksum that fits."""
    return container.write(changed(container.parse(data), **changes))


# --- there and back ------------------------------------------------------------------------------------------------


def test_better_quality_costs_more(codec: Codec, files: dict[int, bytes], sample: Image.Image) -> None:
    sizes = [len(files[quality]) for quality in QUALITIES]
    decoded = [codec.decode(files[quality]) for quality in QUALITIES]
    qualities = [psnr(image, sample) for image in decoded]
    assert sizes == sorted(set(sizes))
    assert qualities == sorted(set(qualities))
    assert qualities[2] > 28
    assert qualities[-1] > qualities[0] + 6
    assert sizes[-1] < 450 * 330 * 3 / 2
    assert sizes[-1] > 4 * sizes[0]
    for quality, data in files.items():
        assert learned_of(container.parse(data)).quality == quality
    assert all((image.size, image.mode) == (sample.size, "RGB") for image in decoded)


@pytest.mark.parametrize("quality", QUALITIES)
def test_the_payload_is_as_long_as_estimated(
    codec: Codec, files: dict[int, bytes], sample: Image.Image, quality: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 0.3 % and 16 bytes of the information that the coded symbols have under the model's scales."""
    bits: list[float] = []

    class Measured(SymbolWriter):
        def code(self, step: Step | None, scales: Tensor, means: Tensor) -> Tensor:
            quantised = super().code(step, scales, means)
            symbols = (quantised - means).double().round()
            bits.append(-float(likelihood(symbols, scales.double()).log2().sum()))
            return quantised

    monkeypatch.setattr("hpcmref.latents.SymbolWriter", Measured)
    data = codec.encode(sample, quality)
    assert data == files[quality]
    assert len(bits) == 12
    estimated = sum(bits) / 8
    assert abs(len(container.parse(data).payload) - estimated) <= 0.003 * estimated + 16


def test_a_scale_takes_the_nearest_table(codec: Codec, small: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """In ratio, as FORMAT.md says."""
    scales: list[np.ndarray] = []
    indexes: list[np.ndarray] = []

    class Observed(SymbolWriter):
        def code(self, step: Step | None, given: Tensor, means: Tensor) -> Tensor:
            scales.append(given.flatten().double().numpy())
            return super().code(step, given, means)

    class Encoder(SymbolEncoder):
        def put(self, symbols: np.ndarray, rows: np.ndarray) -> None:
            indexes.append(rows)
            super().put(symbols, rows)

    monkeypatch.setattr("hpcmref.latents.SymbolWriter", Observed)
    monkeypatch.setattr("hpcmref.latents.SymbolEncoder", Encoder)
    codec.encode(small, 32)
    table = np.log(scale_table().astype(np.float64))
    found = np.concatenate(indexes)
    logs = np.log(np.maximum(np.concatenate(scales), 1e-3))
    distances = np.abs(logs[:, None] - table)
    # Of two that are equally near, rounding decides.
    assert (distances[np.arange(len(found)), found] <= distances.min(axis=1) + 1e-6).all()
    assert len(set(found)) > 20


@pytest.mark.parametrize("size", [(1, 1), (70, 1), (1, 70), (65, 63), (64, 64), (130, 200)])
def test_every_size_comes_back(codec: Codec, sample: Image.Image, size: tuple[int, int]) -> None:
    image = sample.crop((200, 20, 200 + size[0], 20 + size[1]))
    data = codec.encode(image, 40)
    decoded = codec.decode(data)
    assert (decoded.size, decoded.mode) == (size, "RGB")
    assert psnr(decoded, image) > 24
    assert (container.parse(data).width, container.parse(data).height) == size
    # The latents see the image with its last row and column repeated, and nothing else of its size.
    padded = np.pad(np.asarray(image), ((0, -size[1] % 64), (0, -size[0] % 64), (0, 0)), mode="edge")
    whole = codec.encode(Image.fromarray(padded), 40)
    assert container.parse(whole).payload == container.parse(data).payload
    assert codec.decode(whole).crop((0, 0, *size)).tobytes() == decoded.tobytes()


def test_grey_is_coded_and_comes_back_as_grey(codec: Codec, small: Image.Image) -> None:
    grey = small.convert("L")
    data = codec.encode(grey, 48)
    assert container.parse(data).grey
    decoded = codec.decode(data)
    assert (decoded.mode, decoded.size) == ("L", small.size)
    assert psnr(decoded, grey) > 28
    assert not container.parse(codec.encode(small, 48)).grey


@pytest.mark.parametrize(("mode", "named"), [("HSV", "HSV"), ("YCbCr", "YCbCr"), ("P", "palette")])
def test_other_modes_are_converted_with_a_warning(codec: Codec, small: Image.Image, mode: str, named: str) -> None:
    with pytest.warns(UserWarning, match=named):
        data = codec.encode(small.convert(mode), 20)
    plain = small.convert(mode).convert("RGB")
    assert container.parse(data).payload == container.parse(codec.encode(plain, 20)).payload
    assert codec.decode(data).mode == "RGB"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codec.encode(small, 20)
        codec.encode(small.convert("L"), 20)


def test_an_image_gives_the_same_bytes_twice(codec: Codec, files: dict[int, bytes], sample: Image.Image) -> None:
    assert codec.encode(sample, 32) == files[32]
    assert codec.decode(files[32]).tobytes() == codec.decode(files[32]).tobytes()


def test_four_threads_share_a_codec(codec: Codec, files: dict[int, bytes], sample: Image.Image) -> None:
    """Each with other images, at once, on one codec; the process's settings are then as they were."""
    settings = (torch.backends.cudnn.enabled, torch.get_float32_matmul_precision())
    parts = [sample.crop((40 * i, 10 * i, 40 * i + 64 + 30 * i, 10 * i + 90)) for i in range(8)]
    expected = [codec.encode(part, 7 * i) for i, part in enumerate(parts)]
    images = [codec.decode(data).tobytes() for data in expected]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(codec.encode, parts, range(0, 56, 7)))
        assert found == expected
        assert [image.tobytes() for image in pool.map(codec.decode, found)] == images
    assert (torch.backends.cudnn.enabled, torch.get_float32_matmul_precision()) == settings


def test_pixels_stay_in_range(codec: Codec) -> None:
    """Black, white and full noise come out as images too."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 2, (64, 64, 3), np.uint8) * 255)
    for image in (Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "white"), noise):
        decoded = codec.decode(codec.encode(image, 63))
        assert psnr(decoded, image) > (6.1 if image is noise else 30)  # grey everywhere has 6.0


def test_the_functions_of_the_package_do_what_the_codec_does(
    small: Image.Image, files: dict[int, bytes], sample: Image.Image
) -> None:
    data = hpcmref.encode(small, quality=16, device="cpu")
    assert hpcmref.decode(data, device="cpu").size == small.size
    assert hpcmref.load(device="cpu").encode(small, 16) == data
    assert hpcmref.encode(sample, device="cpu") == files[hpcmref.DEFAULT_QUALITY]


def test_the_callers_settings_are_left_alone(codec: Codec, small: Image.Image) -> None:
    """Gradients and autocast of the caller neither change the file nor are changed."""
    expected = codec.encode(small, 32)
    image = codec.decode(expected).tobytes()
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        assert codec.encode(small, 32) == expected
        assert codec.decode(expected).tobytes() == image
        assert torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    **{
        f"default dtype {name}": partial(_default_dtype, getattr(torch, name))
        for name in ("float64", "float16", "bfloat16")
    },
    "default device": partial(_default_device, "meta"),
    "a device context": partial(torch.device, "meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "deterministic algorithms": _deterministic,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_callers_settings_change_no_byte(
    name: str, codec: Codec, small: Image.Image, one_rate: Path, tmp_path: Path
) -> None:
    """Of a codec that was there before, of one that is made under them, and of a model that is saved under them."""
    expected = codec.encode(small, 32)
    image = codec.decode(expected).tobytes()
    with SETTINGS[name]():
        inside = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
        made = fresh(device="cpu")
        for each in (codec, made):
            assert each.encode(small, 32, verify=True) == expected
            assert each.decode(expected).tobytes() == image
        assert made.encode_to(small, psnr=25)
        checkpoints.verify(one_rate)
        checkpoints.convert(one_rate, tmp_path / "again.safetensors")
        assert (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()) == inside
    assert (tmp_path / "again.safetensors").read_bytes() == one_rate.read_bytes()
    assert made.encode(small, 32) == expected


@pytest.mark.parametrize("name", ["default dtype float64", "default dtype bfloat16", "default device"])
def test_a_model_is_saved_under_the_callers_settings(name: str, tmp_path: Path) -> None:
    model = model_of()
    checkpoints.save(model, tmp_path / "one.safetensors", "one", {})
    with SETTINGS[name]():
        checkpoints.save(model, tmp_path / "other.safetensors", "one", {})
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "other.safetensors").read_bytes()


# --- what cannot be encoded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [-1, 64, 1000])
def test_a_quality_out_of_range_is_refused(codec: Codec, small: Image.Image, quality: int) -> None:
    with pytest.raises(ConfigError, match=f"{quality}.*0 to 63"):
        codec.encode(small, quality)


def test_of_several_gpus_a_codec_stays_on_the_one_of_its_making(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a number, tensors would follow the present GPU, and the model would not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert device_of("auto") == device_of("cuda") == torch.device("cuda", 1)
    assert device_of("cpu") == torch.device("cpu")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="tpu"):
        load(device="tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="CUDA"):
        load(device="cuda")


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load("nowhere", device="cpu")


# --- files that are not to be decoded ------------------------------------------------------------------------------


def test_a_file_of_another_model(codec: Codec, files: dict[int, bytes]) -> None:
    """Both are named; a model that ships by its name, any other by its fingerprint."""
    other = forged(files[0], fingerprint=b"\xde\xad\xbe\xef")
    for attempt in (codec.decode, lambda data: codec_for(container.parse(data), "cpu", codec.name)):
        with pytest.raises(ModelMismatchError) as caught:
            attempt(other)
        for named in ("deadbeef", codec.name, codec.fingerprint.hex()):
            assert named in str(caught.value)
    with pytest.raises(ModelMismatchError, match=f"deadbeef.*{codec.name}"):
        hpcmref.decode(other, device="cpu")


def test_a_file_of_a_shipped_model_for_another_one(codec: Codec, files: dict[int, bytes]) -> None:
    stranger = Codec.__new__(Codec)
    stranger.__dict__.update(vars(codec), name="stranger", fingerprint=b"\xde\xad\xbe\xef")
    with pytest.raises(ModelMismatchError, match=rf"{codec.name} \({codec.fingerprint.hex()}\).*stranger \(deadbeef\)"):
        stranger.decode(files[0])


@pytest.mark.parametrize("arithmetic", [7, 255])
def test_another_arithmetic_is_refused(codec: Codec, files: dict[int, bytes], arithmetic: int) -> None:
    with pytest.raises(UnsupportedError, match=str(arithmetic)):
        codec.decode(forged(files[0], arithmetic=arithmetic))


def test_a_newer_format_is_refused(codec: Codec, files: dict[int, bytes]) -> None:
    newer = bytearray(files[0])
    newer[4] = 3
    with pytest.raises(UnsupportedError, match="version 3"):
        codec.decode(bytes(newer))


def test_another_latent_checksum_is_refused(codec: Codec, files: dict[int, bytes]) -> None:
    checksum = latent_checksum_of(container.parse(files[0]))
    with pytest.raises(DecodeError, match="latents"):
        codec.decode(forged(files[0], latent_checksum=checksum ^ 1))


@pytest.mark.parametrize("changes", [{"quality": 1}, {"width": 600}, {"height": 900}, {"payload": b""}])
def test_fields_that_the_payload_does_not_fit_are_refused(
    codec: Codec, files: dict[int, bytes], changes: dict[str, Any]
) -> None:
    with pytest.raises((DecodeError, FormatError)):
        codec.decode(forged(files[0], **changes))


def test_a_payload_cannot_ask_for_a_larger_image_than_there_are_limits() -> None:
    with pytest.raises(ConfigError):
        containers.container(width=1 << 15, height=1 << 15)


@pytest.mark.parametrize("size", [0, 1, 4, 5, 25, 100, -1])
def test_a_truncated_file_is_refused(codec: Codec, files: dict[int, bytes], size: int) -> None:
    with pytest.raises(FormatError):
        codec.decode(files[0][:size])


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n" + bytes(64), b"\x89HPC", bytes(500)])
def test_a_foreign_file_is_refused(codec: Codec, data: bytes) -> None:
    with pytest.raises(FormatError):
        codec.decode(data)


@pytest.mark.parametrize("seed", range(12))
def test_damage_that_no_checksum_of_bytes_shows_changes_no_pixel(codec: Codec, small: Image.Image, seed: int) -> None:
    """Payloads changed in five ways, in a file whose crc32 is right: an error of ours, or the very same image.

    The same image, because the reference encoder ends each payload with two symbols that no decoder asks for.
    """
    random = np.random.default_rng(seed)
    data = codec.encode(small, int(random.integers(0, 64)))
    payload = container.parse(data).payload
    expected = codec.decode(data).tobytes()
    place = int(random.integers(0, len(payload)))
    changed = [
        payload[:place] + bytes([payload[place] ^ 1 << int(random.integers(0, 8))]) + payload[place + 1 :],
        payload[:place] + random.bytes(4) + payload[place + 4 :],
        payload[: place // 4 * 4],
        payload[:8] + random.bytes(len(payload) - 8),
        payload + random.bytes(4 * int(random.integers(1, 9))),
    ]
    outcomes = []
    for broken in changed:
        try:
            outcomes.append(codec.decode(forged(data, payload=broken)).tobytes() == expected)
        except (DecodeError, FormatError):
            outcomes.append(None)
    assert False not in outcomes
    assert outcomes[2:4] == [None, None]
    assert outcomes[4]  # the coder reads what it needs and no more


@pytest.mark.parametrize("seed", range(4))
def test_damage_anywhere_is_refused(codec: Codec, small: Image.Image, seed: int) -> None:
    random = np.random.default_rng(seed)
    data = codec.encode(small, 30)
    for _ in range(25):
        broken = bytearray(data)
        broken[int(random.integers(0, len(data)))] ^= int(random.integers(1, 256))
        with pytest.raises((FormatError, UnsupportedError)):
            codec.decode(bytes(broken))


# --- targets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", [{"size": 900}, {"bpp": 1.2}, {"psnr": 30.0}, {"size": 10**6}, {"psnr": 1.0}], ids=str
)
def test_a_target_is_met_as_closely_as_can_be(
    codec: Codec, small: Image.Image, target: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quality next to the chosen one misses the target, or is further from it; seven trials, and one g_a."""
    calls = {"g_a": 0, "entropy": 0}
    for name, network in (("g_a", codec.model.g_a), ("entropy", codec.latents.entropy)):
        forward = network.forward

        def counted(*args: Any, name: str = name, forward: Any = forward) -> Any:
            calls[name] += 1
            return forward(*args)

        monkeypatch.setattr(network, "forward", counted)
    data = codec.encode_to(small, **target)  # type: ignore[arg-type]
    assert calls["g_a"] == 1
    assert calls["entropy"] <= 7
    quality = learned_of(container.parse(data)).quality
    assert data == codec.encode(small, quality)

    def meets(quality: int) -> bool:
        data = codec.encode(small, quality)
        if "psnr" in target:
            return psnr(codec.decode(data), small) >= target["psnr"]
        return len(data) <= target.get("size", target.get("bpp", 0) * small.width * small.height / 8)

    assert meets(quality)
    nearer = quality - 1 if "psnr" in target else quality + 1
    assert not 0 <= nearer <= 63 or not meets(nearer)
    assert 0 <= nearer <= 63 or target in ({"size": 10**6}, {"psnr": 1.0})


@pytest.mark.parametrize("target", [{"size": 20}, {"bpp": 0.001}, {"psnr": 80.0}], ids=str)
def test_a_target_that_no_quality_meets_is_refused(codec: Codec, small: Image.Image, target: dict[str, float]) -> None:
    with pytest.raises(HpcmrefError, match="no quality"):
        codec.encode_to(small, **target)  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", [{}, {"size": 900, "psnr": 30.0}])
def test_no_target_and_two_targets_are_refused(codec: Codec, small: Image.Image, targets: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        codec.encode_to(small, **targets)


# --- parts of a file -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def previews(codec: Codec, sample: Image.Image) -> tuple[bytes, list[Image.Image]]:
    """A file of 128 x 64, and what is seen of its scales 1, 1 to 2, and 1 to 3."""
    data = codec.encode(sample.crop((120, 40, 248, 104)), 40)
    return data, [codec.decode(data, upto) for upto in (1, 2, 3)]


def test_every_scale_adds_to_the_picture(previews: tuple[bytes, list[Image.Image]], sample: Image.Image) -> None:
    data, shown = previews
    original = sample.crop((120, 40, 248, 104))
    first, second, third = (psnr(image, original) for image in shown)
    assert first < second - 1 < third - 3
    assert shown[2].tobytes() == hpcmref.decode(data, device="cpu").tobytes()


@pytest.mark.parametrize("upto", [0, 4, -1])
def test_a_scale_that_there_is_not_is_refused(
    codec: Codec, previews: tuple[bytes, list[Image.Image]], upto: int
) -> None:
    with pytest.raises(ConfigError, match=str(upto)):
        codec.decode(previews[0], upto)


def test_a_truncated_file_shows_its_whole_scales(codec: Codec, previews: tuple[bytes, list[Image.Image]]) -> None:
    """The shorter it is, the fewer; and never a part of one."""
    data, shown = previews
    pictures = [image.tobytes() for image in shown]
    last, seen = 3, set()
    for length in (*range(len(data) - 1, 40, -len(data) // 14), 36):
        with pytest.raises(FormatError):
            codec.decode(data[:length])
        try:
            scale = 1 + pictures.index(codec.decode(data[:length], partial=True).tobytes())
        except DecodeError:
            scale = 0
        assert scale <= last
        last = scale
        seen.add(scale)
    assert seen == {0, 1, 2, 3}


def test_who_allows_parts_of_a_file_gets_no_damaged_whole(
    codec: Codec, previews: tuple[bytes, list[Image.Image]]
) -> None:
    """A file whose checksum fits is all there: if its latents are wrong, it is not shown in part."""
    data, _ = previews
    file = container.parse(data)
    assert codec.decode(data, partial=True).tobytes() == codec.decode(data).tobytes()
    half = len(file.payload) // 8 * 4
    for changes in (
        {"latent_checksum": latent_checksum_of(file) ^ 1},
        {"payload": file.payload[:half]},
        {"payload": file.payload[:half] + bytes(len(file.payload) - half)},
    ):
        with pytest.raises((DecodeError, FormatError)):
            codec.decode(forged(data, **changes), partial=True)


# --- limits --------------------------------------------------------------------------------------------------------


def test_larger_images_than_allowed_are_refused(codec: Codec, small: Image.Image, files: dict[int, bytes]) -> None:
    data = codec.encode(small, 20)
    assert codec.decode(data, max_pixels=70 * 45).size == (70, 45)
    for attempt in (codec.decode, partial(hpcmref.decode, device="cpu")):
        with pytest.raises(ImageError, match=r"3150.*3149"):
            attempt(data, max_pixels=70 * 45 - 1)  # type: ignore[operator]
    with pytest.raises(ImageError, match=str(hpcmref.DEFAULT_MAX_PIXELS)):
        codec.decode(forged(data, width=1 << 14, height=(1 << 13) + 1))


def test_a_model_file_that_is_replaced_is_loaded_anew(one_rate: Path, tmp_path: Path) -> None:
    """Otherwise new files would need a model that is gone."""
    path = tmp_path / "mine.safetensors"
    shutil.copy(one_rate, path)
    first = load(path, "cpu")
    assert load(path, "cpu") is first
    checkpoints.save(model_of(TINY, seed=9), path, "another", {})
    second = load(path, "cpu")
    assert second.fingerprint == checkpoints.info(path).fingerprint != first.fingerprint


def test_a_codec_of_inference_mode_can_search(sample: Image.Image) -> None:
    image = sample.crop((0, 0, 64, 64))
    with torch.inference_mode():
        codec = fresh(None, "cpu")
        inside = codec.encode(image, 20, effort=1)
    assert codec.encode(image, 20, effort=1) == inside


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_thumbnails_whatever_the_default_type(sample: Image.Image, dtype: torch.dtype) -> None:
    data = fresh(None, "cpu").encode(sample.crop((0, 0, 256, 192)), 20)
    expected = fresh(None, "cpu").thumbnail(data, 16)
    torch.set_default_dtype(dtype)
    try:
        assert fresh(None, "cpu").thumbnail(data, 16) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_threads_that_load_a_model_at_once_load_it_once(one_rate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []

    def slow(path: Path) -> checkpoints.Checkpoint:
        loaded.append(path)
        time.sleep(0.05)
        return checkpoints_load(path)

    checkpoints_load = checkpoints.load
    monkeypatch.setattr(checkpoints, "load", slow)
    path = shutil.copy(one_rate, one_rate.with_name("once.safetensors"))
    with ThreadPoolExecutor(8) as pool:
        codecs = list(pool.map(lambda _: load(path, "cpu"), range(8)))
    assert len(loaded) == 1
    assert all(codec is codecs[0] for codec in codecs)


# --- models of one rate and other models -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_rate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model without quality anchors."""
    path = tmp_path_factory.mktemp("models") / "single.safetensors"
    checkpoints.save(model_of(TINY, lambdas=()), path, "", {})
    return path


def test_a_model_of_one_rate_codes_and_takes_no_quality(one_rate: Path, small: Image.Image) -> None:
    codec = load(one_rate, "cpu")
    data = codec.encode(small)
    assert learned_of(container.parse(data)).quality == 0
    assert codec.decode(data).size == small.size
    with pytest.raises(ConfigError, match=r"single.*one rate"):
        codec.encode(small, 32)
    with pytest.raises(DecodeError, match="quality 5"):
        codec.decode(forged(data, quality=5))
    assert hpcmref.decode(data, device="cpu", model=one_rate).size == small.size
    with pytest.raises(ModelMismatchError):
        hpcmref.decode(data, device="cpu")
