"""Do checkpoints keep what they are given, and is everything else refused with a reason?"""

from __future__ import annotations

import copy
import hashlib
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
from typer.testing import CliRunner

from hpcmref import checkpoints
from hpcmref.checkpoints import CheckpointInfo, convert_official
from hpcmref.cli import app
from hpcmref.codec import Codec, load
from hpcmref.errors import CheckpointError, ConfigError, UnknownModelError
from hpcmref.exact import attach
from hpcmref.format import tensorfile
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
def test_a_saved_model_is_loaded_with_the_same_weights(folder: Path, model: HPCM, half: bool) -> None:
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
        if not name.startswith("entropy."):
            assert torch.equal(found, expected.half().float() if half else expected), name
        elif not name.endswith((".weight", ".bias")):
            assert torch.equal(found, expected), name
    assert model.entropy.context.attn_s3 is not None
    assert model.training is False  # and the model that was saved is as it was


def test_a_stored_model_has_the_exact_layers_of_the_original(saved: CheckpointInfo, model: HPCM) -> None:
    """Convolutions are stored as integers, and loading them gives bit-identical layers."""
    loaded = checkpoints.load(saved.path)
    expected = attach(model.entropy, loaded.grids).state_dict()
    found = attach(loaded.model.entropy, loaded.grids).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    names = [name for name in load_file(saved.path) if name.startswith("entropy.") and name.endswith(".weight")]
    assert names
    assert not any(load_file(saved.path)[name].is_floating_point() for name in names)


def test_converting_again_changes_nothing(saved: CheckpointInfo, tmp_path: Path) -> None:
    again = checkpoints.convert(saved.path, tmp_path / "again.safetensors")
    assert again.path.read_bytes() == saved.path.read_bytes()


def test_converting_never_replaces_the_input(saved: CheckpointInfo) -> None:
    before = saved.path.read_bytes()
    result = CliRunner().invoke(app, ["checkpoints", "convert", str(saved.path), "-o", str(saved.path), "--force"])
    assert result.exit_code == 1
    assert "is an input" in result.stderr
    assert saved.path.read_bytes() == before


