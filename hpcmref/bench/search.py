"""Find the quality of a codec whose file is nearest to a given size."""

from __future__ import annotations

import math
from collections.abc import Mapping

from PIL import Image

from hpcmref.bench.codecs import Codec


def nearest(codec: Codec, image: Image.Image, rate: float, known: Mapping[int, float]) -> int:
    """Find by bisection the quality whose file is nearest, in ratio, to `rate` bits per pixel.

    known: quality -> bits per pixel of this image, as far as measured. The size of files must rise or fall with the
    quality. If the codec does not say which, the lowest and the highest quality are compared.
    """
    sizes = dict(known)

    def size(quality: int) -> float:
        if quality not in sizes:
            sizes[quality] = 8 * len(codec.encode(image, quality)) / (image.width * image.height)
        return sizes[quality]

    order = codec.qualities  # from the smallest file to the largest
    rising = codec.rising if codec.rising is not None else size(order[-1]) >= size(order[0])
    if not rising:
        order = order[::-1]
    # The search stays between the known qualities around the rate.
    low = max((order.index(quality) for quality, bpp in sizes.items() if bpp <= rate), default=0)
    high = min((order.index(quality) for quality, bpp in sizes.items() if bpp >= rate), default=len(order) - 1)
    while low < high - 1:
        middle = (low + high) // 2
        if size(order[middle]) < rate:
            low = middle
        else:
            high = middle
    for place in (low, high):
        size(order[place])
    return min(sizes, key=lambda quality: abs(math.log(sizes[quality] / rate)))
