"""Does each private name of torch have a working replacement where it is missing?"""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import hpcmref
from hpcmref.runtime import torch_names


@pytest.mark.parametrize("missing", [False, True])
def test_int8_matmul_is_that_of_integers(missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randint(-128, 128, (32, 64), dtype=torch.int8), torch.randint(-63, 64, (64, 16), dtype=torch.int8)
    if missing:
        monkeypatch.delattr(torch, "_int_mm")
        assert not torch_names.has_int8_units()
    found = torch_names.int_mm(x, weight)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), x.long() @ weight.long())


def test_no_int8_units_where_torch_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_vnni_supported", raising=False)
    assert not torch_names.has_int8_units()


def test_no_bfloat16_where_torch_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not torch_names.has_bfloat16_units()


@pytest.mark.parametrize("missing", [False, True])
def test_lerp_moves_every_tensor_by_the_same_part(missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing:
        monkeypatch.delattr(torch, "_foreach_lerp_")
    targets = [torch.zeros(3), torch.ones(2)]
    torch_names.lerp_all_(targets, [torch.ones(3), torch.zeros(2)], 0.25)
    assert [target.tolist() for target in targets] == [[0.25] * 3, [0.75] * 2]


def test_full_precision_with_the_old_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(torch.backends.mkldnn, "matmul"):  # a property of the module's class
        monkeypatch.delattr(type(torch.backends.mkldnn), "matmul")
    calls = []
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", calls.append)
    with ExitStack() as undo:
        torch_names.use_full_precision(undo)
        assert calls == ["highest"]
    assert calls == ["highest", "high"]


def test_private_names_are_used_nowhere_else() -> None:
    private = re.compile(r"torch\.(cpu\.)?_(?!_|dynamo)\w+|fp32_precision|_is_\w+_supported")
    folder = Path(hpcmref.__file__).parent
    users = {path.name for path in folder.rglob("*.py") if private.search(path.read_text(encoding="utf-8"))}
    assert users == {"torch_names.py"}


@pytest.mark.parametrize("missing", [False, True])
def test_products_in_bfloat16_end_with_their_context(missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are within the rounding of bfloat16. Afterwards they are those of float32 again, after an error too."""
    if missing and hasattr(torch.backends.mkldnn, "matmul"):  # a property of the module's class
        monkeypatch.delattr(type(torch.backends.mkldnn), "matmul")
    torch.manual_seed(0)
    x, y = torch.randn(256, 256), torch.randn(256, 256)
    before = x @ y

    def product_and_error() -> None:
        with torch_names.matmul_in_bfloat16():
            torch.testing.assert_close(x @ y, before, rtol=0, atol=0.5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        product_and_error()
    assert torch.equal(x @ y, before)
