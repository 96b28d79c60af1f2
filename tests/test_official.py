"""Do official checkpoints load, and does the model then compute what the official code computes?

The golden vectors were recorded from the official code in float64, with the weights of recipe.py. Integers must be
equal, and numbers within 1e-9 of the largest value of their array.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA
from models import psnr
from PIL import Image
from recipe import fill_state_dict
from torch import Tensor
from typer.testing import CliRunner

from hpcmref import checkpoints
from hpcmref.checkpoints import convert_official, load_official
from hpcmref.cli import app
from hpcmref.codec import load
from hpcmref.errors import CheckpointError
from hpcmref.format.rangecoder import scale_table
from hpcmref.model import PRESETS
from hpcmref.model.coders import Estimator
from hpcmref.model.entropy import bits, likelihood, scale_index
from hpcmref.model.schedule import S1, S2, STEPS, Step, lattices
from research.growth import measure

GOLDEN = DATA / "golden"
TOLERANCE = 1e-9

State = dict[str, Tensor]


@cache
def keys(preset: str) -> dict[str, dict[str, Any]]:
    """Key of the official state_dict -> shape, and crc32 of the recipe's float32 bytes."""
    return json.loads((GOLDEN / "keys.json").read_text())[preset]


def golden_state(preset: str) -> State:
    """The official state_dict whose golden vectors there are."""
    filled = fill_state_dict({key: value["shape"] for key, value in keys(preset).items()})
    for key, array in filled.items():
        assert zlib.crc32(array.astype("<f4", copy=False).tobytes()) == keys(preset)[key]["crc32"], key
    return {key: torch.from_numpy(array) for key, array in filled.items()}


def blank_state(preset: str) -> State:
    """An official state_dict of zeros that takes no memory."""
    return {key: torch.zeros(()).expand(value["shape"]) for key, value in keys(preset).items()}


class Recorder(Estimator):
    """An Estimator that remembers the latents and what it was asked in each step."""

    made: list[Recorder]

    def __init__(self, y: Tensor, z: Tensor, noise: bool) -> None:
        super().__init__(y, z, noise)
        self.y, self.z = y, z
        self.steps: list[tuple[Step | None, Tensor, Tensor, Tensor]] = []
        self.made.append(self)

    def code(self, step: Step | None, scales: Tensor, means: Tensor) -> Tensor:
        quantised = super().code(step, scales, means)
        self.steps.append((step, scales, means, quantised))
        return quantised

    def symbols(self) -> list[Tensor]:
        """Of z and of the 11 steps."""
        return [(quantised - means).round() for _, _, means, quantised in self.steps]

    def on_y(self, values: list[Tensor]) -> Tensor:
        """Tensors of the 11 steps, each value at its place in y."""
        whole = torch.zeros_like(self.y)
        for step, value in zip(STEPS, values, strict=True):
            batch, channels, height, width = value.shape
            placed = step.put(torch.zeros(batch, step.groups * channels, height, width).to(value), value)
            whole += {1: lambda x: S2.up(S1.up(x)), 2: S2.up, 3: lambda x: x}[step.scale](placed)
        return whole


def golden_values(preset: str, size: str) -> dict[str, np.ndarray]:
    """What was recorded of the official code."""
    with np.load(GOLDEN / f"{preset}.npz") as arrays:
        return {name.removeprefix(f"{size}."): array for name, array in arrays.items() if name.startswith(size)}