def test_a_file_of_the_old_form_is_converted_and_keeps_its_fingerprint(
    saved: CheckpointInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a checksum a file loads only if it shipped, which the hash of the whole file shows."""
    stored = checkpoints.load(saved.path)
    tensors = {name: tensor.half() for name, tensor in stored.model.state_dict().items()}
    for module, named in stored.grids.items():
        tensors |= {f"exact.{module}.{name}": grid for name, grid in named.items()}
    config = stored.model.config.to_dict()
    fingerprint = checkpoints._fingerprint(config, {name: tensor.numpy() for name, tensor in tensors.items()}, 1).hex()
    said = {"config": config, "description": "old", "fingerprint": fingerprint, "parameters": 1, "provenance": {}}
    source = tmp_path / "old.safetensors"
    save_file(tensors, source, {"hpcmref": json.dumps(said)})
    with pytest.raises(CheckpointError, match="checkpoints convert"):
        checkpoints.load(source)
    made = checkpoints.convert(source, tmp_path / "compact.safetensors")
    assert made.fingerprint.hex() == fingerprint
    monkeypatch.setattr(checkpoints, "_SHIPPED", {hashlib.sha256(source.read_bytes()).hexdigest()})
    old, new = checkpoints.load(source), checkpoints.load(made.path)
    expected = attach(old.model.entropy, old.grids).state_dict()
    assert all(
        torch.equal(tensor, expected[name])
        for name, tensor in attach(new.model.entropy, new.grids).state_dict().items()
    )
    assert torch.equal(old.model.g_s[0].weight, new.model.g_s[0].weight)


def test_a_damaged_synthesis_is_refused(saved: CheckpointInfo, tmp_path: Path) -> None:
    """g_s is no part of the fingerprint; the checksum covers it."""
    path = changed(saved.path, tmp_path / "grey.safetensors", lambda tensors, _: tensors["g_s.0.weight"].zero_())
    with pytest.raises(CheckpointError, match="SHA-256"):
        checkpoints.load(path)


@pytest.mark.parametrize("digits", ["", "ab", "ab" * 5, "ab" * 10**5, 7, None, ["ab"]])
def test_a_fingerprint_of_another_length_is_refused(saved: CheckpointInfo, tmp_path: Path, digits: Any) -> None:
    """That of an old file is believed, as the checksum covers it; but files have room for 4 bytes."""

    def change(tensors: dict[str, torch.Tensor], metadata: Parts) -> None:
        metadata.update(fingerprint=digits, fingerprint_rule=1)
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        metadata["sha256"] = checkpoints._checksum(metadata, arrays)

    path = changed(saved.path, tmp_path / "length.safetensors", change)
    for read in (checkpoints.info, checkpoints.load):
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            read(path)


def resealed(path: Path) -> Path:
    """The file with checksum and fingerprint that fit."""
    with tensorfile.opened(path) as file:
        arrays, metadata = file.read(), checkpoints._metadata(file)
    metadata["fingerprint"] = checkpoints._fingerprint(metadata["config"], arrays, 2).hex()
    metadata["sha256"] = checkpoints._checksum(metadata, arrays)
    save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, path, {METADATA: json.dumps(metadata)})
    return path


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("g_a.1.bias", lambda x: x.fill_(float("nan")), "finite"),
        ("g_s.0.weight", lambda x: x.fill_(float("inf")), "finite"),
        ("exact.h_s.0.input", lambda x: x.fill_(41), "exact|grid"),
        ("exact.h_s.0.limit", lambda x: x.fill_(0), "grid"),
        ("exact.h_s.0.limit", lambda x: x.fill_(2**24), "grid"),
        ("exact.h_s.0.output", lambda x: x.int(), "I32"),
        ("entropy.h_s.0.weight", lambda x: x.float(), "F32"),
        ("g_s.0.weight", lambda x: x.to(torch.int8), "I8"),
        ("g_s.0.weight", lambda x: x.double(), "F64"),
        ("entropy.h_s.0.bias", lambda x: x.int().fill_(2**24 + 1), "float32"),
    ],
)
def test_a_hostile_model_with_a_valid_checksum_is_refused(
    saved: CheckpointInfo, tmp_path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    def apply(tensors: dict[str, torch.Tensor], metadata: Parts) -> None:
        tensors[name] = change(tensors[name])

    path = changed(saved.path, tmp_path / "hostile.safetensors", apply)
    with pytest.raises(CheckpointError, match=reason):
        checkpoints.load(path if reason == "F64" else resealed(path))


@pytest.mark.parametrize(
    "header",
    [
        (2**31).to_bytes(8, "little") + b"{}",
        (2**63).to_bytes(8, "little"),
        b"[" * 100_000,
        b'{"__metadata__":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"__metadata__":{"hpcmref":"{}"},"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}',
        b'{"__metadata__":[]}',
        b"[]",
        b"\xff",
    ],
)
def test_a_hostile_header_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "header.safetensors"
    whole = header if b"\0" in header else len(header).to_bytes(8, "little") + header
    path.write_bytes(whole + bytes(4))
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        checkpoints.load(path)


def nested(levels: int) -> Any:
    """A list in a list, so many levels deep."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "settings",
    [{"M": 10**9}, {"N": 2**40}, {"stages": [[48, 10**6]]}, {"hyper_blocks": 10**6}, {"M": 32.0}, {"N": True},
     {"prior_s3": [1, 10**6]}, {"heads": -1}, {"windows": [4, 8, 10**6]}, {"lambdas": [0.0, 1.0]}, {"ratio": 10**6},
     {"preset": "x" * 1000}, {"lambdas": list(range(1, 1000))}, {"memory": {"mode": "cross", "max_refs": [10**9] * 3}},
     {"memory": {"mode": "full", "value_resolution": 10**6}}, {"memory": [["mode", "light"]]}, {"memory": "light"},
     {"memory": {"mode": "light", "scales": 3}}, {"windows": [32, 32, 32], "heads": 64}, {"lambdas": [10**400, 1]},
     {"displaced_s2": "no"}, {"transform": ["dct"]}, {"N": nested(900)}, {"windows": nested(40)}],
)  # fmt: skip
def test_a_configuration_over_the_limits_costs_nothing(
    saved: CheckpointInfo, tmp_path: Path, settings: dict[str, Any]
) -> None:
    path = changed(saved.path, tmp_path / "large.safetensors", configure(**settings))
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        checkpoints.load(path)


