"""Folders of text files as domains, beside the built-in ones of :mod:`adaskip_compile.texts`.

The split of a folder in halves depends on the names of its files alone, so that it is the same on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from adaskip_compile.texts import Domain, Half, built_in_domains
from adaskip_passes.errors import FileError, MissingFileError, OptionError


def folder_domain(name: str, folder: str | Path) -> Domain:
    """Return the text files in ``folder``, and in folders within it, as a domain.

    Files are put in the order of the digests of their names, and go to the two halves in turn.

    Raises:
        MissingFileError: There is no such folder.
        FileError: A file is no text in UTF-8 or cannot be read.
        OptionError: There are fewer than two files: no half may be empty.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise MissingFileError(f"--texts {name}={folder}: there is no such folder")
    files = [path for path in root.rglob("*") if path.is_file() and not _hidden(path.relative_to(root))]
    if len(files) < 2:
        raise OptionError(
            f"--texts {name}={folder}: holds {len(files)} text files, and 2 are needed: some to profile on, others to "
            "evaluate on"
        )
    ordered = sorted(files, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
    return Domain.of_documents(name, [_read(path) for path in ordered])


def read_domains(texts: Sequence[str]) -> tuple[Domain, ...]:
    """Return the built-in domains and one for each ``NAME=DIR`` in ``texts``.

    Raises:
        OptionError: One is not of that form, or two have one name.
    """
    domains = list(built_in_domains())
    for entry in texts:
        name, equals, folder = entry.partition("=")
        if not (name and equals and folder):
            raise OptionError(f"--texts {entry}: takes NAME=DIR, such as news=./articles")
        if name in [domain.name for domain in domains]:
            raise OptionError(f"--texts {entry}: there is a domain {name!r} already; give it another name")
        domains.append(folder_domain(name, folder))
    return tuple(domains)


def mixed_windows(domains: Sequence[Domain], tokenizer: Any, half: Half, count: int, length: int) -> list[torch.Tensor]:
    """Return ``count`` windows of ``length`` token ids from all ``domains``, in turn."""
    share = -(-count // len(domains))
    each = [domain.windows(tokenizer, half, share, length) for domain in domains]
    return list(chain.from_iterable(zip(*each, strict=True)))[:count]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise FileError(
            f"{path}: not a text file in UTF-8; a folder given with --texts holds text files only"
        ) from error
