"""Does an effort keep its promises: never a worse file, any decoder, the same file again, and targets that hold?"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from models import TINY, model_of, psnr, tensor_of
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import hpcmref
from hpcmref import checkpoints
from hpcmref.cli import app
from hpcmref.codec import Codec
from hpcmref.errors import ConfigError, ImageError
from hpcmref.format.container import parse
from hpcmref.format.rangecoder import SymbolEncoder, symbol_bits
from hpcmref.model import HPCM
from hpcmref.model.layers import in_bfloat16
from hpcmref.search import efforts, synthesis
from hpcmref.search.anneal import LIMIT, predictions
from hpcmref.search.synthesis import SimilarTarget, Target
from hpcmref.similarity import ms_ssim

QUALITY = 40


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of six iterations."""
    monkeypatch.setattr(efforts, "STAGES", (efforts.Stage(2, 3, 0.02, (0.5, 0.1)),) * 9)


@pytest.fixture(scope="module")
def crop(sample: Image.Image) -> Image.Image:
    """A part of the photograph, 100 x 70."""
    return sample.crop((200, 20, 300, 90))


def objective(codec: Codec, data: bytes, image: Image.Image) -> float:
    """Bits + lambda * squared error of a file, as a user would measure it."""
    shown, wanted = (np.asarray(each.convert("RGB"), float) for each in (codec.decode(data), image))
    error = float(np.square(shown - wanted).mean()) * image.width * image.height
    return 8 * len(data) + codec.weight(QUALITY) * error


