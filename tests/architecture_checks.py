"""What is checked of one architecture: its stream, its sublayers, and what skipping does to its logits.

One capture serves all runs of a model: the same graphs run eagerly, through the driver, or node by node
in the reference interpreter, as :class:`Switch` says. What the stream must be is read off the eager
model by hooks: the hidden states that go into and come out of each layer, and the mixers and FFNs
that ran in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import fx, nn

from adaskip_compile.capture.dynamo import constant_floats, graph_break
from adaskip_compile.kv_cache.cache_argument import cache_argument
from adaskip_compile.options import Options
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.runtime.admission import admit
from adaskip_compile.runtime.session import Session
from adaskip_passes.errors import AdaSkipError
from adaskip_passes.stream.find_stream import find_residual_stream
from adaskip_passes.stream.stream import ResidualStream
from tests.models import tokens
from tests.reference import InterpreterReference

# What the configuration implies where the modules of a layer do not tell it by their names: layers that call
# their projections themselves, FFNs that keep a state of their own, more sublayers a layer than two.
EXPECTED = {
    "bamba": "2 attention, 4 ffn, 2 ssm",
    "biogpt": "2 attention, 2 ffn",
    "cpmant": "2 attention, 2 ffn",
    "falcon_h1": "2 attention, 2 ffn, 2 ssm",
    "gemma4_text": "2 attention, 4 ffn",
    "opt": "2 attention, 2 ffn",
    "inkling_text": "2 attention, 2 ssm",
    "inkling2_text": "2 attention, 2 ssm",
    "nemotron_h": "1 attention, 2 ffn, 1 ssm",
    "rwkv": "4 ssm",
    "xglm": "2 attention, 2 ffn",
    "xlstm": "2 ffn, 2 ssm",
    "zamba": "2 attention, 2 ssm",
    "zamba2": "1 attention, 1 ssm",
}
# Layers that norm what they get before they branch off it: their stream begins behind the first norm.
NORMED_FIRST = frozenset({"minimax", "rwkv"})

STEPS = 4
TOLERANCE = 2e-4

_ATTENTIONS = frozenset("self_attn attn attention self_attention temporal_block cross_attn attn_a cca".split())
_STATES = frozenset("mamba linear_attn mixer time_mix conv mamba2 ssm short_conv delta_net".split())
_FFNS = frozenset(
    "mlp feed_forward ffn moe block_sparse_moe mlp_block channel_mix feedforward ff feed_forward2 intermediate".split()
)


class Switch:
    """A Dynamo backend whose graphs run through the driver, or in the reference with ``scales`` skipped."""

    def __init__(self, model: nn.Module) -> None:
        self.session = Session(model, Options(plan=SkipPlan.none(), inner="eager"))
        self.graphs: list[fx.GraphModule] = []
        self.streams: list[ResidualStream] = []
        self.scales: Mapping[str, float] | None = None
        self.observe: Callable[[fx.GraphModule, ResidualStream, dict[fx.Node, Any]], None] | None = None
        self.compiled = constant_floats(torch.compile(model._call_impl, backend=self, dynamic=True))

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        dispatch = admit(self.session, gm, inputs)
        # What the driver refuses, and runs unskipped, has no stream for the reference either.
        gm = getattr(dispatch, "gm", gm)  # in canonical form
        stream = getattr(dispatch, "stream", None) or replace(find_residual_stream(gm), sublayers=())
        self.graphs.append(gm)
        self.streams.append(stream)

        def run(*values: Any) -> Any:
            if self.scales is None or not stream.sublayers:
                return dispatch(*values)
            chosen = [(stream.by_path(path), scale) for path, scale in self.scales.items()]
            reference = InterpreterReference(
                gm, {item.stream_out.name: (scale, item.stream_in.name) for item, scale in chosen}
            )
            result = reference.run(*values)
            if self.observe is not None:
                self.observe(gm, stream, reference.env)
            return result

        return run


class _Forced:
    """Makes ``generate`` take the tokens given, whatever the logits."""

    def __init__(self, forced: torch.Tensor) -> None:
        self.forced, self.step = forced, 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        result = torch.full_like(scores, -1e9)
        result.scatter_(1, self.forced[:, self.step : self.step + 1], 0.0)
        self.step += 1
        return result


def logits(
    model: Any, call: Callable[..., Any] | None, *, cache: Any = None, batch: int = 1, length: int = 8
) -> torch.Tensor:
    """Return the logits ``(steps, batch, vocabulary)`` of one request of forced tokens; ``call`` in the model's place."""
    ids = tokens(batch, length)
    model._compiled_call_impl = call
    try:
        with torch.no_grad():
            result = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **cache_argument(model, cache),
                max_new_tokens=STEPS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                logits_processor=[_Forced(tokens(batch, STEPS, seed=7))],
                disable_compile=True,
            )
    finally:
        model._compiled_call_impl = None
    return torch.stack(result.logits)


