"""Does every memory bank look back as it should, change nothing while it is closed, and decode what it encoded?"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from coding import OTHERS, SYNCHRONISING, Operations, calibrated, exact_after_checks, there_and_back
from containers import latent_checksum_of
from models import TINY, TRAINABLE, in_few_rows, latents_of, model_of
from PIL import Image

from hpcmref import checkpoints
from hpcmref.codec import Codec
from hpcmref.errors import ConfigError
from hpcmref.exact import attach
from hpcmref.exact.memory_bank import ExactCellMean, ExactLinearAttend, ExactPool, ExactRecall, ExactSigmoid, _root
from hpcmref.format import container
from hpcmref.latents import thresholds
from hpcmref.model import HPCM, PRESETS, HPCMConfig, memory_bank
from hpcmref.model.coders import SymbolWriter
from hpcmref.model.config import MEMORY_BANKS, MemoryConfig
from hpcmref.model.context import CrossAttentionCell
from hpcmref.model.memory_bank import CellMean, LinearAttend, Pool, Recall, State, from_cells, top
from hpcmref.training import Phase, TrainingConfig
from hpcmref.training.bfloat16 import train_in_bfloat16
from hpcmref.training.loop import Trainer
from hpcmref.training.start import start_from
from research.exactness_matrix import decode, run

BANKS = {name: dataclasses.replace(bank, num_heads=4, value_resolution=3) for name, bank in MEMORY_BANKS.items()}
for preset in ("memory-saving", "fast", "state"):  # the mode light with other numbers; the last has its own tests
    del BANKS[preset]
BANKS |= {
    "light everywhere": dataclasses.replace(BANKS["light"], scales=(1, 2, 3), transfer=True),
    "light per position": dataclasses.replace(BANKS["light"], per_position=True),
    "full per position": dataclasses.replace(BANKS["full"], per_position=True),
    "full before the prior": dataclasses.replace(BANKS["full"], scales=(2, 3), before_prior=True),
    "full without transfer": dataclasses.replace(BANKS["full"], transfer=False),
    "linear relu": dataclasses.replace(BANKS["linear"], feature_map="relu"),
    "global everywhere": dataclasses.replace(BANKS["global"], scales=(1, 2, 3), transfer=True),
    "cross everywhere": dataclasses.replace(BANKS["cross"], scales=(1, 2, 3)),
}
EVERY_BANK = pytest.mark.parametrize("name", BANKS)
SIZE = (1, 2)
"""Of z, so that the lattice of s1 is 4 x 8, and 3 x 3 cells have unequal sizes."""


def opened(name: str, config: HPCMConfig = TINY) -> HPCM:
    """An untrained model whose bank changes a good part of every context."""
    model = model_of(config, memory=BANKS[name])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".opening." in key:
                parameter.uniform_(0.3, 0.9)
    return model


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- configuration -------------------------------------------------------------------------------------------------


@EVERY_BANK
def test_a_configuration_survives_json(name: str) -> None:
    config = dataclasses.replace(TINY, memory=BANKS[name])
    assert HPCMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_plain_models_say_nothing_of_memory() -> None:
    """So that their configurations and fingerprints stay as they were."""
    assert [name for name, config in PRESETS.items() if "memory" in config.to_dict()] == ["nano", "light"]
    assert "memory" not in TINY.to_dict()
    assert not any("bank" in name for name in model_of().state_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "off"},
        {"scales": ()},
        {"scales": (3, 2)},
        {"scales": (0,)},
        {"scales": (1, 2, 3), "before_prior": True},
        {"transfer": True},
        {"transfer": True, "scales": (1, 3)},
        {"mode": "cross", "transfer": True, "scales": (2, 3)},
        {"max_refs": (2, 2)},
        {"max_refs": (0, 2, 2), "topk": (0, 1, 1)},
        {"max_refs": (2, 2, 17)},
        {"topk": (1, 2, 5)},
        {"compress_ratio": 0},
        {"compress_ratio": 3},
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"value_resolution": 0},
        {"value_resolution": 33},
        {"feature_map": "softmax"},
        {"mode": "linear", "num_heads": 5},
    ],
)
def test_a_bad_memory_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(TINY, memory=dataclasses.replace(BANKS["light"], **changes))


_LIGHT = {"mode": "light"}
HOSTILE: list[Any] = [
    {},
    7,
    [],
    "light",
    [["mode", "light"]],
    {"mode": 1},
    {"mode": ["light"]},
    {"mode": "light" * 10_000},
    _LIGHT | {"depth": 3},
    *(_LIGHT | {"scales": value} for value in (3, "123", [1, "2"], [True], [3.0], [[3]], [1] * 10_000, {"3": 1})),
    *(_LIGHT | {name: 1} for name in ("transfer", "before_prior", "per_position")),
    *(_LIGHT | {"before_prior": value} for value in ("no", None, [], 0)),
    *(_LIGHT | {"max_refs": value} for value in (2, [4, 4], [4, 4, "4"], [4, 4, 4.5], [4, 4, True], [4, 4, 10**9])),
    *(_LIGHT | {"topk": value} for value in (2, None, [1, 1, -1], [[1], 1, 1])),
    *(_LIGHT | {"temperature": value} for value in ("1", None, True, [0.1], 10**400, -0.1)),
    *({"mode": "linear", "num_heads": value} for value in (0, -8, 10**9, 8.0, True, "8", None, 512)),
    *(_LIGHT | {"compress_ratio": value} for value in (10**9, 4.0, "4", None, False)),
    *({"mode": "full", "value_resolution": value} for value in (10**9, 8.0, "8", None, True)),
    *({"mode": "linear", "feature_map": value} for value in (1, None, ["elu"])),
    *({"mode": "state", "scales": [1, 2, 3], "transfer": True, "width": value} for value in (10**9, 8.5, "8", True)),
]


def test_attention_that_takes_too_much_at_a_time_is_refused() -> None:
    """A window's scores: 32 references of 32 x 32 tokens and 256 heads would be 70 GB, in a small file."""
    wide = {"windows": (32, 32, 32)}
    with pytest.raises(ConfigError, match="window"):
        dataclasses.replace(TINY, **wide, heads=64)
    cross = dataclasses.replace(BANKS["cross"], max_refs=(16, 16, 16), topk=(1, 1, 1), num_heads=16, compress_ratio=1)
    with pytest.raises(ConfigError, match="window"):
        dataclasses.replace(TINY, **wide, heads=0, memory=cross)
    for preset in PRESETS.values():
        assert HPCMConfig.from_dict(preset.to_dict()) == preset


