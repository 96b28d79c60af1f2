"""Which quality of a codec gives the file that is nearest to a size?"""

from __future__ import annotations

import math
from collections.abc import Mapping

from PIL import Image

from hpcmref.bench.codecs import Codec


def nearest(codec: Codec, image: Image.Image, rate: float, known: Mapping[int, float]) -> int:
    """The quality whose file is nearest to `rate` bits per pixel in ratio, by bisection.

    known: quality -> bits per pixel of this image, as far as measured. Files must grow, or shrink, with the quality;
    which of the two is found out where the codec does not tell.
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
