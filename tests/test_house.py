"""Does the package keep the rules that ARCHITECTURE.md names under "Rules of the house"?"""

from __future__ import annotations

import re

from tools.draw_layers import PACKAGE

AMBIENT = r"is_grad_enabled|is_inference_mode_enabled|is_autocast_enabled|get_default_dtype|get_default_device"


def test_no_function_asks_for_the_gradient_mode() -> None:
    """What a function does follows from its arguments and its module, and not from who has called it."""
    asking = [path for path in sorted(PACKAGE.rglob("*.py")) if re.search(AMBIENT, path.read_text())]
    assert asking == []
