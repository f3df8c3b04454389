"""Greedy generation for measures of quality."""

from __future__ import annotations

from typing import Any

import torch


def continue_greedily(model: Any, ids: torch.Tensor, new_tokens: int, **how: Any) -> list[int]:
    """Return up to ``new_tokens`` greedy tokens after the prompt ``ids``, ``(tokens,)``; ``how`` goes to ``generate``."""
    prompt = ids.to(model.device)[None]
    given = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1, **how}
    return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **given)[0, len(ids) :].tolist()
