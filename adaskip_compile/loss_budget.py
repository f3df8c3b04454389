"""Find what the prompt can skip within a stated loss, its keys and values kept.

In the prompt the deepest layers matter through their keys and values alone, so they go first: the search goes by depth,
of attentions and FFNs in step, and then of each for itself. Every set that is tried has maps fitted for it, and is
measured as requests meet it, on texts that the maps have not seen, by likelihood and by retrieval: the second falls long
before the first.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx, nn

from adaskip_compile.documents import digest, producer
from adaskip_compile.evaluation.needles import make_needles
from adaskip_compile.evaluation.prompt_quality import PromptJudge, PromptScores
from adaskip_compile.identity import identify, unwrapped
from adaskip_compile.layers import find_layers
from adaskip_compile.options import Options
from adaskip_compile.phase_graphs import longest_context
from adaskip_compile.plans import SkipPlan
from adaskip_compile.profiles import is_finite_number
from adaskip_compile.profiling import show_progress
from adaskip_compile.prompt_skips import PromptSkips, Trade
from adaskip_compile.sequence_fitting import SequenceFitter
from adaskip_compile.texts import held_out_texts, profiling_texts, windows
from adaskip_passes.errors import FileError, ForeignFileError, OptionError
from adaskip_passes.flops import count_flops
from adaskip_passes.residual_stream import ResidualStream

log = logging.getLogger(__name__)

# Shares of the layers below the last one, deepest first, that are tried.
_DEPTHS = (1 / 6, 1 / 4, 1 / 3, 5 / 12, 1 / 2)
# Of what the full model finds, at most so much may be lost.
MAX_LOST = 0.05


@dataclass(frozen=True)
class BudgetSizes:
    """How much text a search takes; the defaults take minutes on a small model.

    Args:
        prompt: Tokens of each prompt, to fit on and to measure.
        continued: Tokens after it whose likelihood is measured.
        fitted: How many prompts to fit on.
        measured: How many to measure.
        needles: How many facts to ask for, at each length.
    """

    prompt: int = 1024
    continued: int = 128
    fitted: int = 48
    measured: int = 12
    needles: int = 20


def plan_within_loss(
    model: nn.Module,
    tokenizer: Any,
    *,
    max_loss: float = 0.02,
    context: int = 1024,
    sizes: BudgetSizes | None = None,
    progress: bool = True,
) -> SkipPlan:
    """Return the plan that by its arithmetic makes a prompt fastest, and loses at most ``max_loss``.

    It skips for the body of the prompt alone and keeps keys and values; decoding runs in full. Where nothing fits, the
    plan is empty and says so. What was tried is kept in the plan (``plan.prompt.frontier``).

    Args:
        model: A causal language model of ``transformers``.
        tokenizer: Its tokenizer.
        max_loss: Nats a token by which continuations may be less likely than in full: 0.02 is 2 % of perplexity. Of the
            facts that the full model finds in a prompt, 5 % may be lost besides.
        context: The length of prompts that the plan is for, in tokens: the arithmetic is that of so long a prompt, and
            retrieval is measured at it too.
        sizes: How much text to take.
        progress: Whether to show a bar on a terminal.

    Raises:
        OptionError: ``max_loss`` or ``context`` makes no sense.
        CaptureError: The model is not captured as one graph.
    """
    if not is_finite_number(max_loss) or max_loss < 0:
        raise OptionError(f"max_loss={max_loss!r}: takes nats a token, 0 or more; 0.02 is 2 % of perplexity")
    if type(context) is not int or context < 128:
        raise OptionError(f"context={context!r}: takes a number of tokens, 128 or more")
    model = unwrapped(model)
    longest = longest_context(model)
    if longest is not None and context > longest:
        raise OptionError(f"context={context}: this model has {longest} positions")
    search = _Search(model, tokenizer, max_loss, context, sizes or BudgetSizes())
    tried = list(show_progress(search.trades(), len(_DEPTHS) + 3, progress, "what can go"))
    frontier = tuple(trade for trade, _ in tried)
    best = max((one for one in tried if one[0].within), key=lambda one: one[0].speedup, default=(None, PromptSkips(())))
    prompt = replace(best[1], frontier=frontier, measured=best[0])
    return replace(SkipPlan.none(), policy="loss_budget", model=identify(model), prompt=prompt)


class _Search:
    """Tries sets of sublayers, one after the other."""

    def __init__(self, model: nn.Module, tokenizer: Any, max_loss: float, context: int, sizes: BudgetSizes) -> None:
        self._max_loss, self._context = max_loss, context
        seen = [text.text for text in profiling_texts(32)]
        unseen = [text.text for text in held_out_texts(sizes.measured)]
        fitted = list(windows(tokenizer, seen, sizes.prompt, per_text=-(-sizes.fitted // 32)))[: sizes.fitted]
        self._fitter = SequenceFitter(model, fitted, max_samples=len(fitted))
        texts = windows(tokenizer, unseen, sizes.prompt + sizes.continued, per_text=1)
        needles = [
            (needle, tokenizer(f" {needle.code}", add_special_tokens=False).input_ids)
            for length in sorted({sizes.prompt, context})
            for needle in make_needles(tokenizer, unseen, context=length, count=sizes.needles)
        ]
        self._judge = PromptJudge(model, [(ids, len(ids) - sizes.continued) for ids in texts], needles)
        self._full = self._judge.measure(SkipPlan.none())
        if not any(self._full.found):
            log.warning("the full model finds no needle of %d: the plan is chosen by likelihood alone", sizes.needles)
        self._layers = layers_from_the_end(self._judge.prompt_graph.stream)

    def trades(self) -> Iterator[tuple[Trade, PromptSkips]]:
        """Yield what was tried: first by depth, both kinds in step, then each kind deeper than the other."""
        most = len(self._layers)
        depths = sorted({max(1, round(share * most)) for share in _DEPTHS})
        reached, failed = 0, None
        for depth in depths:
            trade, skips = self._try(depth, depth)
            yield trade, skips
            if not trade.within:
                failed = depth
                break
            reached = depth
        step = max(1, round(most / 12))
        ffns = reached
        for deeper in range(reached + step, (failed or most // 2 + step) + 1, step):
            trade, skips = self._try(reached, deeper)
            yield trade, skips
            if not trade.within:
                break
            ffns = deeper
        for deeper in range(reached + step, most // 2 + 1, step):
            trade, skips = self._try(deeper, ffns)
            yield trade, skips
            if not trade.within:
                break

    def _try(self, attentions: int, ffns: int) -> tuple[Trade, PromptSkips]:
        paths = deepest(self._layers, attentions, ffns)
        skips = self._fitter.fit(paths, progress=False)
        plan = replace(SkipPlan.none(), prompt=skips)
        scores = self._judge.measure(plan)
        return self._judged(scores, attentions, ffns, skips), skips

    def _judged(self, scores: PromptScores, attentions: int, ffns: int, skips: PromptSkips) -> Trade:
        loss, error = scores.loss_against(self._full)
        found, before = sum(scores.found), sum(self._full.found)
        answers = statistics.fmean(scores.answers) - statistics.fmean(self._full.answers)
        within = loss <= self._max_loss and found >= (1 - MAX_LOST) * before
        count = len(scores.found)
        return Trade(
            attentions, ffns, loss, error, found / count, before / count, answers, self._speedup(skips), within
        )

    def _speedup(self, skips: PromptSkips) -> float:
        """Return how much less a prompt of ``context`` tokens multiplies, keys and values, edges and maps counted."""
        graph = self._judge.prompt_graph
        body = skips.as_pass(graph.stream.paths)
        full, short = (prompt_flops(graph.narrowed(one).gm, self._context) for one in (None, body))
        return full / short


def prompt_flops(gm: fx.GraphModule, tokens: int) -> float:
    """Return the floating-point operations of a prompt graph for one prompt of ``tokens`` tokens and an empty cache."""
    total = sympy.Add(*map(count_flops, gm.graph.nodes))
    return float(total.xreplace(dict.fromkeys(total.free_symbols, sympy.Integer(tokens))))


def layers_from_the_end(stream: ResidualStream) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """Return (attentions, FFNs) of each layer but the last, deepest first; the last runs for the last row alone anyway."""
    kinds = {one.path: one for one in stream.sublayers}
    found = []
    for layer in reversed(find_layers(stream.paths)[:-1]):
        attentions = tuple(path for path in layer if kinds[path].kind == "attention")
        stateless = tuple(path for path in layer if not kinds[path].stateful)
        found.append((attentions, stateless))
    return tuple(found)


def deepest(layers: Sequence[tuple[tuple[str, ...], tuple[str, ...]]], attentions: int, ffns: int) -> tuple[str, ...]:
    """Return the paths of the attentions of so many deepest ``layers``, and of the FFNs of so many."""
    chosen = [path for layer in layers[:attentions] for path in layer[0]]
    return (*chosen, *(path for layer in layers[:ffns] for path in layer[1]))


def kept_plan(
    model: nn.Module, tokenizer: Any, options: Options, max_loss: float, context: int, *, progress: bool = True
) -> SkipPlan:
    """Return the plan within ``max_loss`` from the cache directory, or find it and keep it there.

    It is kept for this model, this budget and these versions.
    """
    inner = unwrapped(model)
    identity = identify(inner)
    dtype = next((parameter.dtype for parameter in inner.parameters()), None)
    about = f"{max_loss} {context} {dtype} {producer()} {torch.__version__}"
    path: Path = options.cache_folder / "plans" / f"{identity.key}-{digest(about)}.json"
    if identity.weights is not None and path.exists():
        try:
            plan = SkipPlan.load(path)
            plan.check(identity)
            return plan
        except (FileError, ForeignFileError):
            pass  # damaged: it is found again, and replaced
    plan = plan_within_loss(inner, tokenizer, max_loss=max_loss, context=context, progress=progress)
    if identity.weights is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        plan.save(path)
    return plan
