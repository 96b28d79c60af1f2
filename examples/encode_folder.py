"""Encode all PNG files of a folder, two at a time, and say how much smaller they became.

Run it with `python examples/encode_folder.py FOLDER OUTPUT`.
"""

import sys
from pathlib import Path

import hpcmref


def main(folder: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    pictures = sorted(folder.glob("*.png"))
    for picture, data in zip(pictures, hpcmref.encode_many(pictures, quality=32, jobs=2), strict=True):
        (output / picture.name).with_suffix(".hpcm").write_bytes(data)
        print(f"{picture.name}: {picture.stat().st_size / len(data):.1f} times smaller")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
