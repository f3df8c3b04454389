"""The folder that export writes: made whole beside its place, and put there at the end or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adaskip_compile.files.versioned_json import DocumentFormat
from adaskip_passes.errors import FileError

MANIFEST = "manifest.json"
EXPORT_FORMAT = DocumentFormat("adaskip-export", 1, remedy="export the model again with `adaskip export`")


def check_folder(directory: str | os.PathLike[str]) -> Path:
    """Return where ``directory`` leads, a place where an export may be put.

    Raises:
        FileError: There is something that is not an export, which would be lost.
    """
    if "\0" in os.fspath(directory):
        raise FileError(f"{os.fspath(directory)!r}: the name of a folder holds no NUL")
    target = Path(os.path.realpath(directory))
    if target.exists() and not target.is_dir():
        raise FileError(f"{directory} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and not _is_export(target):
        raise FileError(f"{directory} is a folder with other things in it; name a new or empty one, or an export")
    return target


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``target`` at the end; an earlier export there goes.

    Where the block fails or is interrupted, the folder goes, and ``target`` is as it was.

    Raises:
        FileError: It cannot be written to.
    """
    draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        draft.mkdir(parents=True)
        yield draft
        _put(draft, target)
    except OSError as error:
        raise FileError(f"{target} was not written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _put(draft: Path, target: Path) -> None:
    if not target.exists():
        draft.rename(target)
        return
    earlier = target.with_name(f"{draft.name}.earlier")
    target.rename(earlier)
    try:
        draft.rename(target)
    except BaseException:
        earlier.rename(target)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _is_export(folder: Path) -> bool:
    try:
        found = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == EXPORT_FORMAT.name
