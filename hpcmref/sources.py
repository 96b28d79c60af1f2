"""Convert the kinds of images and files that callers may pass to those that the codec takes."""

from __future__ import annotations

import os
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from hpcmref import arguments
from hpcmref.errors import ArgumentTypeError, ConfigError, HpcmrefError, ImageError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from PIL import Image

ImageSource: TypeAlias = (
    "Image.Image | NDArray[Any] | torch.Tensor | str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]"
)
FileSource: TypeAlias = "bytes | bytearray | memoryview | str | os.PathLike[str] | IO[bytes]"
_IMAGES = (
    "an image of Pillow, an array of NumPy, a tensor of torch, a path, the bytes of an image file, or a file opened "
    "in binary mode"
)
_FILES = "the bytes of a file, a path, or a file opened in binary mode"


def image_of(source: Any) -> Any:
    """Convert what `encode` takes to an image of Pillow or an array of NumPy. Raises ImageError, ArgumentTypeError."""
    import io
    from pathlib import Path

    import numpy as np
    from PIL import Image

    from hpcmref.picture.images import open_image

    if isinstance(source, (Image.Image, np.ndarray)):
        return source
    if type(source).__module__.partition(".")[0] == "torch" and hasattr(source, "detach"):
        return _array_of_tensor(source)
    if isinstance(source, (str, os.PathLike)):
        return open_image(Path(source))
    return open_image(io.BytesIO(_image_bytes(source)))


def is_file(source: Any) -> bool:
    """Return whether a source is the bytes of a file, or an open file."""
    return isinstance(source, (bytes, bytearray, memoryview)) or callable(getattr(source, "read", None))


def _image_bytes(source: Any) -> bytes:
    try:
        return arguments.contents("image", source, _IMAGES)
    except ConfigError:
        raise
    except HpcmrefError as error:
        raise ImageError(str(error)) from error


def _array_of_tensor(tensor: torch.Tensor) -> NDArray[Any]:
    """Convert a tensor (C, H, W) on any device to an array (H, W, C).

    Raises ImageError for other shapes and types, and ArgumentTypeError for tensors that are not dense.
    """
    import torch

    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "nested tensor" if tensor.is_nested else f"tensor of layout {str(tensor.layout).rpartition('.')[2]}"
        raise ArgumentTypeError(
            f"image is a {layout}, and must be a dense tensor, which to_dense() makes of some others"
        )
    if tensor.ndim != 3 or not 1 <= tensor.shape[0] <= 4:
        raise ImageError(f"image is a tensor of shape {tuple(tensor.shape)}, and must be one of (1 to 4, H, W)")
    if tensor.is_complex() or tensor.is_quantized:
        raise ImageError(f"image is a tensor of {tensor.dtype}, and must be one of uint8 or floats from 0 to 1")
    if tensor.is_meta:
        raise ImageError("image is a tensor on the device meta, which has no values")
    tensor = tensor.detach().cpu().resolve_neg()
    return (tensor.float() if tensor.is_floating_point() else tensor).permute(1, 2, 0).numpy()


def array_of(image: Image.Image) -> NDArray[Any]:
    """Convert an image of Pillow to an array (H, W) or (H, W, 2 to 4). CMYK is converted to RGB."""
    import numpy as np

    return np.array(image.convert("RGB") if image.mode == "CMYK" else image)


def content_of(source: Any) -> bytes:
    """Return the bytes of what `hpcmref.decode` takes. Raises HpcmrefError if they cannot be read."""
    return arguments.contents("data", source, _FILES)


def portable_of(source: Any) -> Any:
    """Convert a source to what can be sent to another process.

    Paths are made absolute, open files become bytes, and an image keeps its metadata in `info`, which is pickled.
    """
    from PIL import Image

    from hpcmref.picture.images import strip_only

    if isinstance(source, (str, os.PathLike)):
        return os.path.abspath(source)
    if is_file(source):
        return _image_bytes(source)
    image = image_of(source)
    return strip_only(image, ()) if isinstance(image, Image.Image) else image
