"""Find what the prompt can skip within a stated loss, its keys and values kept.

The search goes by depth (:mod:`adaskip_compile.fitting.depths`): of attentions and FFNs in step, and then of each for
itself. Where prompts are so long that it pays, attentions have a window at first in place of being skipped: what deep ones
read lies close by. They go in step with FFNs, for the map of the FFN behind it makes up for what a window hides; a window
without one loses facts. What is lost grows with depth, so depths are bisected.

Every set that is tried has maps fitted for it, and is measured as requests meet it, on texts that the maps have not seen,
by likelihood and by retrieval: the second falls long before the first. What the first refuses, the second is not asked of.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import fx, nn

from adaskip_compile.checkpoints.model_config import longest_context
from adaskip_compile.display.progress import show_progress
from adaskip_compile.files.model_identity import identify, unwrapped
from adaskip_compile.fitting.budget_texts import BudgetSizes, BudgetTexts, domains_of
from adaskip_compile.fitting.depths import Depths, layers_from_the_end
from adaskip_compile.fitting.prompt_quality import PromptJudge
from adaskip_compile.fitting.sequence import SequenceFitter
from adaskip_compile.planning.prompt_skips import PromptSkips, Trade
from adaskip_compile.planning.quality import Answers, Quality
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.planning.skipped_sublayer import SkippedSublayer
from adaskip_compile.profiling.profiles import is_finite_number
from adaskip_passes.analysis.flops import count_flops, hidden_flops
from adaskip_passes.errors import LegalityError, OptionError, ProfileError

log = logging.getLogger(__name__)

# Of the layers below the last one, at most so many are tried, so many first, and depths are told apart to so many.
_DEEPEST, _FIRST, _RESOLUTION = 1 / 2, 1 / 3, 1 / 16
_KINDS = ("attentions", "ffns")
# Windows that make a prompt less than this much cheaper are not worth what they lose.
_WINDOWS_PAY = 1.03
# Maps of gated FFNs have so many of their units: an eighth of the products misses a third less than a low-rank map does.
_UNIT_SHARE = 1 / 8
# Sets that a search tries, about: what its bar counts to until it knows better.
_TRIES = 8
# Of the facts that the full model finds, at most so large a share may be lost, one at least, for a few found or not say
# little; and by so many nats a token their answers may be less likely, which falls more evenly.
MAX_LOST = MAX_ANSWER_LOSS = 0.05


def plan_within_loss(
    model: nn.Module,
    tokenizer: Any,
    *,
    max_loss: float = 0.02,
    context: int = 1024,
    texts: Iterable[str] | None = None,
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
            facts that the full model finds in a prompt, 5 % may be lost besides (one at least), and the answers may be
            less likely by 0.05 nats a token.
        context: The length of prompts that the plan is for, in tokens: the arithmetic is that of so long a prompt, and
            retrieval is measured at it too.
        texts: Documents like those to be served, to fit on and to measure with, in turn; by default built-in text.
        sizes: How much text to take.
        progress: Whether to show a bar on a terminal.

    Raises:
        OptionError: ``max_loss`` or ``context`` makes no sense, or there is too little text in ``texts``.
        CaptureError: The model is not captured as one graph.
    """
    how: dict[str, Any] = {"context": context, "texts": texts, "sizes": sizes, "progress": progress}
    [plan] = plans_within_losses(model, tokenizer, [max_loss], **how)
    return plan


