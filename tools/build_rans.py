"""Compile hpcmref/format/librans/rans.c for every platform with the C cross-compiler of the PyPI package ziglang.

    python -m pip install ziglang && python tools/build_rans.py

Writes the shared libraries and SOURCE.sha256, the hash of the source that they were built from, beside the source.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "hpcmref" / "format" / "librans"
TARGETS = {
    "linux-x86_64.so": "x86_64-linux-gnu.2.17",
    "linux-aarch64.so": "aarch64-linux-gnu.2.17",
    "darwin-x86_64.dylib": "x86_64-macos",
    "darwin-arm64.dylib": "aarch64-macos",
    "windows-amd64.dll": "x86_64-windows-gnu",
    "windows-arm64.dll": "aarch64-windows-gnu",
}


def main() -> None:
    """Build all libraries, or stop at the first that fails."""
    source = FOLDER / "rans.c"
    for name, target in TARGETS.items():
        command = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-O2", "-s", "-shared", "-fPIC"]
        command += ["-ffreestanding", "-fvisibility=hidden", "-fno-sanitize=all", "-fno-stack-protector", "-Wall"]
        if "macos" in target:  # without an install name, the library would contain the path of this folder
            command.append(f"-Wl,-install_name,@rpath/{name}")
        else:  # every library of macOS needs libSystem
            command.append("-nostdlib")
        library = FOLDER / name
        subprocess.run([*command, "-o", str(library), str(source)], check=True)
        print(f"{name}: {library.stat().st_size} bytes")
    for leftover in (*FOLDER.glob("*.pdb"), *FOLDER.glob("*.lib")):
        leftover.unlink()
    (FOLDER / "SOURCE.sha256").write_text(hashlib.sha256(source.read_bytes()).hexdigest() + "\n")


if __name__ == "__main__":
    main()