@pytest.mark.parametrize(
    ("preset", "size"),
    [
        ("base", "256x256"),
        ("large", "256x256"),
        ("phi", "256x256"),
        pytest.param("base", "512x768", marks=pytest.mark.long),  # 20 s; passed last on 2026-11-26
    ],
)
def test_a_forward_pass_gives_the_numbers_of_the_official_code(
    preset: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward pass of the public model, with what goes through it recorded, against the official code's numbers."""
    golden = golden_values(preset, size)
    with Image.open(GOLDEN / f"image_{size}.png") as image:
        x = torch.from_numpy(np.asarray(image.convert("RGB")) / 255.0).permute(2, 0, 1)[None]
    model = load_official(golden_state(preset), preset).double()
    assert not model.training

    monkeypatch.setattr(Recorder, "made", [], raising=False)
    monkeypatch.setattr("hpcmref.model.hpcm.Estimator", Recorder)
    params: list[Tensor] = []
    model.entropy.h_s.register_forward_hook(lambda module, inputs, output: params.append(output.clone()))
    with torch.no_grad():
        out = model(x)
    (recorder,) = Recorder.made
    z_step, *steps = recorder.steps
    assert z_step[0] is None
    assert [step for step, *_ in steps] == list(STEPS)

    planes = lattices(recorder.y)
    residuals = [step.select(planes[step.scale]) - means for step, _, means, _ in steps]
    tensors = {
        "y": recorder.y,
        "z": recorder.z,
        "z_hat": z_step[3],
        "params": params[0],
        "y_hat": recorder.on_y([quantised for *_, quantised in steps]),
        "scales_y": recorder.on_y([scales for _, scales, _, _ in steps]),
        "y_res": recorder.on_y(residuals),
        "x_hat": out["x_hat"],
    }
    for name, tensor in tensors.items():
        compare_samples(name, tensor, golden)

    z_symbols, *y_symbols = recorder.symbols()
    np.testing.assert_array_equal(z_symbols, golden["z_symbols"])
    np.testing.assert_array_equal(flat(y_symbols), golden["y_symbols"])
    thresholds = torch.from_numpy(scale_table()[:-1].astype(np.float64))
    indexes = [scale_index(scales, thresholds) for _, scales, _, _ in steps]
    if "y_indexes" in golden:  # not stored for the larger image
        np.testing.assert_array_equal(flat(indexes), golden["y_indexes"])

    likelihoods = out["likelihoods"]
    of_steps = likelihoods["y"].split([symbols.numel() for symbols in y_symbols], dim=1)
    per_step: dict[str, list[Any]] = {
        "shapes": [list(symbols.shape) for symbols in y_symbols],
        "symbols": [symbols.numel() for symbols in y_symbols],
        "sum": [int(symbols.sum()) for symbols in y_symbols],
        "abs_sum": [int(symbols.abs().sum()) for symbols in y_symbols],
        "nonzero": [int(symbols.count_nonzero()) for symbols in y_symbols],
        "index_sum": [int(rows.sum()) for rows in indexes],
    }
    for name, values in per_step.items():
        np.testing.assert_array_equal(values, golden[f"step_{name}"], name)
    close("step bits", [float(bits(part)) for part in of_steps], golden["step_bits"])
    close("step scales", [float(scales.sum()) for _, scales, _, _ in steps], golden["step_scales_sum"])

    np.testing.assert_allclose(float(bits(likelihoods["y"])), golden["bits_y"], rtol=TOLERANCE)
    np.testing.assert_allclose(float(bits(likelihoods["z"])), golden["bits_z"], rtol=TOLERANCE)
    clipped = [int((likelihoods[name] <= 9.999999717180685e-10).sum()) for name in "yz"]
    np.testing.assert_array_equal(clipped, golden["clipped_likelihoods"])


class Known(Exception):  # noqa: N818
    """All steps that are asked for have been predicted."""


class Predicted:
    """A coder that knows the first symbols: it keeps what is predicted of them, and then ends the pass."""

    def __init__(self, symbols: list[Tensor]) -> None:
        self.symbols = symbols
        self.scales: list[Tensor] = []

    def code(self, step: Step | None, scales: Tensor, means: Tensor) -> Tensor:
        self.scales.append(scales)
        if len(self.scales) == len(self.symbols):
            raise Known
        return self.symbols[len(self.scales) - 1] + means


def test_an_image_that_is_not_square_is_predicted_as_by_the_official_code() -> None:
    """z and 7 of 11 steps of y, from the official symbols: every network and lattice, without g_a and g_s."""
    golden = golden_values("base", "512x768")
    sizes, shapes = golden["step_symbols"][:7].tolist(), golden["step_shapes"][:7].tolist()
    parts = torch.from_numpy(golden["y_symbols"])[: sum(sizes)].double().split(sizes)
    coder = Predicted([torch.from_numpy(golden["z_symbols"]).double(), *map(torch.reshape, parts, shapes)])
    model = load_official(golden_state("base"), "base")
    params: list[Tensor] = []
    model.entropy.h_s.register_forward_hook(lambda module, inputs, output: params.append(output.clone()))
    with torch.no_grad(), pytest.raises(Known):
        model.entropy.double()(torch.zeros(1, dtype=torch.float64), (8, 12), coder)

    compare_samples("params", params[0], golden)
    (_, *scales), (z_symbols, *y_symbols) = coder.scales, coder.symbols
    close("scales", [float(each.sum()) for each in scales], golden["step_scales_sum"][:7])
    thresholds = torch.from_numpy(scale_table()[:-1].astype(np.float64))
    indexes = [int(scale_index(each, thresholds).sum()) for each in scales]
    assert indexes == golden["step_index_sum"][:7].tolist()
    of_steps = [float(bits(likelihood(symbols, each))) for symbols, each in zip(y_symbols, scales, strict=True)]
    close("step bits", of_steps, golden["step_bits"][:7])
    np.testing.assert_allclose(float(bits(likelihood(z_symbols, coder.scales[0]))), golden["bits_z"], rtol=TOLERANCE)


def flat(tensors: list[Tensor]) -> np.ndarray:
    """In coding order: steps one after the other, each with its rows first."""
    return torch.cat([tensor.flatten() for tensor in tensors]).numpy()


def compare_samples(name: str, tensor: Tensor, golden: dict[str, np.ndarray]) -> None:
    stride, *shape = golden[f"{name}_stride_shape"].tolist()
    assert list(tensor.shape) == shape, name
    close(name, tensor.flatten()[::stride], golden[f"{name}_sample"])
    stats = [tensor.mean(), tensor.std(), tensor.min(), tensor.max(), tensor.abs().sum()]
    for computed, expected in zip(stats, golden[f"{name}_stats"], strict=True):
        np.testing.assert_allclose(float(computed), expected, rtol=TOLERANCE, err_msg=name)


def close(name: str, computed: Any, expected: np.ndarray) -> None:
    largest = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(computed), expected, rtol=0, atol=TOLERANCE * largest, err_msg=name)


