"""Which errors can hpcmref raise on purpose? One family; each message is a sentence for a person."""

import difflib
from collections.abc import Iterable


class HpcmrefError(Exception):
    """Base of every error that hpcmref raises on purpose."""


class FormatError(HpcmrefError):
    """The bytes are not an hpcmref file, or a damaged or truncated one."""


class TruncatedError(FormatError):
    """The file ends too early."""


class UnsupportedError(HpcmrefError):
    """A well-formed file that this version cannot read: a newer format, an unknown arithmetic or flag."""


class ModelMismatchError(HpcmrefError):
    """The file was made with a model that is not the one at hand."""


class DecodeError(HpcmrefError):
    """The decoder's latents are not the ones that the encoder wrote."""


class ImageError(HpcmrefError):
    """An image that cannot be read, or is outside the limits of the format."""


class CheckpointError(HpcmrefError):
    """A checkpoint that is missing, damaged, or not of the preset it should be."""


class ConfigError(HpcmrefError):
    """A setting out of range, or settings that contradict each other."""


class ArgumentTypeError(ConfigError, TypeError):
    """An argument of a type that the function does not take."""


class ModelChangedError(HpcmrefError):
    """The model in memory is not the one that was loaded, or two decoders of one file disagree."""


def near(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: "(did you mean X?)" if one that is known is near, else nothing."""
    found = difflib.get_close_matches(name.lower(), list(known), 1)
    return f" (did you mean {found[0]}?)" if found else ""
