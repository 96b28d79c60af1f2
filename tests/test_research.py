"""Does every script in research/ still run, on a case small enough for a test, and measure what it says?"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import TINY, TRAINABLE, model_of
from PIL import Image
from typer.testing import CliRunner

from hpcmref import checkpoints
from hpcmref.cli import app
from hpcmref.model import PRESETS
from hpcmref.model.config import MemoryConfig
from hpcmref.search import efforts
from hpcmref.training.data import _is_held_out
from research import (
    batches,
    bench_efforts,
    by_heart,
    codec_speed,
    contention,
    effort_curve,
    exactness_cost,
    found_latents,
    from_start,
    growth,
    memory_ablation,
    memory_probe,
    step_speed,
)
from research import variants as variants_module

ROOT = Path(__file__).parent.parent


@pytest.fixture
def images(tmp_path: Path, sample: Image.Image) -> Path:
    """A folder with one image of 64 x 64."""
    folder = tmp_path / "images"
    folder.mkdir()
    sample.crop((64, 0, 128, 64)).save(folder / "sample.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of an untrained tiny model."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    checkpoints.save(model_of(TINY), path, "tiny", {})
    return str(path)


def test_batches_are_measured_beside_an_image_alone(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        batches.main(height=64, width=64, repeat=1)
    finally:
        torch.set_num_threads(threads)
    assert len(re.findall(r"^(?:alone|of [248]) \d+\.\d ms", capsys.readouterr().out, re.MULTILINE)) == 4


class TestGrowth:
    def test_a_small_curve(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        growth.main(sizes="0.02", model=None, quality=20, output=tmp_path / "new")
        (point,) = json.loads((tmp_path / "new" / "growth.json").read_text())["points"]
        assert (point["width"], point["height"]) == (174, 115)
        assert 0 < point["encode_seconds"] < 30
        assert min(point["encode_memory"], point["decode_memory"]) > 2**27  # torch alone takes more
        assert (tmp_path / "new" / "growth.png").read_bytes()[:4] == b"\x89PNG"
        assert "0.02 MP" in capsys.readouterr().out

    def test_a_process_that_fails_is_reported_from_any_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(RuntimeError, match=r"encode of .*There is no model"):
            growth.measure(0.01, "missing")


@pytest.fixture
def history() -> None:
    """Skips a test where the sources are not a clone."""
    if not (ROOT / ".git").exists():
        pytest.skip("no history of commits here")


@pytest.mark.usefixtures("history")
def test_the_speed_of_two_commits(images: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    codec_speed.main([images / "sample.png"], model=[model], commit="HEAD", threads=1, rounds=2)
    shown = capsys.readouterr().out
    ratios = [float(ratio) for ratio in re.findall(r"median of the ratios ([0-9.]+)", shown)]
    assert len(ratios) == 2
    assert all(0.05 < ratio < 20 for ratio in ratios), shown  # the same code twice, on a machine that may be busy


@pytest.mark.usefixtures("history")
def test_the_speed_of_training_of_two_commits(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step_speed.main(images, commit="HEAD", batch=1, crop=64, rounds=1, steps=1)
    shown = capsys.readouterr().out
    assert "start: 1.00000000" in shown  # the same code has the same gradients
    assert "median ratio" in shown


def test_effort_curve(images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efforts, "STAGES", (efforts.Stage(2, 3, 0.02, (0.5, 0.1)),) * 9)
    effort_curve.main([images], limit=1, crop=64, efforts="2", qualities="8,24,40,56")
    shown = capsys.readouterr().out
    assert "1 images" in shown
    assert re.search(r"^│ 2 +│ -\d\.\d\d % │", shown, re.MULTILINE)


def test_efforts_at_once_give_the_files_of_bench(
    images: Path, sample: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes and PSNR of both images, and seconds that include those of the lower effort."""
    monkeypatch.setattr(efforts, "STAGES", (efforts.Stage(1, 2, 0.02, (0.5, 0.1)),) * 9)
    sample.crop((0, 0, 128, 64)).save(images / "other.png")
    codecs = "hpcmref,hpcmref:effort=1,hpcmref:effort=3"
    options = [str(images), "--codecs", codecs, "--qualities", "24", "--metrics", "psnr"]

    def rows(run: Callable[[list[str]], object], name: str) -> list[list[str]]:
        path = tmp_path / f"{name}.csv"
        with pytest.raises(SystemExit) as ended:
            run([*options, "--csv", str(path)])
        assert ended.value.code == 0
        return [line.split(",") for line in path.read_text().splitlines()[1:]]

    at_once = rows(bench_efforts.main, "at-once")
    each = rows(lambda arguments: app(["bench", *arguments]), "each")
    assert len(at_once) == 3 * (2 + 1)  # also the means
    assert [row[:8] for row in at_once] == [row[:8] for row in each]
    seconds = {tuple(row[:3]): float(row[9]) for row in at_once}
    for (image, codec, quality), value in seconds.items():
        if codec.endswith("effort=3"):
            assert value > seconds[image, codec.replace("effort=3", "effort=1"), quality]


