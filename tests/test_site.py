"""Can the documentation be built as a site without a warning, and is everything there that its pages refer to?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hpcmref
from hpcmref import errors

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site. A dead link, a dead anchor and a page outside the navigation end the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert result.returncode == 0, (result.stdout + result.stderr).decode()
    return folder


def test_style_sheets_scripts_and_images_are_in_the_site(site: Path) -> None:
    found = set()
    for page in site.rglob("*.html"):
        for target in re.findall(r'(?:<link [^>]*href|<script [^>]*src|<img [^>]*src)="([^":#?]+)"', page.read_text()):
            path = site / target.removeprefix("/") if target.startswith("/") else (page.parent / target).resolve()
            assert path.exists(), f"{page.relative_to(site)} refers to {target}"
            found.add(path.suffix)
    assert {".css", ".js", ".png"} <= found


def test_no_page_asks_another_server_for_styles_scripts_or_images(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.search(r'(?:<link [^>]*href|<script [^>]*src|<img [^>]*src)="(?:https?:)?//', page.read_text())


def test_the_reference_has_every_public_name_with_its_arguments(site: Path) -> None:
    page = (site / "docs" / "api" / "index.html").read_text()
    for name in hpcmref.__all__:
        target = f"hpcmref.errors.{name}" if name == "HpcmrefError" else f"hpcmref.{name}"
        assert f'id="{target}"' in page, name
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.HpcmrefError):
            assert f'id="hpcmref.errors.{name}"' in page, name
    assert page.count("Parameters:") > 5
    assert page.count("Raises:") > 5
