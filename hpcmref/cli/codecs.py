"""The codecs that decode files, each loaded when the first file needs it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpcmref.runtime.heap import no_search

if TYPE_CHECKING:
    from hpcmref.codec import Codec
    from hpcmref.format.container import Container


@dataclass(frozen=True)
class Codecs:
    """One codec for each model that has written a file; can be sent to another process.

    model, device: as for `hpcmref.codec.codec_for`.
    """

    model: str | None
    device: str

    def of(self, file: Container) -> Codec | None:
        """The codec of a file, or None for one without a learned payload. Raises as `codec_for` does."""
        if file.learned is None:
            return None
        fingerprint = file.learned.fingerprint
        if fingerprint not in self._loaded:
            with no_search():
                from hpcmref.codec import codec_for  # torch takes a second: not for a file that turns out to be damaged

                self._loaded[fingerprint] = codec_for(file, self.device, self.model)
        return self._loaded[fingerprint]

    @functools.cached_property
    def _loaded(self) -> dict[bytes, Codec]:
        return {}
