"""Tune the maps of a plan together, so that the model that skips predicts what the full model predicts.

Fitted one by one, each map imitates one branch as the full model has it, or in sequence the stream after it. Here all of
them are adjusted at once by gradient descent on the divergence between both models' predictions (distillation,
arXiv 1503.02531). The model's own weights stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import dropwhile
from typing import Any

import torch
from torch import fx, nn

from adaskip_compile.capture.dynamo import constant_floats
from adaskip_compile.display.progress import show_progress
from adaskip_compile.files.model_identity import identify, unwrapped
from adaskip_compile.planning.replacement_values import replacement_values
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.profiling.profiles import is_finite_number
from adaskip_compile.profiling.profiling import cheap_arguments, evaluating, token_ids
from adaskip_compile.profiling.stream_maps import StreamMap
from adaskip_passes.errors import CaptureError, OptionError, ProfileError
from adaskip_passes.ir.module_paths import naming
from adaskip_passes.pipeline.pipeline import PipelineResult, run_pipeline
from adaskip_passes.pipelines import CANONICALISE, canonicalised, row_passes, skip_passes

# Relative to the root mean square of each tensor: one rate for weights and shifts of any model. Maps of a prompt, fitted in
# sequence, are near their best: at 0.003 held-out predictions of SmolLM2 get worse, at 0.001 an eighth better.
_RATE, _PROMPT_RATE = 0.03, 0.001
_WARM_UP = 5
_HELD_OUT = 4
# So many tokens a step, of plans that skip throughout, and of those that skip in prompts alone.
_TOKENS, _PROMPT_TOKENS = 256, 1088
# Tokens after a prompt whose predictions are compared, beside those of its last rows.
AFTER = 64
# Of each row the likeliest tokens are kept, and what all others have together.
_LIKELIEST = 128


def tune(
    model: nn.Module,
    plan: SkipPlan,
    samples: Iterable[str | torch.Tensor],
    *,
    tokenizer: Any = None,
    steps: int = 200,
    tokens: int | None = None,
    rate: float | None = None,
    max_samples: int = 64,
    progress: bool = True,
) -> SkipPlan:
    """Return ``plan`` with its maps tuned on ``samples``; they are those of this one skip set from then on.

    Each step takes ``tokens`` tokens of one sample. Of a plan that skips throughout, predictions of all of them are compared,
    at about the cost of four forward passes over them. Of one that skips in prompts alone, the last 64 tokens are taken for what
    follows a prompt, and predictions of those and of the prompt's last rows are compared; the layers before the first map
    run once for each sample, whose stream is kept. Every fourth sample is held out: where the tuned maps do no
    better on it than those of ``plan``, ``plan`` is returned as it is.

    Args:
        model: The model that the plan is for.
        plan: A plan with maps: ``compensation="low_rank"`` or another form, or of :func:`adaskip_compile.plan_within_loss`.
        samples: Texts, which need a ``tokenizer``, or token ids; as mixed as those to be served.
        tokenizer: Turns texts into token ids.
        steps: How many steps to take.
        tokens: Tokens a step; by default 256, and 1,088 where prompts alone skip.
        rate: How far a step goes at most, relative to the root mean square of each tensor; by default 0.03, and 0.001 where
            prompts alone skip.
        max_samples: At most so many of ``samples`` are used.
        progress: Whether to show a bar on a terminal.

    Raises:
        OptionError: The plan has no maps, or ``steps``, ``tokens`` or ``rate`` is no number of them.
        ForeignFileError: The plan is of another model.
        ProfileError: Fewer than two samples, texts without a tokenizer, or a sample too short.
        CaptureError: The model is not captured as one graph.
    """
    in_prompts = plan.prompt is not None and bool(plan.prompt.maps)
    if not plan.maps and not in_prompts:
        raise OptionError("the plan has no maps to tune; make one with plan(..., compensation='low_rank')")
    usual_tokens, usual_rate = (_PROMPT_TOKENS, _PROMPT_RATE) if in_prompts else (_TOKENS, _RATE)
    tokens = usual_tokens if tokens is None else tokens
    rate = usual_rate if rate is None else rate
    _check(steps, tokens, rate)
    model = unwrapped(model)
    plan.check(identify(model))
    plan.check_paths(model)
    ids = list(token_ids(samples, tokenizer, max_samples))
    if len(ids) < 2:
        raise ProfileError(f"tuning needs two samples or more, one of them to judge by; there are {len(ids)}")
    held_out = ids[_HELD_OUT - 1 :: _HELD_OUT] or ids[-1:]
    learned = [one for place, one in enumerate(ids) if place % _HELD_OUT != _HELD_OUT - 1]
    with evaluating(model), _frozen(model):
        pair = _Pair(model, plan)
        judged = [pair.sample(one[:, -tokens:] if in_prompts else one[:, :tokens]) for one in held_out]
        before = pair.loss(judged)
        draw = _prompts(pair, learned, tokens) if in_prompts else _windows(pair, learned, tokens)
        _descend(pair, draw, steps, rate, progress)
        after = pair.loss(judged)
    return pair.tuned() if after < before else plan


def _check(steps: object, tokens: object, rate: float) -> None:
    for name, value, least in (("steps", steps, 1), ("tokens", tokens, 2)):
        if type(value) is not int or value < least:
            raise OptionError(f"{name}={value!r}: takes a number, {least} or more")
    if not is_finite_number(rate) or rate <= 0:
        raise OptionError(f"rate={rate!r}: takes a number above 0")


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Have no parameter of ``model`` take part in gradients."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@dataclass
class _Sample:
    """Token ids ``(1, tokens)`` and what the full model predicts after its last ``rows``.

    ``wanted`` are log-probabilities ``(rows, tokens + 1)`` of the likeliest tokens, whose ids are ``likeliest``, and of all others
    together. ``begun`` are the values of a skipping graph before its first map, once they are known.
    """

    ids: torch.Tensor
    likeliest: torch.Tensor
    wanted: torch.Tensor
    begun: tuple[_Skipping, dict[fx.Node, Any]] | None = None


class _Pair:
    """The full model and the one that skips, and how far apart their predictions are.

    ``leaves`` are the tensors of the maps, by path and name, in float32.
    """

    def __init__(self, model: nn.Module, plan: SkipPlan) -> None:
        self.plan = plan
        self.device = next(parameter.device for parameter in model.parameters())
        prompt = plan.prompt
        self._scales = {**({} if prompt is None else prompt.scales), **plan.scales}
        maps = {**({} if prompt is None else prompt.maps), **plan.maps}
        self.leaves = {
            path: {name: tensor.to(self.device, copy=True).requires_grad_() for name, tensor in one.tensors.items()}
            for path, one in maps.items()
        }
        # In prompts alone the rows that are compared run in full.
        self._rows = None if prompt is None else prompt.tail + AFTER
        self._sample: _Sample | None = None
        how = {} if self._rows is None else cheap_arguments(model, self._rows)

        def forward(ids: torch.Tensor) -> torch.Tensor:
            return model._call_impl(ids, **how).logits

        self._forward = constant_floats(torch.compile(forward, backend=naming(model, self._backend), dynamic=True))

    @property
    def fewest_tokens(self) -> int:
        """How many tokens a sample has at least."""
        prompt = self.plan.prompt
        return 2 if prompt is None or self._rows is None else prompt.head + 2 * self._rows

    def sample(self, ids: torch.Tensor) -> _Sample:
        """Return a sample of ``ids`` ``(1, tokens)``, with what the full model predicts of it.

        Raises:
            ProfileError: It is too short.
        """
        if ids.shape[1] < self.fewest_tokens:
            raise ProfileError(f"a sample has {ids.shape[1]} tokens; tuning this plan needs {self.fewest_tokens}")
        ids = ids.to(self.device)
        with torch.no_grad():
            predicted = self._predicted(ids, None)
            likeliest = predicted.topk(min(_LIKELIEST, predicted.shape[-1])).indices
            return _Sample(ids, likeliest, _grouped(predicted, likeliest))

    def divergence(self, sample: _Sample) -> torch.Tensor:
        """Return the mean divergence of the two over the rows of ``sample``, in nats; gradients reach ``leaves``."""
        found = _grouped(self._predicted(sample.ids, sample), sample.likeliest)
        return (sample.wanted.exp() * (sample.wanted - found)).sum(-1).mean()

    def loss(self, samples: Sequence[_Sample]) -> float:
        """Return the mean divergence over ``samples``."""
        with torch.no_grad():
            return sum(self.divergence(one).item() for one in samples) / len(samples)

    def tuned(self) -> SkipPlan:
        """Return the plan with the maps as they are now; what was measured of it is of others, and goes."""
        tuned = replace(self.plan, maps=self._maps(self.plan.maps))
        if self.plan.prompt is None:
            return tuned
        prompt = replace(self.plan.prompt, maps=self._maps(self.plan.prompt.maps), measured=None, frontier=())
        return replace(tuned, prompt=prompt)

    def _maps(self, maps: Mapping[str, StreamMap]) -> dict[str, StreamMap]:
        return {
            path: StreamMap(one.form, {name: leaf.detach().cpu() for name, leaf in self.leaves[path].items()}, None)
            for path, one in maps.items()
        }

    def _predicted(self, ids: torch.Tensor, sample: _Sample | None) -> torch.Tensor:
        """Return log-probabilities ``(rows, vocabulary)``: the full model's, or those of the one that skips at ``sample``."""
        self._sample = sample
        logits = self._forward(ids)[0]
        return (logits if self._rows is None else logits[-self._rows :]).float().log_softmax(-1)

    def _backend(self, gm: fx.GraphModule, inputs: list[Any]) -> Any:
        whole = canonicalised(gm, CANONICALISE)
        if whole.stream.problems:
            raise CaptureError(f"nothing to tune: {'; '.join(whole.stream.problems)}")
        skipping = self._skipping(whole)

        def run(*values: Any) -> Any:
            if self._sample is None:
                return gm.forward(*values)
            return skipping(self._sample, values)

        return run

    def _skipping(self, whole: PipelineResult) -> _Skipping:
        stream, prompt = whole.stream, self.plan.prompt
        body = None
        if prompt is not None and self._rows is not None:
            body = replace(prompt, tail=self._rows).as_pass(stream.paths)
        paths = tuple(path for path in stream.paths if path in self.plan.scales)
        passes = (*row_passes(body), *skip_passes(paths, maps=self.plan.map_forms(paths)))
        skipping = run_pipeline(whole.gm, stream, passes)
        return _Skipping(skipping, lambda: replacement_values(skipping.added, stream, self._scales, self.leaves))


