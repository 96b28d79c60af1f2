"""Which networks does a model have? One frozen description, and the presets."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from hpcmref.errors import ConfigError

QUALITIES = 64
"""Quality settings of a variable-rate model: 0 (smallest file) to 63 (best picture)."""


@dataclass(frozen=True)
class HPCMConfig:
    """The shape of one HPCM model. Checked when it is made (ConfigError).

    M and N are the channels of y and z. `stages` describes g_a as (width, blocks) from full to low resolution and
    `synthesis` g_s in the opposite order; `transform` says how they are wired: "conv" is the paper's (halving the
    resolution before every stage), "dct" works at 1/8 resolution and starts as a DCT. `lambdas` are the rate anchors
    of a variable-rate model, ascending; none for a model of one rate.
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

    def __post_init__(self) -> None:
        if self.transform not in ("conv", "dct"):
            raise ConfigError(f"The transform is {self.transform!r}; it must be 'conv' or 'dct'.")
        if self.transform == "dct" and (len(self.stages), len(self.synthesis)) != (1, 1):
            raise ConfigError("The dct transform has exactly one stage.")
        if min(self.M, self.N, self.context_width, self.ratio, self.hyper_ratio) < 1:
            raise ConfigError("Channels and ratios must be positive.")
        if self.M % 8:
            raise ConfigError(f"M = {self.M} must be a multiple of 8: s3 codes 8 channel groups.")
        if self.heads and (2 * self.M) % self.heads:
            raise ConfigError(f"{self.heads} heads do not divide the 2 M = {2 * self.M} context channels.")
        if len(self.lambdas) == 1 or list(self.lambdas) != sorted(set(self.lambdas)):
            raise ConfigError("Rate anchors must be two or more, ascending.")

    @property
    def anchors(self) -> int:
        """Number of rate anchors (1 for a model of one rate)."""
        return max(1, len(self.lambdas))

    @property
    def qualities(self) -> int:
        """Number of quality settings."""
        return QUALITIES if self.lambdas else 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "HPCMConfig":
        """The configuration that `to_dict` wrote. Raises ConfigError on unknown or missing names."""
        names = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ConfigError(f"Unknown model settings: {', '.join(unknown)}.")
        try:
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

PRESETS: dict[str, HPCMConfig] = {
    config.preset: config
    for config in (
        HPCMConfig(
            preset="nano", M=320, N=64, transform="dct", stages=((192, 3),), synthesis=((192, 3),), ratio=3,
            hyper_blocks=1, hyper_ratio=2, context_width=192, prior_s1_s2=(1, 1), prior_s3=(1, 1), heads=8,
            lambdas=_LAMBDAS,
        ),
        HPCMConfig(
            preset="light", M=320, N=128, transform="dct", stages=((256, 4),), synthesis=((256, 6),), ratio=4,
            hyper_blocks=2, hyper_ratio=2, context_width=320, prior_s1_s2=(2, 1), prior_s3=(2, 1), heads=16,
            lambdas=_LAMBDAS,
        ),
        _official("base", 4, (2, 1), (3, 2), 32),
        _official("large", 8, (2, 2), (4, 3), 32),
        _official("phi", 4, (2, 1), (3, 2), 0),
    )
}  # fmt: skip
