"""Answers to prompts, shown as they are decoded, and how long they took.

A conversation keeps its cache from turn to turn, as long as the next prompt begins with the tokens that filled it: a long
document is read once, however many questions follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jinja2
import torch
from transformers import TextStreamer

from adaskip_compile import report
from adaskip_compile.kv_cache.cache_argument import cache_argument, cache_of
from adaskip_passes.errors import OptionError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: of the most likely ones that make up ``top_p``, at ``temperature``; greedily where that is 0."""

    temperature: float = 0.0
    top_p: float = 1.0

    def for_generate(self) -> dict[str, Any]:
        """Return what ``generate`` takes.

        What the model's own configuration says of sampling, beams and kinds of cache is overruled; its penalties are not.
        """
        chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature:
            chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {**chosen, "min_p": None, "typical_p": None, "num_beams": 1, "cache_implementation": None}


@dataclass(frozen=True)
class Answer:
    """One answer; ``first`` is the time to the first token and ``later`` that of all others together, in seconds.

    ``cached`` of the prompt's tokens were in the cache; ``captured`` says whether a graph was captured and compiled meanwhile,
    and ``cut`` whether it has as many tokens as it may have.
    """

    text: str
    prompt_tokens: int
    cached: int
    new_tokens: int
    first: float
    later: float
    captured: bool
    cut: bool

    @property
    def tokens_per_second(self) -> float | None:
        """Return how fast the tokens after the first one came, or None where there were none."""
        return (self.new_tokens - 1) / self.later if self.new_tokens > 1 else None

    def __str__(self) -> str:
        cached = f" ({self.cached:,} of them cached)" if self.cached else ""
        rate = "" if self.tokens_per_second is None else f", the others at {self.tokens_per_second:.1f} tokens/s"
        captured = ", capture and compilation included" if self.captured else ""
        cut = "; cut at --max-new-tokens" if self.cut else ""
        return (
            f"{self.prompt_tokens:,} prompt tokens{cached}; {self.new_tokens:,} new: "
            f"the first after {self.first:.2f} s{rate}{captured}{cut}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON shows; times are in seconds."""
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached,
            "new_tokens": self.new_tokens,
            "first_token_s": self.first,
            "tokens_per_s": self.tokens_per_second,
            "captured": self.captured,
            "cut": self.cut,
        }


@dataclass
class Answering:
    """A compiled model that answers: ``write`` is called with each piece of text as soon as it is whole."""

    model: Any
    tokenizer: Any
    sampling: Sampling
    new_tokens: int
    write: Callable[[str], None]

    def continued(self, text: str) -> Answer:
        """Return what follows ``text`` as it stands, without a chat template.

        Raises:
            OptionError: the tokenizer makes no token of it.
        """
        answer, _, _ = self.generate(self.tokenizer(text, return_tensors="pt").input_ids)
        return answer

    def generate(self, ids: torch.Tensor, cache: Any = None, cached: int = 0) -> tuple[Answer, torch.Tensor, Any]:
        """Return the answer to ``ids``, ``(1, tokens)``, all tokens of prompt and answer, ``(tokens,)``, and the cache.

        ``cache`` holds the first ``cached`` tokens already.
        """
        if not ids.numel():
            raise OptionError("the tokenizer of this model makes no token of the prompt; give more text")
        ids = ids.to(self.model.device)
        stream = _Stream(self.tokenizer, self.write)
        before = _graph_count(self.model)
        result = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.new_tokens,
            streamer=stream,
            return_dict_in_generate=True,
            **self.sampling.for_generate(),
            **({} if cache is None else cache_argument(self.model, cache)),
        )
        began, *ticks = stream.ticks
        tokens = result.sequences[0]
        text = self.tokenizer.decode(tokens[ids.shape[1] :], skip_special_tokens=True)
        captured = _graph_count(self.model) > before
        times = ticks[0] - began, ticks[-1] - ticks[0]
        cut = len(ticks) == self.new_tokens
        answer = Answer(text, ids.shape[1], cached, len(ticks), *times, captured=captured, cut=cut)
        return answer, tokens, cache_of(result)


@dataclass
class Conversation:
    """Turns of a user and the model, from ``system`` on, through the tokenizer's chat template.

    Raises:
        OptionError: The tokenizer has no chat template, or one that takes no system prompt.
    """

    answering: Answering
    system: str | None = None
    messages: list[dict[str, str]] = field(init=False)
    _cache: Any = field(init=False)
    _cached: torch.Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        if not self.answering.tokenizer.chat_template:
            raise OptionError("the tokenizer of this model has no chat template, which --chat and --system need")
        self.begin_anew()
        try:
            self._prompt([*self.messages, {"role": "user", "content": "1"}])
        except jinja2.TemplateError as error:
            raise OptionError(f"the chat template of this model refuses what --system says: {error}") from error

    def begin_anew(self) -> None:
        """Forget all turns, but not what the model was told before them."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self._cache = self._cached = None

    def ask(self, message: str) -> Answer:
        """Return the answer to ``message``, and remember both, or neither where no answer comes of it."""
        asked = [*self.messages, {"role": "user", "content": message}]
        ids = self._prompt(asked)
        cache, cached = self._cache_of(ids)
        self._cache = self._cached = None
        answer, tokens, cache = self.answering.generate(ids, cache, cached)
        if _goes_on(cache, len(tokens)):
            self._cache, self._cached = cache, tokens[:-1].cpu()
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        return answer

    def _prompt(self, messages: list[dict[str, str]]) -> torch.Tensor:
        return self.answering.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids

    def _cache_of(self, ids: torch.Tensor) -> tuple[Any, int]:
        """Return the cache of the turns before, and for how many tokens of ``ids``; None where those are others."""
        held = self._cached
        if held is None or len(held) >= ids.shape[1] or not torch.equal(ids[0, : len(held)], held):
            return None, 0
        return self._cache, len(held)


def _goes_on(cache: Any, tokens: int) -> bool:
    """Whether a later prompt can go on from ``cache``, which has seen all of ``tokens`` but the last, just decoded.

    Models that carry a recurrent state begin it anew with every call of several tokens, or are not known not to.
    """
    layers = getattr(cache, "layers", None)
    if not layers or any(hasattr(one, state) for one in layers for state in ("recurrent_states", "conv_states")):
        return False
    return cache.get_seq_length() == tokens - 1


class _Stream(TextStreamer):
    """Hands text to ``write`` word by word, and notes when each token comes; the prompt comes first."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.ticks: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.ticks.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


def _graph_count(model: Any) -> int:
    return sum(len(session.graphs) for session in report(model).sessions)