def test_settings_added_later_do_not_change_a_fingerprint_by_default() -> None:
    config = {**TINY.to_dict()}
    assert set(checkpoints._settings(config)) == set(config) - {"preset", *checkpoints._TRANSFORM_SETTINGS}


def test_info_says_what_was_saved(saved: CheckpointInfo, model: HPCM) -> None:
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


def test_a_copy_of_a_model_codes_the_same(folder: Path, saved: CheckpointInfo, sample: Image.Image) -> None:
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
    assert fingerprint(folder, model, half=False) == expected
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


@pytest.mark.parametrize("name", ["nosuch", "nanno", "no.such-1", ""])
def test_an_unknown_name_is_a_wrong_value_and_a_missing_file_is_not(name: str, tmp_path: Path) -> None:
    """A script can tell a typing error (exit code 2) from a file that is missing (1)."""
    with pytest.raises(UnknownModelError, match=f"There is no model {name!r}") as caught:
        checkpoints.find(name)
    assert isinstance(caught.value, CheckpointError)
    assert isinstance(caught.value, ConfigError)
    for missing in (f"{name}.safetensors", f"./{name}", tmp_path / name / "x", str(tmp_path / "a" / name)):
        with pytest.raises(CheckpointError) as other:
            checkpoints.find(missing)
        assert not isinstance(other.value, ConfigError)


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
        (put(WEIGHT, torch.zeros(64, 64, 1, 1, dtype=torch.int8)), "SHA-256"),
        (drop(WEIGHT), "lacks"),
        (say(fingerprint="00000000"), "SHA-256"),
        (say(fingerprint="no hex"), "damaged"),
        (say(config={}), "damaged|lacks"),
        (say(config=[]), "damaged|lacks"),
        (configure(depth=3), "depth"),
        (configure(M=33), "33"),
        (configure(stages=[[48]]), "damaged"),
        (configure(transform="wavelet"), "wavelet"),
        (configure(displaced_s2=True), "SHA-256"),
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


@pytest.mark.parametrize("size", range(9))
def test_a_file_that_is_too_short_for_a_header_is_called_so(tmp_path: Path, size: int) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(bytes(size))
    found = "is empty" if size == 0 else f"has only {size} byte{'s' * (size > 1)}" if size < 8 else "Expecting value"
    with pytest.raises(CheckpointError, match=rf"short\.safetensors is damaged or no safetensors file: .*{found}"):
        checkpoints.info(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_not_finite_are_not_stored(tmp_path: Path, value: float) -> None:
    """1e30 is finite, and too large for exact arithmetic."""
    model = model_of()
    with torch.no_grad():
        model.entropy.context.adaptor_s3[2].weight[3, 5] = value
    with pytest.raises(CheckpointError, match=r"adaptor_s3\.2\.weight|too large"):
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


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.pth.tar", "cannot be read: No such file or directory"),
        (".", "cannot be read: (Is a directory|Permission denied)"),
        ("text.safetensors", "is not a PyTorch checkpoint that can be read safely.*"),
        ("sample.png", "is not a PyTorch checkpoint that can be read safely"),
        ("objects.pth.tar", "is not a PyTorch checkpoint that can be read safely"),
        ("empty.pth.tar", "is not a PyTorch checkpoint that can be read safely: EOFError"),
        ("cut.pth.tar", "is not a PyTorch checkpoint that can be read safely: PytorchStreamReader failed .*"),
    ],
)
def test_what_is_no_official_checkpoint_is_refused(tmp_path: Path, sample: Image.Image, name: str, reason: str) -> None:
    """In our own words: torch's advise to read the file in the way that runs the code in it."""
    (tmp_path / "text.safetensors").write_text("some text that is longer than eight bytes")
    sample.save(tmp_path / "sample.png")
    torch.save({"a": Path()}, tmp_path / "objects.pth.tar")
    (tmp_path / "empty.pth.tar").touch()
    (tmp_path / "cut.pth.tar").write_bytes((tmp_path / "objects.pth.tar").read_bytes()[:200])
    with pytest.raises(CheckpointError) as caught:
        convert_official(tmp_path / name, tmp_path / "x.safetensors", "phi")
    assert re.fullmatch(f"{re.escape(str(tmp_path / name))} {reason}", str(caught.value))
    assert "weights_only" not in str(caught.value)
