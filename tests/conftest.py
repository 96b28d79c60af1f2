"""What do several test files share? Threads that do not spin, the sample photograph, the shipped codec, and the count
of skipped tests at the end of a run.

`python -m pytest -n 2 --dist worksteal` runs the tests in two processes (pytest-xdist). The first process runs none: it
gets all reports, and so it alone counts what was skipped and lists the slowest tests.
"""

from __future__ import annotations

import collections
import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything loads OpenMP: on a busy machine, threads that spin while they wait for each other make the float64
# models of the parity tests twenty times slower (measured: 78 s instead of 3 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # processes beside each other share the cores
    from hpcmref.runtime.cores import available_cores  # does not import torch

    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // workers)))
# Models that the person who runs the tests has added are none of their business.
os.environ["HPCMREF_MODELS"] = str(Path(__file__).parent / "no models")

import pytest
from PIL import Image

if TYPE_CHECKING:
    from hpcmref.codec import Codec

DATA = Path(__file__).parent / "data"

MAY_BE_MISSING = (
    "needs a CUDA device",
    "no history of commits here",
    "there is a CUDA device",
    "this GPU has no TF32",
    "there are no int8 instructions here",
    "older torch has one mode for all",
    "torch does not use GNU's OpenMP here",
    "this Typer and this click do not keep the help of arguments",
    "there is no Chromium with chromedriver here",
    "root may (list anything|write anywhere)",
    "only root gives files away",
    "could not import 'ray'.*",
    r"needs the extra hpcmref\[formats\]",
    "(bash|zsh|fish|man|groff|file|update-mime-database|xdg-mime|desktop-file-validate|gio) is not installed",
)
"""Why tests may be skipped in CI on Linux, as regular expressions: hardware, and programs around hpcmref. A codec, a
library or data is not among them. Any other reason makes the run fail where the variable CI is set."""
if sys.version_info >= (3, 13) or platform.machine() != "x86_64":
    MAY_BE_MISSING += ("CompressAI is not installed",)  # which has no wheels there


@pytest.fixture(scope="session")
def sample() -> Image.Image:
    """The sample photograph, 450 x 330 RGB."""
    with Image.open(DATA / "sample.png") as image:
        return image.convert("RGB")


@pytest.fixture(scope="session")
def codec() -> Codec:
    """The codec that ships with the package, on the CPU."""
    from hpcmref.codec import load

    return load(device="cpu")


def skipped(reporter: Any) -> collections.Counter[str]:
    """How many tests (or files of tests) were skipped for each reason."""
    # Every process of a parallel run reports a file that is skipped as a whole.
    reports = {report.nodeid: report for report in reporter.stats.get("skipped", [])}
    return collections.Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports.values())


def unexpected(reasons: collections.Counter[str]) -> list[str]:
    """The reasons for which nothing may be skipped here. Other systems lack more by nature: there it is counted."""
    if not os.environ.get("CI") or sys.platform != "linux":
        return []
    return [each for each in reasons if not re.fullmatch("|".join(MAY_BE_MISSING), each)]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was skipped, by reason."""
    reasons = skipped(terminalreporter)
    if reasons:
        terminalreporter.section("skipped")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5d}  {reason}")
    for reason in unexpected(reasons):
        terminalreporter.line(f"FAILED: nothing may be skipped in CI because {reason!r}", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if something was skipped in CI that should have run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and session.exitstatus == 0 and unexpected(skipped(reporter)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
