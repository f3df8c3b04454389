"""Needle retrieval: is a fact in a long text still found?"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from adaskip_compile.evaluation.generation import continue_greedily
from adaskip_compile.needles import DIGITS, Needle, token_ids


def retrieved(model: Any, tokenizer: Any, needles: Iterable[Needle]) -> tuple[float, ...]:
    """Return for each needle whether the greedy continuation begins with its code: 1 or 0."""
    room = len(token_ids(tokenizer, " " + "0" * DIGITS)) + 1  # and one to see that the number ends there
    found = []
    for needle in needles:
        text = tokenizer.decode(continue_greedily(model, needle.ids, room))
        found.append(float(re.match(rf"\s*{needle.code}(?!\d)", text) is not None))
    return tuple(found)
