"""Find the input files of a command line, and choose the names of their outputs. docs/files.md states the rules.

Folders are searched with all folders below them. Hidden files and folders (names that begin with a dot) are left out.
Links to files are read, and links to folders are not followed. The output has the same tree of folders.

`a.jpg` becomes `a.hpcm`. If several files of one folder would become `a.hpcm`, only one of them does, and each of the
others keeps its suffix: `a.png.hpcm`. If `a.hpcm` exists already, the file that it was made from keeps the name. So
files that are added later do not change existing names.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpcmref.errors import HpcmrefError

STREAM = "-"
_JUNCTION = 0xA0000003  # Windows, IO_REPARSE_TAG_MOUNT_POINT


@dataclass(frozen=True)
class Source:
    """One input file, or None for standard input. folder: its folder, relative to the named one that was searched."""

    path: Path | None
    folder: Path = Path()


@dataclass
class Found:
    """The input files of a command line.

    skipped: the number of files that were left out, by reason. suffixes: the suffixes of files that were left out
    because of them. problems: an error for each folder that cannot be listed or has no suitable files.
    """

    sources: list[Source] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    suffixes: set[str] = field(default_factory=set)
    problems: list[HpcmrefError] = field(default_factory=list)

    def describe_skipped(self) -> str | None:
        """Describe what was left out in one line, or return None if nothing was."""
        if not self.skipped:
            return None
        parts = []
        for reason, count in self.skipped.most_common():
            shown = ", ".join(sorted(self.suffixes)[:5]) + (", ..." if len(self.suffixes) > 5 else "")
            parts.append(f"{count} {reason}" + (f" ({shown})" if reason == OTHERS else ""))
        return f"skipped in folders: {', '.join(parts)}"


HIDDEN, LINKS, FOLDERS = "hidden", "links to folders", "subfolders (--no-recursive)"
SPECIAL, OTHERS = "broken links, pipes or devices", "with other suffixes"


def find(
    arguments: Sequence[str], suffixes: Collection[str], recursive: bool = True, without: str | None = None
) -> Found:
    """Find the inputs of a command line.

    arguments: files, folders, and `-` for standard input. A folder means all files in it whose suffix is in `suffixes`,
        sorted by name.
    recursive: also search the folders below a folder.
    without: a folder that is not searched, because the command writes to it.

    Returns the sources without duplicates, what was left out, and an error for each folder that cannot be listed or has
    no suitable files.
    """
    found = Found()
    seen: dict[str, list[str]] = defaultdict(list)
    output = os.path.realpath(without) if without is not None else None
    for argument in arguments:
        if argument == STREAM:
            found.sources.append(Source(None))
            continue
        named = [Source(Path(argument))]
        if os.path.isdir(argument):
            named = list(_walk(Path(argument), suffixes, recursive, output, found))
            if not named:
                found.problems.append(HpcmrefError(f"{argument}: no files here end with {', '.join(sorted(suffixes))}"))
        for source in named:
            assert source.path is not None
            absolute = os.path.abspath(source.path)
            others = seen[_folded(absolute)]
            if not any(_is_same(absolute, other) for other in others):
                others.append(absolute)
                found.sources.append(source)
    return found


def _walk(
    root: Path, suffixes: Collection[str], recursive: bool, without: str | None, found: Found
) -> Iterator[Source]:
    waiting = [Path()]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(root / folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            found.problems.append(HpcmrefError(f"cannot list {root / folder}: {error.strerror or error}"))
            continue
        below = []
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                found.skipped[HIDDEN] += 1
            elif entry.is_dir():
                if is_link(entry):
                    found.skipped[LINKS] += 1
                elif not recursive:
                    found.skipped[FOLDERS] += 1
                elif without is None or not is_same_file(Path(entry.path), Path(without)):
                    below.append(folder / entry.name)
            elif not entry.is_file():
                found.skipped[SPECIAL] += 1
            elif suffix not in suffixes:
                found.skipped[OTHERS] += 1
                found.suffixes.add(suffix or "none")
            else:
                yield Source(root / folder / entry.name, folder)
        waiting += reversed(below)


def name_outputs(sources: Sequence[Source], output: Path, suffix: str) -> dict[Source, Path | HpcmrefError]:
    """Choose the output file of each source in the folder `output`. Two sources never get the same output.

    suffix: that of the outputs. The value is an error for a source that gets no output.
    """
    rivals: dict[tuple[str, str], list[Source]] = defaultdict(list)
    for source in sources:
        assert source.path is not None
        rivals[_folded(str(source.folder)), _folded(source.path.stem)].append(source)
    named: dict[Source, Path | HpcmrefError] = {}
    for group in rivals.values():
        named |= _name_rivals(group, output, suffix)
    return _without_collisions(named)


def _name_rivals(group: list[Source], output: Path, suffix: str) -> dict[Source, Path | HpcmrefError]:
    """Choose the output files of sources in one folder whose names differ only in their suffix."""
    named: dict[Source, Path | HpcmrefError] = {}
    paths: dict[Source, Path] = {}
    first: dict[str, Path] = {}  # name -> the file that has it
    for source in group:
        assert source.path is not None
        other = first.setdefault(_folded(source.path.name), source.path)
        if other is not source.path:
            where = output / source.folder
            named[source] = HpcmrefError(
                f"{other} and {source.path} have the same name, and would both be written to {where}"
            )
        else:
            paths[source] = source.path
    short = {source: output / source.folder / (path.stem + suffix) for source, path in paths.items()}
    long = {source: output / source.folder / (path.name + suffix) for source, path in paths.items()}
    free = sorted((each for each in paths if not _exists(long[each])), key=lambda each: paths[each].name)
    owner = _owner(free, short[free[0]]) if free else None
    return named | {each: short[each] if each is owner else long[each] for each in paths}


def _owner(claimants: Sequence[Source], short: Path) -> Source:
    """Return the source that gets the short name. claimants: the sources that want it, sorted by name.

    If a file with the short name exists, its source is found by the time of modification (equal after --preserve), or
    else it is the first source that existed before that file.
    """
    if len(claimants) == 1 or not _exists(short):
        return claimants[0]
    try:
        made = short.stat()
        times = {each: each.path.stat() for each in claimants if each.path is not None}
    except OSError:
        return claimants[0]
    equal = [each for each in claimants if times[each].st_mtime_ns == made.st_mtime_ns]
    older = [each for each in claimants if times[each].st_ctime_ns <= made.st_ctime_ns]
    return [*equal, *older, *claimants][0]


def _without_collisions(named: dict[Source, Path | HpcmrefError]) -> dict[Source, Path | HpcmrefError]:
    inputs: dict[str, list[Path]] = defaultdict(list)
    for path in (source.path for source in named if source.path is not None):
        inputs[_folded(os.path.realpath(path))].append(path)
    writers: dict[str, Source] = {}
    for source, target in named.items():
        if isinstance(target, HpcmrefError):
            continue
        if any(is_same_file(target, path) for path in inputs[_folded(os.path.realpath(target))]):
            named[source] = HpcmrefError(f"{target} is an input; name another output with -o")
            continue
        other = writers.setdefault(_folded(str(target)), source)
        if other is not source:
            named[source] = HpcmrefError(f"{other.path} and {source.path} would both be written to {target}")
    return named


def is_same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file or folder, be it in other letters where the file system sees no difference.

    Hard links with different names count as several files: to replace one leaves the others as they are.
    """
    return _is_same(os.path.realpath(one), os.path.realpath(other))


def _is_same(one: str, other: str) -> bool:
    try:
        return one == other or (_folded(one) == _folded(other) and os.path.samefile(one, other))
    except OSError:
        return False


def _exists(path: Path) -> bool:
    """Whether a file or folder exists. One that cannot be seen, or whose name is too long, counts as none."""
    try:
        return path.exists()
    except OSError:
        return False


def is_link(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is a symbolic link, or a junction of Windows, which may lead back to its folder."""
    if entry.is_symlink():
        return True
    return getattr(entry.stat(follow_symlinks=False), "st_reparse_tag", 0) == _JUNCTION


def _folded(name: str) -> str:
    """Normalise a name, so that names which some file systems do not distinguish become equal."""
    return unicodedata.normalize("NFC", name).casefold()
