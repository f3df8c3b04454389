"""Rouge-L of greedy continuations against the full model's: how far does generated text drift?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from adaskip_compile.evaluation.generation import continue_greedily
from adaskip_passes.errors import OptionError


def continuations(model: Any, tokenizer: Any, prompts: Iterable[torch.Tensor], new_tokens: int) -> tuple[str, ...]:
    """Return the text of exactly ``new_tokens`` greedy tokens after each prompt of token ids ``(tokens,)``."""
    return tuple(
        tokenizer.decode(continue_greedily(model, prompt, new_tokens, min_new_tokens=new_tokens)) for prompt in prompts
    )


def rouge_l(texts: Iterable[str], references: Iterable[str]) -> tuple[float, ...]:
    """Return the Rouge-L F1 of each text against its reference, 0 to 1 (Lin 2004); 1 for equal ones, wordless ones too.

    Raises:
        OptionError: The library rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise OptionError("Rouge-L needs rouge-score: pip install 'adaskip-compile[evaluation]'") from error
    scorer = RougeScorer(["rougeL"])
    pairs = zip(texts, references, strict=True)
    return tuple(
        1.0 if text == reference else float(scorer.score(reference, text)["rougeL"].fmeasure)
        for text, reference in pairs
    )