def plans_within_losses(
    model: nn.Module,
    tokenizer: Any,
    max_losses: Sequence[float],
    *,
    context: int = 1024,
    texts: Iterable[str] | None = None,
    sizes: BudgetSizes | None = None,
    progress: bool = True,
) -> tuple[SkipPlan, ...]:
    """Return the plan of :func:`plan_within_loss` for each of ``max_losses``: what one search measures serves the others."""
    for max_loss in max_losses:
        if not is_finite_number(max_loss) or max_loss < 0:
            raise OptionError(f"max_loss={max_loss!r}: takes nats a token, 0 or more; 0.02 is 2 % of perplexity")
    if type(context) is not int or context < 128:
        raise OptionError(f"context={context!r}: takes a number of tokens, 128 or more")
    model = unwrapped(model)
    longest = longest_context(model)
    if longest is not None and context > longest:
        raise OptionError(f"context={context}: this model has {longest} positions")
    search = _Search(
        model, BudgetTexts(tokenizer, context, sizes or BudgetSizes(), domains_of(texts), longest), context
    )
    identity = identify(model)
    plans = []
    for max_loss in max_losses:
        title = f"what the prompt can skip within {100 * max_loss:g} %"
        tried = list(show_progress(search.trades(max_loss), _TRIES, progress, title))
        within = (one for one in tried if one[0].within and one[0].speedup > 1)
        best = max(within, key=lambda one: one[0].speedup, default=(None, PromptSkips(())))
        prompt = replace(best[1], frontier=tuple(trade for trade, _ in tried), measured=best[0])
        plans.append(replace(SkipPlan.none(), policy="loss_budget", model=identity, prompt=prompt))
    return tuple(plans)


def _one_deeper(depths: Depths, kind: str) -> Depths:
    return replace(depths, **{kind: getattr(depths, kind) + 1})


@dataclass
class _Tried:
    """What was fitted for one set, and measured of it: facts only where likelihood kept a budget."""

    skips: PromptSkips
    quality: Quality
    answers: Answers | None = None


