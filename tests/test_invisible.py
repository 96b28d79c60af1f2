"""Are colours that nobody sees replaced by cheap ones, without a halo around what is seen?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from models import psnr
from PIL import Image, ImageFilter

from hpcmref.picture.invisible import filled

if TYPE_CHECKING:
    from hpcmref.codec import Codec


@pytest.fixture(scope="module")
def cut_out(sample: Image.Image) -> Image.Image:
    """A part of the sample in a disc with a soft edge, and noise where it is invisible."""
    rows, columns = np.mgrid[:128, :128]
    disc = Image.fromarray((np.hypot(rows - 64, columns - 64) < 40) * np.uint8(255))
    alpha = np.asarray(disc.filter(ImageFilter.GaussianBlur(3)))
    pixels = np.array(sample.crop((150, 60, 278, 188)))
    hidden = alpha == 0
    pixels[hidden] = np.random.default_rng(0).integers(0, 256, (hidden.sum(), 3))
    return Image.fromarray(np.dstack([pixels, alpha]))


def on(colour: str, image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image).convert("RGB")


def test_garbage_costs_nothing_and_there_is_no_halo(codec: Codec, cut_out: Image.Image) -> None:
    """Against the file with the garbage: less than half of the bytes, and no worse on white and on black."""
    plain, kept = (codec.encode(cut_out, 32, keep_invisible=keep) for keep in (False, True))
    assert len(plain) < len(kept) / 2
    for colour in ("white", "black"):
        expected = on(colour, cut_out)
        with_fill, with_garbage = (psnr(on(colour, codec.decode(data)), expected) for data in (plain, kept))
        assert with_fill > 35
        assert with_fill > with_garbage - 0.1


def test_visible_pixels_stay_and_the_border_is_continued(cut_out: Image.Image) -> None:
    pixels, alpha = np.asarray(cut_out)[..., :3], np.asarray(cut_out)[..., 3]
    found = filled(pixels, alpha)
    np.testing.assert_array_equal(found[alpha > 0], pixels[alpha > 0])
    steps = np.abs(np.diff(found.astype(int), axis=1)).max(axis=2)
    at_the_border = (alpha[:, 1:] > 0) != (alpha[:, :-1] > 0)
    assert np.median(steps[at_the_border]) < 12


def test_one_colour_continues_as_itself() -> None:
    pixels = np.full((37, 21, 3), (7, 130, 255), np.uint8)
    alpha = np.zeros((37, 21), np.uint8)
    alpha[5, 6] = 1
    pixels[alpha == 0] = 99
    assert (filled(pixels, alpha) == (7, 130, 255)).all()
    assert (filled(pixels, np.zeros_like(alpha)) == 0).all()
