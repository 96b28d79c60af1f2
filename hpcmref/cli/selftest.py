"""The command `selftest`: check that hpcmref works on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from hpcmref.cli.options import Device, DeviceOption

if TYPE_CHECKING:
    from hpcmref.selftest import Report


def selftest(
    device: DeviceOption = Device.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check with known files whether this machine codes correctly.

    Decodes files whose latents and pixels are known, and encodes and decodes their pictures. This takes some seconds.
    The exit code is 1 if a check fails.
    """
    from hpcmref import selftest

    report = selftest.run(device.value)
    print(json.dumps(report.to_dict(), indent=2) if as_json else _text(report))
    if not report.passed:
        raise typer.Exit(1)


def _text(report: Report) -> str:
    lines = [", ".join(f"{name} {version}" for name, version in report.versions.items() if name != "system")]
    lines[0] += f", {report.versions['system']}"
    lines += [f"  {name:12} {kernel}" for name, kernel in report.kernels.items()]
    models = ", ".join(f"{name} ({fingerprint})" for name, fingerprint in report.models.items())
    lines.append(f"  {'models':12} {models or 'none'}")
    lines.append(
        f"  {'decoded':12} {report.decoded[0]} of {report.decoded[1]} files have the expected latents and pixels "
        f"(within {report.worst} levels; {report.tolerance} are allowed)"
    )
    lines.append(f"  {'coded again':12} {report.coded[0]} of {report.coded[1]} pictures")
    lines += [f"  wrong: {failure}" for failure in report.failures]
    verdict = "passed: this machine codes as it should"
    if not report.passed:
        verdict = "FAILED: do not trust files from this machine, nor pictures that it decodes"
    return "\n".join([*lines, verdict])
