"""What is kept in the cache directory, how much room it takes, and throwing it away."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from adaskip_passes.errors import FileError

# Kind, which is the name of its folder, and what is in it. Nothing else in the directory is ours to count or to remove.
KINDS = {
    "captures": "graphs that Dynamo captured",
    "checkpoints": "GGUF files, converted",
    "plans": "plans that were found within a loss",
    "profiles": "profiles that were learned from requests",
}
_LOCK, _ASIDE = ".lock", ".removed"


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

    A process that reads finds a kind whole or not at all.

    Raises:
        FileError: A process is just writing there.
    """
    removed = []
    for kind in kinds:
        place = (folder / kind).resolve()
        removed.append(_kept(kind, place))
        for left in place.parent.glob(f"{kind}-*{_ASIDE}"):  # by a removal that was interrupted
            shutil.rmtree(left, ignore_errors=True)
        if place.exists():
            with _nobody_writes(place):
                aside = Path(tempfile.mkdtemp(prefix=f"{kind}-", suffix=_ASIDE, dir=place.parent))
                place.replace(aside / kind)
            shutil.rmtree(aside)
    return removed


@contextlib.contextmanager
def _nobody_writes(place: Path) -> Iterator[None]:
    """Hold the locks of those who write to ``place``."""
    with contextlib.ExitStack() as held:
        for lock in place.rglob(f"*{_LOCK}"):
            try:
                held.enter_context(FileLock(lock, timeout=0))
            except Timeout as error:
                raise FileError(
                    f"{lock.with_suffix('')}: another process is just making it; try again later"
                ) from error
        yield


def _kept(kind: str, folder: Path) -> Kept:
    stats: dict[Path, os.stat_result] = {}
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it since
            if file.is_file() and file.suffix != _LOCK:
                stats[file] = file.stat()
    things = {file.relative_to(folder).parts[0] for file in stats}
    written = max((stat.st_mtime for stat in stats.values()), default=None)
    return Kept(kind, len(things), sum(stat.st_size for stat in stats.values()), written)
