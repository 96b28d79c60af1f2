"""Are latents decoded as they were encoded, does anything else fail, and does the model stay as it is?"""

from __future__ import annotations

import json

import conformance
import pytest
import torch
from coding import calibrated
from containers import changed, learned_of
from models import TINY, latents_of, model_of
from PIL import Image

from hpcmref.codec import Codec
from hpcmref.errors import DecodeError, FormatError, HpcmrefError, ModelChangedError
from hpcmref.exact import attach
from hpcmref.exact.unchanged import Unchanged, digest
from hpcmref.format import container
from hpcmref.latents import LatentCodec
from hpcmref.model import PRESETS

CPU = torch.device("cpu")
SIZE = (2, 3)


@pytest.fixture(scope="module")
def tiny() -> LatentCodec:
    model = model_of(TINY)
    return LatentCodec(attach(model.entropy, calibrated(model)), CPU)


MADE_UP = list(conformance.SIZES)


# The scope keeps the tests of a preset together.
@pytest.mark.parametrize("preset", [*MADE_UP, *conformance.SHIPPED], scope="module")
def test_a_golden_file_decodes_for_ever(preset: str) -> None:
    assert conformance.decoded(preset) == json.loads(conformance.EXPECTED.read_text())[preset]


def test_every_preset_and_every_shipped_model_has_a_golden_file() -> None:
    assert {*MADE_UP, "nano"} == set(PRESETS)
    assert {path.stem for path in conformance.FOLDER.glob("*.bin")} == {*MADE_UP, *conformance.SHIPPED}


@pytest.mark.parametrize("preset", MADE_UP, scope="module")
def test_golden_payloads_are_written_as_they_were(preset: str) -> None:
    """Latents in, bytes out: the same as when the golden file was made, in version 1 of the format."""
    config = conformance.CONFIGS[preset]
    codec, _ = conformance.made_up_codec(preset)
    compressed = codec.compress(*conformance.latents(preset, config), conformance.made_up_quality(config))
    golden = container.parse((conformance.FOLDER / f"{preset}.bin").read_bytes())
    assert golden.version == 1
    assert compressed.payloads == [golden.payload]
    assert compressed.checksums[0].all == learned_of(golden).checksums.all


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_is_decoded_as_it_was_encoded(tiny: LatentCodec, batch: int) -> None:
    y, z = latents_of(model_of(TINY), batch, SIZE)
    compressed = tiny.compress(y, z, 20)
    assert (compressed.y_hat - y).abs().max() < 0.6
    tiny.verify(compressed, SIZE, 20)
    for upto in (1, 2, 3):
        y_hat = tiny.decompress(compressed.payloads, compressed.checksums, SIZE, 20, upto)
        assert torch.equal(y_hat, compressed.y_hat) == (upto == 3)
    for index in range(batch):
        alone = tiny.compress(y[index, None], z[index, None], 20)
        assert (alone.payloads[0], alone.checksums[0]) == (compressed.payloads[index], compressed.checksums[index])


@pytest.mark.parametrize(("column", "scale"), [(0, 1), (2, 2), (1, 3)])
def test_a_checksum_covers_the_latents_up_to_its_scale(tiny: LatentCodec, column: int, scale: int) -> None:
    """Of channel 0, s1 holds position (0, 0), s2 holds (0, 2) besides, and s3 all others."""
    y, z = latents_of(model_of(TINY), 1, SIZE)
    other = y.clone()
    other[0, 0, 0, column] += 5
    one, two = (tiny.compress(each, z, 20).checksums[0] for each in (y, other))
    assert [one.of(each) != two.of(each) for each in (1, 2, 3)] == [each >= scale for each in (1, 2, 3)]


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_a_preview_with_another_checksum_is_refused(codec: Codec, sample: Image.Image, scale: int) -> None:
    """`upto` shows only latents that the encoder wrote, as the checksums of all scales that are read say."""
    file = container.parse(codec.encode(sample.crop((0, 0, 100, 70)), 30))
    checksums = learned_of(file).checksums
    name = ("s1", "s2", "all")[scale - 1]
    fields = {**vars(checksums), name: getattr(checksums, name) ^ 1}
    forged = changed(file, checksums=container.Checksums(**fields))
    for upto in range(scale, 4):
        with pytest.raises(DecodeError):
            codec.decode(forged, upto=upto)
    for upto in range(1, scale):
        codec.decode(forged, upto=upto)


def test_a_damaged_file_is_shown_as_far_as_it_verifies(codec: Codec, sample: Image.Image) -> None:
    sample = sample.crop((0, 0, 200, 130))
    data = codec.encode(sample, 40)
    payload = len(container.parse(data).payload)
    shown = []
    for part in (0.05, 0.5, 0.97):
        damaged = bytearray(data)
        damaged[len(data) - 4 - int(payload * (1 - part))] ^= 0x10
        with pytest.raises(FormatError):
            codec.decode(bytes(damaged))
        try:
            shown.append(codec.decode(bytes(damaged), damaged=True))
        except DecodeError:
            shown.append(None)
    assert shown[0] is None
    assert shown[2].tobytes() == codec.decode(data, upto=2).tobytes()


def test_verify_finds_a_changed_model(tiny: LatentCodec) -> None:
    y, z = latents_of(model_of(TINY), 1, (1, 1))
    compressed = tiny.compress(y, z, 20)
    bias = next(buffer for name, buffer in tiny.entropy.named_buffers() if name.endswith("spatial.bias"))
    before = bias.clone()
    try:
        bias.numpy()[0] += 1  # past PyTorch's version counters
        with pytest.raises(ModelChangedError):
            tiny.verify(compressed, (1, 1), 20)
    finally:
        bias.numpy()[:] = before.numpy()
    tiny.verify(compressed, (1, 1), 20)


def test_no_file_is_returned_once_the_model_has_changed(tiny: LatentCodec) -> None:
    """An in-place operation raises a version counter, which every encode and decode compares."""
    codec = LatentCodec(tiny.entropy, CPU)
    y, z = latents_of(model_of(TINY), 1, (1, 1))
    compressed = codec.compress(y, z, 20)
    next(iter(codec.entropy.buffers())).add_(0)
    for attempt in (
        lambda: codec.compress(y, z, 20),
        lambda: codec.decompress(compressed.payloads, compressed.checksums, (1, 1), 20),
    ):
        with pytest.raises(ModelChangedError):
            attempt()


def test_a_network_made_in_inference_mode_is_hashed() -> None:
    with torch.inference_mode():
        network = torch.nn.Linear(2, 2)
        unchanged = Unchanged(network)
        unchanged.check()
        network.weight.add_(1)
        with pytest.raises(ModelChangedError):
            unchanged.check()


def test_the_digest_covers_every_tensor() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), torch.nn.BatchNorm2d(2))
    seen = {digest(network)}
    unchanged = Unchanged(network)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data += 1
        seen.add(digest(network))
        with pytest.raises(ModelChangedError):
            unchanged.check_all()
    assert len(seen) == 1 + len(list(network.parameters())) + len(list(network.buffers()))


def test_a_codec_verifies_what_it_encodes(codec: Codec, sample: Image.Image) -> None:
    image = sample.crop((0, 0, 60, 50))
    data = codec.encode(image, 30, verify=True)
    assert data == codec.encode(image, 30)
    codec.verify(data)
    forged = changed(container.parse(data), latent_checksum=learned_of(container.parse(data)).checksums.all ^ 1)
    with pytest.raises(HpcmrefError):
        codec.verify(container.write(forged))
