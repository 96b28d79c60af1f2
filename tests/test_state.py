"""Does the memory bank of the mode `state` carry a sum from step to step, exactly, and can a trained model get one?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from coding import OTHERS, Recorder, calibrated, exact_after_checks, there_and_back
from containers import latent_checksum_of
from models import STATE, TINY, TRAINABLE, in_few_rows, latents_of, model_of
from PIL import Image
from torch import Tensor, nn

from hpcmref import checkpoints
from hpcmref.codec import Codec
from hpcmref.errors import ConfigError
from hpcmref.exact import attach
from hpcmref.format import container
from hpcmref.model import HPCM, PRESETS, HPCMConfig, context
from hpcmref.model.coders import Estimator
from hpcmref.model.config import MEMORY_BANKS, MemoryConfig
from hpcmref.model.context import Attend
from hpcmref.model.memory_bank import StateBank
from hpcmref.model.schedule import S1, S2, STEPS_S1, STEPS_S2, STEPS_S3, Step
from hpcmref.training.bfloat16 import train_in_bfloat16
from hpcmref.training.start import start_from
from research.exactness_matrix import decode, run

WIDTH = STATE.state_width
SIZE = (2, 3)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- configuration -------------------------------------------------------------------------------------------------


def test_a_width_that_is_the_default_is_not_spelled_out() -> None:
    """So that the files of other banks, which know of no width, keep their fingerprints."""
    for config in (STATE, dataclasses.replace(STATE, memory=MEMORY_BANKS["state"]), PRESETS["nano"]):
        values = config.to_dict()
        assert ("width" in values["memory"]) == (config.state_width != 64)
        assert HPCMConfig.from_dict(json.loads(json.dumps(values))) == config
    assert "width" not in dataclasses.replace(TINY, memory=MEMORY_BANKS["light"]).to_dict()["memory"]
    assert TINY.state_width == dataclasses.replace(TINY, memory=MEMORY_BANKS["light"]).state_width == 0


def test_the_shipped_model_has_a_state() -> None:
    shipped = checkpoints.load(checkpoints.find("nano"))
    assert shipped.model.config == PRESETS["nano"]
    assert shipped.model.config.state_width == 64


@pytest.mark.parametrize("changes", [{"scales": (3,)}, {"transfer": False}, {"width": 0}, {"width": 1025}])
def test_a_bad_state_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(MEMORY_BANKS["state"], **changes)
    assert MemoryConfig("state", scales=(1, 2, 3), transfer=True) == MEMORY_BANKS["state"]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1)])
def test_the_finer_state_has_memory_of_its_own(batch: int, size: tuple[int, int]) -> None:
    """It is added to in place. Where s1 is one position, reshaped values were a view: one place for all four."""
    state = torch.randn(batch, WIDTH, *size).to(memory_format=torch.channels_last)
    before = state.clone()
    finer = StateBank(WIDTH).finer(state)
    assert torch.equal(finer, state.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    finer.add_(torch.arange(finer.numel()).view(finer.shape))
    assert torch.equal(state, before)
    assert len(finer.unique()) == finer.numel()


@pytest.mark.parametrize("side", [1, 33, 64])
def test_the_smallest_pictures(side: int, sample: Image.Image, tmp_path: Path) -> None:
    """s1 is one position."""
    checkpoints.save(model_of(STATE), tmp_path / "state.safetensors", "a state", {})
    codec = Codec(checkpoints.load(tmp_path / "state.safetensors"), "state", torch.device("cpu"))
    assert codec.decode(codec.encode(sample.crop((0, 0, side, side)), 30, verify=True)).size == (side, side)


def test_a_state_may_have_more_channels_than_a_context(sample: Image.Image, tmp_path: Path) -> None:
    bank = dataclasses.replace(MEMORY_BANKS["state"], width=2 * STATE.M + 8)
    checkpoints.save(model_of(dataclasses.replace(STATE, memory=bank)), tmp_path / "wide.safetensors", "wide", {})
    codec = Codec(checkpoints.load(tmp_path / "wide.safetensors"), "wide", torch.device("cpu"))
    assert codec.decode(codec.encode(sample.crop((0, 0, 70, 130)), 30, verify=True)).size == (70, 130)


# --- one pass ------------------------------------------------------------------------------------------------------


def test_the_state_is_the_sum_of_what_all_priors_wrote() -> None:
    """The context model of a state written out: scales and means of every step."""
    model = model_of(STATE).double()
    net, both = model.entropy.context, 2 * STATE.M
    y, z = latents_of(model, 2, SIZE)
    quality = torch.tensor([10.0, 50.0]).double()
    seen = Recorder(y, z)
    with torch.no_grad():
        found = model.entropy(quality, SIZE, seen)

    expected: list[tuple[Tensor, Tensor]] = []
    target = seen._target
    rows = iter([table(quality) for table in net.quant_steps])

    def code(step: Any, context: Tensor, y_hat: Tensor) -> Tensor:
        expected.append((step.select(context[:, : STATE.M]), step.select(context[:, STATE.M :])))
        return step.put(y_hat, target.of(step))

    def steps(these: Any, adaptors: Any, prior: Any, plane: Tensor, y_hat: Tensor, state: Tensor) -> Any:
        for step, adaptor in zip(these, adaptors, strict=True):
            out = prior(adaptor(torch.cat((plane, y_hat, state), 1)), next(rows))
            plane, state = out[:, :both], state + out[:, both:]
            y_hat = code(step, plane, y_hat)
        return plane, y_hat, state

    def halves(lattice: Any, x: Tensor) -> Tensor:
        return torch.cat([lattice.down(half) for half in x.chunk(2, 1)], 1)

    def put(lattice: Any, fine: Tensor, coarse: Tensor) -> Tensor:
        pairs = zip(fine.chunk(2, 1), coarse.chunk(2, 1), strict=True)
        return torch.cat([lattice.put(one, other) for one, other in pairs], 1)

    def doubled(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    with torch.no_grad():
        hyper = model.entropy.h_s(z)
        hyper_s2 = halves(S2, hyper)
        plane = halves(S1, hyper_s2)
        y_hat = code(STEPS_S1[0], plane, torch.zeros_like(plane[:, : STATE.M]))
        state = plane.new_zeros(2, WIDTH, *plane.shape[2:])
        parts = (STEPS_S1[1:], net.adaptor_s1, net.prior_s1_s2)
        plane, y_hat, state = steps(*parts, plane, y_hat, state)
        plane = net.context_net[0](put(S1, hyper_s2, plane))
        parts = (STEPS_S2, net.adaptor_s2, net.prior_s1_s2)
        plane, y_hat, state = steps(*parts, plane, S1.up(y_hat), doubled(state))
        plane = net.context_net[1](put(S2, hyper, plane))
        parts = (STEPS_S3, net.adaptor_s3, net.prior_s3)
        _, y_hat, state = steps(*parts, plane, S2.up(y_hat), doubled(state))
    torch.testing.assert_close(found, y_hat)
    assert float(state.abs().max()) > 0.1
    for pair, written in zip(seen.predicted[1:], expected, strict=True):
        torch.testing.assert_close(pair, written)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_smallest_lattices(size: tuple[int, int], batch: int) -> None:
    """One position of s1 becomes four of s2, each with memory of its own, since the state is added to in place."""
    x = torch.randn(batch, WIDTH, *size)
    finer = StateBank(WIDTH).finer(x)
    assert torch.equal(finer, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    finer.add_(torch.arange(finer.numel()).view_as(finer))
    assert len(finer.unique()) > 4 * WIDTH * batch - 2
    model = model_of(STATE)
    y, z = latents_of(model, batch, size)
    with torch.no_grad():
        model.entropy(torch.full((batch,), 20.0), size, Recorder(y, z))


def test_the_same_in_train_and_eval_mode_in_a_batch_and_alone() -> None:
    model = model_of(STATE).double()

    def likelihoods(x: Tensor, quality: Tensor) -> Tensor:
        y, z = model.analyse(x, quality)
        estimator = Estimator(y, z, noise=False)
        model.entropy(quality, (z.shape[2], z.shape[3]), estimator)
        return estimator.y_likelihoods

    x, quality = torch.rand(2, 3, 128, 192).double(), torch.tensor([10.0, 50.0]).double()
    model.train()
    with_gradients = likelihoods(x, quality)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(likelihoods(x, quality), with_gradients.detach())
        torch.testing.assert_close(likelihoods(x[1:], quality[1:]), with_gradients[1:].detach())


def test_gradients_reach_what_is_written_and_who_reads_it() -> None:
    model = model_of(STATE).train()
    train_in_bfloat16(model, "cpu")
    model(torch.rand(2, 3, 64, 64), torch.tensor([5.0, 58.0]))["likelihoods"]["y"].log2().mean().backward()
    net = model.entropy.context
    for adaptor in (*net.adaptor_s2, *net.adaptor_s3):
        assert adaptor.weight.grad is not None
        assert adaptor.weight.grad[:, -WIDTH:].abs().amax() > 0
    for prior in (net.prior_s1_s2, net.prior_s3):
        assert prior.branch_2[-1].weight.grad[-WIDTH:].abs().amax((1, 2, 3)).min() > 0
    assert net.adaptor_s1[0].weight.grad[:, -WIDTH:].abs().amax() == 0  # the state is zero there


def test_a_finer_state_repeats_each_value() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    finer = StateBank(3).finer(x)
    assert finer.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(finer, x.repeat_interleave(2, 2).repeat_interleave(2, 3))


# --- exact arithmetic ----------------------------------------------------------------------------------------------


def test_what_was_encoded_is_decoded(codec: Codec) -> None:
    """In a batch and alone, on 1 and 3 threads, and close to what the float model computes."""
    _, difference = exact_after_checks(model_of(STATE), SIZE)
    assert difference < 0.02


def test_strips_change_nothing(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(STATE)
    exact = attach(model.entropy, calibrated(model, SIZE))
    y, z = latents_of(model, 1, (5, 2))
    payloads, expected, _ = there_and_back(exact, y, z)
    in_few_rows(monkeypatch)
    found, strips, _ = there_and_back(exact, y, z)
    assert found == payloads
    assert torch.equal(strips, expected)


def test_contexts_share_two_planes_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In strips, a context overwrites the last but one, which nothing reads any more."""
    model = model_of(STATE)
    y, z = latents_of(model, 1, (5, 2))
    places: dict[int, set[int]] = {}
    code = context.ContextModel._code

    def noted(self: context.ContextModel, step: Step, plane: Tensor, *others: Any) -> Tensor:
        places.setdefault(step.scale, set()).add(plane.untyped_storage().data_ptr())
        return code(self, step, plane, *others)

    monkeypatch.setattr(context.ContextModel, "_code", noted)
    in_few_rows(monkeypatch)
    with torch.no_grad():
        model.entropy(torch.tensor([20.0]), (z.shape[2], z.shape[3]), Estimator(y, z, noise=False))
    assert [len(places[scale]) for scale in (2, 3)] == [2, 2]


