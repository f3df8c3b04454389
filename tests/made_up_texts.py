"""Made-up texts in which each domain has words of its own, as folders and as domains."""

from __future__ import annotations

import random
from pathlib import Path

from adaskip_compile.texts import Domain

WORDS = {"sea": "wave salt reef gull tide".split(), "city": "tram brick light crowd tower".split()}


def made_up(name: str, seed: int, *, words: int = 400) -> str:
    """Return lines of random words of a domain."""
    draw = random.Random(f"{name} {seed}")
    return "\n".join(" ".join(draw.choices(WORDS[name], k=8)) for _ in range(words // 8))


def made_up_domain(name: str) -> Domain:
    """Return a domain of made-up text, other text in each half."""
    return Domain(name, made_up(name, 1), made_up(name, 2))


def made_up_folder(folder: Path, name: str, files: int = 4) -> Path:
    """Write text files of a domain and return their folder."""
    folder.mkdir(parents=True)
    for index in range(files):
        (folder / f"{index}.txt").write_text(made_up(name, index))
    return folder
