"""Stream maps in a file of their own beside the profile or plan that uses them.

Numbers go into a safetensors file, which holds no code; the readable file names it and holds its checksum. The name
holds part of the checksum too, so that neither file is ever seen with the other's earlier version.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from adaskip_compile.files.atomic_write import replace_file
from adaskip_compile.profiling.stream_maps import StreamMap
from adaskip_passes.errors import DamagedFileError, FileError, MissingFileError, ProfileError

_SEPARATOR = "/"  # no module path holds one


def write_maps(document: str | os.PathLike[str], maps: Mapping[str, Sequence[StreamMap]]) -> dict[str, Any] | None:
    """Write ``maps``, by path, beside ``document``; return what the document has to say of them, None for no maps.

    Raises:
        FileError: The file cannot be written.
    """
    if not maps:
        return None
    tensors = {
        _SEPARATOR.join((path, one.form, name)): tensor.contiguous()
        for path, ones in maps.items()
        for one in ones
        for name, tensor in one.tensors.items()
    }
    data = save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    target = Path(document)
    target = target.with_name(f"{target.stem}-{digest[:8]}.safetensors")
    try:
        replace_file(target, data)
    except OSError as error:
        raise FileError(f"{target} was not written: {error.strerror or error}") from error
    errors = {path: {one.form: one.error for one in ones} for path, ones in maps.items()}
    return {"file": target.name, "sha256": digest, "errors": errors}


def read_maps(document: str | os.PathLike[str], entry: Mapping[str, Any] | None) -> dict[str, tuple[StreamMap, ...]]:
    """Return the maps, by path, that ``document`` says in ``entry`` that it uses.

    Raises:
        MissingFileError: Their file is not there.
        DamagedFileError: It is not the file that was written with the document.
    """
    if not entry:
        return {}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("file"), str) or not Path(entry["file"]).name:
        raise DamagedFileError(f"{document} does not name the file of its maps")
    path = Path(document).with_name(Path(entry["file"]).name)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} does not exist; {document} uses it: keep both in one folder") from error
    except OSError as error:
        raise FileError(f"{path}, which {document} uses, cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # the name holds a NUL
        raise DamagedFileError(f"{document} names the file of its maps {entry['file']!r}: {error}") from error
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise DamagedFileError(f"{path} is not the file that was written with {document}: it was damaged or replaced")
    try:
        return _maps(load(data), entry["errors"])
    except (SafetensorError, ProfileError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path} holds no stream maps: {error}") from error


def _maps(
    tensors: Mapping[str, Any], errors: Mapping[str, Mapping[str, float | None]]
) -> dict[str, tuple[StreamMap, ...]]:
    parts: dict[tuple[str, str], dict[str, Any]] = {}
    for name, tensor in tensors.items():
        path, form, part = name.rsplit(_SEPARATOR, 2)
        parts.setdefault((path, form), {})[part] = tensor
    return {
        path: tuple(StreamMap(form, parts[path, form], error) for form, error in forms.items())
        for path, forms in errors.items()
    }
