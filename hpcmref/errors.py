"""The errors that hpcmref raises on purpose. All have one base class, and each message is one sentence for a person."""

import difflib
from collections.abc import Iterable


class HpcmrefError(Exception):
    """Base class of all errors that hpcmref raises on purpose."""


class FormatError(HpcmrefError):
    """The bytes are not an hpcmref file, or the file is damaged or truncated."""


class TruncatedError(FormatError):
    """The file ends too early."""


class UnsupportedError(HpcmrefError):
    """The file is valid, but this version cannot read it, since its format, arithmetic or a flag is unknown."""


class ModelMismatchError(HpcmrefError):
    """Another model than the given one has made the file, or the model of the file is not installed."""


class DecodeError(HpcmrefError):
    """The decoded latents or pixels are not those that were encoded."""


class ImageError(HpcmrefError):
    """The image cannot be read, or it is outside the limits of the format."""


class CheckpointError(HpcmrefError):
    """A model file is missing or damaged, or its architecture is not the expected one."""


class ConfigError(HpcmrefError):
    """An argument or a setting is out of range, or two settings contradict each other."""


class ArgumentTypeError(ConfigError, TypeError):
    """An argument has a type that the function does not take."""


class UnknownModelError(CheckpointError, ConfigError):
    """No model has the given name."""


class ModelChangedError(HpcmrefError):
    """The weights in memory have changed since they were loaded, or two decoders of one file disagree."""


def near(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the known name that is most similar to `name`, or "" if none is similar."""
    found = difflib.get_close_matches(name.lower(), list(known), 1)
    return f" (did you mean {found[0]}?)" if found else ""
