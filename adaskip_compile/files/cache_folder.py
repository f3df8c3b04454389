"""What is kept in the cache directory, how much room it takes, and throwing it away. All of it can be made again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Kind, which is the name of its folder, and what is in it. Nothing else in the directory is ours to count or to remove.
KINDS = {
    "captures": "graphs that Dynamo captured",
    "checkpoints": "GGUF files, converted",
    "plans": "plans that were found within a loss",
    "profiles": "profiles that were learned from requests",
}
_LOCK = ".lock"


@dataclass(frozen=True)
class Kept:
    """What is kept of one kind: the number of things, their bytes, and when one was last written, in seconds since 1970."""

    kind: str
    count: int
    bytes: int
    written: float | None


def list_kept(folder: Path) -> list[Kept]:
    """Return what is kept of each kind; a folder that is not there holds nothing."""
    return [_kept(kind, folder / kind) for kind in KINDS]


def clear(folder: Path, kinds: Iterable[str] = tuple(KINDS)) -> list[Kept]:
    """Remove what is kept of ``kinds``, and return what it was.

    A process that works with the directory finds a kind whole or not at all.
    """
    removed = []
    for kind in kinds:
        removed.append(_kept(kind, folder / kind))
        if (folder / kind).exists():
            aside = Path(tempfile.mkdtemp(prefix=f"{kind}-", suffix=".removed", dir=folder))
            (folder / kind).replace(aside / kind)
            shutil.rmtree(aside)
    return removed


def _kept(kind: str, folder: Path) -> Kept:
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != _LOCK]
    things = {file.relative_to(folder).parts[0] for file in files}
    stats = [file.stat() for file in files]
    return Kept(
        kind,
        len(things),
        sum(stat.st_size for stat in stats),
        max((stat.st_mtime for stat in stats), default=None),
    )
