"""Text that every Python installation holds, to profile a model on and to measure it with.

Two domains, technical English (the language reference that ``help()`` prints) and code (the standard
library's source), each split by document: no topic or file used for profiling is ever used for measuring,
and no topic that quotes another one is used at all. The split depends on names alone, so it is the same on
every machine with the same Python.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from adaskip_passes.errors import MissingFileError, OptionError

Domain = Literal["english", "code"]
Split = Literal["profiling", "held-out"]

DOMAINS: tuple[Domain, ...] = ("english", "code")

# Shorter paragraphs (headings, grammar rules) recur in many topics and say nothing of one quoting another.
_TELLING_PARAGRAPH = 80

# Enough characters that a window of so many tokens fits, for tokenizers of up to this many characters a token.
_CHARACTERS_PER_TOKEN = 5

# A piece of text begins at a line, unless that would leave less than this share of it.
_ENOUGH = 0.9


@dataclass(frozen=True)
class Text:
    """A piece of built-in text and the domain that it is of."""

    domain: Domain
    text: str


def profiling_texts(count: int = 20, *, characters: int = 10_000) -> tuple[Text, ...]:
    """Return ``count`` texts of about ``characters`` characters to profile on, the domains in turn.

    10,000 characters are 2,000 to 3,000 tokens of most tokenizers.

    Raises:
        OptionError: there is not that much text; the message says how much there is.
        MissingFileError: this Python was installed without its sources or topics.
    """
    return _texts("profiling", count, characters)


def held_out_texts(count: int = 8, *, characters: int = 10_000) -> tuple[Text, ...]:
    """Return ``count`` texts that share no document with :func:`profiling_texts`, the domains in turn.

    Raises the same errors.
    """
    return _texts("held-out", count, characters)


def most_held_out(characters: int) -> int:
    """Return how many texts of ``characters`` characters :func:`held_out_texts` has, 0 where none is so long."""
    return len(DOMAINS) * (longest_held_out() // characters)


def longest_held_out() -> int:
    """Return how many characters the longest text has of which there is one of each domain."""
    return min(len(built_in_text(domain, "held-out")) for domain in DOMAINS)


def spread(stream: str, count: int, characters: int, *, name: str = "built-in") -> list[str]:
    """Return ``count`` pieces of ``stream``, of ``characters`` each, evenly spread, each beginning at a line or a word.

    Raises:
        OptionError: it is too short for that; the message calls it by ``name``.
    """
    available = len(stream) // characters
    if count > available:
        raise OptionError(
            f"there are only {available} {name} texts of {characters} characters in a domain, not {count}: "
            "ask for fewer or shorter ones, or name text files of your own"
        )
    starts = (index * available // count * characters for index in range(count))
    return [_from_a_beginning(stream[start : start + characters]) for start in starts]


def windows(
    tokenizer: Any, texts: Iterable[str], length: int, *, per_text: int | None = None
) -> Iterator[torch.Tensor]:
    """Yield windows of ``length`` token ids, int64 of shape ``(length,)``, that do not overlap.

    Each begins with the tokens that ``tokenizer`` puts before any text (for most models one, or none).
    At most ``per_text`` windows come from one text (default: all that fit); a text shorter than
    ``length`` gives one window of what it has.

    Raises:
        OptionError: ``length`` leaves no room for a token of text.
    """
    prefix = tokenizer("").input_ids
    room = length - len(prefix)
    if room < 1:
        raise OptionError(f"length: {length} tokens is too short; at least {len(prefix) + 1} are needed")
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        whole = max(len(ids) // room, 1 if ids else 0)
        for index in range(whole if per_text is None else min(whole, per_text)):
            yield torch.tensor([*prefix, *ids[index * room : (index + 1) * room]])


def choose_samples(tokenizer: Any, texts: Iterable[str] | None, count: int, length: int) -> list[torch.Tensor]:
    """Return up to ``count`` windows of ``length`` token ids from ``texts``, or from built-in text to profile on."""
    if texts is not None:
        return list(islice(windows(tokenizer, texts, length), count))
    built_in = profiling_texts(count, characters=_CHARACTERS_PER_TOKEN * length)
    return list(windows(tokenizer, (text.text for text in built_in), length, per_text=1))


def _from_a_beginning(piece: str) -> str:
    """Return ``piece`` from its second line on; from its second word on, where that would leave too little."""
    below = piece.partition("\n")[2]
    return below if len(below) >= _ENOUGH * len(piece) else piece.partition(" ")[2]


def _texts(split: Split, count: int, characters: int) -> tuple[Text, ...]:
    if count < 1 or characters < 1:
        raise OptionError(f"count and characters must be positive, not {count} and {characters}")
    shares = dict.fromkeys(DOMAINS, count // 2)
    shares[DOMAINS[0]] += count % 2
    pieces = {domain: spread(built_in_text(domain, split), share, characters) for domain, share in shares.items()}
    return tuple(Text(DOMAINS[index % 2], pieces[DOMAINS[index % 2]][index // 2]) for index in range(count))


@cache
def built_in_text(domain: Domain, split: Split) -> str:
    """Return all built-in text of one domain and split, documents in the order of their digests.

    Raises:
        MissingFileError: this Python was installed without its sources or topics.
    """
    documents = _topics() if domain == "english" else _sources()
    digests = {hashlib.sha256(f"{domain}/{name}".encode()).digest(): name for name in documents}
    parity = 0 if split == "profiling" else 1
    return "\n\n".join(documents[name] for digest, name in sorted(digests.items()) if digest[0] % 2 == parity)


def _topics() -> dict[str, str]:
    """Return the topics that ``help()`` knows, longest first, without those that quote a longer one."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise MissingFileError("this Python has no help topics (pydoc_data); name text files of your own") from error
    kept: dict[str, str] = {}
    seen: set[str] = set()
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = {part.strip() for part in text.split("\n\n")}
        telling = {part for part in paragraphs if len(part) >= _TELLING_PARAGRAPH}
        if seen.isdisjoint(telling):
            kept[name] = text
            seen |= telling
    return kept


def _sources() -> dict[str, str]:
    """Return the source of the standard library's top-level modules."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = {file.stem: file.read_text("utf-8") for file in files if file.stem in sys.stdlib_module_names}
    if not texts:
        raise MissingFileError("this Python has no sources of its standard library; name text files of your own")
    return texts