class _Search:
    """Tries sets of sublayers, one after the other, each once."""

    def __init__(self, model: nn.Module, texts: BudgetTexts, context: int) -> None:
        self._context = context
        self._tried: dict[Depths, _Tried] = {}
        measured = texts.to_measure()
        self._fitter = SequenceFitter(model, texts.to_fit(), max_samples=texts.sizes.fitted)
        self._judge = PromptJudge(model, measured.texts, measured.needles)
        self._full_losses = self._judge.continuations(SkipPlan.none())
        self._full_answers = self._judge.answers(SkipPlan.none())
        if not any(self._full_answers.found):
            log.warning(
                "the full model finds no needle of %d: of retrieval, the likelihood of answers alone decides",
                texts.sizes.needles,
            )
        self._layers = layers_from_the_end(self._judge.prompt_graph.stream)
        self._most = min(len(self._layers), max(1, round(_DEEPEST * len(self._layers))))
        self._fitter.begin_at(Depths(self._most, self._most).skipped(self._layers))

    def trades(self, max_loss: float) -> Iterator[tuple[Trade, PromptSkips]]:
        """Yield what was tried: both kinds in step, then each deeper than the other, what gains more first."""
        windows = self._gain(Depths(windows=self._most)) >= _WINDOWS_PAY
        in_step = ("windows", "ffns") if windows else _KINDS
        depths = yield from self._deepest(max_loss, Depths(), round(_FIRST * len(self._layers)), in_step)
        for kind in sorted(_KINDS, key=lambda kind: self._gain(_one_deeper(depths, kind)), reverse=True):
            depths = yield from self._deepest(max_loss, depths, None, (kind,))

    def _deepest(
        self, max_loss: float, depths: Depths, first: int | None, kinds: Sequence[str]
    ) -> Generator[tuple[Trade, PromptSkips], None, Depths]:
        """Yield tries of ``kinds`` in step, deeper than ``depths``, by bisection; return the deepest within the budget."""
        reached, over = getattr(depths, kinds[0]), self._most + 1
        step = max(1, round(_RESOLUTION * len(self._layers)))
        while over - reached > step:
            depth = min(max(first or (reached + over) // 2, reached + 1), over - 1)
            first = None
            deeper = replace(depths, **dict.fromkeys(kinds, depth))
            if deeper.named(self._layers) == depths.named(self._layers):
                return depths  # neither attentions nor stateless sublayers so deep
            try:
                trade, skips = self._try(max_loss, deeper)
            except (ProfileError, LegalityError) as error:
                log.warning("%s cannot be left out: %s", deeper, error)
                over = depth
                continue
            yield trade, skips
            if trade.within:
                reached, depths = depth, deeper
            else:
                over = depth
        return depths

    def _gain(self, depths: Depths) -> float:
        """Return how much less a prompt multiplies at ``depths``, maps not counted."""
        paths = depths.skipped(self._layers)
        skipped = tuple(SkippedSublayer(path, "", None, 1.0, None) for path in paths)
        return self._speedup(PromptSkips(skipped, windows=depths.windowed(self._layers)))

    def _try(self, max_loss: float, depths: Depths) -> tuple[Trade, PromptSkips]:
        if depths not in self._tried:
            skips = self._fitter.fit(
                depths.skipped(self._layers),
                unit_share=_UNIT_SHARE,
                windows=depths.windowed(self._layers),
                progress=False,
            )
            losses = self._judge.continuations(replace(SkipPlan.none(), prompt=skips))
            self._tried[depths] = _Tried(skips, Quality.of(losses, self._full_losses))
        tried = self._tried[depths]
        trade = Trade(
            depths.attentions,
            depths.ffns,
            self._speedup(tried.skips),
            within=False,
            quality=tried.quality,
            windows=depths.windows_left,
        )
        return self._with_answers(trade, tried) if tried.quality.loss <= max_loss else trade, tried.skips

    def _with_answers(self, trade: Trade, tried: _Tried) -> Trade:
        before = sum(self._full_answers.found)
        enough = before - max(1, math.floor(MAX_LOST * before))
        if tried.answers is None:
            tried.answers = self._judge.answers(replace(SkipPlan.none(), prompt=tried.skips), enough)
        quality = tried.quality.with_answers(tried.answers, self._full_answers)
        assert quality.answer_loss is not None
        kept = sum(tried.answers.found) >= enough and quality.answer_loss <= MAX_ANSWER_LOSS
        return replace(trade, quality=quality, within=kept)

    def _speedup(self, skips: PromptSkips) -> float:
        """Return how much less a prompt of ``context`` tokens multiplies, keys and values, edges and maps counted."""
        graph = self._judge.prompt_graph
        body = skips.as_pass(graph.stream.paths)
        full, short = (prompt_flops(graph.variants.narrowed(one).gm, self._context) for one in (None, body))
        return full / short


def confirm(
    model: nn.Module,
    tokenizer: Any,
    plans: Sequence[SkipPlan],
    *,
    context: int = 1024,
    texts: Iterable[str] | None = None,
    sizes: BudgetSizes | None = None,
) -> list[Quality]:
    """Return what ``plans`` lose on held-out texts and needles that no search for a plan has seen.

    Where there is too little text for others at ``context`` (above 14,000 tokens or so), needles alone are others.

    Args:
        model: A causal language model of ``transformers``.
        tokenizer: Its tokenizer.
        plans: Of any kind, those that leave holes too.
        context: The length of the longer prompts, in tokens.
        texts: What the search was given; by default built-in text.
        sizes: How much text to take.
    """
    inner = unwrapped(model)
    chosen = BudgetTexts(tokenizer, context, sizes or BudgetSizes(), domains_of(texts), longest_context(inner))
    measured = chosen.to_measure(further=True)
    return PromptJudge(inner, measured.texts, measured.needles).compare(plans)


def prompt_flops(gm: fx.GraphModule, tokens: int) -> float:
    """Return the floating-point operations of a prompt graph for one prompt of ``tokens`` tokens and an empty cache.

    What causality hides from an attention does not count.
    """
    total = sympy.Add(*(count_flops(node) - hidden_flops(node) for node in gm.graph.nodes))
    return float(total.xreplace(dict.fromkeys(total.free_symbols, sympy.Integer(tokens))))