@dataclass
class Expected:
    """What hooks saw in one eager call: the stream around each layer, and the kind of each part that ran, in order."""

    before: dict[str, torch.Tensor] = field(default_factory=dict)
    after: dict[str, torch.Tensor] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


@contextmanager
def watched(model: nn.Module) -> Iterator[Expected]:
    """Record the first call of each decoder layer of an eager model, and of its parts."""
    seen = Expected()
    handles = []
    types = _layer_types(model.config)
    for index, (path, layer) in enumerate(decoder_layers(model)):
        handles.append(layer.register_forward_hook(_layer_hook(path, seen), with_kwargs=True))
        for name, part in layer.named_children():
            kind = part_kind(name)
            if kind == "attention" and types[index : index + 1] in (
                ["linear_attention"],
                ["conv"],
                ["recurrent"],
                ["mamba"],
            ):
                kind = "ssm"
            if kind:
                handles.append(part.register_forward_hook(_part_hook(f"{path}.{name}", kind, seen)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _layer_types(config: Any) -> list[str]:
    for name in ("layer_types", "layers_block_type", "block_types"):
        if getattr(config, name, None):
            return list(getattr(config, name))
    return []


def part_kind(name: str) -> str:
    """Return the kind of sublayer that a module of that name is, or ``""``."""
    for kind, names in (("attention", _ATTENTIONS), ("ssm", _STATES), ("ffn", _FFNS)):
        if name.rstrip("0123456789_").lower() in names:
            return kind
    return ""


def decoder_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of each entry of the list of layers: the module list with the most parameters."""
    lists = [
        (sum(parameter.numel() for parameter in module.parameters()), path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    _, path, layers = max(lists, key=lambda item: item[0])
    for index, layer in enumerate(layers):
        yield f"{path}.{index}", layer


def _layer_hook(path: str, seen: Expected) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        before = next((value for value in (*args, *kwargs.values()) if _is_stream(value)), None)
        after = next(
            (value for value in (result if isinstance(result, tuple) else (result,)) if _is_stream(value)), None
        )
        if before is not None and after is not None and path not in seen.before:
            seen.before[path], seen.after[path] = before.detach().clone(), after.detach().clone()

    return hook


def _is_stream(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 2 and value.is_floating_point()


def _part_hook(path: str, kind: str, seen: Expected) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        if path not in seen.names:
            seen.names.append(path)
            seen.kinds.append(kind)

    return hook


@dataclass
class Findings:
    """What was found of one architecture; ``problems`` is empty where all holds."""

    family: str
    sublayers: int = 0
    kinds: str = ""
    expected: str = ""
    caches: str = ""
    graphs: int = 0
    stream: str = ""
    zero: str = ""
    skip: str = ""
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    paths: tuple[str, ...] = ()
    streams: list[ResidualStream] = field(default_factory=list)


def count_kinds(kinds: Any) -> str:
    """Return ``2 attention, 2 ffn``."""
    return ", ".join(f"{number} {kind}" for kind, number in sorted(Counter(kinds).items()))


def examine(family: str, model: Any, *, plans: int = 3, batch: int = 1) -> Findings:
    """Check everything of one model, with the cache that it makes itself and, where eager can, with a static one.

    Problems are noted, not raised.
    """
    found = _examine(family, model, lambda: None, plans, batch)
    found.caches = "own"
    if found.reason or not _takes_static_cache(model, batch):
        return found
    static = _examine(family, model, lambda: _static_cache(model), plans, batch)
    found.caches = "own, static"
    for name in ("zero", "skip", "stream"):
        if getattr(static, name) != "yes":
            setattr(found, name, f"no: with a static cache: {getattr(static, name)[4:] or static.reason}")
    found.notes += [f"static cache: {note}" for note in static.notes]
    if static.paths != found.paths:
        found.notes.append("the caches differ in sublayers")
    return found


def _static_cache(model: Any) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=16)


def _takes_static_cache(model: Any, batch: int) -> bool:
    """Tell whether the eager model fills a static cache: some types know no such cache, others do not read it."""
    try:
        cache = _static_cache(model)
        logits(model, None, cache=cache, batch=batch)
        return int(cache.get_seq_length()) > 0
    except Exception:  # noqa: BLE001 whatever a model raises that was not written for it
        return False


def _examine(family: str, model: Any, cache: Callable[[], Any], plans: int, batch: int) -> Findings:
    found = Findings(family)
    torch._dynamo.reset()
    with watched(model) as seen:
        eager = logits(model, None, cache=cache(), batch=batch)
    found.expected = EXPECTED.get(family) or count_kinds(seen.kinds)
    switch = Switch(model)
    missing: set[str] = set(seen.before)
    outside: set[str] = set(seen.after)

    def observe(gm: fx.GraphModule, stream: ResidualStream, env: dict[fx.Node, Any]) -> None:
        values = [env[node] for item in stream.sublayers for node in (item.stream_in, item.stream_out)]
        for names, wanted in ((missing, seen.before), (outside, seen.after)):
            names.difference_update([path for path in names if any(_equal(wanted[path], value) for value in values)])

    switch.scales = dict[str, float]()
    switch.observe = observe
    plain = logits(model, switch.compiled, cache=cache(), batch=batch)
    switch.observe, switch.scales = None, None
    found.graphs, found.streams = len(switch.graphs), switch.streams
    first = switch.streams[0]
    found.sublayers, found.paths = len(first.sublayers), first.paths
    found.kinds = count_kinds(item.kind for item in first.sublayers)
    if not missing and len(seen.after) > 1 and outside == {list(seen.after)[-1]}:
        outside.clear()  # post-norm: what the last layer gives is the norm of the stream's last value
    if family in NORMED_FIRST:
        missing -= {next(iter(seen.before))}
    found.stream = "yes" if not missing | outside else f"no: {sorted(missing)[:2]} {sorted(outside)[:2]}"
    breaks = [stop for gm in switch.graphs if (stop := graph_break(gm))]
    problems = [problem for stream in switch.streams for problem in stream.problems]
    found.reason = f"capture breaks the forward in pieces: {breaks[0]}" if breaks else next(iter(problems), "")
    if len({stream.paths for stream in switch.streams if stream.sublayers}) > 1:
        found.notes.append("graphs differ in sublayers")
    if _differ(plain, eager):
        found.notes.append(f"captured graphs differ from eager by {_gap(plain, eager):.1e}")
    driven = logits(model, switch.compiled, cache=cache(), batch=batch)
    found.zero = "yes" if not _differ(driven, eager) else f"no: {_gap(driven, eager):.1e}"
    found.notes += [note for note in switch.session.notes if "as a whole" in note]
    if first.problems:
        return found
    failed = _failing_plans(switch, first, eager, plans, lambda call: logits(model, call, cache=cache(), batch=batch))
    found.skip = "yes" if not failed else "no: " + "; ".join(failed)
    if len(switch.graphs) != found.graphs:
        found.notes.append(f"captured again: {len(switch.graphs)} graphs, were {found.graphs}")
    return found


def _failing_plans(
    switch: Switch, stream: ResidualStream, eager: torch.Tensor, plans: int, run: Callable[[Any], torch.Tensor]
) -> list[str]:
    """Return, for each of some random legal plans that the driver gets wrong, what is wrong."""
    failed: list[str] = []

    @settings(
        max_examples=plans,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(legal_plans(stream))
    def try_plan(scales: dict[str, float]) -> None:
        switch.scales = scales
        wanted = run(switch.compiled)
        switch.scales = None
        switch.session.use(SkipPlan.from_scales(scales))
        try:
            got = run(switch.compiled)
        except AdaSkipError as error:
            failed.append(f"{sorted(scales)}: {type(error).__name__} {str(error)[:300]}")
            return
        if _differ(got, wanted):
            failed.append(f"{sorted(scales)}: {_gap(got, wanted):.1e}")
        if not _differ(got, eager):
            failed.append(f"{sorted(scales)}: changes nothing")

    try_plan()
    return failed


def verdict(found: Findings) -> str:
    """Return ``yes`` where every check holds, else ``no``."""
    held = found.kinds == found.expected and found.stream == found.zero == found.skip == "yes" and not found.reason
    return "yes" if held else "no"


@st.composite
def legal_plans(draw: st.DrawFn, stream: ResidualStream) -> dict[str, float]:
    """Draw path -> scale: at least one stateful and one stateless sublayer where there are, and one of each kept."""
    chosen: list[str] = []
    for stateful in (True, False):
        group = [item.path for item in stream.sublayers if item.stateful == stateful]
        if group:
            most = max(1, len(group) - 1)
            chosen += draw(st.lists(st.sampled_from(group), min_size=1, max_size=most, unique=True))
    readers = [reader for path in chosen for reader in stream.by_path(path).shared_with if reader in stream.paths]
    every = {*chosen, *readers}
    return {path: draw(st.floats(0.8, 1.2)) for path in stream.paths if path in every}


def _equal(one: torch.Tensor, other: Any) -> bool:
    if not isinstance(other, torch.Tensor) or one.numel() != other.numel():
        return False
    return torch.allclose(one.flatten().float(), other.flatten().float(), rtol=1e-3, atol=1e-4)


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())
