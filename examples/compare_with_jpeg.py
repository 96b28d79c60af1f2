"""Which PSNR do JPEG and hpcmref reach with files of the same size?

Run it with `python examples/compare_with_jpeg.py IMAGE`.
"""

import io
import sys

import numpy as np
from PIL import Image

import hpcmref


def psnr(shown: Image.Image, original: Image.Image) -> float:
    error = np.asarray(shown.convert("RGB"), np.float64) - np.asarray(original, np.float64)
    return float(10 * np.log10(255**2 / np.square(error).mean()))


def main(path: str) -> None:
    original = Image.open(path).convert("RGB")
    for quality in (20, 50, 80):
        stream = io.BytesIO()
        original.save(stream, "JPEG", quality=quality, optimize=True)
        data = hpcmref.encode(original, size=stream.tell())
        ours, theirs = psnr(hpcmref.decode(data), original), psnr(Image.open(stream), original)
        print(f"{stream.tell()} bytes: JPEG {theirs:.1f} dB, hpcmref {ours:.1f} dB")


if __name__ == "__main__":
    main(sys.argv[1])
