"""Do checkpoints keep what they are given, and is everything else refused with a reason?"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import TINY, model_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hpcmref import checkpoints
from hpcmref.checkpoints import CheckpointInfo, convert_official
from hpcmref.codec import Codec, load
from hpcmref.errors import CheckpointError
from hpcmref.model import HPCM

METADATA = "hpcmref"

Parts = dict[str, Any]
"""tensors, and the fields of the metadata."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def model() -> HPCM:
    return model_of()


@pytest.fixture(scope="module")
def saved(folder: Path, model: HPCM) -> CheckpointInfo:
    return checkpoints.save(model, folder / "tiny.safetensors", "a test", {"steps": 3})


def changed(path: Path, target: Path, change: Callable[[dict[str, torch.Tensor], Parts], Any]) -> Path:
    """A copy of a checkpoint whose tensors and metadata went through `change`."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()[METADATA])
    change(tensors, metadata)
    save_file(tensors, target, {METADATA: json.dumps(metadata)})
    return target


# --- there and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [True, False])
def test_weights_survive(folder: Path, model: HPCM, half: bool) -> None:
    path = folder / f"half-{half}.safetensors"
    checkpoints.save(model, path, "", {}, half=half)
    loaded = checkpoints.load(path).model
    assert not loaded.training
    assert loaded.config == model.config
    for (name, found), (expected_name, expected) in zip(
        loaded.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert name == expected_name
        assert found.dtype == torch.float32
        assert torch.equal(found, expected.half().float() if half else expected), name
    assert model.entropy.context.attn_s3 is not None
    assert model.training is False  # and the model that was saved is as it was


def test_what_a_checkpoint_says_of_itself(saved: CheckpointInfo, model: HPCM) -> None:
    assert checkpoints.info(saved.path) == saved
    assert (saved.name, saved.preset, saved.description, saved.default) == ("tiny", "nano", "a test", False)
    assert saved.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert saved.size == saved.path.stat().st_size
    assert len(saved.fingerprint) == 4
    assert checkpoints.load(saved.path).fingerprint == saved.fingerprint
    with safe_open(saved.path, framework="pt") as file:
        assert json.loads(file.metadata()[METADATA])["provenance"] == {"steps": 3}


def test_saving_twice_gives_the_same_file(folder: Path, saved: CheckpointInfo, model: HPCM) -> None:
    """Calibration included."""
    again = checkpoints.save(model, folder / "again.safetensors", "a test", {"steps": 3})
    assert again.path.read_bytes() == saved.path.read_bytes()


def test_a_file_coded_before_and_after(folder: Path, saved: CheckpointInfo, sample: Image.Image) -> None:
    """Storing a loaded model again changes no bit of what it codes."""
    part = sample.crop((0, 0, 100, 64))
    data = load(saved.path, "cpu").encode(part, 50)
    copied = folder / "copied.safetensors"
    copied.write_bytes(saved.path.read_bytes())
    other = load(copied, "cpu")
    assert other.encode(part, 50) == data
    assert other.decode(data).tobytes() == load(saved.path, "cpu").decode(data).tobytes()


# --- fingerprints --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(folder: Path) -> tuple[HPCM, bytes]:
    """A model of one rate, which takes a fourth of the time to store, and its fingerprint."""
    model = model_of(lambdas=())
    return model, fingerprint(folder, model)


def fingerprint(folder: Path, model: HPCM, **settings: Any) -> bytes:
    path = folder / "fingerprint.safetensors"
    return checkpoints.save(model, path, **{"description": "", "provenance": {}, **settings}).fingerprint


def test_the_fingerprint_names_the_entropy_path(folder: Path, single: tuple[HPCM, bytes]) -> None:
    """Whatever a decoder needs to find the latents changes it; descriptions do not."""
    model, expected = single
    assert fingerprint(folder, model, description="other", provenance={"a": 1}) == expected
    assert fingerprint(folder, model, half=False) != expected
    for name in ("means_hyper.values", "h_s.0.bias", "context.adaptor_s2.1.weight", "context.attn_s3.conv_k.weight"):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.entropy.get_parameter(name).flatten()[0] += 1
        assert fingerprint(folder, other) != expected, name


def test_the_fingerprint_depends_on_the_configuration(folder: Path, single: tuple[HPCM, bytes]) -> None:
    """Windows, heads and the displacement of s2 decide what the same weights compute."""
    model, expected = single
    for settings in ({"windows": (4, 4, 8)}, {"displaced_s2": True}, {"heads": 2}):
        other = model_of(TINY, lambdas=(), **settings)
        other.load_state_dict(model.state_dict())
        assert fingerprint(folder, other) != expected, settings


# --- the registry --------------------------------------------------------------------------------------------------


def test_one_model_is_the_default() -> None:
    shipped = checkpoints.available()
    assert [info.default for info in shipped] == [True, *[False] * (len(shipped) - 1)]
    assert len({info.fingerprint for info in shipped}) == len({info.name for info in shipped}) == len(shipped)
    for info in shipped:
        assert checkpoints.name_of(info.fingerprint) == info.name
        assert checkpoints.find(info.name) == info.path
    assert checkpoints.find(None) == shipped[0].path
    assert checkpoints.name_of(b"\0\0\0\0") is None


@pytest.mark.parametrize("info", checkpoints.available(), ids=lambda info: info.name)
def test_every_shipped_model_works(info: CheckpointInfo, sample: Image.Image) -> None:
    codec = load(info.name, "cpu")
    assert isinstance(codec, Codec)
    assert (codec.name, codec.fingerprint) == (info.name, info.fingerprint)
    assert sum(each.numel() for each in checkpoints.load(info.path).model.parameters()) == info.parameters
    part = sample.crop((0, 0, 64, 64))
    assert codec.decode(codec.encode(part, 32)).size == part.size


def test_a_model_is_found_by_path(saved: CheckpointInfo) -> None:
    assert checkpoints.find(saved.path) == checkpoints.find(str(saved.path)) == saved.path
    assert load(saved.path, "cpu").name == "tiny"
    for missing in ("tiny", saved.path.parent, saved.path.with_name("missing.safetensors")):
        with pytest.raises(CheckpointError, match=re.escape(repr(str(missing)))):
            checkpoints.find(missing)


# --- what is refused -----------------------------------------------------------------------------------------------

WEIGHT = "entropy.context.context_net.1.weight"


def drop(name: str) -> Callable[[dict[str, torch.Tensor], Parts], Any]:
    return lambda tensors, metadata: tensors.pop(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor], Parts], Any]:
    return lambda tensors, metadata: tensors.update({name: tensor})


def say(**fields: Any) -> Callable[[dict[str, torch.Tensor], Parts], Any]:
    return lambda tensors, metadata: metadata.update(fields)


def configure(**settings: Any) -> Callable[[dict[str, torch.Tensor], Parts], Any]:
    return lambda tensors, metadata: metadata["config"].update(settings)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop("g_s.0.weight"), r"g_s\.0\.weight"),
        (put("g_s.9.weight", torch.zeros(2)), r"g_s\.9\.weight"),
        (put("g_s.0.bias", torch.zeros(47)), r"g_s\.0\.bias.*47"),
        (put(WEIGHT, torch.zeros(64, 64, 1, 1, dtype=torch.float16)), "fingerprint"),
        (drop(WEIGHT), "fingerprint"),
        (say(fingerprint="00000000"), "fingerprint"),
        (say(fingerprint="no hex"), "damaged"),
        (say(config={}), "damaged|lacks"),
        (say(config=[]), "damaged|lacks"),
        (configure(depth=3), "depth"),
        (configure(M=33), "33"),
        (configure(stages=[[48]]), "damaged"),
        (configure(transform="wavelet"), "wavelet"),
        (configure(displaced_s2=True), "fingerprint"),
    ],
)
def test_a_changed_checkpoint_is_refused(
    saved: CheckpointInfo, tmp_path: Path, change: Callable[[dict[str, torch.Tensor], Parts], Any], reason: str
) -> None:
    path = changed(saved.path, tmp_path / "changed.safetensors", change)
    with pytest.raises(CheckpointError, match=reason) as caught:
        checkpoints.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {METADATA: "no json"}, {METADATA: "3"}, {METADATA: "{}"}])
def test_a_foreign_safetensors_file_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(3)}, path, metadata)
    for read in (checkpoints.info, checkpoints.load):
        with pytest.raises(CheckpointError, match=r"foreign\.safetensors"):
            read(path)


def test_damage_is_refused(saved: CheckpointInfo, tmp_path: Path) -> None:
    """In the header, wherever it is hit, and by every cut."""
    data = saved.path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    random = np.random.default_rng(0)
    path = tmp_path / "damaged.safetensors"
    for place in random.integers(0, header, 60):
        broken = bytearray(data)
        broken[place] ^= 1 << int(random.integers(0, 7))
        path.write_bytes(broken)
        with pytest.raises(CheckpointError):
            checkpoints.load(path)
    for size in (0, 7, 8, 100, header, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            checkpoints.load(path)
    with pytest.raises(CheckpointError):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_not_finite_are_not_stored(tmp_path: Path, value: float) -> None:
    """1e30 is not finite in float16."""
    model = model_of()
    with torch.no_grad():
        model.entropy.context.adaptor_s3[2].weight[3, 5] = value
    with pytest.raises(CheckpointError, match=r"adaptor_s3\.2\.weight"):
        checkpoints.save(model, tmp_path / "x.safetensors", "", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_damaged_official_checkpoint_is_refused(tmp_path: Path, legacy: bool) -> None:
    """Whatever the unpickler makes of it."""
    source = tmp_path / "official.pth.tar"
    torch.save({"a": torch.zeros(3), "b": torch.ones(2)}, source, _use_new_zipfile_serialization=not legacy)
    data = source.read_bytes()
    random = np.random.default_rng(1)
    for _ in range(150):
        broken = bytearray(data)
        for place in random.integers(0, len(data), 2):
            broken[place] ^= 1 << int(random.integers(0, 8))
        source.write_bytes(broken[: len(data) if random.random() < 0.8 else int(random.integers(0, len(data)))])
        with pytest.raises(CheckpointError):
            convert_official(source, tmp_path / "x.safetensors", "phi")


@pytest.mark.parametrize("name", ["missing.pth.tar", ".", "text.safetensors"])
def test_what_is_no_official_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.safetensors").write_text("some text that is longer than eight bytes")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / name))):
        convert_official(tmp_path / name, tmp_path / "x.safetensors", "phi")