class _Skipping:
    """A graph that skips, run node by node; what comes before its first map is run once for each sample.

    ``added`` gives the values of the inputs that its skips have added.
    """

    def __init__(self, skipping: PipelineResult, added: Callable[[], Iterable[torch.Tensor]]) -> None:
        self._gm, self._added = skipping.gm, added
        self._inputs = skipping.gm.graph.find_nodes(op="placeholder")
        nodes = [node for node in skipping.gm.graph.nodes if node.op != "placeholder"]
        maps = {*self._inputs[len(self._inputs) - len(skipping.added) :]}
        self._then = list(dropwhile(lambda node: not maps.intersection(node.all_input_nodes), nodes))
        self._first = nodes[: len(nodes) - len(self._then)]
        read = {source for node in self._then for source in node.all_input_nodes}
        self._kept = read.intersection(self._first)

    def __call__(self, sample: _Sample, values: Sequence[Any]) -> Any:
        interpreter = fx.Interpreter(self._gm, garbage_collect_values=False)
        interpreter.env = dict(zip(self._inputs, (*values, *self._added()), strict=True))
        if sample.begun is None or sample.begun[0] is not self:
            with torch.no_grad():
                for node in self._first:
                    interpreter.env[node] = interpreter.run_node(node)
            sample.begun = self, {node: interpreter.env[node] for node in self._kept}
        interpreter.env |= sample.begun[1]
        for node in self._then:
            interpreter.env[node] = interpreter.run_node(node)
        return interpreter.env[self._then[-1]]


