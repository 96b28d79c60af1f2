"""Does every process decode the same latents, however it computes, and does a picture beyond all ranges survive?

The whole matrix is `python -m research.exactness_matrix FOLDER`; here is what is fast, with small pictures.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from coding import OTHERS, calibrated, there_and_back
from containers import latent_checksum_of
from models import TINY, in_few_rows, latents_of, model_of
from PIL import Image

from hpcmref.codec import Codec
from hpcmref.errors import DecodeError, TruncatedError
from hpcmref.exact import attach
from hpcmref.exact.unchanged import Unchanged
from hpcmref.format import container
from research.exactness_matrix import (
    CONFIGURATIONS,
    MODES,
    SIZES,
    Answer,
    Configuration,
    Latents,
    decode,
    encode,
    run,
    small_pictures,
)

SIDES = (192, 128)
SMALL = len(SIZES) - 1
"""How many of the small pictures are coded here: all but the largest, which takes longer than the others together."""


def pictures(sample: Image.Image) -> dict[str, Image.Image]:
    """A photograph, and pictures that take the activations where no calibration has been."""
    random = np.random.RandomState(0)
    rows, columns = np.indices(SIDES[::-1])
    checkerboard = (rows + columns) % 2 * 255
    primary = random.randint(0, 2, (SIDES[1] // 8, SIDES[0] // 8, 3)).repeat(8, 0).repeat(8, 1) * 255
    arrays = {
        "noise": random.randint(0, 256, (*SIDES[::-1], 3)),
        "black": np.zeros((*SIDES[::-1], 3)),
        "white": np.full((*SIDES[::-1], 3), 255),
        "checkerboard": np.stack([checkerboard] * 3, 2),
        "saturated": primary,
    }
    made = {name: Image.fromarray(array.astype(np.uint8)) for name, array in arrays.items()}
    return {"photograph": sample.crop((100, 50, 100 + SIDES[0], 50 + SIDES[1])), **made}


@pytest.fixture(scope="module")
def files(codec: Codec, sample: Image.Image) -> list[bytes]:
    """The pictures at one quality, in the order of `pictures`."""
    return [codec.encode(image, 44) for image in pictures(sample).values()]


@pytest.fixture(scope="module")
def expected(codec: Codec, files: list[bytes]) -> list[Latents]:
    return decode(codec, files)


# --- one process ---------------------------------------------------------------------------------------------------


def test_symbols_are_those_that_were_encoded(files: list[bytes], expected: list[Latents]) -> None:
    assert [symbols for symbols, _ in expected] == [latent_checksum_of(container.parse(file)) for file in files]
    assert len(set(expected)) == len(files)


@pytest.mark.parametrize("quality", [0, 63])
def test_pictures_beyond_all_ranges_survive(codec: Codec, sample: Image.Image, quality: int) -> None:
    """At the lowest and the highest quality: `Codec.decode` compares the symbols."""
    for image in pictures(sample).values():
        assert codec.decode(codec.encode(image, quality)).size == image.size


@pytest.mark.parametrize("mode", sorted(set(MODES) - {"plain", "cuda"}))
def test_a_mode_changes_nothing(mode: str, codec: Codec, files: list[bytes], expected: list[Latents]) -> None:
    assert decode(codec, files, mode) == expected


@pytest.mark.parametrize("mode", sorted(set(MODES) - {"cuda"}))
def test_small_pictures_first_and_last(mode: str, codec: Codec, files: list[bytes], expected: list[Latents]) -> None:
    """A picture of one position once changed the model in memory, and tests with large pictures did not see it."""
    images = small_pictures()[:SMALL]
    written = encode(codec, images, 30, mode) + encode(codec, images[::-1], 30, mode)
    assert decode(codec, files[:1], mode) == expected[:1]
    assert decode(codec, written, mode) == decode(codec, written)
    codec.latents.unchanged.check_all()


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_nothing(
    threads: int, codec: Codec, files: list[bytes], expected: list[Latents]
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert decode(codec, files) == expected
    finally:
        torch.set_num_threads(before)


def test_encoding_in_a_mode_gives_the_same_latents(codec: Codec, sample: Image.Image) -> None:
    """What is encoded while the caller computes in bfloat16 is decoded without."""
    image = pictures(sample)["photograph"]
    for mode in ("autocast", "medium precision", "without oneDNN", "no denormals"):
        with MODES[mode](codec):
            data = codec.encode(image, 20)
        codec.decode(data)  # compares the symbols


def test_eight_threads_at_once(codec: Codec, sample: Image.Image) -> None:
    images = [image.crop((0, 0, 64 + 8 * index, 64)) for index, image in enumerate(pictures(sample).values())] * 4
    torch.set_float32_matmul_precision("medium")
    try:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(partial(codec.encode, quality=30), images))
            decoded = list(pool.map(lambda data: decode(codec, [data]), together))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert decoded == [decode(codec, [data]) for data in together]
    assert [symbols for ((symbols, _),) in decoded] == [latent_checksum_of(container.parse(data)) for data in together]


@pytest.mark.parametrize("batch", [2, 17])  # from 16 on, PyTorch may take other kernels
@pytest.mark.parametrize("mode", ["plain", "without oneDNN", "contiguous"])
def test_images_in_a_batch_and_alone(batch: int, mode: str, codec: Codec) -> None:
    model = model_of(TINY)
    exact = attach(model.entropy, calibrated(model))
    y, z = latents_of(model, batch, (1, 2))
    if mode != "contiguous":
        exact.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with MODES[mode](codec):
        payloads, written, read = there_and_back(exact, y, z)
        assert torch.equal(written.view(torch.int32), read.view(torch.int32))
        for index in range(0, batch, 5):
            (payload,), alone, _ = there_and_back(exact, y[index, None], z[index, None])
            assert payload == payloads[index]
            assert torch.equal(alone[0].view(torch.int32), written[index].view(torch.int32))


def test_strips_change_nothing(
    codec: Codec, files: list[bytes], expected: list[Latents], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in large images: every local function on a few rows at a time."""
    strips = in_few_rows(monkeypatch)
    assert decode(codec, files[:2]) == expected[:2]
    assert len(strips) > 20


