"""The texts that a search for a plan within a loss fits maps on, and those that it measures with.

They are built in, or documents of the user's own; no document is ever in both. Facts are strewn in some of the prompts to
fit on, and asked for in some of those that are measured (:mod:`adaskip_compile.needles`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch

from adaskip_compile.needles import Needle, answered, distractors_in, make_needles
from adaskip_compile.planning.prompt_skips import HEAD, TAIL
from adaskip_compile.texts import (
    MOST_CHARACTERS_PER_TOKEN,
    Domain,
    built_in_domains,
    longest,
    own_domain,
    take,
    windows,
)
from adaskip_passes.errors import OptionError

log = logging.getLogger(__name__)

# What share of a prompt to fit on facts take, where they are strewn; drawn otherwise than those that are measured (0 and 1).
_FACTS, _SEED = 0.4, 2
# Facts that are asked for after the first one, where answers are learned.
_ASKED = 2
# Texts to fit on are cut to so many characters, and no more than so many are taken.
_CHARACTERS, _TEXTS = 10_000, 32
# Of fewer prompts maps learn next to nothing.
_FEWEST = 8


@dataclass(frozen=True)
class BudgetSizes:
    """How much text a search takes; the defaults take minutes on a small model.

    Where plans are for longer prompts than ``prompt``, half of what maps are fitted on is as long as those, and as much
    as half again is measured at that length.

    Args:
        prompt: Tokens of a prompt, to fit on and to measure.
        continued: Tokens after it whose likelihood is measured.
        fitted: How many such prompts to fit on.
        measured: How many to measure.
        needles: How many facts to ask for.
    """

    prompt: int = 1024
    continued: int = 128
    fitted: int = 48
    measured: int = 12
    needles: int = 20


@dataclass(frozen=True)
class Measured:
    """What plans are measured with: texts with the number of tokens of their prompt, and needles with their answers."""

    texts: list[tuple[torch.Tensor, int]]
    needles: list[tuple[Needle, list[int]]]


class BudgetTexts:
    """Texts of ``domains`` as prompts of ``sizes.prompt`` and of ``context`` tokens, by one tokenizer.

    Where a model has ``most`` positions, no text ends beyond them.
    """

    def __init__(
        self, tokenizer: Any, context: int, sizes: BudgetSizes, domains: Sequence[Domain], most: int | None = None
    ) -> None:
        if most is not None:
            room = most - sizes.continued
            context, sizes = min(context, room), replace(sizes, prompt=min(sizes.prompt, room))
        self._tokenizer, self._context, self.sizes, self._domains = tokenizer, context, sizes, domains

    @property
    def _long(self) -> bool:
        """Whether there are prompts of ``context`` tokens beside the others."""
        return self._context > self.sizes.prompt

    def to_fit(self) -> list[torch.Tensor]:
        """Return prompts to fit on; where ``context`` is longer than ``sizes.prompt``, half of their tokens in prompts so long.

        In every third prompt facts are strewn. Deep keys and values of what is unlike the text around it (names, numbers)
        are what retrieval lives on, and in plain text there is too little of it for maps to learn them.

        Raises:
            OptionError: There is too little text of the user's own.
        """
        return self._to_learn_from(0)

    def to_tune(self, after: int) -> list[torch.Tensor]:
        """Return such prompts with so many tokens ``after`` them; where facts are strewn, some are asked for and answered instead.

        Raises:
            OptionError: There is too little text of the user's own.
        """
        return self._to_learn_from(after)

    def _to_learn_from(self, after: int) -> list[torch.Tensor]:
        sizes, context = self.sizes, self._context
        longer = max(1, sizes.fitted * sizes.prompt // (2 * context)) if self._long else 0
        shorter = sizes.fitted // 2 if longer else sizes.fitted
        most = longest(self._domains, "profiling")
        characters = min(_CHARACTERS, most)
        count = min(_TEXTS, len(self._domains) * (most // characters))
        texts = [text.text for text in take(self._domains, "profiling", count, characters)]
        found: list[torch.Tensor] = []
        for length, wanted in ((sizes.prompt, shorter), (context, longer)):
            facts = wanted // 3
            distractors = distractors_in(self._tokenizer, length, _FACTS)
            strewn = make_needles(
                self._tokenizer, texts, context=length, count=facts, distractors=distractors, seed=_SEED
            )
            asking = [answered(self._tokenizer, one, _ASKED) if after else one.ids for one in strewn]
            # Long ones from texts on end: few are so long, and a long prompt holds more than one document anyway.
            joined = texts if length == sizes.prompt else ["\n\n".join(reversed(texts))]
            per_text = -(-wanted // len(joined))
            plain = list(windows(self._tokenizer, joined, length + after, per_text=per_text))[: wanted - facts]
            mixed = [plain[index::2] for index in range(2)]
            found += [ids for row in zip_longest(*mixed, asking) for ids in row if ids is not None]
        self._require_enough(found)
        return found

    def _require_enough(self, prompts: Sequence[torch.Tensor]) -> None:
        usable = sum(len(ids) > HEAD + TAIL for ids in prompts)
        if usable < min(_FEWEST, self.sizes.fitted):
            raise OptionError(
                f"texts: they make {usable} prompts of {self.sizes.prompt} tokens to fit on, and {_FEWEST} are needed"
            )
        if usable < self.sizes.fitted // 2:
            log.warning("the texts make %d prompts to fit on; with %d a plan loses less", usable, self.sizes.fitted)

    def to_measure(self, *, further: bool = False) -> Measured:
        """Return held-out texts and needles in them, or ``further`` ones, which lie between the others.

        Raises:
            OptionError: There is too little text of the user's own.
        """
        sizes = self.sizes
        found = Measured([], [])
        for length, share in ((sizes.prompt, 1), (self._context, 2))[: 1 + self._long]:
            unseen = self._unseen(length, sizes.measured // share, further=further)
            for ids in windows(self._tokenizer, unseen, length + sizes.continued, per_text=1):
                if len(ids) <= HEAD + TAIL + sizes.continued:
                    raise OptionError(
                        f"texts: one to measure with has {len(ids)} tokens, too few for a prompt and {sizes.continued} after it"
                    )
                found.texts.append((ids, len(ids) - sizes.continued))
            count = max(1, sizes.needles // share)
            asked = make_needles(self._tokenizer, unseen, context=length, count=count, seed=int(further))
            found.needles.extend(
                (one, self._tokenizer(f" {one.code}", add_special_tokens=False).input_ids) for one in asked
            )
        if len(found.texts) < min(2, sizes.measured):
            raise OptionError(
                "texts: they make 1 prompt to measure with; of fewer than 2 nobody knows how far to trust them"
            )
        return found

    def _unseen(self, length: int, count: int, *, further: bool) -> list[str]:
        """Return ``count`` held-out texts for prompts of ``length`` tokens, or fewer where there are fewer.

        ``further`` ones lie between the others, where there are enough for both.
        """
        kinds, most = len(self._domains), longest(self._domains, "evaluation")
        characters = min(MOST_CHARACTERS_PER_TOKEN * length, most)
        turns = most // characters
        wanted = max(1, -(-count // kinds))  # of each domain
        wanted = min(wanted, -(-turns // 2))  # as many again are for others
        texts = take(self._domains, "evaluation", kinds * min(2 * wanted, turns), characters)
        rows = [texts[start : start + kinds] for start in range(0, len(texts), kinds)]
        chosen = rows[int(further) :: 2] or rows
        return [text.text for row in chosen[:wanted] for text in row]


def domains_of(texts: Iterable[str] | None) -> tuple[Domain, ...]:
    """Return the domain of the user's own ``texts``, or those that are built in."""
    return built_in_domains() if texts is None else (own_domain(texts),)
