"""Readable, versioned JSON files that are written whole or not at all.

Profiles and plans are exchanged between people, so a file holds data only: no pickle and no code. Around the payload
stand the name of the format, its version, the package that wrote it and a checksum of the payload::

    {
      "format": "adaskip-plan",
      "version": 1,
      "producer": "adaskip-compile 0.1.0",
      "checksum": "sha256:9f86d081...",
      "payload": {...}
    }

The checksum is over the payload's values and not over its text, so that changed line ends or indentation do no harm.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from adaskip_compile.files.atomic_write import replace_file
from adaskip_passes.errors import DamagedFileError, FileError, MissingFileError, NewerFileError

DISTRIBUTION = "adaskip-compile"


@dataclass(frozen=True)
class DocumentFormat:
    """One kind of file: reads and writes it, and knows what to tell a person whose file is not one.

    Args:
        name: What the file says it is, such as ``adaskip-plan``.
        version: The version written, and the newest that can be read.
        remedy: How to get a good file; the end of a sentence that starts with "to get a good one,".
    """

    name: str
    version: int
    remedy: str

    def write(self, path: str | os.PathLike[str], payload: dict[str, Any]) -> None:
        """Write ``payload`` to ``path``: afterwards the file holds all of it, or whatever it held before.

        ``payload`` is made of dicts with string keys, lists, strings, finite numbers, booleans and None. Missing
        folders are made. A link is followed, and what it points to is replaced.

        Raises:
            FileError: The payload holds NaN or an infinity, or the file cannot be written.
        """
        try:
            text = self._text(payload)
        except ValueError as error:
            raise FileError(f"{path} was not written: {self.name} files hold no NaN and no infinity") from error
        try:
            replace_file(Path(path), text.encode())
        except OSError as error:
            raise FileError(f"{path} was not written: {error.strerror or error}") from error

    def read(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Return the payload of the file at ``path``.

        Raises:
            MissingFileError: There is no such file.
            DamagedFileError: The file is truncated, is not JSON, or does not hold what its checksum says.
            NewerFileError: A newer version of this package wrote it in a version of the format unknown here.
            FileError: It is another kind of file, or cannot be read.
        """
        document = self._parse(path)
        found = document.get("format")
        if found is None:
            self._refuse(path, 'it names no "format"')
        if found != self.name:
            raise FileError(f"{path} is of format {found}, and {self.name} is needed; to get one, {self.remedy}")
        version = document.get("version")
        if type(version) is not int or version < 1:
            self._refuse(path, f"its version is {version!r}")
        if version > self.version:
            raise NewerFileError(
                f"{path} is of version {version} of the format {self.name}, written by {document.get('producer', 'an unknown package')}; "
                f"{producer()} reads up to version {self.version}: upgrade with `pip install --upgrade {DISTRIBUTION}`"
            )
        payload = document.get("payload")
        if not isinstance(payload, dict):
            self._refuse(path, "it holds no payload")
        if document.get("checksum") != checksum(payload):
            self._refuse(path, "its content does not match its checksum (it was damaged, or edited by hand)")
        return payload

    def damaged(self, path: str | os.PathLike[str], reason: object) -> DamagedFileError:
        """Return the error for a file at ``path`` that is refused for ``reason``."""
        return DamagedFileError(f"{path} is not a usable {self.name}: {reason}; to get a good one, {self.remedy}")

    def _refuse(self, path: str | os.PathLike[str], reason: str) -> NoReturn:
        raise self.damaged(path, reason)

    def _parse(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError as error:
            raise MissingFileError(f"{path} does not exist; to get one, {self.remedy}") from error
        except OSError as error:
            raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:  # the name holds a NUL
            raise FileError(f"{str(path)!r} cannot be read: {error}") from error
        try:
            document = json.loads(
                data, parse_constant=_refuse_constant, parse_float=_finite_float, parse_int=_bounded_int
            )
        except (ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
            raise self.damaged(path, f"it is empty, truncated or not JSON ({error})") from error
        if not isinstance(document, dict):
            self._refuse(path, f"it holds a JSON {type(document).__name__}")
        return document

    def _text(self, payload: dict[str, Any]) -> str:
        document = {
            "format": self.name,
            "version": self.version,
            "producer": producer(),
            "checksum": checksum(payload),
            "payload": payload,
        }
        return _layout(document) + "\n"


def producer() -> str:
    """Return the name and version of this package, as files record it."""
    try:
        return f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}"
    except metadata.PackageNotFoundError:  # run from a source folder that was never installed
        return DISTRIBUTION


def digest(text: str) -> str:
    """Return a short digest of ``text``, to tell it from any other."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def checksum(payload: dict[str, Any]) -> str:
    """Return the digest of a payload's values; raises ValueError where it holds NaN or an infinity."""
    canonical = json.dumps(payload, allow_nan=False, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def _layout(value: Any, indent: str = "") -> str:
    """Return JSON text in which a list or dict of plain values stands on one line."""
    if not isinstance(value, (dict, list, tuple)):
        return json.dumps(value, ensure_ascii=False)
    members = value.values() if isinstance(value, dict) else value
    if indent and not any(isinstance(member, (dict, list, tuple)) for member in members):
        return json.dumps(value, ensure_ascii=False)
    inner = indent + "  "
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(key, ensure_ascii=False)}: {_layout(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + _layout(item, inner) for item in value) + f"\n{indent}]"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} is out of range")
    return number


def _bounded_int(text: str) -> int:
    # No more digits are read than a number in range has: Python takes long over millions of them.
    number = int(text) if len(text) <= 20 else 2**63
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"the number {text[:20]}... of {len(text)} digits is out of range")
    return number
