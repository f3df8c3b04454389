"""Models that answer by a rule, so that what a measure makes of right and wrong answers is known."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch


class Reader:
    """A model whose continuation of a prompt, and whose next token, is what ``answer`` says to the prompt's text."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: Any, answer: Callable[[str], str]) -> None:
        self.tokenizer, self.answer = tokenizer, answer
        self.generation_config = SimpleNamespace(eos_token_id=2)
        self.asked: list[str] = []
        self.how: list[dict[str, Any]] = []

    def _say(self, ids: torch.Tensor) -> list[int]:
        self.asked.append(self.tokenizer.decode(ids[0], skip_special_tokens=True))
        return self.tokenizer(self.answer(self.asked[-1]), add_special_tokens=False).input_ids

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **how: Any) -> torch.Tensor:
        self.how.append({"max_new_tokens": max_new_tokens, **how})
        return torch.cat([input_ids, torch.tensor([self._say(input_ids)[:max_new_tokens]], dtype=torch.long)], 1)

    def __call__(self, input_ids: torch.Tensor, logits_to_keep: int) -> Any:
        assert logits_to_keep == 1
        logits = torch.zeros(1, 1, len(self.tokenizer))
        logits[0, 0, self._say(input_ids)[0]] = 1
        return SimpleNamespace(logits=logits)