class TestGradient:
    """The gradient is that of the squared error, whatever is seen of the picture and however it is cut."""

    @pytest.fixture
    def y(self) -> Tensor:
        return 0.01 * torch.randn(1, TINY.M, 12, 8, generator=torch.Generator().manual_seed(3))

    @pytest.fixture
    def model(self) -> HPCM:
        model = model_of()
        model.g_s[-2].bias.data += 0.5  # pictures of a middle grey, where nothing is clamped
        return model

    def picture(self, model: HPCM, size: tuple[int, int], grey: bool = False) -> Target:
        x = torch.randint(0, 256, (1, 3, 192, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
        if grey:
            x = x[:, :1].expand(1, 3, -1, -1).contiguous()
        return Target(model, torch.tensor([30.0]), x, size, grey)

    @pytest.mark.parametrize("grey", [False, True])
    def test_the_gradient_is_that_of_autograd(self, model: HPCM, y: Tensor, grey: bool) -> None:
        picture = self.picture(model, (181, 100), grey)
        leaf = y.clone().requires_grad_()
        shown = 255 * model.train().synthesise(leaf, torch.tensor([30.0]))[:, :, :181, :100]
        model.eval()
        assert 0 < float(shown.detach().min()) < 120 < float(shown.detach().max()) < 255
        wanted = picture._x
        if grey:
            shown = shown.mean(1, keepdim=True)
        error = (shown - wanted).square().sum() / 3
        error.backward()
        gradient = picture.gradient(y)
        assert leaf.grad is not None
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))

    def test_the_gradient_in_bfloat16_is_nearly_that_in_float32(self, model: HPCM, y: Tensor) -> None:
        picture = self.picture(model, (181, 100))
        exact = picture.gradient(y)
        in_bfloat16(model.g_s)
        rounded = picture.gradient(y)
        assert 0 < float(torch.dist(rounded, exact) / exact.norm()) < 0.02

    def test_clamped_pixels_pull_no_further(self, model: HPCM, y: Tensor) -> None:
        """A white that is meant to be white has no error, however much whiter the network makes it."""
        model.g_s[-2].bias.data += 2
        picture = self.picture(model, (192, 128))
        picture._x.fill_(255)
        assert not picture.gradient(y).any()

    def test_strips_change_nothing(self, model: HPCM, y: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        picture = self.picture(model, (181, 100))
        gradient = picture.gradient(y)
        monkeypatch.setattr(synthesis, "POSITIONS", 16)  # two rows
        in_strips = picture.gradient(y)
        torch.testing.assert_close(in_strips, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))

    def test_invisible_pixels_do_not_count(self, model: HPCM, y: Tensor) -> None:
        seen = torch.zeros(192, 128, dtype=torch.bool)
        seen[:64] = True
        whole = self.picture(model, (192, 128))
        masked = Target(model, torch.tensor([30.0]), whole._x, (192, 128), False, seen)
        part = self.picture(model, (64, 128))
        torch.testing.assert_close(masked.gradient(y), part.gradient(y), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            assert masked.error(y) == part.error(y)

    def test_what_is_not_seen_has_none(self, model: HPCM, y: Tensor) -> None:
        gradient = self.picture(model, (64, 128)).gradient(y)
        assert gradient[:, :, :4].abs().min() > 0
        assert not gradient[:, :, 8:].any()

    def test_the_error_is_that_of_the_decoded_picture(self, codec: Codec, crop: Image.Image) -> None:
        for image in (crop, crop.convert("L")):
            picture, _ = codec._with_header(image, False)
            x = torch.from_numpy(np.pad(picture.pixels, ((0, 58), (0, 28), (0, 0)), "edge")).permute(2, 0, 1)[None]
            data = codec.encode(image, QUALITY)
            target = Target(codec.model, torch.tensor([float(QUALITY)]), x, crop.size[::-1], picture.grey)
            with torch.inference_mode():
                y_hat = codec.latents.compress(*codec.model.analyse(x / 255, torch.tensor([float(QUALITY)])), QUALITY)
                error = target.error(y_hat.y_hat)
            shown, wanted = (np.asarray(each.convert("RGB"), float) for each in (codec.decode(data), image))
            assert error == pytest.approx(np.square(shown - wanted).sum() / 3)


def test_costs_of_symbols_are_those_of_the_payload(codec: Codec, crop: Image.Image) -> None:
    """The rows of the table belong to the places of the symbols, and the table's bits to the range coder."""
    x = tensor_of(crop.crop((0, 0, 64, 64))) * 255
    with torch.inference_mode():
        y, z = codec.model.analyse(x / 255, torch.tensor([float(QUALITY)]))
        compressed, parts = codec.latents.compress_and_predict(y, z, QUALITY)
        known = predictions(parts, compressed.y_hat)
        symbols = (y - known.means).round()
    assert torch.equal(symbols + known.means, compressed.y_hat)
    bits = symbol_bits(LIMIT)
    rows = ((known.rows - LIMIT) // (2 * LIMIT)).numpy()
    spent = bits[rows, symbols.int().numpy() + LIMIT].sum()
    (_, z_symbols, z_rows), *_ = parts
    spent += bits[z_rows.int().numpy(), z_symbols.int().numpy() + LIMIT].sum()
    assert 8 * len(compressed.payloads[0]) == pytest.approx(spent, abs=100)


def test_bits_of_an_escape_have_its_two_bytes() -> None:
    """A hundred symbols far outside the first table take as many bytes as the table of bits says."""
    encoder = SymbolEncoder()
    encoder.put(np.full(100, 200, np.int32), np.zeros(100, np.int32))
    assert 8 * len(encoder.payload()) == pytest.approx(100 * symbol_bits(LIMIT)[0, 200 + LIMIT], abs=64)


class TestSimilarity:
    """The same promises, with 1 - MS-SSIM for the error."""

    @pytest.fixture
    def image(self, sample: Image.Image) -> Image.Image:
        return sample.crop((150, 20, 330, 190))

    @pytest.mark.parametrize("mode", ["RGB", "L"])
    @pytest.mark.usefixtures("short")
    def test_a_search_lowers_the_objective(self, codec: Codec, image: Image.Image, mode: str) -> None:
        image = image.convert(mode)
        files = [
            codec.encode(image, QUALITY, effort=effort, metric="ms-ssim" if effort else "mse") for effort in (0, 3)
        ]
        worth = codec.weight(QUALITY, "ms-ssim") * image.width * image.height
        objectives = []
        for data in files:
            seen, wanted = (
                torch.from_numpy(np.atleast_3d(np.array(each))).permute(2, 0, 1)[None] / 255
                for each in (codec.decode(data), image)
            )
            objectives.append(8 * len(data) + worth * (1 - float(ms_ssim(seen, wanted))))
        assert objectives[1] < 0.99 * objectives[0]

    @pytest.mark.parametrize("grey", [False, True])
    def test_the_gradient_of_ms_ssim_is_that_of_autograd(self, grey: bool) -> None:
        model = model_of()
        model.g_s[-2].bias.data += 0.5
        y = 0.02 * torch.randn(1, TINY.M, 12, 12, generator=torch.Generator().manual_seed(3))
        x = torch.randint(0, 256, (1, 3, 192, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
        if grey:
            x = x[:, :1].expand(1, 3, -1, -1).contiguous()
        leaf = y.clone().requires_grad_()
        shown, wanted = model.train().synthesise(leaf, torch.tensor([30.0])), x / 255
        model.eval()
        if grey:
            shown, wanted = shown.mean(1, keepdim=True), wanted[:, :1]
        ((1 - ms_ssim(shown[:, :, :170, :181], wanted[:, :, :170, :181])) * 170 * 181).sum().backward()
        with torch.no_grad():
            gradient = SimilarTarget(model, torch.tensor([30.0]), x, (170, 181), grey).gradient(y)
        assert leaf.grad is not None
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))

    def test_small_images_have_none(self, codec: Codec, crop: Image.Image) -> None:
        with pytest.raises(ImageError, match="at least 161 pixels a side"):
            codec.encode(crop, effort=1, metric="ms-ssim")

    def test_a_target_in_psnr_contradicts_it(self, codec: Codec, image: Image.Image) -> None:
        with pytest.raises(ConfigError, match="goes with the metric mse"):
            codec.encode_to(image, psnr=30, effort=1, metric="ms-ssim")


@pytest.mark.usefixtures("short")
class TestPromises:
    def test_more_effort_is_never_worse(self, codec: Codec, crop: Image.Image) -> None:
        files = [codec.encode(crop, QUALITY, effort=effort) for effort in range(6)]
        objectives = [objective(codec, data, crop) for data in files]
        assert all(more <= less for less, more in pairwise(objectives))
        assert objectives[-1] < 0.98 * objectives[0]
        assert [parse(data).encoder.effort for data in files] == list(range(6))

    def test_no_effort_is_the_file_of_before(self, codec: Codec, crop: Image.Image) -> None:
        assert codec.encode(crop, QUALITY, effort=0) == codec.encode(crop, QUALITY)

    def test_the_same_file_again(self, codec: Codec, crop: Image.Image) -> None:
        torch.manual_seed(5)  # is none of its business
        first = codec.encode(crop, QUALITY, effort=2)
        torch.manual_seed(6)
        assert codec.encode(crop, QUALITY, effort=2) == first

    def test_random_numbers_of_the_caller_are_left_alone(self, codec: Codec, crop: Image.Image) -> None:
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        codec.encode(crop, QUALITY, effort=1)
        assert torch.equal(torch.rand(1), expected)

    @pytest.mark.parametrize("size", [(1, 1), (70, 1), (1, 70), (65, 63)])
    def test_every_size_is_searched(self, codec: Codec, sample: Image.Image, size: tuple[int, int]) -> None:
        image = sample.crop((200, 20, 200 + size[0], 20 + size[1]))
        plain, better = (codec.encode(image, QUALITY, effort=effort) for effort in (0, 2))
        assert codec.decode(better).size == size
        assert objective(codec, better, image) <= objective(codec, plain, image)

    @pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "1"])
    def test_every_mode_is_searched(self, codec: Codec, crop: Image.Image, mode: str) -> None:
        image = crop.convert(mode)
        if "A" in mode:
            image.putalpha(Image.linear_gradient("L").resize(crop.size))
        plain, better = (codec.encode(image, QUALITY, effort=effort, keep_invisible=True) for effort in (0, 2))
        decoded = codec.decode(better)
        assert decoded.mode == image.mode
        if "A" in mode:
            assert decoded.getchannel("A").tobytes() == image.getchannel("A").tobytes()
        if mode != "1":
            assert objective(codec, better, image) < objective(codec, plain, image)

    @pytest.mark.parametrize("target", [{"size": 1500}, {"bpp": 1.0}, {"psnr": 33.0}])
    def test_targets_are_kept(self, codec: Codec, crop: Image.Image, target: dict[str, float]) -> None:
        plain, better = (codec.encode_to(crop, **target, effort=effort) for effort in (0, 3))  # type: ignore[arg-type]
        sizes = [len(data) for data in (plain, better)]
        shown = [psnr(codec.decode(data), crop) for data in (plain, better)]
        if "psnr" in target:
            assert min(shown) >= target["psnr"]
            assert sizes[1] < sizes[0]
        else:
            assert max(sizes) <= target.get("size", crop.width * crop.height / 8)
            assert shown[1] > shown[0]

    def test_a_second_decoder_agrees(self, codec: Codec, crop: Image.Image) -> None:
        codec.verify(codec.encode(crop, QUALITY, effort=2, verify=True))

    def test_the_watch_sees_all_of_it(self, codec: Codec, crop: Image.Image) -> None:
        seen: list[float] = []
        codec.encode(crop, QUALITY, effort=3, watch=seen.append)
        assert len(seen) == 18
        assert seen == sorted(seen)
        assert seen[-1] == 1

    def test_the_watch_ends_it(self, codec: Codec, crop: Image.Image) -> None:
        seen: list[float] = []

        def watch(done: float) -> bool:
            seen.append(done)
            return len(seen) == 7

        data = codec.encode(crop, QUALITY, effort=9, watch=watch)
        assert len(seen) == 7
        whole = codec.encode(crop, QUALITY, effort=1)  # six iterations
        assert parse(data).payload == parse(whole).payload

    def test_seconds_end_it(self, codec: Codec, crop: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(efforts, "STAGES", (efforts.Stage(1000, 3, 0.02, (0.5, 0.1)),))
        start = time.monotonic()
        data = codec.encode(crop, QUALITY, effort=9, max_seconds=0.5)
        assert time.monotonic() - start < 10
        assert objective(codec, data, crop) <= objective(codec, codec.encode(crop, QUALITY), crop)

    def test_threads_share_a_codec(self, codec: Codec, crop: Image.Image) -> None:
        from concurrent.futures import ThreadPoolExecutor

        qualities = (20, 40, 60)
        alone = [codec.encode(crop, quality, effort=1) for quality in qualities]
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(lambda quality: codec.encode(crop, quality, effort=1), qualities)) == alone