def test_a_state_beyond_all_ranges(codec: Codec) -> None:
    """Latents a thousand times those that the grids were chosen with; written numbers up to 2^71 would still add up."""
    model = model_of(STATE)
    exact = attach(model.entropy, calibrated(model, SIZE))
    y, z = (1000 * part for part in latents_of(model, 1, SIZE))
    _, written, read = there_and_back(exact, y, z)
    assert torch.equal(written.view(torch.int32), read.view(torch.int32))


def test_files_decode_in_another_process(sample: Image.Image, tmp_path: Path) -> None:
    model = model_of(dataclasses.replace(STATE, M=16, N=8))
    path = tmp_path / "model.safetensors"
    checkpoints.save(model, path, "with a state", {})
    codec = Codec(checkpoints.load(path), "with a state", torch.device("cpu"))
    data = codec.encode(sample.crop((0, 0, 180, 120)), 30)
    expected = decode(codec, [data])  # compares the symbols
    (tmp_path / "image.bin").write_bytes(data)
    assert [expected[0][0]] == [latent_checksum_of(container.parse(data))]
    assert run(OTHERS[0], [tmp_path / "image.bin"], str(path)).latents == expected


# --- the start of a run --------------------------------------------------------------------------------------------


def predicted(model: HPCM, y: Tensor, z: Tensor) -> list[tuple[Tensor, Tensor]]:
    seen = Recorder(y, z)
    with torch.no_grad():
        model.entropy(torch.full((len(y),), 30.0).to(y), (z.shape[2], z.shape[3]), seen)
    return seen.predicted


