"""Are the numbers of `hpcmref bench` right, comparable and complete, and does a run survive what long runs meet?"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import re
import subprocess
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from typer.testing import CliRunner, Result

from hpcmref.bench import bdrate, codecs, curves, measure, metrics
from hpcmref.bench.curves import Curve, Point
from hpcmref.bench.measure import Measurement
from hpcmref.bench.run import names_of, run
from hpcmref.cli import app
from hpcmref.errors import CheckpointError, ConfigError, HpcmrefError
from hpcmref.format.container import parse

pytest.importorskip("bjontegaard")

# Of anchors against VTM on Kodak, computed with bjontegaard 1.3 (pchip) from the published points.
KODAK_BD_RATES = {
    "JPEG": 194.5,
    "JPEG XL": 108.2,
    "WebP": 83.1,
    "AVIF": 38.9,
    "mbt2018-mean": 21.3,
    "cheng2020-attn": 5.5,
    "HPCM-Base": -16.0,
    "HPCM-Large": -19.9,
    "BPG 4:4:4 (x265)": 22.0,
    "AV1 (libaom, slow)": 16.2,
}


def picture(seed: int = 0, size: tuple[int, int] = (192, 176)) -> Image.Image:
    """Something photo-like: smooth shapes, an edge and some noise."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse).astype(np.int16)
    pixels[:, size[0] // 3 : size[0] // 2] //= 2
    noisy = pixels + random.normal(0, 4, pixels.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for seed in range(3):
        picture(seed).save(f"in/{seed}.png")
    return tmp_path


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def curve(name: str, points: Sequence[tuple[float, float]]) -> Curve:
    return Curve(name, tuple(Point(bpp, psnr) for bpp, psnr in points))


def exponential(factor: float, first: float = 25, last: float = 40) -> Curve:
    """Rate doubles every 3 dB; `factor` times as much of it."""
    return curve(str(factor), [(factor * 2 ** ((psnr - 25) / 3) / 10, psnr) for psnr in np.linspace(first, last, 6)])


# --- BD-rate -------------------------------------------------------------------------------------------------------


class TestBdRate:
    @pytest.mark.parametrize("name", KODAK_BD_RATES)
    def test_known_values(self, name: str) -> None:
        kodak = {each.name: each for each in curves.read("kodak")}
        delta = bdrate.bd_rate(kodak["VTM-9.1"], kodak[name])
        assert delta.value == pytest.approx(KODAK_BD_RATES[name], abs=0.1)
        assert delta.note == ""

    def test_a_constant_factor(self) -> None:
        rate = bdrate.bd_rate(exponential(1), exponential(0.8, 28, 46))
        assert rate.value == pytest.approx(-20)
        assert (rate.low, rate.high) == (28, 40)
        assert rate.anchor_share == pytest.approx(12 / 15)
        assert rate.share == pytest.approx(12 / 18)
        psnr = bdrate.bd_psnr(exponential(1), exponential(0.8))
        assert psnr.value == pytest.approx(3 * math.log2(1 / 0.8), abs=0.01)

    def test_a_range_cuts_both_curves(self) -> None:
        low, high = 0.2, 0.8
        delta = bdrate.bd_rate(exponential(1), exponential(0.8), limits=(low, high))
        assert delta.value == pytest.approx(-20, abs=0.1)
        assert delta.low == pytest.approx(25 + 3 * math.log2(low / 0.1 / 0.8), abs=0.02)
        assert delta.high == pytest.approx(25 + 3 * math.log2(high / 0.1), abs=0.02)
        assert bdrate.bd_rate(exponential(1), exponential(0.8), limits=(5, 6)).value is None

    def test_a_range_beyond_the_curves_changes_nothing(self) -> None:
        assert bdrate.bd_rate(exponential(1), exponential(0.8), limits=(0.001, 99)) == bdrate.bd_rate(
            exponential(1), exponential(0.8)
        )

    @pytest.mark.parametrize(
        ("other", "reason"),
        [
            (exponential(1, 41, 50), "do not overlap"),
            (exponential(1, 39.5, 50), "too little"),
            (exponential(1, 37, 80), "too little"),
            (curve("few", [(0.1, 25), (0.2, 30), (0.4, 35)]), "few has 3 points"),
            (curve("lossless", [(0.1, 25), (0.2, 30), (0.4, 35), (2, math.inf)]), "lossless has 3 points"),
        ],
    )
    def test_refusals(self, other: Curve, reason: str) -> None:
        delta = bdrate.bd_rate(exponential(1), other)
        assert delta.value is None
        assert reason in delta.note

    def test_points_no_better_than_smaller_files_are_named(self) -> None:
        bent = curve("bent", [(0.1, 25), (0.2, 30), (0.3, 29), (0.4, 35), (0.8, 38)])
        delta = bdrate.bd_rate(bent, bent)
        assert delta.value == pytest.approx(0)
        assert "bent: 1 points left out" in delta.note

    def test_ms_ssim(self) -> None:
        def similar(factor: float) -> Curve:
            shape = exponential(factor)
            return Curve(shape.name, tuple(replace(each, ms_ssim_db=each.psnr / 2, psnr=1) for each in shape.points))

        assert bdrate.bd_rate(similar(1), similar(1.5), "ms_ssim_db").value == pytest.approx(50)
        assert bdrate.bd_rate(exponential(1), exponential(2), "ms_ssim_db").value is None


# --- metrics -------------------------------------------------------------------------------------------------------


class TestMetrics:
    def test_psnr(self) -> None:
        black = np.zeros((4, 5, 3), np.uint8)
        red = black.copy()
        red[..., 0] = 255
        assert metrics.psnr(black, red) == pytest.approx(10 * math.log10(3))
        assert metrics.psnr(red, black) == metrics.psnr(black, red)  # no wrap-around
        assert metrics.psnr(red, red) == math.inf

    def test_ms_ssim(self) -> None:
        original = np.asarray(picture())
        noise = np.random.default_rng(0).integers(-9, 10, original.shape)
        noisy = (original.astype(int) + noise).clip(0, 255).astype(np.uint8)
        similarity = metrics.ms_ssim(original, noisy)
        assert similarity is not None
        assert 0.9 < similarity < 0.999
        assert metrics.decibels(0.99) == pytest.approx(20)
        assert metrics.decibels(1.0) == math.inf
        assert metrics.ms_ssim(original, original) == pytest.approx(1)
        assert metrics.ms_ssim(original[:160], noisy[:160]) is None  # too small
        assert metrics.ms_ssim(original[:161, :161], noisy[:161, :161]) is not None


# --- codecs and measurements ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """A codec that fails at quality 2, or on the pictures in `on`, or whose files are of another shape."""

    error: Exception
    name: str = "broken"
    identity: str = "broken 1"
    device: str = "cpu"
    qualities: range = range(3)
    default_qualities: tuple[int, ...] = (1, 2)
    rising: bool = True

    def encode(self, image: Image.Image, quality: int) -> bytes:
        if quality == 2:
            raise self.error
        return codecs.PILLOW_CODECS["jpeg"].encode(image, 10 * quality)

    def decode(self, data: bytes) -> Image.Image:
        return codecs.PILLOW_CODECS["jpeg"].decode(data)


def task(image: Image.Image, *points: tuple[codecs.Codec, Sequence[int]], repeat: int = 1) -> measure.Task:
    file = io.BytesIO()
    image.save(file, "PNG")
    return measure.Task("a.png", file.getvalue(), points, repeat)


class TestMeasure:
    @pytest.mark.parametrize("name", [name for name in codecs.available() if name != "hpcmref"])
    def test_pillow_codecs(self, name: str) -> None:
        codec = codecs.PILLOW_CODECS[name]
        measured, failures = measure.measure(task(picture(), (codec, codec.default_qualities)))
        assert failures == []
        for each in measured:
            assert each.bpp == 8 * each.size / (192 * 176)
            assert each.encode_seconds > 0
            assert each.decode_seconds > 0
        for metric in ("size", "psnr", "ms_ssim"):
            values = [getattr(each, metric) for each in measured]
            assert values == sorted(values)

    def test_every_pillow_codec_is_found_and_measured_by_hand(self) -> None:
        codec = codecs.PILLOW_CODECS["jpeg"]
        image = picture(5)
        measured, _ = measure.measure(task(image, (codec, [40])))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=40, optimize=True, progressive=True, subsampling="4:2:0")
        assert measured[0].size == len(file.getvalue())
        error = np.asarray(image).astype(float) - np.asarray(Image.open(file))
        assert measured[0].psnr == pytest.approx(10 * math.log10(255**2 / np.mean(error**2)))

    def test_the_shipped_model(self) -> None:
        (codec,) = codecs.codecs_of(["hpcmref"], ["nano"], "cpu")
        assert codec.default_qualities == (0, 9, 18, 27, 36, 45, 54, 63)
        measured, failures = measure.measure(task(picture(size=(65, 63)), (codec, [5, 60])))
        assert failures == []
        assert measured[0].size < measured[1].size
        assert measured[0].psnr < measured[1].psnr
        assert measured[0].ms_ssim is None
        assert codec.name == "hpcmref nano-2"

    def test_an_effort_is_another_curve(self) -> None:
        plain, effort = codecs.codecs_of(["hpcmref", "hpcmref:effort=1"], ["nano"], "cpu")
        assert effort.name == f"{plain.name} effort=1"
        assert plain.identity != effort.identity
        assert parse(effort.encode(picture(size=(16, 16)), 40)).encoder.effort == 1

    def test_grey_images_are_measured_as_rgb(self) -> None:
        measured, _ = measure.measure(task(picture().convert("L"), (codecs.PILLOW_CODECS["webp"], [50])))
        assert 20 < measured[0].psnr < 60

    def test_what_fails_is_reported_and_the_rest_is_measured(self) -> None:
        broken = Broken(ValueError("no\nluck"))
        measured, failures = measure.measure(task(picture(), (broken, [1, 2]), (codecs.PILLOW_CODECS["jpeg"], [50])))
        assert [(each.codec, each.quality) for each in measured] == [("broken", 1), ("JPEG", 50)]
        assert failures == [measure.Failure("a.png", "broken", "quality 2", "ValueError: no luck")]

    def test_no_image(self) -> None:
        measured, failures = measure.measure(measure.Task("a.png", b"nothing", [(codecs.PILLOW_CODECS["jpeg"], [50])]))
        assert measured == []
        assert [(each.image, each.codec, each.setting) for each in failures] == [("a.png", None, None)]
        assert "a.png is not an image in one of the supported formats" in str(failures[0])

    @pytest.mark.parametrize("error", [CheckpointError("bad weights"), ConfigError("bad setting")])
    def test_what_fails_every_image_ends_the_run(self, error: HpcmrefError) -> None:
        with pytest.raises(type(error)):
            measure.measure(task(picture(), (Broken(error), [2])))

    def test_repetitions_give_the_median(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter([0, 5, 10, 11, 20, 22, *range(100, 106)])  # encode: 5, 1, 2; decode: 1, 1, 1
        monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
        measured, _ = measure.measure(task(picture(), (codecs.PILLOW_CODECS["jpeg"], [50]), repeat=3))
        assert (measured[0].encode_seconds, measured[0].decode_seconds) == (2, 1)

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")
    def test_peak_memory(self) -> None:
        with measure.PeakMemory("cpu") as peak:
            held = np.ones(64 << 20, np.uint8)
            del held
        assert peak.bytes is not None
        assert 60 << 20 < peak.bytes < 90 << 20


class TestCodecsOf:
    def test_options(self) -> None:
        plain, changed = codecs.codecs_of(["jpeg", "JPEG:subsampling=4:4:4+progressive=0"], [], "cpu")
        assert changed.name == "JPEG subsampling=4:4:4 progressive=0"
        assert changed.identity != plain.identity
        assert len(changed.encode(picture(), 50)) > len(plain.encode(picture(), 50))
        wanted = codecs.qualities_of(["jpeg=10:30:10,5"], [plain, changed])
        assert wanted == {plain.name: (5, 10, 20, 30), changed.name: (5, 10, 20, 30)}

    @pytest.mark.parametrize(
        "names",
        [["gif"], ["jpeg", "jpeg"], ["jpeg:quality"], ["hpcmref:"]],
    )
    def test_refused(self, names: list[str]) -> None:
        with pytest.raises(HpcmrefError):
            codecs.codecs_of(names, ["nano"], "cpu")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("avif:speed=99", "AVIF speed=99: it must be 0 to 10"),
            ("avif:speed=fast", "AVIF speed=fast: it must be 0 to 10"),
            ("avif:speed=-1", "AVIF speed=-1: it must be 0 to 10"),
            ("avif:sped=4", "AVIF has no option 'sped' here: did you mean speed?"),
            ("webp:quality=4", "WebP has no option 'quality' here: it has method, lossless"),
            ("jpeg:", "'' are not options"),
            ("jpeg:optimize=1+optimize=0", "optimize is given twice"),
            ("jpeg:subsampling=4:1:1", "it must be one of 4:4:4, 4:2:2, 4:2:0"),
            ("hpcmref:speed=1", "hpcmref has the options choose=1 and effort=0 to effort=9; choose models with"),
            ("hpcmref:effort=10", "hpcmref has the options choose=1 and effort=0 to effort=9; choose models with"),
        ],
    )
    def test_options_are_checked(self, text: str, message: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(message)):
            codecs.codecs_of([text], ["nano"], "cpu")

    @pytest.mark.parametrize("name", [name for name in codecs.available() if name != "hpcmref"])
    def test_every_value_that_is_allowed_works(self, name: str) -> None:
        for key, choices in codecs.PILLOW_CODECS[name].known.items():
            for value in (choices[0], choices[-1]) if key not in ("codec", "max_threads") else choices[:1]:
                codecs.codecs_of([f"{name}:{key}={value}"], [], "cpu")

    @pytest.mark.parametrize("text", ["jpeg=0", "jpeg=", "jpeg=a", "gif=5", "jpeg=1:9:0", "64", "5:2"])
    def test_refused_qualities(self, text: str) -> None:
        with pytest.raises(ConfigError):
            codecs.qualities_of([text], codecs.codecs_of(["jpeg", "hpcmref"], ["nano"], "cpu"))

    def test_models_of_one_rate_make_a_curve(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from hpcmref.codec import load

        shipped = load("nano", "cpu")

        class OneRate:
            """The shipped model at a fixed quality, as if it had no other."""

            model = types.SimpleNamespace(config=types.SimpleNamespace(qualities=1))

            def __init__(self, quality: int) -> None:
                self.quality = quality
                self.fingerprint = b"%04d" % quality

            def encode(self, image: Image.Image, quality: int | None, **_: object) -> bytes:
                assert quality is None
                return shipped.encode(image, self.quality)

            def decode(self, data: bytes) -> Image.Image:
                return shipped.decode(data)

        monkeypatch.setattr(codecs, "_network", lambda model, device: OneRate({"a": 10, "b": 50}[model]))
        monkeypatch.setattr("hpcmref.checkpoints.find", Path)
        (codec,) = codecs.codecs_of(["hpcmref"], ["mine=a+b"], "cpu")
        assert codec.name == "hpcmref mine"
        assert codecs.qualities_of(["3,4"], [codec]) == {"hpcmref mine": (0, 1)}
        image = picture(size=(40, 30))
        assert len(codec.encode(image, 0)) < len(codec.encode(image, 1))
        assert codec.decode(codec.encode(image, 1)).size == image.size

    def test_a_model_of_many_rates_is_no_point(self) -> None:
        with pytest.raises(ConfigError, match="many rates"):
            codecs.codecs_of(["hpcmref"], ["mine=nano+nano"], "cpu")


# --- averages and results files ------------------------------------------------------------------------------------


def measured(image: str, codec: str = "a", quality: int = 1, **values: float) -> Measurement:
    given = {"bpp": 1.0, "psnr": 30.0, "ms_ssim": 0.9, "encode_seconds": 1.0, "decode_seconds": 1.0, **values}
    return Measurement(image, codec, quality, 8, 8, 8, memory=None, **given)  # type: ignore[arg-type]


class TestCurves:
    def test_conventions(self) -> None:
        (found,), images = curves.averages(
            [measured("1", bpp=1, psnr=30, ms_ssim=0.9), measured("2", bpp=2, psnr=40, ms_ssim=0.99)]
        )
        assert images == ["1", "2"]
        assert found.points[0].bpp == 1.5
        assert found.points[0].psnr == 35  # and not the PSNR of the mean error
        assert found.points[0].ms_ssim_db == pytest.approx(15)

    def test_an_image_that_failed_anywhere_is_in_no_average(self) -> None:
        found, images = curves.averages([measured("1"), measured("2", psnr=99), measured("1", codec="b")])
        assert images == ["1"]
        assert [each.points[0].psnr for each in found] == [30, 30]
        assert curves.averages([measured("1"), measured("2", codec="b")]) == ([], [])
        assert curves.averages([]) == ([], [])

    def test_shipped(self) -> None:
        assert curves.shipped() == ["clic-professional-valid", "clic2020-professional", "kodak", "tecnick"]
        for name in curves.shipped():
            for each in curves.read(name):
                assert each.source
                assert len(each.points) >= 6
                assert all(0.01 < point.bpp < 5 and 20 < point.psnr < 60 for point in each.points)

    def test_the_form_of_compressai(self, tmp_path: Path) -> None:
        file = tmp_path / "vtm.json"
        file.write_text('{"name": "VTM", "description": "x", "results": {"bpp": [2, 1], "psnr-rgb": [40, 30]}}')
        assert curves.read(str(file)) == [Curve("VTM", (Point(1, 30), Point(2, 40)), "x")]

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '{"curves": {"a": {"bpp": [1]}}}', '{"curves": {"a": {"bpp": [1], "psnr": [1, 2]}}}']
    )
    def test_refused(self, tmp_path: Path, text: str) -> None:
        file = tmp_path / "a.json"
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"a\.json"):
            curves.read(str(file))
        with pytest.raises(ConfigError, match="kodak"):
            curves.read("nowhere")