def test_low_qualities_take_smaller_steps() -> None:
    """In quantiser steps, which are large there: half as far at quality 8 as at 56, and as hot."""
    (low, *_), (high, *_) = (list(efforts.STAGES[0].schedules(quality)) for quality in (8, 56))
    assert high.learning_rate[0] == efforts.STAGES[0].learning_rate
    assert [rate / 2 for rate in high.learning_rate] == pytest.approx(low.learning_rate)
    assert high.temperature == low.temperature


def test_stages_are_longer_and_longer() -> None:
    """Each effort costs more than all before it gained time for, and the whole is what efforts 1 to 9 are."""
    lengths = [stage.rounds * stage.iterations for stage in efforts.STAGES]
    assert len(lengths) == 9
    assert lengths == sorted(lengths)


def test_another_process_decodes_it(tmp_path: Path, codec: Codec, crop: Image.Image) -> None:
    """Whatever a search finds is a file like any other."""
    (tmp_path / "crop.hpcm").write_bytes(codec.encode(crop, QUALITY, effort=1))
    subprocess.run([sys.executable, "-m", "hpcmref", "decode", "crop.hpcm", "-o", "crop.png"], cwd=tmp_path, check=True)
    assert Image.open(tmp_path / "crop.png").tobytes() == codec.decode((tmp_path / "crop.hpcm").read_bytes()).tobytes()


