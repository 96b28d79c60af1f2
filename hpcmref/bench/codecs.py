"""The codecs that can be measured. All have the interface `Codec`: qualities, encode and decode.

A codec is a frozen dataclass, so that it can be sent to other processes, and its repr shows all settings. Networks are
loaded on first use and kept.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image, features
from PIL import __version__ as pillow_version

from hpcmref._version import __version__
from hpcmref.errors import ConfigError, near

Choices = range | tuple[str, ...]
"""The permitted values of an option of a codec: whole numbers, or words."""

if TYPE_CHECKING:
    from hpcmref.codec import Codec as Network


class Codec(Protocol):
    """A codec that can be measured."""

    @property
    def name(self) -> str:
        """The name of the codec in tables and figures."""

    @property
    def identity(self) -> str:
        """Name, version and settings in one line. It differs whenever the files might differ."""

    @property
    def device(self) -> str:
        """Where the codec computes: "cpu", "cuda", or "process" for programs in processes of their own."""

    @property
    def default_qualities(self) -> tuple[int, ...]:
        """The qualities that are measured by default, from the smallest file to the best picture."""

    @property
    def qualities(self) -> range:
        """All qualities."""

    @property
    def rising(self) -> bool | None:
        """Whether a higher quality gives a larger file, or None if that is unknown."""

    def encode(self, image: Image.Image, quality: int) -> bytes:
        """Encode an image of mode RGB or L, and return the bytes of the file in host memory."""

    def decode(self, data: bytes) -> Image.Image:
        """Decode a file, and return the image with its pixels in host memory."""


@dataclass(frozen=True)
class PillowCodec:
    """A format that Pillow encodes and decodes in memory.

    label: the name of the codec. form: Pillow's name of the format.
    known: the options that may be changed, and their permitted values.
    options: Pillow's save options by default. changed: options that were set on the command line, and replace them.
    """

    label: str
    form: str
    qualities: range
    default_qualities: tuple[int, ...]
    known: Mapping[str, Choices]
    options: Mapping[str, Any] = field(default_factory=dict)
    changed: Mapping[str, Any] = field(default_factory=dict)
    device = "cpu"
    rising = True

    @property
    def name(self) -> str:
        """The label, and the options that differ from their defaults."""
        changed = {key: int(value) if isinstance(value, bool) else value for key, value in self.changed.items()}
        return " ".join([self.label, *(f"{key}={value}" for key, value in changed.items())])

    @property
    def identity(self) -> str:
        """The library with its version and all save options."""
        settings = {**self.options, **self.changed}
        return f"{self.label} {_library_version(self.form)} {settings}"

    def encode(self, image: Image.Image, quality: int) -> bytes:
        """See Codec."""
        _register(self.form)
        file = io.BytesIO()
        image.save(file, self.form, quality=quality, **{**self.options, **self.changed})
        return file.getvalue()

    def decode(self, data: bytes) -> Image.Image:
        """See Codec."""
        _register(self.form)
        image = Image.open(io.BytesIO(data), formats=[self.form])
        image.load()
        return image

    def with_options(self, changed: Mapping[str, str]) -> PillowCodec:
        """Return the same codec with other save options of Pillow.

        Raises ConfigError for an option or a value that the codec does not have.
        """
        values = {key: self._value(key, text) for key, text in changed.items()}
        codec = replace(self, changed=values)
        try:
            codec.decode(codec.encode(Image.new("RGB", (16, 16)), self.default_qualities[0]))
        except Exception as error:
            raise ConfigError(f"{codec.name}: Pillow refuses these options: {error}") from error
        return codec

    def _value(self, key: str, text: str) -> bool | int | str:
        choices = self.known.get(key)
        if choices is None:
            near = difflib.get_close_matches(key, self.known, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(self.known)}"
            raise ConfigError(f"{self.label} has no option {key!r} here: {hint}")
        if isinstance(choices, range):
            if text.isdecimal() and int(text) in choices:
                return bool(int(text)) if choices == _SWITCH else int(text)
            raise ConfigError(f"{self.label} {key}={text}: it must be {choices[0]} to {choices[-1]}")
        if text in choices:
            return text
        raise ConfigError(f"{self.label} {key}={text}: it must be one of {', '.join(choices)}")


_SWITCH = range(2)
"""The values of an option that is off or on, which Pillow's plugins expect as a bool."""