# --- runs ----------------------------------------------------------------------------------------------------------


def untimed(measurements: Sequence[Measurement]) -> list[Measurement]:
    return [replace(each, encode_seconds=0, decode_seconds=0, memory=None) for each in measurements]


class TestRun:
    def test_processes_change_no_result(self, folder: Path) -> None:
        images = sorted(Path("in").iterdir())
        jpeg, webp = codecs.PILLOW_CODECS["jpeg"], codecs.PILLOW_CODECS["webp"]
        wanted = {"JPEG": (20, 80), "WebP": (50,)}
        one = run(images, [jpeg, webp], wanted)
        two = run(images, [jpeg, webp], wanted, jobs=2)
        assert untimed(one.measurements) == untimed(two.measurements)
        assert [(each.image, each.codec, each.quality) for each in one.measurements][:3] == [
            ("0.png", "JPEG", 20),
            ("0.png", "JPEG", 80),
            ("0.png", "WebP", 50),
        ]

    def test_resume(self, folder: Path) -> None:
        images = sorted(Path("in").iterdir())
        jpeg, journal = codecs.PILLOW_CODECS["jpeg"], Path("deep/journal")
        calls: list[int] = []

        def count(measured: Sequence[Measurement], failed: object) -> None:
            calls.append(len(measured))

        first = run(images[:2], [jpeg], {"JPEG": (20, 80)}, journal=journal)
        journal.write_text(journal.read_text()[:-30])  # cut off while it was written
        second = run(images, [jpeg], {"JPEG": (20, 80)}, journal=journal, listener=count)
        assert second.measurements[:3] == first.measurements[:3]  # the very same seconds
        assert len(second.measurements) == 6
        third = run(images, [jpeg], {"JPEG": (20, 80)}, journal=journal)
        assert third == second
        picture(7).save(images[0])
        fourth = run(images, [jpeg], {"JPEG": (20, 80)}, journal=journal)
        assert fourth.measurements[2:] == second.measurements[2:]
        assert fourth.measurements[0] != second.measurements[0]
        other = run(images, [jpeg], {"JPEG": (20, 80)}, journal=journal, repeat=2)
        assert other.measurements != fourth.measurements

    def test_another_file_is_no_journal(self, folder: Path) -> None:
        Path("notes").write_text("dear diary\nto-day\n")
        with pytest.raises(HpcmrefError, match="notes"):
            run([Path("in/0.png")], [codecs.PILLOW_CODECS["jpeg"]], {"JPEG": (20,)}, journal=Path("notes"))
        assert Path("notes").read_text() == "dear diary\nto-day\n"

    def test_names(self) -> None:
        paths = [Path("a/1.png"), Path("b/1.png"), Path("b/2.png")]
        assert list(names_of(paths).values()) == ["a/1.png", "b/1.png", "2.png"]