def test_found_latents(
    tmp_path: Path, sample: Image.Image, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training on found latents and on those of g_a, and the comparison on a held-out photograph."""
    monkeypatch.setattr(checkpoints, "tiles", lambda: [sample.crop((0, 0, 256, 256))])  # calibration on one is faster
    held_out = next(name for name in (f"{number}.png" for number in range(1000)) if _is_held_out(name))
    for place, name in enumerate(("a.png", "b.png", held_out)):
        sample.crop((100 * place, 0, 100 * place + 96, 96)).save(tmp_path / name)
    assert _is_held_out("a.png") is _is_held_out("b.png") is False
    found_latents.main(
        [tmp_path], model=None, crops=3, side=64, effort=1, steps=2, learning_rate=1e-4, limit=1, held_side=64,
        efforts="0", qualities="8,24,40,56",
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert re.search(r"^trained on found latents, effort 0: [+-]\d+\.\d\d %", shown, re.MULTILINE)
    assert re.search(r"^trained on latents of g_a, effort 0: [+-]\d+\.\d\d %", shown, re.MULTILINE)


def test_from_start(tmp_path: Path, sample: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variant trains; a run that is there is not repeated."""
    held_out = next(name for name in (f"{number}.png" for number in range(1000)) if _is_held_out(name))
    for place, name in enumerate(("a.png", held_out)):
        sample.crop((100 * place, 0, 100 * place + 96, 96)).save(tmp_path / name)
    nano = PRESETS["nano"]
    plain = dataclasses.replace(TRAINABLE, heads=0)
    state = dataclasses.replace(plain, memory=MemoryConfig("state", (1, 2, 3), transfer=True, width=8))
    small = functools.partial(from_start.Variant, state, crop=64)
    of_nano = from_start.VARIANTS
    variants = {
        "state 64": small(),
        "gated": small(bank=variants_module.GatedState),
        "references": small(bank=variants_module.LastReferences),
        "none, 2 crops": from_start.Variant(plain, batch=2, crop=64),
        "low": small(trainer=variants_module.MoreLow),
        **{name: small(parts=of_nano[name].parts) for name in of_nano if of_nano[name].parts},
    }
    monkeypatch.setattr(from_start, "VARIANTS", variants)
    monkeypatch.setattr(from_start, "SIDE", 64)
    monkeypatch.setattr(from_start, "step_ratio", functools.partial(from_start.step_ratio, rounds=1))

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(from_start.app, arguments)
        assert result.exit_code == 0, result.output
        return result.output

    run = ("run", str(tmp_path), "-o", str(tmp_path / "runs"), "--steps", "2", "--tiles", "1", "--variants")
    call(*run, ";".join(variants))
    assert call(*run, ";".join(variants)) == ""
    assert PRESETS["nano"] is nano
    results = tmp_path / "runs" / "results.jsonl"
    rows = {row["variant"]: row for row in memory_ablation.lines_of(results)}
    assert [(row["steps"], len(row["points"])) for row in rows.values()][:1] == [(2, 5)]
    costs = {name: row["multiplications"] for name, row in rows.items()}
    assert costs["gated"] == costs["low"] == costs["state 64"]
    assert costs["4 priors in s3"] < costs["state 64"]
    ratios = {name: row["step_ratio"] for name, row in rows.items()}
    assert ratios["state 64"] == ratios["low"] == 1
    changed_parts = {tuple(map(tuple, row["points"])) for row in rows.values()}
    assert len(changed_parts) == len(rows)

    points = [(0.1 * 2**index, 25.0 + 3 * index) for index in range(5)]
    changed = (rows["state 64"] | {"points": points}, rows["gated"] | {"points": [(0.9 * x, y) for x, y in points]})
    results.write_text("".join(json.dumps(row) + "\n" for row in changed))
    shown = call("report", str(tmp_path / "runs"))
    assert re.search(r"^\| state 64 \| \d+\.\d \| 1\.00 \| 2 \| \+0\.00 % \|$", shown, re.MULTILINE)
    assert re.search(r"^\| gated .* \| -10\.00 % \|$", shown, re.MULTILINE)


def test_by_heart(tmp_path: Path, sample: Image.Image, capsys: pytest.CaptureFixture[str]) -> None:
    """Each group of tiles is judged by itself."""
    held_out = next(name for name in (f"{number}.png" for number in range(1000)) if _is_held_out(name))
    sample.crop((0, 0, 256, 256)).save(tmp_path / "a.png")
    sample.crop((190, 70, 446, 326)).save(tmp_path / held_out)
    by_heart.main([tmp_path], models="nano-2,nano-1", count=1)
    *_, same, other = capsys.readouterr().out.splitlines()
    assert same == "| nano-2 | +0.00 % | +0.00 % |"
    seen, unseen = map(float, re.findall(r"([+-]\d+\.\d+) %", other))
    assert 0 < seen != unseen > 0


def test_exactness_cost(images: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    exactness_cost.main(images, model=model, limit=1, crop=64, timed=1, repeat=1)
    shown = capsys.readouterr().out
    assert "mean of 1 images" in shown
    assert len(re.findall(r"^│ +\d+ ", shown, re.MULTILINE)) == 5  # a row for each quality
    assert "x 0.00" not in shown


def test_memory_ablation_and_probe(
    images: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "ablation"

    def ablation(*arguments: str) -> str:
        result = CliRunner().invoke(memory_ablation.app, arguments)
        assert result.exit_code == 0, result.output
        return result.output

    ablation(
        "run", str(images), "--kodak", str(images), "-o", str(output), "-m", model,
        "--steps", "3", "--batch", "2", "--crop", "64", "--crops", "8", "--seeds", "0", "--first", "2",
    )  # fmt: skip
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["off", "light"]
    assert rows[1]["parameters"] > rows[0]["parameters"]
    ablation("cost", str(output), "--kodak", str(images), "--limit", "1", "--repeat", "1")
    shown = ablation("report", str(output), "--figure", str(tmp_path / "memory.png"))
    assert re.search(r"^\| light \| [+-]0\.\d\d % .*\| x \d", shown, re.MULTILINE)
    assert (tmp_path / "memory.png").read_bytes()[:4] == b"\x89PNG"

    memory_probe.main(output, images, model, quality=42)
    assert capsys.readouterr().out.count("magnitude") == 4  # two steps of two groups


def test_contention(tmp_path: Path) -> None:
    """Every kind runs, also beside a busy process; the ratios are of the right pairs."""
    found = contention.measure(["--version"], {"spin": contention.SPIN, "sleep": contention.SLEEP}, tmp_path, 1)
    assert list(found) == ["spin", "sleep"]
    assert min(each for seconds in found.values() for each in (seconds.alone, seconds.beside)) > 0
    spin = contention.Seconds(2.0, 16.0)
    row = contention.Seconds(2.02, 4.04).row("encode", "sleep", spin)
    assert row.split() == ["encode", "sleep", "2.02", "1.010", "2.00", "yes"]
    assert contention.Seconds(2.2, 4.04).row("encode", "sleep", spin).endswith("no")
    assert spin.row("encode", "spin", spin).endswith("no")
