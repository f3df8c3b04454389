"""In-context classification: does a model still tell kinds of text apart from a few labelled examples?

The label of a passage is its domain. Examples come from the profiling halves and queries from the evaluation halves,
so that none is seen twice. The label whose first token is likeliest is the answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaskip_compile.texts import Domain, Half
from adaskip_passes.errors import OptionError

_CHARACTERS = 8


@dataclass(frozen=True)
class Question:
    """A prompt of token ids ``(tokens,)``, the first token of each label, and which label is right."""

    ids: torch.Tensor
    labels: tuple[int, ...]
    answer: int


def make_questions(
    tokenizer: Any, domains: Sequence[Domain], *, count: int, examples: int = 3, passage: int = 48, seed: int = 0
) -> list[Question]:
    """Return ``count`` questions, the domains in turn, each after ``examples`` examples a label in random order.

    ``passage`` is the number of tokens of each text.

    Raises:
        OptionError: There is one domain, two labels begin with the same token, or there is not enough text.
    """
    labels = _labels(tokenizer, domains)
    draw = random.Random(seed)
    share = -(-count // len(domains))
    shown = [_passages(tokenizer, domain, "profiling", examples * share, passage) for domain in domains]
    asked = [_passages(tokenizer, domain, "evaluation", share, passage) for domain in domains]
    questions = []
    for index in range(count):
        answer, turn = index % len(domains), index // len(domains)
        pairs = [
            (text, label)
            for label, texts in enumerate(shown)
            for text in texts[examples * turn : examples * (turn + 1)]
        ]
        draw.shuffle(pairs)
        ids = list(tokenizer("").input_ids)
        for text, label in pairs:
            ids += _ids(tokenizer, "Text: ") + text + _ids(tokenizer, f"\nKind: {domains[label].name}\n\n")
        ids += _ids(tokenizer, "Text: ") + asked[answer][turn] + _ids(tokenizer, "\nKind:")
        questions.append(Question(torch.tensor(ids), labels, answer))
    return questions


@torch.no_grad()
def classified(model: Any, questions: Iterable[Question]) -> tuple[float, ...]:
    """Return for each question whether the right label is the likeliest: 1 or 0."""
    found = []
    for question in questions:
        logits = model(input_ids=question.ids.to(model.device)[None], logits_to_keep=1).logits[0, -1]
        found.append(float(int(logits[list(question.labels)].argmax()) == question.answer))
    return tuple(found)


def _labels(tokenizer: Any, domains: Sequence[Domain]) -> tuple[int, ...]:
    if len(domains) < 2:
        raise OptionError("classification needs two domains or more: name another with --texts NAME=DIR")
    first = [_ids(tokenizer, f" {domain.name}")[0] for domain in domains]
    if first[0] == _ids(tokenizer, " ")[0]:  # a tokenizer whose space is a token of its own
        first = [_ids(tokenizer, f" {domain.name}")[1] for domain in domains]
    for place, token in enumerate(first):
        other = first.index(token)
        if other < place:
            raise OptionError(
                f"the domains {domains[other].name!r} and {domains[place].name!r} begin with the same token, so they "
                "cannot be told apart as labels: give one of them another name with --texts NAME=DIR"
            )
    return tuple(first)


def _passages(tokenizer: Any, domain: Domain, half: Half, count: int, passage: int) -> list[list[int]]:
    pieces = domain.pieces(half, count, _CHARACTERS * passage)
    return [_ids(tokenizer, " ".join(piece.split()))[:passage] for piece in pieces]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
