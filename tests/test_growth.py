"""Does the growth script measure each direction of each size, and say when a process fails?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcmref.bench import growth


def test_a_small_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    growth.main(sizes="0.02", model=None, quality=20, output=tmp_path / "new")
    (point,) = json.loads((tmp_path / "new" / "growth.json").read_text())["points"]
    assert (point["width"], point["height"]) == (174, 115)
    assert 0 < point["encode_seconds"] < 30
    assert min(point["encode_memory"], point["decode_memory"]) > 2**27  # torch alone takes more
    assert (tmp_path / "new" / "growth.png").read_bytes()[:4] == b"\x89PNG"
    assert "0.02 MP" in capsys.readouterr().out


def test_a_process_that_fails_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"encode of .*There is no model"):
        growth.measure(0.01, "missing")