def started(config: HPCMConfig, trained: HPCM) -> HPCM:
    model = HPCM(config).initialise().to(next(trained.parameters()).dtype)
    start_from(model, trained)
    return model.eval()


@pytest.mark.parametrize("folded", [2, 3])
@pytest.mark.parametrize("width", [0, WIDTH])
def test_a_trained_model_without_its_attention(folded: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins as the same model whose attention finds nothing.

    Of scales 2 and 3 one has a conv_out at a time: that of s2 is lost where a context goes on to s3.
    """
    trained = model_of(TRAINABLE).double()
    net = trained.entropy.context
    for scale in {1, 2, 3} - {folded}:
        conv_out = net.get_submodule(f"attn_s{scale}.conv_out")
        nn.init.dirac_(conv_out.weight)
        nn.init.zeros_(conv_out.bias)
    memory = dataclasses.replace(MEMORY_BANKS["state"], width=width) if width else None
    model = started(dataclasses.replace(TRAINABLE, heads=0, memory=memory), trained)
    y, z = latents_of(trained, 2, SIZE)
    found = predicted(model, y, z)
    monkeypatch.setattr(Attend, "forward", lambda self, query, key, value, inside: torch.zeros_like(value))
    expected = predicted(trained, y, z)
    steps = {2: 1 + 2 + 3, 3: 12}[folded]
    torch.testing.assert_close(found[:steps], expected[:steps])


def test_a_state_that_is_new_is_not_read_at_first_and_a_trained_one_is_kept() -> None:
    plain = model_of(TRAINABLE, heads=0)
    config = dataclasses.replace(TRAINABLE, heads=0, memory=STATE.memory)
    model = started(config, plain)
    y, z = latents_of(plain, 1, SIZE)
    assert all(torch.equal(*pair) for pairs in zip(predicted(model, y, z), predicted(plain, y, z), strict=True)
               for pair in zip(*pairs, strict=True))  # fmt: skip
    net = model.entropy.context
    assert float(net.adaptor_s3[2].weight.detach()[:, -WIDTH:].abs().max()) == 0
    assert float(net.prior_s3.branch_2[-1].weight.detach()[-WIDTH:].abs().min()) > 0

    trained = model_of(config)
    again = started(config, trained)
    assert all(
        torch.equal(found, expected) for found, expected in zip(again.parameters(), trained.parameters(), strict=True)
    )
    grown = started(dataclasses.replace(config, M=48), trained)
    weight, kept = grown.entropy.context.adaptor_s2[1].weight, trained.entropy.context.adaptor_s2[1].weight
    assert torch.equal(weight[:, -WIDTH:], kept[:, -WIDTH:])
    with pytest.raises(ConfigError, match="12 channels, and not 8"):
        started(dataclasses.replace(config, memory=dataclasses.replace(MEMORY_BANKS["state"], width=8)), trained)
    with pytest.raises(ConfigError, match="12 channels, and not 0"):
        started(dataclasses.replace(config, memory=None), trained)
    with pytest.raises(ConfigError, match="heads"):
        started(TRAINABLE, trained)


def test_a_grown_model_without_attention_computes_the_old_channels_as_before() -> None:
    config = dataclasses.replace(TRAINABLE, heads=0, memory=STATE.memory)
    trained = model_of(config).double()
    model = started(dataclasses.replace(config, M=48), trained)
    old = torch.arange(48) % 6 < 4
    y, z = latents_of(trained, 1, SIZE)
    grown = torch.randn(1, 48, *y.shape[2:]).double()
    grown[:, old] = y
    for pair, (scales, means) in zip(predicted(trained, y, z)[2:], predicted(model, grown, z)[2:], strict=True):
        kept = old[: scales.shape[1]]
        torch.testing.assert_close((scales[:, kept], means[:, kept]), pair)
