"""Write files so that they appear completely or not at all.

`atomic_write` writes a temporary file in the same folder, flushes it to the disk, and renames it. Pipes, devices and
open file descriptors must be written to and not be replaced by a new file, so they are opened directly.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import sys
import time
from pathlib import Path

from hpcmref.errors import HpcmrefError

_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_MAX_LINKS = 40  # the limit of the Linux kernel
_LONGEST = 259
"""Characters of a path on Windows that does not begin with \\\\?\\."""
_PAUSES = (0.05, 0.1, 0.2, 0.4)
"""Seconds between attempts to rename a file on Windows."""


def atomic_write(path: Path, data: bytes, modified: int | None = None) -> None:
    """Write a file so that at every moment it has either its old content or all of `data`.

    A new file gets the permissions that the umask leaves. A replaced file keeps its permissions, and its owner where
    the system allows it. Symbolic links are followed. A hard link is broken: its other names keep the old content.

    modified: the time of modification in ns since 1970; None means now.

    Raises HpcmrefError if the folder is missing or not writable, or the disk is full. The temporary file is always
    removed, except if the process is killed.
    """
    try:
        if (descriptor := descriptor_of(path)) is not None:
            with open(os.dup(descriptor), "wb") as file:
                file.write(data)
            return
        target = Path(os.path.realpath(path))
        if target.is_symlink():  # it leads back to itself
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if is_special(target):
            target.write_bytes(data)
        else:
            _replace(_without_limit(target), data, modified)
    except OSError as error:
        raise HpcmrefError(f"cannot write {path}: {error.strerror or error}") from error


def descriptor_of(path: Path) -> int | None:
    """Return the number of the open file that a path names (/dev/stdout, /dev/fd/3, or a link to one), or None.

    Such a path must not be resolved: it may lead to a regular file that the shell has redirected the output to, and
    replacing that file would lose what others have written to it.
    """
    name = os.path.abspath(path)
    for _ in range(_MAX_LINKS):
        if name in _STANDARD:
            return _STANDARD[name]
        if match := re.fullmatch(rf"(?:/dev|/proc/(?:self|{os.getpid()}))/fd/(\d+)", name):
            return int(match[1])
        try:
            name = os.path.normpath(os.path.join(os.path.dirname(name), os.readlink(name)))
        except (OSError, ValueError):
            return None
    return None


def is_special(path: Path) -> bool:
    """Return whether a path, followed through links, names a pipe, a socket, a device or an open file descriptor.

    Open file descriptors have paths such as /dev/fd/3 and /dev/stdout. A path that does not exist is not special.
    """
    if descriptor_of(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_closed_pipe(error: OSError) -> bool:
    """Whether a write failed because nobody reads the pipe any more: EPIPE, or on Windows EINVAL.

    EINVAL with the name of a file is another error: the name is one that Windows does not allow.
    """
    invalid = sys.platform == "win32" and error.errno == errno.EINVAL and error.filename is None
    return invalid or isinstance(error, BrokenPipeError)


def _replace(target: Path, data: bytes, modified: int | None) -> None:
    """Write a temporary file next to `target`, and rename it to `target`."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    old = target.stat() if target.exists() else None
    temporary = target.with_name(f".hpcmref-{secrets.token_hex(8)}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        # The temporary file must not be readable to anyone who cannot read the file that it replaces.
        with open(os.open(temporary, flags, 0o666 if old is None else 0o600), "wb") as file:
            file.write(data)
            file.flush()
            if old is not None:
                _take_over(temporary, old)
            os.fsync(file.fileno())
        if modified is not None:
            os.utime(temporary, ns=(modified, modified))
        _rename(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.chmod(temporary, 0o600)  # Windows removes no file that is read-only, as the old one may have been
            temporary.unlink()
        raise
    _flush_folder(target.parent)


def _rename(path: Path, target: Path) -> None:
    """As os.replace. Windows refuses while a virus scanner or an indexer has one of both open: it is asked again."""
    for pause in _PAUSES if sys.platform == "win32" else ():
        try:
            os.replace(path, target)
            return
        except PermissionError:
            time.sleep(pause)
    os.replace(path, target)


def _without_limit(target: Path) -> Path:
    """On Windows, an absolute path in the form that may have more than 260 characters, if it or the longer name of the
    temporary file comes near that; elsewhere the same path.
    """
    text = str(target)
    longest = len(text) + len(".hpcmref-0123456789abcdef.tmp")
    if sys.platform != "win32" or longest <= _LONGEST or text.startswith("\\\\?\\"):
        return target
    return Path("\\\\?\\UNC" + text[1:] if text.startswith("\\\\") else "\\\\?\\" + text)


def _take_over(path: Path, old: os.stat_result) -> None:
    """Copy the permissions of another file, and its owner where the system allows it."""
    if hasattr(os, "chown"):
        for owner in ((old.st_uid, -1), (-1, old.st_gid)):
            with contextlib.suppress(OSError):
                os.chown(path, *owner)
    os.chmod(path, stat.S_IMODE(old.st_mode))


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk. Windows and some network file systems do not support this."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
