"""Check the arguments of public functions.

Each function returns the checked value. It raises ArgumentTypeError for a wrong type and ConfigError for a wrong value,
as each docstring says. (An ArgumentTypeError is a ConfigError and a TypeError.) The message names the argument, its
value, and the values that are permitted.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import reprlib
from typing import Any

from hpcmref.errors import ArgumentTypeError, ConfigError, HpcmrefError

DEVICES = ("auto", "cpu", "cuda")
_DEVICES = "auto, cpu or cuda"


def wrong_type(name: str, value: object, wanted: str) -> ArgumentTypeError:
    """Return the error for an argument of a wrong type. wanted: the permitted types, in words."""
    kind = type(value)
    known = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return ArgumentTypeError(f"{name} is {_short(value)} of type {known}, and must be {wanted}")


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """Check that an argument is a whole number from `low` to `high` (None: without an upper limit), and not a bool.

    Raises ArgumentTypeError if it is no whole number, and ConfigError if it is outside of the limits.
    """
    wanted = f"a whole number, {low} to {high}" if high is not None else f"a whole number, {low} or more"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise wrong_type(name, value, wanted)
    try:
        number = operator.index(value)
    except TypeError:  # an array of more than one number
        raise wrong_type(name, value, wanted) from None
    if number < low or (high is not None and number > high):
        raise ConfigError(f"{name} is {_short(value)}, and must be {wanted}")
    return number


def positive(name: str, value: object) -> float:
    """Check that an argument is a finite number above 0, and return it as a float.

    Raises ArgumentTypeError if it is no number, and ConfigError if it is not finite or not above 0.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong_type(name, value, "a number above 0")
    try:
        number = float(value)
    except OverflowError:  # a whole number or a fraction that no float can hold
        number = math.inf
    if not (0 < number < math.inf):
        raise ConfigError(f"{name} is {_short(value)}, and must be a finite number above 0")
    return number


def effort(value: object, max_seconds: object) -> int:
    """Check an effort (0 to 9) and the time limit of its search (seconds, or None), and return the effort.

    Raises ArgumentTypeError if one is no number, and ConfigError if one is outside of its limits, or if there is a time
    limit and no search.
    """
    number = integer("effort", value, 0, 9)
    if max_seconds is not None:
        positive("max_seconds", max_seconds)
        if not number:
            raise ConfigError("max_seconds ends a search, and effort 0 does not search: choose an effort of 1 to 9")
    return number


METRICS = ("mse", "ms-ssim")


def metric(value: object, effort: int) -> str:
    """Check the error that a search minimises: one of METRICS. All but the first need an effort above 0.

    Raises ArgumentTypeError if it is no text, and ConfigError if it is not in METRICS, or needs an effort.
    """
    if not isinstance(value, str):
        raise wrong_type("metric", value, " or ".join(METRICS))
    if value not in METRICS:
        raise ConfigError(f"the metric is {value!r:.60}, and must be {' or '.join(METRICS)}")
    if value != METRICS[0] and not effort:
        raise ConfigError("the metric is for a search, and effort 0 does not search: choose an effort of 1 to 9")
    return value


def flag(name: str, value: object) -> bool:
    """Check that an argument is True or False. Raises ArgumentTypeError."""
    if not isinstance(value, bool):
        raise wrong_type(name, value, "True or False")
    return value


def model(value: object) -> str | os.PathLike[str] | None:
    """Check that an argument can be a model: a name, a path, or None. Raises ArgumentTypeError."""
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise wrong_type("model", value, "a name, the path of a .safetensors file, or None")
    return value


def device(value: object) -> str:
    """Check that an argument is one of DEVICES. Raises ArgumentTypeError if it is no text, and else ConfigError."""
    if not isinstance(value, str):
        raise wrong_type("device", value, _DEVICES)
    if value.partition(":")[0] == "mps":
        raise ConfigError("Apple's GPUs (mps) have no float64, which the exact arithmetic needs: use the device cpu")
    if value not in DEVICES:
        raise ConfigError(f"the device is {value!r}, and must be {_DEVICES}")
    return value


def bytes_like(name: str, value: object) -> bytes:
    """Return bytes as they are, and a bytearray or memoryview as a copy. Raises ArgumentTypeError for other types."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    raise wrong_type(name, value, "bytes")


def contents(name: str, source: Any, wanted: str) -> bytes:
    """Return all bytes of a source: bytes, the path of a file, or a file opened in binary mode.

    wanted: the permitted types, in words. Raises ArgumentTypeError if the source has another type or returns text, and
    HpcmrefError if it cannot be read.
    """
    try:
        if isinstance(source, (bytes, bytearray, memoryview)):
            return bytes_like(name, source)
        if isinstance(source, (str, os.PathLike)):
            with open(source, "rb") as file:
                return file.read()
        if not callable(getattr(source, "read", None)):
            raise wrong_type(name, source, wanted)
        data = source.read()
    except OSError as error:
        raise HpcmrefError(f"{name} cannot be read: {_where(source)}{error.strerror or error}") from error
    except UnicodeDecodeError:
        raise ArgumentTypeError(f"{name} is a file that returns text: open it in binary mode") from None
    except ValueError as error:  # a closed file, or a path with a zero byte
        raise HpcmrefError(f"{name} cannot be read: {error}") from error
    if not isinstance(data, (bytes, bytearray)):
        raise ArgumentTypeError(f"{name} is a file that returns {type(data).__name__}: open it in binary mode")
    if not data and _position(source):
        raise HpcmrefError(f"{name} is a file of which nothing is left to read: go to its beginning with seek(0)")
    return bytes(data)


def _position(file: Any) -> int:
    """Return the position in a file, or 0 if it has none, as a pipe."""
    try:
        return int(file.tell())
    except (AttributeError, OSError, ValueError):
        return 0


def _where(source: Any) -> str:
    return f"{os.fspath(source)!s}: " if isinstance(source, (str, os.PathLike)) else ""


def _short(value: object) -> str:
    """Return a short representation of a value, even if its own `__repr__` fails."""
    try:
        return reprlib.repr(value)
    except Exception:
        return "a value"
