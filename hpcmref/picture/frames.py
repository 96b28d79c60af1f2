"""Find the frames and pages of an image file."""

from __future__ import annotations

from PIL import Image


def frames_of(image: Image.Image) -> list[int]:
    """Return the numbers, from 1, of the frames of an image that has just been opened, and go back to the first.

    An MPO file is a JPEG to which the camera has appended other images, often thumbnails or a gain map. Of them only
    those count that are as large as the first, and none if its XMP announces a gain map.
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
        except Exception:  # a wrong offset
            break
        if image.size == size:
            same.append(index + 1)
    image.seek(0)
    return same or [1]
