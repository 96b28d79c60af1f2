"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from hpcmref.errors import HpcmrefError


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that at every moment its old content or all of `data` is there, and never a part.

    Links are followed; pipes and devices are written to, not replaced. Raises HpcmrefError if the folder is missing, is
    full, or may not be written to; whatever ends the write early, no temporary file stays behind.
    """
    target = path.resolve()
    temporary = target.with_name(f".hpcmref-{secrets.token_hex(8)}.tmp")
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(data)
            return
        try:
            temporary.write_bytes(data)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise HpcmrefError(f"cannot write {path}: {error.strerror or error}") from error
