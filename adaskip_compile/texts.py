"""Texts to profile a model on and to measure it with, split by document: no document is ever used for both.

Two domains are in every Python installation: technical English (the language reference that ``help()`` prints) and code
(the standard library's source). No topic that quotes another one is used at all, and the split depends on names alone,
so it is the same on every machine with the same Python. Texts of the user's own are one more domain.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from adaskip_passes.errors import MissingFileError, OptionError

Half = Literal["profiling", "evaluation"]

DOMAINS = ("english", "code")

# Shorter paragraphs (headings, grammar rules) recur in many topics and say nothing of one quoting another.
_TELLING_PARAGRAPH = 80

# Enough characters that a window of so many tokens fits, for tokenizers of up to this many characters a token.
_CHARACTERS_PER_TOKEN = 5
# What most text has fewer of than this; where not, more are tried.
MOST_CHARACTERS_PER_TOKEN = 6

# A piece of text begins at a line, unless that would leave less than this share of it.
_ENOUGH = 0.9


@dataclass(frozen=True)
class Text:
    """A piece of built-in text and the domain that it is of."""

    domain: str
    text: str


@dataclass(frozen=True)
class Domain:
    """One kind of text: all of its text to profile on, and all to evaluate on, from no document in common."""

    name: str
    profiling: str
    evaluation: str

    @classmethod
    def of_documents(cls, name: str, documents: Sequence[str]) -> Domain:
        """Return a domain of ``documents``, which go to the two halves in turn."""
        return cls(name, "\n\n".join(documents[::2]), "\n\n".join(documents[1::2]))

    @property
    def digest(self) -> str:
        """A short digest of all of its text."""
        return hashlib.sha256(f"{self.profiling}\0{self.evaluation}".encode()).hexdigest()[:16]

    def half(self, half: Half) -> str:
        """Return all text of one half."""
        return self.profiling if half == "profiling" else self.evaluation

    def pieces(self, half: Half, count: int, characters: int) -> list[str]:
        """Return ``count`` pieces of ``characters`` characters, evenly spread, each beginning at a line.

        Raises:
            OptionError: There is not that much text.
        """
        return spread(self.half(half), count, characters, name=f"{half} ({self.name})")

    def windows(self, tokenizer: Any, half: Half, count: int, length: int) -> list[torch.Tensor]:
        """Return ``count`` windows of ``length`` token ids, each ``(tokens,)``, as a request would begin.

        Raises:
            OptionError: There is not that much text.
        """
        characters = MOST_CHARACTERS_PER_TOKEN * length
        while True:  # ends: too many characters are an error
            found = list(windows(tokenizer, self.pieces(half, count, characters), length, per_text=1))
            if len(found) == count and all(len(window) == length for window in found):
                return found
            characters *= 2


def built_in_domains() -> tuple[Domain, ...]:
    """Return the domains that every Python installation holds: ``english`` and ``code``.

    Raises:
        MissingFileError: This Python was installed without its sources or topics.
    """
    return tuple(Domain(name, *(built_in_text(name, half) for half in get_args(Half))) for name in DOMAINS)


def own_domain(texts: Iterable[str]) -> Domain:
    """Return documents of the user's own as a domain: to profile and to evaluate on in turn, a lone one in two parts.

    Raises:
        OptionError: There is too little text for two halves.
    """
    documents = [text for text in texts if text.strip()]
    if len(documents) == 1:
        middle = len(documents[0]) // 2
        documents = [documents[0][:middle], _from_a_beginning(documents[0][middle:])]
    domain = Domain.of_documents("own", documents)
    if not (domain.profiling and domain.evaluation):
        raise OptionError("texts: there is too little in them to fit on some and to measure others")
    return domain


def take(domains: Sequence[Domain], half: Half, count: int, characters: int) -> tuple[Text, ...]:
    """Return ``count`` pieces of ``characters`` characters of one half, of ``domains`` in turn.

    Raises:
        OptionError: There is not that much text.
    """
    if count < 1 or characters < 1:
        raise OptionError(f"count and characters must be positive, not {count} and {characters}")
    shares = [len(range(place, count, len(domains))) for place in range(len(domains))]
    pieces = [one.pieces(half, share, characters) for one, share in zip(domains, shares, strict=True)]
    places = ((index % len(domains), index // len(domains)) for index in range(count))
    return tuple(Text(domains[place].name, pieces[place][turn]) for place, turn in places)


def longest(domains: Sequence[Domain], half: Half) -> int:
    """Return how many characters the longest text has of which there is one of each of ``domains``."""
    return min(len(domain.half(half)) for domain in domains)


def profiling_texts(count: int = 20, *, characters: int = 10_000) -> tuple[Text, ...]:
    """Return ``count`` texts of about ``characters`` characters to profile on, the domains in turn.

    10,000 characters are 2,000 to 3,000 tokens of most tokenizers.

    Raises:
        OptionError: there is not that much text; the message says how much there is.
        MissingFileError: this Python was installed without its sources or topics.
    """
    return take(built_in_domains(), "profiling", count, characters)


def held_out_texts(count: int = 8, *, characters: int = 10_000) -> tuple[Text, ...]:
    """Return ``count`` texts that share no document with :func:`profiling_texts`, the domains in turn.

    Raises the same errors.
    """
    return take(built_in_domains(), "evaluation", count, characters)


def spread(stream: str, count: int, characters: int, *, name: str) -> list[str]:
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


@cache
def built_in_text(domain: str, half: Half) -> str:
    """Return all built-in text of one half of a domain, documents in the order of their digests.

    Raises:
        MissingFileError: this Python was installed without its sources or topics.
    """
    documents = _topics() if domain == "english" else _sources()
    digests = {hashlib.sha256(f"{domain}/{name}".encode()).digest(): name for name in documents}
    parity = 0 if half == "profiling" else 1
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
