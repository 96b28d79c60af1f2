"""Which files does a command line mean, and what are their outputs called? docs/files.md states the rules.

Folders are walked. Hidden files and folders (names that begin with a dot) are left out; links to files are read, links
to folders are not entered. The tree is kept in the output.

`a.jpg` becomes `a.hpcm`. Where several files of one folder would, one of them does, and each other one gets its whole
name: `a.png.hpcm`. The one that does is the one that an existing `a.hpcm` came from, so that files which are added
later change no names.
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
    """One input; None is standard input. folder: where it lies below the folder that was named."""

    path: Path | None
    folder: Path = Path()


@dataclass
class Found:
    """What the arguments stand for.

    skipped: how many files were left out, by reason. suffixes: of those that were left out for theirs. problems: what
    could not be listed.
    """

    sources: list[Source] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    suffixes: set[str] = field(default_factory=set)
    problems: list[HpcmrefError] = field(default_factory=list)

    def describe_skipped(self) -> str | None:
        """What was left out, as a sentence."""
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
    """The inputs that the arguments name. A folder stands for the files in it, and unless `recursive` is false in the
    folders below it, whose suffix is one of `suffixes`, sorted by name. `-` stands for standard input.

    without: a folder that is not entered, where it is met: the one that is written to.
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
    """The output of each source in the folder `output`, or why it has none: two inputs never share an output."""
    rivals: dict[tuple[str, str], list[Source]] = defaultdict(list)
    for source in sources:
        assert source.path is not None
        rivals[_folded(str(source.folder)), _folded(source.path.stem)].append(source)
    named: dict[Source, Path | HpcmrefError] = {}
    for group in rivals.values():
        named |= _name_rivals(group, output, suffix)
    return _without_collisions(named)


def _name_rivals(group: list[Source], output: Path, suffix: str) -> dict[Source, Path | HpcmrefError]:
    """Name the outputs of files in one folder whose names differ by their suffix only."""
    named: dict[Source, Path | HpcmrefError] = {}
    paths: dict[Source, Path] = {}
    first: dict[str, Path] = {}  # name -> the file that has it
    for source in group:
        assert source.path is not None
        other = first.setdefault(_folded(source.path.name), source.path)
        if other is not source.path:
            where = output / source.folder
            named[source] = HpcmrefError(
                f"{other} and {source.path} have one name, and would both be written to {where}"
            )
        else:
            paths[source] = source.path
    short = {source: output / source.folder / (path.stem + suffix) for source, path in paths.items()}
    long = {source: output / source.folder / (path.name + suffix) for source, path in paths.items()}
    free = sorted((each for each in paths if not long[each].exists()), key=lambda each: paths[each].name)
    owner = _owner(free, short[free[0]]) if free else None
    return named | {each: short[each] if each is owner else long[each] for each in paths}


def _owner(claimants: Sequence[Source], short: Path) -> Source:
    """Which of several files, sorted by name, the short name belongs to.

    If it exists: the one whose time of modification it has (--preserve), or else the first that was there before it.
    """
    if len(claimants) == 1 or not short.exists():
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


def is_link(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is a symbolic link, or a junction of Windows, which may lead back to its folder."""
    if entry.is_symlink():
        return True
    return getattr(entry.stat(follow_symlinks=False), "st_reparse_tag", 0) == _JUNCTION


def _folded(name: str) -> str:
    """Equal for names that some file systems do not tell apart."""
    return unicodedata.normalize("NFC", name).casefold()
