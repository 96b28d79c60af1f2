"""The versions that `hpcmref --version --verbose` prints, for bug reports."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

from hpcmref._version import __version__

PACKAGES = ("torch", "numpy", "pillow", "safetensors", "compressai")


def described() -> str:
    """Describe the versions of hpcmref, Python and the packages that it uses, and the range coder, one in a line."""
    from hpcmref.format.rangecoder import implementation

    bits = 64 if sys.maxsize > 1 << 32 else 32
    facts = {
        "python": f"{platform.python_implementation()} {platform.python_version()}, {bits} bits",
        "platform": platform.platform(),
        **{package: _installed(package) for package in PACKAGES},
        "range coder": implementation(),
    }
    return "\n".join([f"hpcmref {__version__}", *(f"  {name:11}  {value}" for name, value in facts.items())])


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