# --- the command ---------------------------------------------------------------------------------------------------


QUICK = ("--codecs", "jpeg,webp", "--metrics", "ms-ssim")


class TestCommand:
    def test_table_json_and_csv(self, folder: Path) -> None:
        result = bench("in", *QUICK, "--json", "a.json", "--csv", "a.tsv", "--limit", "2")
        assert result.exit_code == 0, result.output
        assert "in: averages over 2 images" in result.stdout
        assert "Against JPEG" in result.stdout
        found = json.loads(Path("a.json").read_text())
        assert found["images"] == 2
        assert "mean of the per-image RGB PSNR" in found["conventions"]
        assert len(found["measurements"]) == 2 * (7 + 6)
        (row,) = found["comparison"]["curves"]
        assert row["name"] == "WebP"
        assert f"{row['rates']['psnr']['value']:+.2f} %" in result.stdout
        rows = list(csv.DictReader(Path("a.tsv").read_text().splitlines(), delimiter="\t"))
        assert len(rows) == 13 * 3
        assert rows[0]["image"] == "(mean of 2)"
        assert float(rows[0]["bpp"]) == pytest.approx(found["curves"]["JPEG"]["bpp"][0], abs=1e-4)

    @pytest.mark.parametrize(
        "outputs",
        [
            ["--json", "in/0.png"], ["--csv", "link.png"], ["--json", "o", "--csv", "./o"], ["--report", "in"],
            ["--json", "o", "--resume", "o"], ["--report", "in/0.png"], ["--report", "in/0.png/deeper"],
            ["--json", "nowhere/o"],
        ],
    )  # fmt: skip
    def test_outputs_that_would_replace_inputs_or_cannot_be_are_refused(self, folder: Path, outputs: list[str]) -> None:
        """And before anything is measured."""
        Path("link.png").symlink_to("in/0.png")
        before = {path: path.read_bytes() for path in Path("in").iterdir()}
        result = bench("in", *QUICK, *outputs)
        assert result.exit_code == 2
        assert "JPEG" not in result.stdout
        assert {path: path.read_bytes() for path in Path("in").iterdir()} == before
        assert not Path("o").exists()

    def test_a_folder_that_cannot_be_written_is_refused(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "closed")
        Path("closed").mkdir()
        for option, path in (("--json", "closed/o"), ("--csv", "closed/o"), ("--report", "closed/o")):
            assert bench("in", *QUICK, option, path).exit_code == 2

    def test_the_figures_of_a_report_are_no_images_of_the_next_run(self, folder: Path) -> None:
        for _ in range(2):
            result = bench("in", *QUICK, "--report", "in/report")
            assert result.exit_code == 0, result.output
            assert "averages over 3 images" in result.stdout

    def test_a_run_is_an_anchor_of_the_next(self, folder: Path) -> None:
        assert bench("in", "--codecs", "jpeg", "--json", "a.json", "--quiet").exit_code == 0
        result = bench("in", "--codecs", "jpeg", "--results", "a.json", "--anchor", "jpeg (fixed)")
        assert result.exit_code == 0, result.output
        (row,) = [line for line in result.stdout.splitlines() if line.startswith("JPEG") and "100%" in line]
        assert "0.00 %" in row

    def test_failures_are_reported_and_the_run_goes_on(self, folder: Path) -> None:
        Path("in/1.png").write_text("no image")
        result = bench("in", *QUICK, "--json", "a.json")
        assert result.exit_code == 1
        assert result.stderr.startswith("hpcmref: 1.png: 1.png is not an image in one of the supported formats: ")
        assert result.stderr.count("\n") == 1
        assert "averages over 2 images" in result.stdout
        assert "Left out of the averages because something failed: 1.png" in result.stdout
        assert json.loads(Path("a.json").read_text())["failures"][0]["image"] == "1.png"

    def test_nothing_works(self, folder: Path) -> None:
        for path in Path("in").iterdir():
            path.write_text("no image")
        result = bench("in", *QUICK)
        assert result.exit_code == 1
        assert "averages over 0 images" in result.stdout

    def test_range_and_anchor(self, folder: Path) -> None:
        result = bench("in", *QUICK, "--anchor", "webp", "--range", "0.5:2")
        assert "Against WebP between 0.5 and 2 bpp" in result.stdout

    def test_kodak(self, folder: Path) -> None:
        result = bench("--kodak", "in", "--codecs", "jpeg", "--limit", "1")
        assert "Against VTM-9.1" in result.stdout
        assert "CompressAI repository, results/image/kodak/vtm.json" in result.stdout
        assert "of 24 images, and not of 1" in result.stdout
        assert "JPEG (fixed)" not in result.stdout
        assert "\nAVIF" in result.stdout

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            ([], 2, "folder"),
            (["in", "--codecs", "gif"], 2, "there is no codec 'gif'"),
            (["in", "--range", "2:1"], 2, "LOW:HIGH"),
            (["in", "--anchor", "VTM"], 2, "--anchor VTM: the curves of this run are JPEG"),
            (["in", "--results", "nowhere"], 2, "there are no results"),
            (["nowhere.png", "--codecs", "jpeg"], 1, "No such file"),
            (["empty"], 1, "no files here"),
            (["in", "--qualities", "jpeg=200"], 2, "quality 200 of JPEG"),
            (["in", "--models", "nowhere", "--codecs", "hpcmref"], 2, "nowhere"),
        ],
    )
    def test_mistakes(self, folder: Path, arguments: list[str], code: int, message: str) -> None:
        Path("empty").mkdir()
        result = bench(*(arguments if "--codecs" in arguments else [*arguments, "--codecs", "jpeg"]))
        assert result.exit_code == code, result.output
        assert message in " ".join(result.stderr.split())

    def test_the_bar_has_the_averages(self, folder: Path) -> None:
        pty = pytest.importorskip("pty")
        import os

        master, slave = pty.openpty()
        command = [sys.executable, "-m", "hpcmref", "bench", "in", *QUICK]
        done = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=slave, env={**os.environ, "COLUMNS": "150"})
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(master, 65536):
                shown += data
        assert done.wait() == 0
        assert b"JPEG" in shown
        assert b"bpp" in shown


def test_importing_is_cheap() -> None:
    code = (
        "import sys, hpcmref.bench, hpcmref.bench.codecs, hpcmref.bench.run, hpcmref.bench.bdrate, hpcmref.cli.bench\n"
        "print([name for name in ('torch', 'matplotlib', 'ray', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_avif_is_here_where_pillow_has_it() -> None:
    assert ("avif" in codecs.available()) == bool(features.check("avif"))