def _grouped(predicted: torch.Tensor, likeliest: torch.Tensor) -> torch.Tensor:
    """Return of each row the log-probabilities of its ``likeliest`` tokens, and of all others together."""
    kept = predicted.gather(-1, likeliest)
    others = (1 - kept.exp().sum(-1, keepdim=True)).clamp_min(1e-6).log()
    return torch.cat([kept, others], -1)


def _windows(pair: _Pair, samples: Sequence[torch.Tensor], tokens: int) -> Callable[[int], _Sample]:
    """Return what gives for a step so many tokens from anywhere in a sample."""
    chance = torch.Generator().manual_seed(0)

    def draw(step: int) -> _Sample:
        sample = samples[step % len(samples)]
        start = int(torch.randint(0, max(1, sample.shape[1] - tokens + 1), (1,), generator=chance))
        return pair.sample(sample[:, start : start + tokens])

    return draw


def _prompts(pair: _Pair, samples: Sequence[torch.Tensor], tokens: int) -> Callable[[int], _Sample]:
    """Return what gives for a step the last tokens of a sample: the same ones each time, for they are costly to begin."""
    found: dict[int, _Sample] = {}

    def draw(step: int) -> _Sample:
        place = step % len(samples)
        if place not in found:
            found[place] = pair.sample(samples[place][:, -tokens:])
        return found[place]

    return draw


def _descend(pair: _Pair, draw: Callable[[int], _Sample], steps: int, rate: float, progress: bool) -> None:
    leaves = [leaf for named in pair.leaves.values() for leaf in named.values()]
    rates = [rate * leaf.detach().square().mean().sqrt().clamp_min(1e-8).item() for leaf in leaves]
    groups = [{"params": [leaf], "lr": rate} for leaf, rate in zip(leaves, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    for step in show_progress(range(steps), steps, progress, "tuning"):
        sample = draw(step)
        with torch.enable_grad():
            pair.divergence(sample).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
