"""The measures by name, made ready for one model: what a sweep and the studies run under every plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from adaskip_compile.evaluation.classification import classified, make_questions
from adaskip_compile.evaluation.continuations import continuations, rouge_l
from adaskip_compile.evaluation.domains import mixed_windows
from adaskip_compile.evaluation.likelihood import decoded_nlls, window_nlls
from adaskip_compile.evaluation.longbench import find_task, longbench_scores, read_items
from adaskip_compile.evaluation.retrieval import retrieved
from adaskip_compile.needles import make_needles
from adaskip_compile.texts import Domain
from adaskip_passes.errors import OptionError

# Characters of text for a token of filler: more than fit, so that needles lie in different parts of it.
_FILLER = 16

MEASURES = ("nll", "decode", "needle", "classification", "rouge")


@dataclass(frozen=True)
class Sizes:
    """How much of each measure is run.

    Args:
        windows: Windows of text a domain, for ``nll`` and ``decode``.
        length: Tokens in each.
        decoded: Tokens at the end of each that ``decode`` measures one by one.
        contexts: Tokens of the prompts of ``needle``, a measure each.
        needles: Prompts of each context.
        questions: Prompts of ``classification``.
        prompts: Prompts of ``rouge``, the domains in turn.
        prompt_tokens: Tokens in each of them.
        new_tokens: Tokens generated after each.
    """

    windows: int = 2
    length: int = 1024
    decoded: int = 32
    contexts: tuple[int, ...] = (1024, 4096)
    needles: int = 9
    questions: int = 32
    prompts: int = 8
    prompt_tokens: int = 512
    new_tokens: int = 48


@dataclass(frozen=True)
class Measure:
    """A measure that is ready to run: ``run(model)`` returns one value an item.

    ``name`` is its kind, one of :data:`MEASURES` or ``longbench``, and where a kind has several which of them:
    ``nll/code``, ``needle/4096``.
    """

    name: str
    run: Callable[[Any], tuple[float, ...]]


def kind_of(name: str) -> str:
    """Return the kind of the measure of this name."""
    return name.partition("/")[0]


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise :class:`OptionError` for a kind of measure that there is not."""
    for kind in kinds:
        if kind not in MEASURES:
            raise OptionError(f"measures: {kind!r} is none; known are {', '.join(MEASURES)}")


def make_measures(
    kinds: Sequence[str], model: Any, tokenizer: Any, domains: Sequence[Domain], sizes: Sizes = Sizes()
) -> list[Measure]:
    """Return the measures of ``kinds``.

    ``model`` is to run in full here: the references of ``rouge`` are what it generates.

    Raises:
        OptionError: A kind is unknown, needs a library that is not installed, or there is not enough text.
    """
    check_kinds(kinds)
    made: list[Measure] = []
    for kind in kinds:
        make = {"nll": _nll, "decode": _decode, "needle": _needle, "classification": _classification, "rouge": _rouge}
        made.extend(make[kind](model, tokenizer, domains, sizes))
    return made


def _nll(_: Any, tokenizer: Any, domains: Sequence[Domain], sizes: Sizes) -> list[Measure]:
    windows = _windows(tokenizer, domains, sizes)
    return [Measure(f"nll/{name}", partial(window_nlls, windows=some)) for name, some in windows.items()]


def _decode(_: Any, tokenizer: Any, domains: Sequence[Domain], sizes: Sizes) -> list[Measure]:
    if sizes.decoded > sizes.length - 2:
        raise OptionError(
            f"decoded: {sizes.decoded} tokens do not fit a window of {sizes.length} with a prompt before them"
        )
    windows = _windows(tokenizer, domains, sizes)
    return [
        Measure(f"decode/{name}", partial(decoded_nlls, windows=some, decoded=sizes.decoded))
        for name, some in windows.items()
    ]


def _needle(_: Any, tokenizer: Any, domains: Sequence[Domain], sizes: Sizes) -> list[Measure]:
    measures = []
    for context in sizes.contexts:
        filler = [domain.evaluation[: _FILLER * context] for domain in domains]
        needles = make_needles(tokenizer, filler, context=context, count=sizes.needles, seed=context)
        measures.append(Measure(f"needle/{context}", partial(retrieved, tokenizer=tokenizer, needles=needles)))
    return measures


def _classification(_: Any, tokenizer: Any, domains: Sequence[Domain], sizes: Sizes) -> list[Measure]:
    questions = make_questions(tokenizer, domains, count=sizes.questions)
    return [Measure("classification", partial(classified, questions=questions))]


def _rouge(model: Any, tokenizer: Any, domains: Sequence[Domain], sizes: Sizes) -> list[Measure]:
    rouge_l([], [])  # is the library there?
    prompts = mixed_windows(domains, tokenizer, "evaluation", sizes.prompts, sizes.prompt_tokens)
    references = continuations(model, tokenizer, prompts, sizes.new_tokens)

    def run(model: Any) -> tuple[float, ...]:
        return rouge_l(continuations(model, tokenizer, prompts, sizes.new_tokens), references)

    return [Measure("rouge", run)]


def _windows(tokenizer: Any, domains: Sequence[Domain], sizes: Sizes) -> dict[str, list[torch.Tensor]]:
    return {domain.name: domain.windows(tokenizer, "evaluation", sizes.windows, sizes.length) for domain in domains}


def longbench_measures(
    folder: str, tasks: Sequence[str], model: Any, tokenizer: Any, *, count: int | None = None
) -> list[Measure]:
    """Return a measure for each LongBench task, from its file in ``folder``; ``count`` is how many items of each.

    Prompts keep as many tokens as leave room in the model's context for the answer.

    Raises:
        FileError: A file is not there or not LongBench's.
        OptionError: A task is unknown, or the tokenizer's limit and the model's leave no room.
    """
    longest = model.config.get_text_config().max_position_embeddings
    measures = []
    for task in tasks:
        room = longest - find_task(task).max_new_tokens
        items = read_items(folder, task, tokenizer, max_tokens=room, count=count)
        measures.append(
            Measure(f"longbench/{task}", partial(longbench_scores, tokenizer=tokenizer, task=task, items=items))
        )
    return measures
