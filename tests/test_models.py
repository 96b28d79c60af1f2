"""Are models that a person has added found by name and by fingerprint, and never a reason not to decode?"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from models import TINY, model_of
from PIL import Image
from typer.testing import CliRunner, Result

import hpcmref
from hpcmref import checkpoints, models
from hpcmref.cli import app
from hpcmref.errors import CheckpointError, ModelMismatchError
from hpcmref.format import tensorfile
from hpcmref.model import PRESETS
from hpcmref.runtime.folders import models_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tiny models, one.safetensors and other.safetensors."""
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("one", "other")):
        checkpoints.save(model_of(TINY, seed=seed), folder / f"{name}.safetensors", f"tiny, {name}", {})
    return folder


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of one's own models, which does not exist yet."""
    folder = tmp_path / "deep" / "models"
    monkeypatch.setenv("HPCMREF_MODELS", str(folder))
    return folder


@pytest.fixture
def small(sample: Image.Image) -> Image.Image:
    return sample.crop((0, 0, 64, 64))


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["checkpoints", *arguments])


def listed() -> dict[str, str]:
    return {each["name"]: each["path"] for each in json.loads(call("list", "--json").stdout)}


def test_a_model_is_added_used_and_removed(made: Path, mine: Path, small: Image.Image) -> None:
    data = hpcmref.encode(small, 20, made / "one.safetensors", "cpu")
    fingerprint = hpcmref.info(data).fingerprint
    with pytest.raises(ModelMismatchError) as caught:
        hpcmref.decode(data, "cpu")
    assert str(mine) in str(caught.value)
    assert fingerprint in str(caught.value)

    result = call("add", str(made / "one.safetensors"), "--name", "my.model-1")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"my.model-1: {mine / 'my.model-1.safetensors'}, ")
    assert listed()["my.model-1"] == str(mine / "my.model-1.safetensors")
    assert "tiny, one" in call("list").stdout

    assert hpcmref.info(data).model == "my.model-1"
    assert hpcmref.decode(data, "cpu").size == small.size
    assert hpcmref.encode(small, 20, "my.model-1", "cpu") == data

    assert call("remove", "my.model-1").exit_code == 0
    assert not any(mine.iterdir())
    with pytest.raises(ModelMismatchError):
        hpcmref.decode(data, "cpu")


def test_the_usual_folder_is_the_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPCMREF_MODELS")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    folder = models_folder()
    assert folder.parts[-2:] == ("hpcmref", "models")
    if sys.platform.startswith("linux"):
        assert folder == tmp_path / "hpcmref" / "models"
    monkeypatch.setenv("HPCMREF_MODELS", "~/mine")
    assert models_folder() == Path.home() / "mine"
    monkeypatch.setenv("HPCMREF_MODELS", "")
    assert models_folder() == folder


@pytest.mark.usefixtures("mine")
def test_names_that_are_taken(made: Path) -> None:
    one, other = made / "one.safetensors", made / "other.safetensors"
    with pytest.raises(CheckpointError, match=r"nano-2 already.*another with --name"):
        models.add(one, "nano-2", force=True)
    models.add(one, "mine")
    with pytest.raises(CheckpointError, match=r"mine already.*--force"):
        models.add(other, "mine")
    with pytest.raises(CheckpointError, match=r"fingerprint .* of the model mine"):
        models.add(one, "again")
    assert models.add(other, "mine", force=True).description == "tiny, other"
    assert models.add(one).name == "one"


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../up", "a,b", "a=b", "a+b", "a b", "x" * 101])
def test_names_that_cannot_be(made: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="is not a valid name"):
        models.add(made / "one.safetensors", name)


def test_only_whole_models_are_added(made: Path, mine: Path) -> None:
    content = bytearray((made / "one.safetensors").read_bytes())
    content[-1] ^= 1
    damaged = made / "damaged.safetensors"
    damaged.write_bytes(content)
    for source in (damaged, made / "missing.safetensors", Path(__file__)):
        result = call("add", str(source))
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert str(source) in result.stderr
    assert not mine.exists()


def test_damaged_files_in_the_folder_keep_nobody_from_decoding(made: Path, mine: Path, small: Image.Image) -> None:
    models.add(made / "one.safetensors")
    data = hpcmref.encode(small, 20, "one", "cpu")
    (mine / "empty.safetensors").write_bytes(b"")
    (mine / "folder.safetensors").mkdir()
    assert hpcmref.decode(data, "cpu").size == hpcmref.decode(hpcmref.encode(small, 1)).size
    result = call("list")
    assert result.exit_code == 0
    assert sorted(line.split()[1] for line in result.stderr.splitlines()) == [
        str(mine / "empty.safetensors"),
        str(mine / "folder.safetensors"),
    ]
    assert call("list", "--verify").exit_code == 1
    assert call("remove", "empty").exit_code == 0


def test_verify_reads_every_model(made: Path, mine: Path) -> None:
    models.add(made / "one.safetensors")
    assert call("list", "--verify").exit_code == 0
    path = mine / "one.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert call("list").exit_code == 0
    result = call("list", "--verify")
    assert result.exit_code == 1
    assert result.stderr == f"hpcmref: {path} is damaged: its SHA-256 does not match the one in its header.\n"
    assert "nano" in result.stdout


@pytest.mark.usefixtures("mine")
def test_a_name_without_a_version_is_the_newest(made: Path) -> None:
    assert checkpoints.find("nano") == checkpoints.find("nano-2")
    models.add(made / "one.safetensors", "nano-10")
    models.add(made / "other.safetensors", "nano-9")
    assert checkpoints.find("nano") == checkpoints.find("nano-10")
    assert checkpoints.info(checkpoints.find(None)).name == "nano-2"


def test_a_model_that_ships_stays_and_keeps_its_name(made: Path, mine: Path) -> None:
    assert "ships with hpcmref" in call("remove", "nano-2").stderr
    result = call("remove", "nowhere")
    assert (result.exit_code, str(mine) in result.stderr) == (1, True)
    mine.mkdir(parents=True)
    os.link(made / "one.safetensors", mine / "nano-2.safetensors")  # put there by hand
    assert checkpoints.find("nano-2") != mine / "nano-2.safetensors"
    assert [each.default for each in checkpoints.available() if each.name == "nano-2"] == [True, False]
    assert call("remove", "nano-2").exit_code == 0


def test_a_folder_that_cannot_be_written_is_one_sentence(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HPCMREF_MODELS", str(tmp_path / "file" / "models"))
    result = call("add", str(made / "one.safetensors"))
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "cannot be made" in result.stderr


def test_a_quality_is_the_same_lambda_in_every_model() -> None:
    """The rule and the table of docs/models.md."""

    def by_rule(quality: int) -> float:
        return 0.0009 * (0.15 / 0.0009) ** (quality / 63)

    with tensorfile.opened(checkpoints.find(None)) as file:
        shipped = json.loads(file.metadata["hpcmref"])["config"]["lambdas"]
    for lambdas in (shipped, *(config.lambdas for config in PRESETS.values() if config.lambdas)):
        last = len(lambdas) - 1
        assert list(lambdas) == pytest.approx([by_rule(63 * anchor / last) for anchor in range(last + 1)], rel=1e-3)
    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    table = re.findall(r"^\| (\d+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert len(table) == 9
    for quality, stated in table:
        assert float(stated) == pytest.approx(by_rule(int(quality)), abs=5e-6)