# Each format has the strongest settings that take seconds, and not minutes, for an image.
PILLOW_CODECS = {
    "jpeg": PillowCodec(
        "JPEG", "JPEG", range(1, 101), (8, 15, 25, 40, 60, 80, 90),
        {"optimize": _SWITCH, "progressive": _SWITCH, "subsampling": ("4:4:4", "4:2:2", "4:2:0")},
        {"optimize": True, "progressive": True, "subsampling": "4:2:0"},
    ),
    "webp": PillowCodec(
        "WebP", "WEBP", range(101), (1, 10, 25, 50, 75, 90), {"method": range(7), "lossless": _SWITCH}, {"method": 6}
    ),
    "avif": PillowCodec(
        "AVIF", "AVIF", range(101), (12, 20, 30, 42, 55, 68, 80),
        {
            "speed": range(11),
            "subsampling": ("4:4:4", "4:2:2", "4:2:0", "4:0:0"),
            "codec": ("auto", "aom", "rav1e", "svt"),
            "range": ("full", "limited"),
            "max_threads": range(1, 257),
            "tile_rows": range(7),
            "tile_cols": range(7),
            "autotiling": _SWITCH,
        },
        {"speed": 4, "subsampling": "4:4:4"},
    ),
    "jxl": PillowCodec(
        "JPEG XL", "JXL", range(101), (10, 25, 40, 55, 70, 82, 90),
        {"effort": range(1, 11), "decoding_speed": range(5), "lossless": _SWITCH}, {"effort": 7},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class HpcmrefCodec:
    """The codec of hpcmref with one model, or with several models of one rate each.

    label: the name of the codec.
    models: one model, or several from the lowest rate to the highest. With several, quality k means the k-th model.
    device: "cpu" or "cuda".
    choose: let the encoder use a lossless stream where that is better, as `hpcmref encode` does.
    effort: how long encoding searches, 0 to 9.
    """

    label: str
    models: tuple[str, ...]
    device: str
    choose: bool = False
    effort: int = 0
    rising = True

    @property
    def name(self) -> str:
        """The label, and the options that differ from their defaults."""
        return self.label + self._options

    @property
    def identity(self) -> str:
        """The version of hpcmref, the models with their digests, and the options."""
        models = " ".join(_digest(model) for model in self.models)
        return f"hpcmref {__version__} {models}{self._options}"

    @property
    def _options(self) -> str:
        return " choose=1" * self.choose + (f" effort={self.effort}" if self.effort else "")

    @property
    def qualities(self) -> range:
        """Every quality of the model, or the position of every model of one quality."""
        if len(self.models) > 1:
            return range(len(self.models))
        return range(_network(self.models[0], self.device).model.config.qualities)

    @property
    def default_qualities(self) -> tuple[int, ...]:
        """See Codec."""
        every = self.qualities
        return tuple(range(0, 64, 9)) if len(every) == 64 else tuple(every)

    def encode(self, image: Image.Image, quality: int) -> bytes:
        """See Codec."""
        network = _network(self.models[quality if len(self.models) > 1 else 0], self.device)
        own = None if network.model.config.qualities == 1 else quality
        return network.encode(image, own, choose=self.choose, effort=self.effort)

    def decode(self, data: bytes) -> Image.Image:
        """See Codec."""
        from hpcmref.format.container import parse

        file = parse(data)
        fingerprint = b"" if file.learned is None else file.learned.fingerprint
        networks = [_network(model, self.device) for model in self.models]
        return next((each for each in networks if each.fingerprint == fingerprint), networks[0]).decode(file)


@functools.cache
def _network(model: str, device: str) -> Network:
    # `codec.load` would keep only two models, and a run may use more of them in turn for every image.
    from hpcmref.codec import fresh

    return fresh(model, device)


@functools.cache
def _digest(model: str) -> str:
    from hpcmref.checkpoints import find

    path = find(model)
    return f"{path.stem} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


@functools.cache
def _library_version(form: str) -> str:
    """Return the version of the library that Pillow uses for a format."""
    if form == "JXL":
        import importlib.metadata

        return f"pillow-jxl-plugin {importlib.metadata.version('pillow-jxl-plugin')}"
    name = {"JPEG": "libjpeg_turbo", "WEBP": "webp", "AVIF": "avif"}[form]
    return f"Pillow {pillow_version} {name} {features.version(name) or ''}".strip()


@functools.cache
def _register(form: str) -> None:
    if form == "JXL":
        import pillow_jxl  # noqa: F401  registers the format with Pillow


def available() -> list[str]:
    """Return the names of the codecs that are available here, hpcmref first."""
    return ["hpcmref", *(name for name in PILLOW_CODECS if _is_here(name))]


def _is_here(name: str) -> bool:
    if name == "jxl":
        return importlib.util.find_spec("pillow_jxl") is not None
    return name == "jpeg" or bool(features.check(name))


def codecs_of(names: Sequence[str], models: Sequence[str], device: str) -> list[Codec]:
    """Make the codecs of a command line.

    names: "hpcmref" (one codec for each of `models`), "jpeg", "webp", "avif" or "jxl". Save options of Pillow may
    follow,
        as in "avif:speed=0+subsampling=4:2:0".
    models: the name of a model, a file, NAME=FILE for another name, or NAME=FILE+FILE+... for models of one rate that
        make one curve.
    device: "auto", "cpu" or "cuda".

    Raises ConfigError for unknown or repeated codecs and options, and CheckpointError for models.
    """
    chosen: list[Codec] = []
    for text in names:
        name, colon, options = text.strip().partition(":")
        if name.lower() == "hpcmref":
            own = _own_options(_options(options)) if colon else {}
            where = _resolved(device)
            chosen += [replace(_hpcmref(model, where), **own) for model in models]
        elif (codec := PILLOW_CODECS.get(name.lower())) is None:
            hint = near(name, available())
            raise ConfigError(f"there is no codec {name!r}; the codecs here are {', '.join(available())}{hint}")
        elif not _is_here(name.lower()):
            how = "pip install pillow-jxl-plugin" if name.lower() == "jxl" else "this build of Pillow lacks it"
            raise ConfigError(f"the codec {name} is not installed: {how}")
        else:
            chosen.append(codec.with_options(_options(options)) if colon else codec)
    return distinct(chosen)


def distinct(codecs: Sequence[Codec]) -> list[Codec]:
    """Return the codecs as a list. Raises ConfigError if two of them have the same name."""
    names = [codec.name for codec in codecs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{twice[0]} is given twice")
    return list(codecs)


def _hpcmref(text: str, device: str) -> HpcmrefCodec:
    from hpcmref.checkpoints import find

    label, equals, files = text.strip().partition("=")
    models = tuple((files if equals else text.strip()).split("+"))
    paths = [find(model) for model in models]
    codec = HpcmrefCodec(f"hpcmref {label if equals else paths[0].stem}", models, device)
    if len(models) > 1:
        for model in models:
            if _network(model, device).model.config.qualities > 1:
                raise ConfigError(f"{model} has many rates, so it cannot be one point of {label}")
    return codec


def _own_options(texts: Mapping[str, str]) -> dict[str, Any]:
    """Parse the options of hpcmref: "choose" 0 or 1, "effort" 0 to 9. Raises ConfigError."""
    highest = {"choose": 1, "effort": 9}
    if not all(text.isdecimal() and int(text) <= highest.get(name, -1) for name, text in texts.items()):
        raise ConfigError("hpcmref has the options choose=1 and effort=0 to effort=9; choose models with --models")
    return {name: bool(int(text)) if name == "choose" else int(text) for name, text in texts.items()}


def _resolved(device: str) -> str:
    """Return "cpu" or "cuda" for a device, which may be "auto"."""
    from hpcmref.codec import device_of

    return device_of(device).type


def _options(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split("+")]
    if not all(key and equals for key, equals, _ in pairs):
        raise ConfigError(f"{text!r} are not options: write KEY=VALUE, joined by +")
    keys = [key for key, _, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"{text!r}: {twice[0]} is given twice")
    return {key: value for key, _, value in pairs}


def qualities_of(texts: Sequence[str], codecs: Sequence[Codec]) -> dict[str, tuple[int, ...]]:
    """Return the qualities to measure by codec name, in ascending order.

    texts: the values of --qualities. "LIST" is for all hpcmref models, and "NAME=LIST" for the codecs of that name or
        label (case is ignored). See `numbers_of` for LIST.
    codecs: all codecs of the run. Those that no text names have their default qualities.

    Raises ConfigError for an unknown codec or a quality that a codec does not have.
    """
    chosen = {codec.name: codec.default_qualities for codec in codecs}
    for text in texts:
        name, equals, numbers = text.rpartition("=")
        prefix = name.strip().lower() if equals else "hpcmref"
        meant = [codec for codec in codecs if _means(prefix, codec)]
        if not meant and equals:
            raise ConfigError(f"--qualities {text}: no codec of this run is called {name}")
        for codec in meant:
            wanted = numbers_of(numbers)
            if bad := sorted(set(wanted) - set(codec.qualities)):
                least, most = codec.qualities[0], codec.qualities[-1]
                raise ConfigError(f"quality {bad[0]} of {codec.name}: it must be {least} to {most}")
            chosen[codec.name] = wanted
    return chosen


def _means(prefix: str, codec: Codec) -> bool:
    if prefix == "hpcmref" and isinstance(codec, HpcmrefCodec):
        return len(codec.models) == 1 and len(codec.qualities) > 1  # codecs of several models have one quality for each
    # "jpeg" is not "jpeg xl", but "avif" is "avif speed=0" too
    if codec.name.lower() == prefix:
        return True
    return isinstance(codec, PillowCodec) and codec.label.lower() == {"jxl": "jpeg xl"}.get(prefix, prefix)


def numbers_of(text: str) -> tuple[int, ...]:
    """Parse a list of whole numbers, and return them in ascending order. Raises ConfigError.

    The list consists of numbers and ranges FIRST:LAST:STEP (LAST included), separated by commas: "10,25,50", "0:63:9".
    """
    numbers: set[int] = set()
    try:
        for part in text.split(","):
            bounds = [int(number) for number in part.split(":")]
            if len(bounds) == 1:
                numbers.add(bounds[0])
            else:
                first, last, step = bounds if len(bounds) == 3 else (*bounds, 1)
                numbers |= set(range(first, last + 1, step))
    except ValueError:
        numbers = set()
    if not numbers:
        raise ConfigError(f"{text!r} is not a list of qualities: write 10,25,50 or 0:63:9")
    return tuple(sorted(numbers))