def test_models_of_one_rate_refuse_it(tmp_path: Path, crop: Image.Image) -> None:
    """They do not say what a bit is worth."""
    checkpoints.save(model_of(lambdas=()), tmp_path / "one.safetensors", "one", {})
    codec = hpcmref.load(tmp_path / "one.safetensors", "cpu")
    with pytest.raises(ConfigError, match="does not say what bits are worth"):
        codec.encode(crop, effort=1)
    with pytest.raises(ConfigError, match="does not say what bits are worth"):
        codec.encode_to(crop, psnr=1, effort=1)


def test_the_weight_of_a_quality_is_between_its_anchors(codec: Codec) -> None:
    """Lambda is that of training at the anchors, and geometric between them."""
    lambdas = codec.model.config.lambdas
    assert codec.weight(0) == pytest.approx(lambdas[0])
    assert codec.weight(63) == pytest.approx(lambdas[-1])
    assert codec.weight(9) == pytest.approx(lambdas[1])
    assert math.log(codec.weight(31)) == pytest.approx(
        math.log(lambdas[3]) + (31 / 9 - 3) * math.log(lambdas[4] / lambdas[3])
    )


class TestCommand:
    @pytest.fixture
    def folder(self, tmp_path: Path, crop: Image.Image, monkeypatch: pytest.MonkeyPatch) -> Path:
        crop.crop((0, 0, 32, 32)).save(tmp_path / "crop.png")
        monkeypatch.chdir(tmp_path)
        return tmp_path

    @pytest.mark.usefixtures("short")
    def test_the_file_says_its_effort(self, folder: Path) -> None:
        assert CliRunner().invoke(app, ["encode", "crop.png", "-o", "a.hpcm", "--effort", "2"]).exit_code == 0
        assert hpcmref.info("a.hpcm").effort == 2
        assert "with effort 2" in CliRunner().invoke(app, ["info", "a.hpcm"]).stdout

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--effort", "10"], "--effort"),
            (["--max-seconds", "5"], "--effort 0 does not search"),
            (["--on-interrupt", "keep"], "--effort 0 does not search"),
            (["--effort", "3", "--metric", "psnr"], "it must be mse or ms-ssim"),
            (["--effort", "3", "--max-seconds", "0"], "must be a number above 0"),
            (["--effort", "3", "--lossless"], "a lossless file cannot be improved"),
            (["--effort", "3", "--on-interrupt", "keep", "--jobs", "2"], "leave out --jobs and --ray"),
        ],
    )
    def test_options_that_contradict_each_other_are_refused(
        self, folder: Path, options: list[str], message: str
    ) -> None:
        result = CliRunner().invoke(app, ["encode", "crop.png", *options], env={"COLUMNS": "200"})
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
    @pytest.mark.parametrize("keep", [True, False])
    def test_an_interrupt(self, folder: Path, keep: bool) -> None:
        """Kept, it ends the search with a whole file; else there is none, and no trace of one."""
        command = [sys.executable, "-c", INTERRUPTED, "encode", "crop.png", "-o", "a.hpcm", "--effort", "9"]
        command += ["--on-interrupt", "keep"] if keep else []
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=60,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the background ignores it
        )  # fmt: skip
        if keep:
            assert process.returncode == 0
            assert "interrupted: this is the best file" in process.stderr
            assert hpcmref.decode("a.hpcm").size == (32, 32)
        else:
            assert process.returncode in (130, -signal.SIGINT)
            assert sorted(each.name for each in folder.iterdir()) == ["crop.png"]


INTERRUPTED = """
import os, signal, sys
from hpcmref.cli import app
from hpcmref.search import anneal

step = anneal.Annealer._step

def interrupted(self, *arguments):
    step(self, *arguments)
    if self._count == 4:
        os.kill(os.getpid(), signal.SIGINT)

anneal.Annealer._step = interrupted
app(sys.argv[1:])
"""
"""A program that is interrupted during the fourth iteration of its search."""