# --- which state_dicts load ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["base", "large", "phi"])
def test_every_official_parameter_is_used(preset: str) -> None:
    state = {key: torch.zeros(()).expand(value["shape"]) + i for i, (key, value) in enumerate(keys(preset).items())}
    model = load_official(state, preset)
    used = {int(parameter.flatten()[0]) for parameter in model.parameters()}
    buffers = {"scale_table", "quantized_cdf_z", "cdf_length_z", "offset_z", "quantized_cdf_y", "cdf_length_y"}
    buffers |= {"offset_y", *(key for key in state if key.startswith("entropy_estimation."))}
    assert used == {i for i, key in enumerate(state) if key not in buffers}


def test_buffers_may_be_filled_or_missing_and_keys_may_have_a_prefix() -> None:
    bare = blank_state("phi")
    assert bare["quantized_cdf_y"].shape == (0,)
    filled = {**bare, "scale_table": torch.ones(60), "quantized_cdf_z": torch.ones(256, 99, dtype=torch.int32)}
    missing = {key: value for key, value in bare.items() if key not in ("offset_y", "entropy_estimation.beta")}
    prefixed = {f"module.{key}": value for key, value in bare.items()}
    names = set(load_official(bare, "phi").state_dict())
    for state in (filled, missing, prefixed):
        assert set(load_official(state, "phi").state_dict()) == names


MISSING = "attn_s3.conv_out.bias"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.pop(MISSING), MISSING),
        (lambda state: state.update(extra=torch.zeros(1)), "extra"),
        (lambda state: state.update({MISSING: torch.zeros(641)}), MISSING),
        (lambda state: state.update({MISSING: torch.zeros(0)}), MISSING),
        (lambda state: state.update({MISSING: torch.zeros(640, dtype=torch.int64)}), MISSING),
        (lambda state: state.update({MISSING: torch.zeros(640).to_sparse()}), MISSING),
        (lambda state: state.update({"module.g_a.nonsense": torch.zeros(1)}), "g_a.nonsense"),
    ],
)
def test_a_wrong_key_is_named(change: Callable[[State], Any], named: str) -> None:
    state = blank_state("base")
    change(state)
    with pytest.raises(CheckpointError, match=rf"(?<![\w.]){named}(?![\w.])"):
        load_official(state, "base")


