"""Needles: prompts that ask for a fact in a long text, in the style of RULER's keys and values (arXiv 2404.06654).

A filler text holds sentences that give codes to names; the prompt ends by asking for one of them. Everything is drawn
from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from adaskip_passes.errors import OptionError

_FIRST = "amber brave calm dusty eager faint golden hollow icy jolly".split()
_SECOND = "anchor bridge castle desert engine falcon garden harbour island jungle".split()
_HEAD = "The text below holds some codes. Remember them.\n\n"
_FACT = "\nThe code of the {name} is {code}.\n"
_QUESTION = "\n\nWhat is the code of the {name}?\nThe code of the {name} is"

# Depths at which the needle that is asked for stands, as shares of the text.
DEPTHS = (0.1, 0.5, 0.9)
DIGITS = 5


@dataclass(frozen=True)
class Needle:
    """A prompt of token ids ``(tokens,)`` and the code that it asks for, which stands at ``depth`` of the text.

    ``others`` are the names and codes of the further facts in it.
    """

    ids: torch.Tensor
    code: str
    depth: float
    others: tuple[tuple[str, str], ...] = ()


def make_needles(
    tokenizer: Any,
    filler: Sequence[str],
    *,
    context: int,
    count: int,
    depths: Sequence[float] = DEPTHS,
    distractors: int = 3,
    seed: int = 0,
) -> list[Needle]:
    """Return ``count`` prompts of exactly ``context`` tokens, the depths and the texts of ``filler`` in turn.

    Beside the needle that is asked for, each holds ``distractors`` others, at random depths. A filler that is too short
    begins again.

    Raises:
        OptionError: ``context`` leaves no room for filler.
    """
    draw = random.Random(seed)
    texts = [token_ids(tokenizer, text) for text in filler]
    return [
        _make_needle(tokenizer, texts[index % len(texts)], context, depths[index % len(depths)], distractors, draw)
        for index in range(count)
    ]


def distractors_in(tokenizer: Any, context: int, share: float) -> int:
    """Return how many further facts take about ``share`` of a prompt of ``context`` tokens: of different names, 1 or more."""
    fact = token_ids(tokenizer, _FACT.format(name=f"{_FIRST[0]} {_SECOND[0]}", code="1" * DIGITS))
    return min(max(1, int(share * context / len(fact))), len(_FIRST) * len(_SECOND) - 1)


def _make_needle(
    tokenizer: Any, filler: list[int], context: int, depth: float, distractors: int, draw: random.Random
) -> Needle:
    names = draw.sample([" ".join(pair) for pair in product(_FIRST, _SECOND)], 1 + distractors)
    codes = [str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS)) for _ in names]
    facts = [token_ids(tokenizer, _FACT.format(name=name, code=code)) for name, code in zip(names, codes, strict=True)]
    head = [*tokenizer("").input_ids, *token_ids(tokenizer, _HEAD)]
    question = token_ids(tokenizer, _QUESTION.format(name=names[0]))
    room = context - len(head) - len(question) - sum(map(len, facts))
    if room < 1:
        raise OptionError(
            f"contexts: {context} tokens are too few for needles; at least {context - room + 1} are needed"
        )
    start = draw.randrange(len(filler))
    body = (filler[start:] + filler * (1 + room // len(filler)))[:room]
    places = [int(depth * room), *(draw.randrange(room) for _ in range(distractors))]
    for place, fact in sorted(zip(places, facts, strict=True), reverse=True):
        body[place:place] = fact  # from the last to the first, so that no place moves
    others = tuple(zip(names[1:], codes[1:], strict=True))
    return Needle(torch.tensor([*head, *body, *question]), codes[0], depth, others)


def answered(tokenizer: Any, needle: Needle, further: int = 0) -> torch.Tensor:
    """Return the prompt of ``needle`` with its answer, and then with so many ``further`` facts asked for and answered."""
    text = f" {needle.code}."
    for name, code in needle.others[:further]:
        text += f"{_QUESTION.format(name=name)} {code}."
    return torch.cat([needle.ids, torch.tensor(token_ids(tokenizer, text))])


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of ``text`` alone, without what the tokenizer puts before any text."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