@pytest.mark.parametrize("values", HOSTILE, ids=lambda values: str(values)[:50])
def test_a_bad_dictionary_is_refused(values: Any) -> None:
    with pytest.raises(ConfigError):
        HPCMConfig.from_dict({**TINY.to_dict(), "memory": values})


# --- one pass ------------------------------------------------------------------------------------------------------


@EVERY_BANK
def test_a_closed_bank_changes_nothing(name: str) -> None:
    """A bank on a trained model gives the same numbers, bit for bit, until it is trained."""
    plain = model_of()
    model = HPCM(dataclasses.replace(TINY, memory=BANKS[name])).eval()
    start_from(model, plain)
    x, quality = torch.rand(2, 3, 128, 64), torch.tensor([3.0, 40.0])
    with torch.no_grad():
        expected, found = plain(x, quality), model(x, quality)
    assert torch.equal(found["x_hat"], expected["x_hat"])
    assert torch.equal(found["likelihoods"]["y"], expected["likelihoods"]["y"])


@EVERY_BANK
def test_images_in_a_batch_in_another_order_and_alone(name: str) -> None:
    """And after each other: nothing of an image stays behind."""
    model = opened(name).double()
    x = torch.rand(3, 3, 64 * SIZE[0], 64 * SIZE[1], dtype=torch.float64)
    quality = torch.tensor([3.0, 40.0, 63.0], dtype=torch.float64)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        together = model(x, quality)["likelihoods"]["y"]
        torch.testing.assert_close(model(x[order], quality[order])["likelihoods"]["y"], together[order])
        for image in range(3):
            alone = model(x[image, None], quality[image, None])["likelihoods"]["y"]
            torch.testing.assert_close(alone, together[image, None])
    assert not list(model.entropy.context.banks.named_buffers())


