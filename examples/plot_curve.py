"""Plot bits per pixel against PSNR of one image (needs matplotlib, which `hpcmref[bench]` brings).

Run it with `python examples/plot_curve.py IMAGE curve.png`.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import hpcmref


def main(path: str, target: str) -> None:
    original = Image.open(path).convert("RGB")
    codec = hpcmref.load()
    rates, decibels = [], []
    for quality in range(0, 64, 21):
        data = codec.encode(original, quality)
        error = np.asarray(codec.decode(data), np.float64) - np.asarray(original, np.float64)
        rates.append(8 * len(data) / (original.width * original.height))
        decibels.append(10 * np.log10(255**2 / np.square(error).mean()))
    plt.plot(rates, decibels, marker="o")
    plt.xlabel("bits per pixel")
    plt.ylabel("PSNR, dB")
    plt.savefig(target)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
