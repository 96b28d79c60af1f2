"""Frames and pages of an image file."""

from __future__ import annotations

from PIL import Image


def frames_of(image: Image.Image) -> list[int]:
    """The numbers, from 1, of the frames of an image just opened; it is at the first again afterwards.

    The later images of an MPO may be thumbnails and gain maps, which cameras append to a JPEG: only those of the size
    of the first count, and none if its XMP announces a gain map.
    """
    count = int(getattr(image, "n_frames", 1))
    if image.format != "MPO" or count == 1:
        return list(range(1, count + 1))
    if b"hdrgm:" in (image.info.get("xmp") or b""):
        return [1]
    size, same = image.size, []
    for index in range(count):
        try:
            image.seek(index)
        except Exception:  # an offset that leads nowhere
            break
        if image.size == size:
            same.append(index + 1)
    image.seek(0)
    return same or [1]