@EVERY_BANK
def test_gradients_reach_keys_values_and_gates(name: str) -> None:
    closed = model_of(memory=BANKS[name]).train()
    x, quality = torch.rand(2, 3, 64 * SIZE[0], 64 * SIZE[1]), torch.tensor([5.0, 58.0])
    for model, reached in ((closed, lambda key: ".opening." in key), (opened(name).train(), lambda key: True)):
        model(x, quality)["likelihoods"]["y"].log2().mean().backward()
        for key, parameter in model.entropy.context.banks.named_parameters():
            # A bias of all keys adds the same to all similarities inside a softmax, which does not see it.
            unseen = ("cross", "global") if key.endswith("conv_k.bias") else ()
            if reached(f".{key}") and not name.startswith(unseen):
                assert parameter.grad is not None, key
                assert parameter.grad.isfinite().all(), key
                assert parameter.grad.count_nonzero(), key


@pytest.mark.parametrize("name", ["light", "full", "linear", "global", "cross"])
def test_nothing_leaves_the_device_inside_a_pass(name: str) -> None:
    model = opened(name)
    x, quality = torch.rand(2, 3, 128, 64), torch.tensor([10.0, 50.0])
    with torch.no_grad(), Operations() as recorded:
        model(x, quality)
    assert "aten::avg_pool2d" in recorded.names
    assert not recorded.names & SYNCHRONISING


