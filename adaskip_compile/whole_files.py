"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from pathlib import Path

from adaskip_passes.errors import FileError


def replace_file(path: Path, data: bytes) -> None:
    """Put ``data`` where ``path`` points to, by way of a file beside it that takes its place at the end.

    Missing folders are made. Whatever goes wrong, an interrupt from the keyboard included, leaves what was there.

    Raises:
        OSError: The file cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        # Replacing would put a plain file in the place of a folder, a pipe or a device such as /dev/null.
        raise OSError("it exists and is not a regular file")
    if target.parent.exists() and not target.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not the tempfile module: its files are readable by their owner alone, whatever the umask says.
    draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, draft)
        draft.replace(target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str, *, option: str) -> None:
    """Write ``text`` whole or not at all to the file that the command-line ``option`` names.

    Raises:
        FileError: It cannot be written; the message names the option and the file.
    """
    try:
        replace_file(Path(path), text.encode())
    except OSError as error:
        raise FileError(f"{option} {os.fspath(path)}: cannot be written ({error.strerror or error})") from error
