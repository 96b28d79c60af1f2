"""Does `hpcmref selftest` pass here, and does it fail when a model, a kernel or a file is not what it should be?"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from typer.testing import CliRunner

from hpcmref import checkpoints, selftest
from hpcmref.checkpoints import CheckpointInfo
from hpcmref.cli import app
from hpcmref.codec import Codec, fresh
from hpcmref.errors import CheckpointError
from hpcmref.exact import guard
from hpcmref.format import container
from hpcmref.selftest import FOLDER, Case, read_set
from tools import build_conformance

ROOT = Path(__file__).parent.parent


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the shipped set, to be damaged."""
    return Path(shutil.copytree(FOLDER, tmp_path / "set"))


def case(part: str) -> Case:
    return next(each for each in read_set(FOLDER).cases if part in each.name)


# --- the shipped set -----------------------------------------------------------------------------------------------


def test_this_machine_passes() -> None:
    begun = time.process_time()
    result = CliRunner().invoke(app, ["selftest", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert time.process_time() - begun < 15  # of one core; a person waits for two
    *_, verdict = result.output.splitlines()
    assert verdict == "passed: this machine codes as it should"
    for said in ("torch", "NumPy", "exact sums", "transforms", "range coder", *shipped()):
        assert said in result.output


def test_json() -> None:
    result = CliRunner().invoke(app, ["selftest", "--json", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.output)
    assert said["passed"]
    assert said["failures"] == []
    assert said["versions"]["torch"] == torch.__version__
    assert said["kernels"]["range coder"]
    good, tried = said["decoded"]
    assert good == tried == len(read_set(FOLDER).cases)
    assert said["worst"] <= said["tolerance"]
    assert list(said["models"]) == shipped()


def shipped() -> list[str]:
    return [info.name for info in checkpoints.shipped()]


def test_the_set_has_what_it_should() -> None:
    """Of every shipped model: several qualities, grey, alpha, 1x1, sides that are no multiples of 64, parts of a file.

    After a model has changed, `python tools/build_conformance.py` makes the set anew.
    """
    known = read_set(FOLDER)
    assert {each.model for each in known.cases} == {None, *shipped()}
    assert known.tolerance >= 2
    for info in checkpoints.shipped():
        cases = [each for each in known.cases if each.model == info.name]
        files = {each.file: container.parse((FOLDER / each.file).read_bytes()) for each in cases}
        learned = [file.learned for file in files.values() if file.learned]
        assert {each.fingerprint for each in learned} == {info.fingerprint}, "run tools/build_conformance.py"
        assert {each.upto for each in cases} == {1, 2, 3}
        assert any(each.length for each in cases)
        assert any(file.grey for file in files.values())
        assert any(file.chunk(container.Tag.ALPHA) for file in files.values())
        sizes = {(file.width, file.height) for file in files.values()}
        assert (1, 1) in sizes
        assert any(width % 64 and height % 64 for width, height in sizes)
        if fresh(info.path, "cpu").model.config.qualities > 1:
            assert len({each.quality for each in learned}) >= 5


def test_the_set_is_small_and_ships() -> None:
    used = {name for each in read_set(FOLDER).cases for name in (each.file, each.picture)} | {"set.json"}
    assert {path.name for path in FOLDER.iterdir()} == used
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= build_conformance.MOST_BYTES
    assert '"conformance/*"' in (ROOT / "pyproject.toml").read_text()


def test_a_set_that_is_made_anew_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_conformance, "spread", lambda exact, coarse: 1)  # measures on all tiles: slow
    size = build_conformance.build(tmp_path)
    assert 10_000 < size <= build_conformance.MOST_BYTES
    report = selftest.run("cpu", tmp_path)
    assert report.passed, report.failures


def test_files_of_the_set_stay_when_a_model_is_added(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They show that files of older versions can be decoded. Those of a model that has changed are made anew."""
    first, *rest = checkpoints.shipped()
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    (copied / "left over.png").touch()
    monkeypatch.setattr(build_conformance, "spread", lambda exact, coarse: 1)
    build_conformance.build(copied)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before

    changed = dataclasses.replace(first, fingerprint=b"another model")
    monkeypatch.setattr(checkpoints, "shipped", lambda: [changed, *rest])
    made: list[str] = []
    monkeypatch.setattr(build_conformance, "cases_of", lambda codec, folder: made.append(codec.name) or [])
    build_conformance.build(copied)
    assert made == [first.name]
    after = {path.name: path.read_bytes() for path in copied.iterdir()}
    assert after.keys() == {name for name in before if not name.startswith(first.name)}
    assert all(after[name] == before[name] for name in after if name != "set.json")


# --- what is wrong is found ----------------------------------------------------------------------------------------


def failures(folder: Path = FOLDER) -> str:
    report = selftest.run("cpu", folder)
    assert not report.passed
    return "\n".join(report.failures)


def only(monkeypatch: pytest.MonkeyPatch, *parts: str) -> None:
    """Leave only some cases of a set, which is faster: those whose names end so."""

    def few(folder: Path) -> selftest.ConformanceSet:
        known = read_set(folder)
        cases = tuple(each for each in known.cases if each.name.endswith(parts))
        return dataclasses.replace(known, cases=cases)

    monkeypatch.setattr(selftest, "read_set", few)


def _silent_synthesis(codec: Codec) -> None:
    for parameter in codec.model.g_s.parameters():
        parameter.data.zero_()


def _another_analysis(codec: Codec) -> None:
    codec.model.g_a[-1].weight.data.mul_(0.5)


def _another_scale(codec: Codec) -> None:
    """As if one layer of the entropy path were computed otherwise."""
    codec.latents.entropy.context.adaptor_s1[0].bias.data.mul_(2)


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (_silent_synthesis, r"its pixels differ by up to \d+ levels"),
        (_another_analysis, "encoded here, it differs by"),
        (_another_scale, "decoded latents are not the encoded ones|payload is damaged|expected ones"),
    ],
)
def test_a_broken_model_fails(breaks: Callable[[Codec], None], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, device: str) -> Codec:
        codec = fresh(path, device)
        breaks(codec)
        return codec

    only(monkeypatch, "fine")
    monkeypatch.setattr(selftest, "fresh", broken)
    assert re.search(said, failures())


def test_a_model_file_that_is_damaged_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "one pixel")
    original, *_ = checkpoints.shipped()
    path = tmp_path / original.path.name
    data = bytearray(original.path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(checkpoints, "shipped", lambda: [_moved(original, path)])
    assert str(path) in failures()


def _moved(info: CheckpointInfo, path: Path) -> CheckpointInfo:
    return dataclasses.replace(info, path=path)


def test_models_that_cannot_even_be_listed_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> list[CheckpointInfo]:
        raise CheckpointError("nano.safetensors cannot be read.")

    monkeypatch.setattr(checkpoints, "shipped", nothing)
    assert "cannot be read" in failures()
    monkeypatch.setattr(checkpoints, "shipped", list)
    assert not selftest.run("cpu").passed


def test_a_kernel_that_is_not_exact_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    convolve = F.conv2d
    guard.check.cache_clear()
    only(monkeypatch, "one pixel")
    monkeypatch.setattr(F, "conv2d", lambda x, *rest, **options: convolve(x.bfloat16().to(x.dtype), *rest, **options))
    try:
        assert "does not compute exactly" in failures()
    finally:
        monkeypatch.undo()
        guard.check.cache_clear()


@pytest.mark.parametrize("kind", ["file", "picture"])
def test_a_changed_file_fails(kind: str, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "colour")
    path = copied / getattr(case("colour"), kind)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert case("colour").name in failures(copied)


def test_a_picture_that_is_off_by_more_than_the_tolerance_fails(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "grey")
    path = copied / case("grey").picture
    with Image.open(path) as image:
        brighter = image.point(lambda level: min(255, level + read_set(FOLDER).tolerance + 2))
    brighter.save(path)
    assert f"{case('grey').name}: its pixels differ" in failures(copied)


def test_a_file_without_loss_must_be_exact(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "without loss", "one pixel")
    path = copied / case("without loss").picture
    with Image.open(path) as image:
        changed = image.copy()
    red, *rest = changed.getpixel((3, 3))
    changed.putpixel((3, 3), (red ^ 1, *rest))
    changed.save(path)
    assert failures(copied) == "without loss: its pixels differ, and should be exact"


def test_other_latents_than_expected_fail(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents that verify, and still are not those that they were when the set was made."""
    only(monkeypatch, "narrow")
    path = copied / "set.json"
    path.write_text(path.read_text().replace(str(case("narrow").latents), "0" * 16))
    assert failures(copied) == f"{case('narrow').name}: its latents are not the expected ones"


@pytest.mark.parametrize("missing", ["picture", "file"])
def test_a_missing_file_fails(missing: str, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "narrow")
    name = getattr(case("narrow"), missing)
    (copied / name).unlink()
    assert f"{name} cannot be read" in failures(copied)


@pytest.mark.parametrize("content", [None, "", "[]", '{"tolerance": 2, "cases": [{"surprise": 1}]}'])
def test_a_damaged_set_fails(content: str | None, copied: Path) -> None:
    path = copied / "set.json"
    path.unlink() if content is None else path.write_text(content)
    assert "conformance set of this installation is missing or damaged" in failures(copied)


def test_a_model_without_files_fails(copied: Path) -> None:
    known = json.loads((copied / "set.json").read_text())
    known["cases"] = [each for each in known["cases"] if "model" not in each]
    (copied / "set.json").write_text(json.dumps(known))
    assert "the conformance set has no file of this model" in failures(copied)


def test_the_verdict_of_a_failure(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "set.json").unlink()
    run = selftest.run
    monkeypatch.setattr(selftest, "run", lambda device: run(device, copied))
    result = CliRunner().invoke(app, ["selftest", "--device", "cpu"])
    assert result.exit_code == 1
    *_, wrong, verdict = result.output.splitlines()
    assert wrong.startswith("  wrong: the conformance set")
    assert verdict.startswith("FAILED: do not trust")
    result = CliRunner().invoke(app, ["selftest", "--device", "cpu", "--json"])
    assert result.exit_code == 1
    assert not json.loads(result.output)["passed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there() -> None:
    result = CliRunner().invoke(app, ["selftest", "--device", "cuda"])
    assert result.exit_code == 2
    assert result.stderr == "hpcmref: there is no CUDA device here\n"
