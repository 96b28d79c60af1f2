"""Load the codecs that decoding needs, each when the first file asks for it."""

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
    """The codecs of a run, one for each model that has written a file. It can be pickled for worker processes.

    model, device: as in `hpcmref.codec.codec_for`.
    """

    model: str | None
    device: str

    def of(self, file: Container) -> Codec | None:
        """Return the codec of a file, or None for a lossless file. Raises the errors of `codec_for`."""
        if file.learned is None:
            return None
        fingerprint = file.learned.fingerprint
        if fingerprint not in self._loaded:
            with no_search():
                from hpcmref.codec import codec_for  # imports torch: a second, which is wasted on damaged files

                self._loaded[fingerprint] = codec_for(file, self.device, self.model)
        return self._loaded[fingerprint]

    @functools.cached_property
    def _loaded(self) -> dict[bytes, Codec]:
        return {}