@pytest.mark.parametrize(("of", "wanted"), [("base", "large"), ("large", "base"), ("base", "phi"), ("phi", "base")])
def test_a_checkpoint_of_another_preset_is_refused(of: str, wanted: str) -> None:
    with pytest.raises(CheckpointError, match=wanted):
        load_official(blank_state(of), wanted)


@pytest.mark.parametrize("preset", ["nano", "1b", ""])
def test_only_official_presets(preset: str) -> None:
    with pytest.raises(CheckpointError, match="base, large or phi"):
        load_official(blank_state("phi"), preset)


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_converted_checkpoint_codes_in_little_memory(tmp_path: Path, sample: Image.Image) -> None:
    """A checkpoint as the official train.py saves it on several GPUs: converted, and an image there and back.

    A process with it takes less than 900 MiB for 768x512, where the official code takes 1147. The image here is
    smaller and takes as much (689 MiB instead of 693), since large images are computed in strips.
    """
    state = golden_state("base")
    source, target = tmp_path / "official.pth.tar", tmp_path / "x.safetensors"
    torch.save({f"module.{key}": value for key, value in state.items()}, source)
    result = CliRunner().invoke(app, ["checkpoints", "convert", str(source), "-o", str(target), "--preset", "base"])
    assert result.exit_code == 0, result.output
    source.unlink()

    parameters = sum(parameter.numel() for parameter in load_official(state, "base").parameters())
    made = checkpoints.info(target)
    assert (made.preset, made.parameters, made.default) == ("base", parameters, False)
    assert f"{parameters} parameters" in result.stdout
    assert made.fingerprint.hex() in result.stdout

    crop, codec = sample.crop((100, 100, 200, 150)), load(str(target), "cpu")
    decoded = codec.decode(codec.encode(crop))
    # Weights of a recipe reconstruct nothing: the image has the right size, and is the model's own reconstruction.
    assert (decoded.size, decoded.mode) == ((100, 50), "RGB")
    assert psnr(decoded, reconstruction(load_official(state, "base"), crop)) > 40

    point = measure(384 * 256e-6, str(target))
    assert (point.width, point.height) == (384, 256)
    assert max(point.encode_memory, point.decode_memory) < 900 * 2**20


def reconstruction(model: torch.nn.Module, image: Image.Image) -> Image.Image:
    """model(x), of an image smaller than 128 x 64, as an image."""
    pixels = np.pad(np.asarray(image), ((0, 64 - image.height), (0, 128 - image.width), (0, 0)), mode="edge")
    with torch.no_grad():
        x_hat = model(torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)[None])["x_hat"]
    eight_bit = x_hat[0].clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(eight_bit[: image.height, : image.width])


class Malicious:
    """Runs code when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.unlink, (self.victim,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_malicious_pickle_is_not_run(tmp_path: Path, write: Callable[[Any, Path], Any]) -> None:
    source, victim = tmp_path / "official.pth.tar", tmp_path / "victim"
    victim.touch()
    write({"g_a.branch.0.weight": Malicious(victim)}, source)
    with pytest.raises(CheckpointError, match=r"official\.pth\.tar"):
        convert_official(source, tmp_path / "x.safetensors", "base")
    assert victim.exists()
    assert not (tmp_path / "x.safetensors").exists()

    with contextlib.suppress(AttributeError, RuntimeError, TypeError, pickle.UnpicklingError):
        torch.load(source, weights_only=False)
    assert not victim.exists()  # so the file was a threat


@pytest.mark.parametrize(
    "content", [[1, 2], {"epoch": 3}, {"state_dict": {"g_a": "text"}}, torch.zeros(3), {}, {1: torch.zeros(1)}]
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "official.pth.tar")
    with pytest.raises(CheckpointError):
        convert_official(tmp_path / "official.pth.tar", tmp_path / "x.safetensors", "phi")
    assert not (tmp_path / "x.safetensors").exists()


def test_presets_of_the_official_code_are_named_everywhere() -> None:
    assert {name for name, config in PRESETS.items() if not config.lambdas} == {"base", "large", "phi"}
