"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from adaskip_passes.errors import FileError


def replace_file(path: Path, data: bytes) -> None:
    """Put ``data`` where ``path`` points to, by way of a file beside it that takes its place at the end.

    Missing folders are made. Whatever goes wrong, an interrupt from the keyboard included, leaves what was there.

    Raises:
        OSError: The file cannot be written.
    """
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "its name holds a NUL")
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


class _Unfailing(io.RawIOBase):
    """Takes whatever is written, keeps the first error that writing it to ``file`` meets, and writes no more."""

    def __init__(self, file: io.FileIO) -> None:
        super().__init__()
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        try:
            while left and self.error is None:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.error = error
        return memoryview(data).nbytes


@contextmanager
def native_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new file at ``path`` for native code that ends the process where a write fails, as PyTorch's writer does.

    Raises:
        OSError: It could not be written, at the end of the block.
    """
    with path.open("xb", buffering=0) as file:
        taking = _Unfailing(file)
        yield cast("IO[bytes]", taking)
        if taking.error is not None:
            raise taking.error


def write_text(path: str | os.PathLike[str], text: str, *, option: str) -> None:
    """Write ``text`` whole or not at all to the file that the command-line ``option`` names.

    Raises:
        FileError: It cannot be written; the message names the option and the file.
    """
    try:
        replace_file(Path(path), text.encode())
    except OSError as error:
        raise FileError(f"{option} {os.fspath(path)}: cannot be written ({error.strerror or error})") from error