@pytest.mark.parametrize("name", [*BANKS, None])
def test_nothing_leaves_the_device_while_encoding(name: str | None) -> None:
    """The same of exact arithmetic: the host hears of the symbols after the last step."""
    model = model_of() if name is None else opened(name)
    exact = attach(model.entropy, calibrated(model, SIZE))
    y, z = latents_of(model, 1, SIZE)
    there_and_back(exact, y, z)  # what is checked once a process
    writer = SymbolWriter(y, z, thresholds(), [])
    with torch.inference_mode(), Operations() as recorded:
        exact(torch.full((1,), 20.0), SIZE, writer)
    assert {"aten::bucketize", "aten::round_"} <= recorded.names
    assert not recorded.names & SYNCHRONISING


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("light", {"write 3": 5, "read 3": 5}),
        ("full", {"write 1": 1, "read 1": 1, "write 2": 3, "read 2": 3, "write 3": 5, "read 3": 5}),
        ("full before the prior", {"write 2": 2, "read 2": 3, "write 3": 5, "read 3": 6}),
    ],
)
def test_only_what_is_used_is_computed(name: str, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every context that was replaced is written, and nothing after the last step. (The first read of s2 is empty.)"""
    calls: Counter[str] = Counter()
    for call in ("write", "read"):
        original = getattr(memory_bank.MemoryBank, call)

        def counted(self: Any, *arguments: Any, call: str = call, original: Any = original) -> Any:
            calls[f"{call} {int(math.log2(self.pool.cell)) + 1}"] += 1
            return original(self, *arguments)

        monkeypatch.setattr(memory_bank.MemoryBank, call, counted)
    with torch.no_grad():
        opened(name)(torch.rand(1, 3, 64, 64))
    assert calls == expected


def test_a_bank_keeps_the_last_references() -> None:
    bank = opened("full").entropy.context.banks["s2"]
    state = bank.start(torch.tensor([20.0, 30.0]))
    states = [state]
    contexts = torch.randn(5, 2, 64, 8, 12)
    with torch.no_grad():
        for each in contexts:
            states.append(bank.write(states[-1], each))
    assert [len(each.references) for each in states] == [0, 1, 2, 3, 3, 3]
    assert states[5].references[:2] == states[4].references[1:]  # the newest last, the oldest gone
    assert torch.equal(bank.read(state, contexts[0]), contexts[0])


# --- parts ---------------------------------------------------------------------------------------------------------


def test_ties_go_to_the_oldest() -> None:
    similarity = torch.tensor([[0.5, 0.9, 0.5, 0.9], [0.1, 0.1, 0.1, 0.1], [0.0, -0.0, 0.3, -1.0]])
    assert top(similarity, 1).int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]
    assert top(similarity, 3).int().tolist() == [[1, 1, 0, 1], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert top(similarity, 7).all()


def test_recall_is_what_it_is_written_out() -> None:
    query, keys = torch.randn(2, 5, 1, 1), [torch.randn(2, 5, 1, 1) for _ in range(4)]
    values = [torch.randn(2, 3, 4, 6) for _ in range(4)]
    found = Recall(2, 0.1)(query, keys, values)
    for image in range(2):
        similar = [float(torch.cosine_similarity(query[image].flatten(), key[image].flatten(), dim=0)) for key in keys]
        chosen = sorted(range(4), key=lambda index: -similar[index])[:2]
        weights = [math.exp(similar[index] / 0.1) for index in chosen]
        expected = sum(
            weight / sum(weights) * similar[index] * values[index][image]
            for weight, index in zip(weights, chosen, strict=True)
        )
        torch.testing.assert_close(found[image], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feature_map", ["elu", "relu", "softmax"])
def test_linear_attention_is_attention(feature_map: str) -> None:
    """Against weights of all tokens of two contexts, written out."""
    attend = LinearAttend(2, feature_map)
    query, sharpness = torch.randn(1, 8, 3, 4), torch.tensor([0.5, 2.0]).view(1, 2, 1, 1)
    contexts = [(torch.randn(1, 8, 2, 3), torch.randn(1, 6, 2, 3)) for _ in range(2)]
    sums = [attend.summary(key, value, sharpness) for key, value in contexts]
    found = attend(query, sums[0][0] + sums[1][0], sums[0][1] + sums[1][1], sharpness)
    for head in range(2):
        channels, outputs = slice(4 * head, 4 * head + 4), slice(3 * head, 3 * head + 3)
        scale = float(sharpness[0, head])
        asked = query[0, channels].flatten(1).T * scale
        keys = [key[0, channels].flatten(1).T * scale for key, _ in contexts]
        values = torch.cat([value[0, outputs].flatten(1).T for _, value in contexts])
        if feature_map == "softmax":
            weights = asked.softmax(1) @ torch.cat([key.softmax(0) for key in keys]).T / 2
        else:
            phi = torch.relu if feature_map == "relu" else lambda x: torch.where(x > 0, x + 1, x.exp())
            weights = phi(asked) @ phi(torch.cat(keys)).T
            weights = (weights / weights.sum(1, keepdim=True)).nan_to_num()  # relu may let nothing through
        torch.testing.assert_close(found[0, outputs].flatten(1).T, weights @ values, rtol=1e-4, atol=1e-5)


def test_attention_over_several_contexts_is_attention_over_all_their_tokens() -> None:
    """Twice the same context is the context; and each token of two counts like those of one twice as wide."""
    cell = CrossAttentionCell(8, 4, 2, contexts=2)
    query, one, other = torch.randn(3, 1, 8, 6, 5)
    torch.testing.assert_close(cell(query, one, one), cell(query, one))
    torch.testing.assert_close(cell(query, one, other), cell(query, other, one))
    assert not torch.allclose(cell(query, one, other), cell(query, one))


@pytest.mark.parametrize("side", [1, 2, 3, 8])
def test_a_grid_of_means_has_the_means_of_its_cells(side: int) -> None:
    x = torch.randn(2, 3, 5, 7)
    means = CellMean(side)(x)
    assert means.shape[2:] == (min(side, 5), min(side, 7))
    back = from_cells(means, x.shape[2:], side)
    assert back.shape == x.shape
    for row, column in ((0, 0), (2, 3), (4, 6)):
        rows = [r for r in range(5) if r * min(side, 5) // 5 == row * min(side, 5) // 5]
        columns = [c for c in range(7) if c * min(side, 7) // 7 == column * min(side, 7) // 7]
        torch.testing.assert_close(back[:, :, row, column], x[:, :, rows][:, :, :, columns].mean((2, 3)))


# --- exact arithmetic ----------------------------------------------------------------------------------------------


@EVERY_BANK
def test_every_bank_decodes_what_it_encoded(name: str, codec: Codec) -> None:
    """In a batch and alone, on 1 and 3 threads, and close to what the float model computes."""
    _, difference = exact_after_checks(opened(name), SIZE)
    assert difference < 0.03


@EVERY_BANK
def test_every_bank_codes_the_smallest_pictures(name: str) -> None:
    """s1 is one position, where a reshaped tensor can be a view, and an expanded one contiguous."""
    model = opened(name)
    exact = attach(model.entropy, calibrated(model, (1, 1))).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for batch in (1, 2):
        _, written, read = there_and_back(exact, *latents_of(model, batch, (1, 1)))
        assert torch.equal(written.view(torch.int32), read.view(torch.int32))


@pytest.mark.parametrize("name", ["light everywhere", "full", "linear", "global", "cross everywhere"])
def test_strips_change_nothing(name: str, codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(name)
    exact = attach(model.entropy, calibrated(model, SIZE))
    y, z = latents_of(model, 1, SIZE)
    payloads, expected, _ = there_and_back(exact, y, z)

    in_few_rows(monkeypatch)
    found, strips, _ = there_and_back(exact, y, z)
    assert found == payloads
    assert torch.equal(strips, expected)


def test_files_decode_in_another_process(sample: Image.Image, tmp_path: Path) -> None:
    model = opened("linear", dataclasses.replace(TINY, M=16, N=8))
    path = tmp_path / "model.safetensors"
    checkpoints.save(model, path, "with a memory", {})
    codec = Codec(checkpoints.load(path), "with a memory", torch.device("cpu"))
    data = codec.encode(sample.crop((0, 0, 180, 120)), 30)
    assert codec.decode(data).size == (180, 120)  # compares the symbols
    (tmp_path / "image.bin").write_bytes(data)
    expected = decode(codec, [data])
    assert [expected[0][0]] == [latent_checksum_of(container.parse(data))]
    assert run(OTHERS[0], [tmp_path / "image.bin"], str(path)).latents == expected


def test_square_roots_of_integers() -> None:
    """The whole part is certain, also beside squares, where a rounded root errs; the rest within Newton's error."""
    roots = torch.randint(1, 2**26, (2000,)).double()
    n = torch.cat([roots * roots + shift for shift in (-1, 0, 1)] + [torch.arange(20.0).double()])
    for number, found in zip(n.long().tolist(), _root(n).tolist(), strict=True):
        whole = max(1, math.isqrt(number))
        assert found == max(1.0, (whole + number / whole) * 0.5)


def test_means_over_the_largest_image_are_exact() -> None:
    """All as large as can be: no partial sum is rounded."""
    x = torch.full((1, 1, 512, 512), 1e9)
    x[..., ::2] *= -1
    x[..., -1, -1] = 3 * 2.0**-14
    pooled = ExactPool(Pool(1))(x)
    assert float(pooled.max()) == (2**20 - 1) / 2**10
    whole = [int(value * 2**14) for value in pooled.double().flatten().tolist()]
    expected = Fraction(sum(whole), len(whole) * 2**14)
    assert Fraction(float(ExactCellMean(CellMean(1))(pooled))) == Fraction(float(torch.tensor(float(expected))))


def test_twins_are_close_to_what_they_replace() -> None:
    x = torch.linspace(-9, 9, 400)
    assert (ExactSigmoid(torch.nn.Sigmoid())(x) - x.sigmoid()).abs().max() < 0.01
    plane = 5 * torch.randn(2, 6, 8, 12)
    assert (ExactPool(Pool(4))(plane) - Pool(4)(plane)).abs().max() < 2**-10
    query, keys = torch.randn(2, 6, 1, 1), [torch.randn(2, 6, 1, 1) for _ in range(4)]
    values = [torch.randn(2, 3, 4, 6) for _ in range(4)]
    recall = Recall(3, 0.1)
    assert (ExactRecall(recall)(query, keys, values) - recall(query, keys, values)).abs().max() < 0.05
    for feature_map in ("elu", "relu", "softmax"):
        attend, sharpness = LinearAttend(2, feature_map), torch.ones(2, 2, 1, 1)
        twin, key = ExactLinearAttend(attend), torch.randn(2, 6, 8, 12)
        found = twin(plane, *twin.summary(key, plane, sharpness), sharpness)
        expected = attend(plane, *attend.summary(key, plane, sharpness), sharpness)
        assert (found - expected).abs().max() < 0.1, feature_map
        assert (found - expected).abs().mean() < 0.02, feature_map


def test_equal_keys_are_recalled_alike_on_both_sides() -> None:
    """References that tie, as in a flat image: the oldest, whatever the last bits of a sum say."""
    key = torch.randn(1, 6, 1, 1)
    values = [torch.full((1, 1, 2, 2), float(index)) for index in range(1, 4)]
    found = ExactRecall(Recall(1, 0.1))(key, [key, key * 1.0000001, key], values)
    assert torch.equal(found, torch.ones(1, 1, 2, 2))


# --- training ------------------------------------------------------------------------------------------------------


def test_a_run_puts_a_closed_bank_on_a_trained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "nano", TRAINABLE)
    monkeypatch.setitem(MEMORY_BANKS, "light", BANKS["light"])
    trained = model_of(TRAINABLE)
    config = TrainingConfig((), tmp_path, memory="light", phases=(Phase(0, 1, 64),), bfloat16=False)
    trainer = Trainer(config)
    trainer.begin_with(trained)
    x, quality = torch.rand(1, 3, 64, 64), torch.tensor([9.0])
    with torch.no_grad(), trainer.averaged() as model:
        assert isinstance(model.config.memory, MemoryConfig)
        expected = trained.to(memory_format=torch.channels_last)(x, quality)["x_hat"]  # type: ignore[call-overload]
        assert torch.equal(model(x, quality)["x_hat"], expected)
    with pytest.raises(ConfigError, match="no memory bank 'lite'"):
        dataclasses.replace(config, memory="lite")


@pytest.mark.parametrize("name", ["light", "full", "linear", "cross"])
def test_a_bank_trains_in_bfloat16(name: str) -> None:
    """Attention gives bfloat16 then, and a bank computes in float32 all the same."""
    model = opened(name).train()
    train_in_bfloat16(model, "cpu")
    model(torch.rand(1, 3, 64, 64), torch.tensor([9.0]))["likelihoods"]["y"].log2().mean().backward()
    gradients = [parameter.grad for parameter in model.entropy.context.banks.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_a_state_is_a_value() -> None:
    """Writing gives a new state and leaves the old one as it was."""
    bank = opened("linear").entropy.context.banks["s3"]
    quality, first, second = torch.tensor([20.0]), *torch.randn(2, 1, 64, 8, 8)
    with torch.no_grad():
        state = bank.write(bank.start(quality), first)
        before = bank.read(state, second)
        bank.write(state, second)
        assert torch.equal(bank.read(state, second), before)
    assert isinstance(state, State)