def test_what_differs_all_the_same_is_an_error(codec: Codec, files: list[bytes]) -> None:
    """A machine that computed one layer otherwise would decode symbols that fit neither checksum nor payload."""
    bias = codec.latents.entropy.context.adaptor_s1[0].bias
    before = bias.clone()
    bias *= 2
    codec.latents.unchanged = Unchanged(codec.latents.entropy)
    said = []
    try:
        for file in files:
            with pytest.raises((DecodeError, TruncatedError), match=r"latents|payload") as caught:
                codec.decode(file)
            said.append(str(caught.value))
    finally:
        bias.copy_(before)
        codec.latents.unchanged = Unchanged(codec.latents.entropy)
    assert any("latents" in each for each in said), said


# --- other processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("configuration", OTHERS, ids=lambda configuration: configuration.name)
def test_another_process_codes_the_same(
    configuration: Configuration, codec: Codec, files: list[bytes], expected: list[Latents], tmp_path: Path
) -> None:
    """It decodes our files, and we decode those that it writes, the smallest pictures first and last."""
    paths = [tmp_path / f"{index}.bin" for index in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    drawn = [tmp_path / f"{index}.png" for index in range(SMALL)]
    for path, picture in zip(drawn, small_pictures(), strict=False):
        picture.save(path)
    answer = run(configuration, paths, None, drawn)
    assert isinstance(answer, Answer), answer
    assert answer.latents == expected
    assert len(answer.files) == 2 * len(drawn)
    for data in answer.files:
        codec.verify(data)


def test_a_file_of_another_machine_decodes_here(codec: Codec, sample: Image.Image, tmp_path: Path) -> None:
    pictures(sample)["photograph"].save(tmp_path / "image.png")
    subprocess.run(
        [sys.executable, "-m", "hpcmref", "encode", "image.png", "-o", "image.bin"],
        cwd=tmp_path,
        env=os.environ | OTHERS[0].environment,
        check=True,
    )
    codec.decode((tmp_path / "image.bin").read_bytes())  # compares the symbols


def test_the_matrix_tries_what_it_should() -> None:
    """Every environment variable and mode that the specification names."""
    tried = {pair for each in CONFIGURATIONS for pair in each.environment.items()}
    assert {name for name, _ in tried} == {
        *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR"),
        *("OMP_NUM_THREADS", "ONEDNN_DEFAULT_FPMATH_MODE"),
    }
    assert {each.mode for each in CONFIGURATIONS} == set(MODES) - {"cuda"}


def test_a_process_that_fails_is_told(tmp_path: Path) -> None:
    assert "No such file" in str(run(CONFIGURATIONS[0], [tmp_path / "missing.bin"], None))
