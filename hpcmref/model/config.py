"""The configuration of a model, which determines its networks, and the presets."""

from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from hpcmref.errors import ConfigError

T = TypeVar("T", "MemoryConfig", "HPCMConfig")

MAX_CHANNELS, MAX_BLOCKS, MAX_FACTOR, MAX_HEADS, MAX_WINDOW, MAX_ANCHORS = 4096, 32, 16, 256, 32, 64
"""Upper limits of a configuration: channels (a fourth of it for M and N), consecutive residual blocks, expansion
factors of blocks, attention heads, sides of windows, and quality anchors. A model file that exceeds one of them is
refused before networks are made."""

MAX_SCORES = 2**25
"""Limit of the float32 scores of one attention window: heads x queries x keys. (The largest preset has 2^17.)"""

MAX_REFERENCES, MAX_RESOLUTION, MAX_STATE = 16, 32, 1024
"""Limits of a memory bank: references kept, cells a side of a plane of values, channels of a state (docs/limits.md)."""

QUALITIES = 64
"""Quality settings of a variable-rate model: 0 (smallest file) to 63 (best picture)."""


@dataclass(frozen=True)
class MemoryConfig:
    """The configuration of a memory bank (see `memory_bank.py`). Making an invalid one raises ConfigError.

    mode: one of the modes that `memory_bank.py` describes. Some settings are used by the modes in brackets only.
    scales: which of s1, s2 and s3 have a bank.
    transfer: the bank of a scale starts with the references of the scale before.
    before_prior: the bank is read just before the prior. What it recalls then goes into the prior only, and not into
        the context that attention reads.
    max_refs, topk: the numbers of references kept and recalled in s1, s2 and s3 (light, full). cross recalls all the
        references that it keeps.
    compress_ratio: keys have the number of channels of a context divided by this (all modes but state).
    temperature: similarities are divided by it (light, full).
    value_resolution: the cells a side of a plane of values (full, linear).
    feature_map: the feature map of linear attention (linear).
    per_position: references are chosen for every position, and not once for the whole image (light, full).
    width: the number of channels of the state (state). This mode has a state in all scales and uses no other number.
    """

    mode: str
    scales: tuple[int, ...] = (3,)
    transfer: bool = False
    before_prior: bool = False
    max_refs: tuple[int, int, int] = (2, 3, 4)
    topk: tuple[int, int, int] = (1, 2, 2)
    compress_ratio: int = 4
    temperature: float = 0.1
    num_heads: int = 8
    value_resolution: int = 8
    feature_map: str = "elu"
    per_position: bool = False
    width: int = 64

    def __post_init__(self) -> None:
        self._check_limits()
        if self.mode not in ("state", "light", "full", "linear", "global", "cross"):
            raise ConfigError(
                f"The memory bank is {self.mode!r:.40}; it must be state, light, full, linear, global or cross."
            )
        if not self.scales or list(self.scales) != sorted(set(self.scales)) or not {1, 2, 3} >= set(self.scales):
            raise ConfigError(f"The memory bank's scales are {self.scales}; they must be of 1, 2 and 3, ascending.")
        if self.before_prior and 1 in self.scales:
            raise ConfigError("There is nothing to read before the prior of s1: it has one.")
        if self.mode == "state" and (self.scales, self.transfer) != ((1, 2, 3), True):
            raise ConfigError("A state runs through all scales: they are 1, 2 and 3, with transfer.")
        if self.transfer and (self.mode == "cross" or self.scales not in ((1, 2, 3), (2, 3), (1, 2))):
            raise ConfigError("Transfer is between scales that follow each other, and not with the mode cross.")
        if any(topk > max_refs for topk, max_refs in zip(self.topk, self.max_refs, strict=True)):
            raise ConfigError(f"topk {self.topk} is more than max_refs {self.max_refs}.")
        if self.feature_map not in ("elu", "relu"):
            raise ConfigError(f"The feature map is {self.feature_map!r:.40}; it must be 'elu' or 'relu'.")

    def _check_limits(self) -> None:
        """Check types and ranges, since the values may come from a file."""
        for name in ("transfer", "before_prior", "per_position"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"The memory bank's {name} must be true or false.")
        if not isinstance(self.scales, tuple) or len(self.scales) > 3:
            raise ConfigError("The memory bank's scales must be some of 1, 2 and 3.")
        for value in self.scales:
            _check_whole("a scale of the memory bank", value, 1, 3)
        for name in ("max_refs", "topk"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != 3:
                raise ConfigError("max_refs and topk are three numbers: of s1, s2 and s3.")
            for value in values:
                _check_whole(name, value, 1, MAX_REFERENCES)
        for name, high in (
            ("compress_ratio", MAX_CHANNELS), ("num_heads", MAX_HEADS), ("value_resolution", MAX_RESOLUTION),
            ("width", MAX_STATE),
        ):  # fmt: skip
            _check_whole(f"The memory bank's {name}", getattr(self, name), 1, high)
        if type(self.temperature) not in (int, float) or not 0.001 <= self.temperature <= 1000:
            raise ConfigError(
                f"The memory bank's temperature is {self.temperature!r:.40}; it must be within 0.001 to 1000."
            )


_YOUNGER = ("width",)
"""Settings of a memory bank that model files of 0.1.0 do not have."""


@dataclass(frozen=True)
class HPCMConfig:
    """The configuration of one HPCM model. Making an invalid one raises ConfigError.

    M and N are the numbers of channels of y and z. `stages` describes g_a by the width and the number of blocks of each
    stage, from high to low resolution. `synthesis` describes g_s in the opposite order. `transform` selects their
    architecture: "conv" is the paper's, which halves the resolution before every stage; "dct" works at 1/8 of the
    resolution and is initialised as a DCT. `lambdas` are the quality anchors of a variable-rate model, ascending; a
    model of one rate has none. Without `memory` the model is plain HPCM.
    """

    preset: str
    M: int
    N: int
    transform: str
    stages: tuple[tuple[int, int], ...]
    synthesis: tuple[tuple[int, int], ...]
    ratio: int
    hyper_blocks: int
    hyper_ratio: int
    context_width: int
    prior_s1_s2: tuple[int, int]
    prior_s3: tuple[int, int]
    heads: int
    windows: tuple[int, int, int] = (4, 8, 8)
    displaced_s2: bool = False
    lambdas: tuple[float, ...] = ()
    memory: MemoryConfig | None = None

    def __post_init__(self) -> None:
        self._check_limits()
        if self.transform not in ("conv", "dct"):
            raise ConfigError(f"The transform is {self.transform!r:.40}; it must be 'conv' or 'dct'.")
        if self.transform == "dct" and (len(self.stages), len(self.synthesis)) != (1, 1):
            raise ConfigError("The dct transform has exactly one stage.")
        if min(self.M, self.N, self.context_width, self.ratio, self.hyper_ratio) < 1:
            raise ConfigError("Channels and ratios must be positive.")
        if self.M % 8:
            raise ConfigError(f"M = {self.M} must be a multiple of 8: s3 codes 8 channel groups.")
        if self.heads and (2 * self.M) % self.heads:
            raise ConfigError(f"{self.heads} heads do not divide the 2 M = {2 * self.M} context channels.")
        for window in self.windows:
            _check_scores(self.heads, window, 1)
        if len(self.lambdas) == 1 or list(self.lambdas) != sorted(set(self.lambdas)):
            raise ConfigError("Quality anchors must be two or more, ascending.")
        if self.memory is not None:
            self._check_memory(self.memory)

    def _check_limits(self) -> None:
        """Check types and ranges, since the values may come from a file."""
        if not isinstance(self.preset, str) or len(self.preset) > 64:
            raise ConfigError("The preset's name must be a text of at most 64 characters.")
        for name in ("M", "N"):
            _check_whole(name, getattr(self, name), 4, MAX_CHANNELS // 4)
        _check_whole("context_width", self.context_width, 4, MAX_CHANNELS)
        for name, low in (("ratio", 1), ("hyper_ratio", 1)):
            _check_whole(name, getattr(self, name), low, MAX_FACTOR)
        _check_whole("hyper_blocks", self.hyper_blocks, 0, MAX_BLOCKS)
        _check_whole("heads", self.heads, 0, MAX_HEADS)
        for name, count, low, high in (
            ("prior_s1_s2", 2, 0, MAX_BLOCKS), ("prior_s3", 2, 0, MAX_BLOCKS), ("windows", 3, 1, MAX_WINDOW)
        ):  # fmt: skip
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != count:
                raise ConfigError(f"{name} must be {count} numbers.")
            for value in values:
                _check_whole(name, value, low, high)
        for name in ("stages", "synthesis"):
            stages = getattr(self, name)
            if not isinstance(stages, tuple) or not 1 <= len(stages) <= 3:
                raise ConfigError(f"{name} must be one to three pairs of width and blocks.")
            for stage in stages:
                if not isinstance(stage, tuple) or len(stage) != 2:
                    raise ConfigError(f"{name} must be one to three pairs of width and blocks.")
                _check_whole(f"a width of {name}", stage[0], 4, MAX_CHANNELS // 4)
                _check_whole(f"the blocks of {name}", stage[1], 0, MAX_BLOCKS)
        if not isinstance(self.lambdas, tuple) or len(self.lambdas) > MAX_ANCHORS:
            raise ConfigError(f"lambdas must be at most {MAX_ANCHORS} numbers.")
        if not all(type(each) in (int, float) and 1e-9 <= each <= 1e9 for each in self.lambdas):
            raise ConfigError("Every lambda must be a number within 1e-9 to 1e9.")
        if not isinstance(self.displaced_s2, bool):
            raise ConfigError("displaced_s2 must be true or false.")
        if not isinstance(self.memory, MemoryConfig | None):
            raise ConfigError("The memory bank must be a MemoryConfig.")

    def _check_memory(self, memory: MemoryConfig) -> None:
        if memory.mode == "state":
            return
        narrow, rest = divmod(2 * self.M, memory.compress_ratio)
        if rest:
            raise ConfigError(f"compress_ratio {memory.compress_ratio} does not divide the {2 * self.M} channels.")
        if memory.mode in ("linear", "global", "cross") and narrow % memory.num_heads:
            raise ConfigError(f"num_heads {memory.num_heads} does not divide the {narrow} channels of keys.")
        if memory.mode == "cross":
            for scale in memory.scales:
                _check_scores(memory.num_heads, self.windows[scale - 1], memory.max_refs[scale - 1])

    @property
    def anchors(self) -> int:
        """Number of quality anchors (1 for a model of one rate)."""
        return max(1, len(self.lambdas))

    @property
    def qualities(self) -> int:
        """Number of quality settings."""
        return QUALITIES if self.lambdas else 1

    @property
    def state_width(self) -> int:
        """Channels of the state that each coding step passes to the next; 0 for a model without a state."""
        return self.memory.width if self.memory is not None and self.memory.mode == "state" else 0

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary for JSON; `from_dict` is the inverse.

        The entry "memory" is left out if there is no memory. Settings that are newer than the first model files
        (`_YOUNGER`) are left out if they have their defaults: a model's fingerprint depends on this form, and must not
        change.
        """
        values = asdict(self)
        if self.memory is None:
            del values["memory"]
            return values
        for name in _YOUNGER:
            if values["memory"][name] == MemoryConfig.__dataclass_fields__[name].default:
                del values["memory"][name]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "HPCMConfig":
        """The configuration that `to_dict` wrote. Raises ConfigError on unknown or missing names."""
        if isinstance(values, dict) and values.get("memory") is not None:
            values = {**values, "memory": _made(MemoryConfig, values["memory"])}
        return _made(cls, values)


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    """Raise ConfigError unless a value is an integer within the range."""
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r:.40}; it must be an integer from {low} to {high}.")


def _check_scores(heads: int, window: int, contexts: int) -> None:
    if (scores := heads * window**4 * contexts) > MAX_SCORES:
        raise ConfigError(f"A window of attention has {scores} scores; it may have {MAX_SCORES}.")


def _made(cls: type[T], values: Any) -> T:
    """Make a configuration from a dictionary of JSON values. Raises ConfigError."""
    if not isinstance(values, dict):
        raise ConfigError("Not a model configuration: it must be names with their values.")
    try:
        if unknown := sorted(set(values) - set(cls.__dataclass_fields__)):
            raise ConfigError(f"Unknown model settings: {', '.join(unknown):.100}.")
        return cls(**{name: _tuples(value) for name, value in values.items()})
    except TypeError as error:
        raise ConfigError(f"Not a model configuration: {error}.") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _official(
    preset: str, deep: int, prior_s1_s2: tuple[int, int], prior_s3: tuple[int, int], heads: int
) -> HPCMConfig:
    shallow: tuple[tuple[int, int], ...] = ((96, 2), (192, 2))
    return HPCMConfig(
        preset=preset, M=320, N=256, transform="conv",
        stages=(*shallow, (384, deep)), synthesis=((384, deep), *reversed(shallow)), ratio=4,
        hyper_blocks=3, hyper_ratio=4, context_width=960, prior_s1_s2=prior_s1_s2, prior_s3=prior_s3, heads=heads,
        displaced_s2=True,
    )  # fmt: skip


# Lambdas are log-spaced over the range that covers about 0.05 to 1.5 bits per pixel on photographs.
_LAMBDAS = tuple(round(0.0009 * (0.15 / 0.0009) ** (k / 7), 6) for k in range(8))

_EVERYWHERE: dict[str, Any] = {"scales": (1, 2, 3), "transfer": True}

MEMORY_BANKS: dict[str, MemoryConfig] = {
    "state": MemoryConfig("state", **_EVERYWHERE),
    "light": MemoryConfig("light"),
    "full": MemoryConfig("full", **_EVERYWHERE),
    "linear": MemoryConfig("linear", **_EVERYWHERE),
    "global": MemoryConfig("global"),
    "cross": MemoryConfig("cross"),
    "memory-saving": MemoryConfig("light", compress_ratio=8, max_refs=(2, 2, 2)),
    "accurate": MemoryConfig("light", compress_ratio=2, max_refs=(6, 6, 6), topk=(3, 3, 3)),
    "fast": MemoryConfig("light", topk=(1, 1, 1), temperature=0.05),
}
"""Every mode with its usual numbers, and three presets of the mode light."""

PRESETS: dict[str, HPCMConfig] = {
    config.preset: config
    for config in (
        HPCMConfig(
            preset="nano", M=320, N=64, transform="dct", stages=((192, 4),), synthesis=((192, 4),), ratio=3,
            hyper_blocks=1, hyper_ratio=2, context_width=192, prior_s1_s2=(2, 1), prior_s3=(2, 1), heads=0,
            lambdas=_LAMBDAS, memory=MEMORY_BANKS["state"],
        ),
        HPCMConfig(
            preset="light", M=320, N=64, transform="dct", stages=((256, 4),), synthesis=((256, 6),), ratio=4,
            hyper_blocks=2, hyper_ratio=2, context_width=320, prior_s1_s2=(3, 1), prior_s3=(3, 1), heads=0,
            lambdas=_LAMBDAS, memory=MEMORY_BANKS["state"],
        ),
        _official("base", 4, (2, 1), (3, 2), 32),
        _official("large", 8, (2, 2), (4, 3), 32),
        _official("phi", 4, (2, 1), (3, 2), 0),
    )
}  # fmt: skip
