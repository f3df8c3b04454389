"""Independent references for what a specialised graph must compute, and for what its probes must measure.

Three ways that share nothing with the rewriter:

* :class:`InterpreterReference` runs the captured graph, unchanged, node by node, and puts ``scale * a``
  in the place of the skipped sublayers' adds;
* :func:`omit_sublayers` makes an eager model truly omit them, by a layer forward written by hand;
* :func:`hook_statistics` measures similarity and scales with forward hooks on the eager model, in float64.

The last two know decoder layers whose parts are called as Llama's are. A scale mapping is read at each
call, so that a test may change it between two tokens, as the end of the window does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from adaskip_passes.canonicalise.straighten_stream import StraightenStream
from adaskip_passes.stream.find_stream import find_residual_stream
from adaskip_passes.stream.stream import ResidualStream
from tests.generation import CACHE_NAME
from tests.rewriting import applied

Skips = Mapping[str, tuple[float, str]]


class InterpreterReference(fx.Interpreter):
    """Runs a graph with some of its adds overridden: the value of each add ``b`` becomes ``scale * a``.

    ``skips`` maps the name of a sublayer's residual add to its scale and the name of the node that holds
    the stream before it. Everything else runs as captured, the skipped sublayer too; what its attention
    writes into its cache has no reader left.
    """

    def __init__(self, gm: fx.GraphModule, skips: Skips) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._skips = skips
        self._nodes = {node.name: node for node in gm.graph.nodes}
        unknown = {name for add, (_, before) in skips.items() for name in (add, before)} - self._nodes.keys()
        if unknown:
            raise KeyError(f"the graph has no nodes {sorted(unknown)}")

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self._skips:
            return super().run_node(n)
        scale, before = self._skips[n.name]
        return scale * self.env[self._nodes[before]]


def sublayer_skips(gm: fx.GraphModule, scales: Mapping[str, float]) -> dict[str, tuple[float, str]]:
    """Return what :class:`InterpreterReference` needs to skip the sublayers of ``gm`` at the given paths."""
    return _skips(find_residual_stream(gm), scales)


def _skips(stream: ResidualStream, scales: Mapping[str, float]) -> dict[str, tuple[float, str]]:
    found = [(stream.by_path(path), scale) for path, scale in scales.items()]
    return {sublayer.stream_out.name: (scale, sublayer.stream_in.name) for sublayer, scale in found}


def reference_backend(scales: Mapping[str, float]) -> Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]:
    """Return a Dynamo backend that runs each graph with the sublayers in ``scales`` (path to scale) skipped."""

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        applied(StraightenStream(), gm)
        stream = find_residual_stream(gm)
        return lambda *inputs: InterpreterReference(gm, _skips(stream, scales)).run(*inputs)

    return backend


def decoder_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of each decoder layer of ``model``."""
    parts = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    for path, module in model.named_modules():
        if all(hasattr(module, part) for part in parts):
            yield path, module


@contextmanager
def omit_sublayers(model: nn.Module, scales: Mapping[str, float]) -> Iterator[None]:
    """Make an eager model omit the sublayers in ``scales``: attention or MLP does not run, and ``b = scale * a``.

    Zeros take the place of an omitted attention's keys and values, so that the cache counts its tokens and
    positions and masks come out right even where layer 0 is the omitted one.
    """
    layers = dict(decoder_layers(model))
    unknown = scales.keys() - {f"{path}.{part}" for path in layers for part in ("self_attn", "mlp")}
    if unknown:
        raise KeyError(f"the model has no sublayers {sorted(unknown)}")
    with _layer_forwards(layers, lambda path, layer: _forward(path, layer, scales)):
        yield


@contextmanager
def _layer_forwards(layers: Mapping[str, Any], forward_of: Callable[[str, Any], Callable[..., Any]]) -> Iterator[None]:
    """Have each layer run what ``forward_of`` gives for its path and itself."""
    for path, layer in layers.items():
        layer.forward = forward_of(path, layer)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def _forward(path: str, layer: Any, scales: Mapping[str, float]) -> Callable[..., torch.Tensor]:
    def forward(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        scale = scales.get(f"{path}.self_attn")
        if scale is None:
            normed = layer.input_layernorm(hidden)
            mixed, _ = layer.self_attn(hidden_states=normed, **kwargs)
            hidden = hidden + mixed
        else:
            _count_tokens(layer.self_attn, hidden, kwargs.get(CACHE_NAME))
            hidden = scale * hidden
        scale = scales.get(f"{path}.mlp")
        if scale is not None:
            return scale * hidden
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    return forward


def _count_tokens(attention: Any, hidden: torch.Tensor, cache: Any) -> None:
    if cache is None:
        return
    batch, length, _ = hidden.shape
    heads = attention.config.num_key_value_heads
    zeros = hidden.new_zeros(batch, heads, length, attention.head_dim)
    cache.update(zeros, zeros, attention.layer_idx)


@dataclass(frozen=True)
class Body:
    """What replaces sublayers for the body of a prompt, by path: b of a, for all but the first and last rows.

    ``windows`` are the tokens that such a row sees in an attention, by path, beside the first ``head``.
    """

    replacements: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
    head: int
    tail: int
    windows: Mapping[str, int] = field(default_factory=dict)

    def mask(self, path: str, queries: int, keys: int) -> torch.Tensor | None:
        """Return which keys each query sees, of a prompt that begins with them; None where there is no window."""
        if path not in self.windows or queries < 4 * (self.head + self.tail):
            return None
        query, key = torch.arange(queries)[:, None], torch.arange(keys)
        near = (query - key < self.windows[path]) | (key < self.head) | (query >= queries - self.tail)
        return (key <= query) & near

    def joined(self, path: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return ``b`` with the body of its rows made from those of ``a``, where the sublayer at ``path`` is replaced."""
        rows = a.shape[1]
        if path not in self.replacements or rows < 4 * (self.head + self.tail):
            return b
        body = self.replacements[path](a[:, self.head : rows - self.tail])
        return torch.cat([b[:, : self.head], body, b[:, rows - self.tail :]], dim=1)


class BodyInterpreter(fx.Interpreter):
    """Runs a captured graph, unchanged, and puts the replacements of ``body`` into the values of its adds."""

    def __init__(self, gm: fx.GraphModule, stream: ResidualStream, body: Body) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._ends = {one.stream_out: one for one in stream.sublayers}
        attention = torch.nn.functional.scaled_dot_product_attention
        self._attentions = {
            node: one.path for one in stream.sublayers for node in one.nodes if node.target is attention
        }
        self._body = body

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._attentions:
            operands, how = self.fetch_args_kwargs_from_env(n)
            mask = self._body.mask(self._attentions[n], *(one.shape[-2] for one in operands[:2]))
            if mask is not None:
                how = dict[str, Any](how) | {"attn_mask": mask, "is_causal": False}
                return nn.functional.scaled_dot_product_attention(*operands, **how)
        if n not in self._ends:
            return value
        return self._body.joined(self._ends[n].path, self.env[self._ends[n].stream_in], value)


def body_backend(body: Body) -> Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]:
    """Return a Dynamo backend that runs each graph with the replacements of ``body``."""

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        applied(StraightenStream(), gm)
        stream = find_residual_stream(gm)
        return lambda *inputs: BodyInterpreter(gm, stream, body).run(*inputs)

    return backend


@contextmanager
def replace_body(model: nn.Module, body: Body) -> Iterator[None]:
    """Make an eager model replace sublayers as ``body`` says, by layer forwards written by hand; K and V are kept."""
    with _layer_forwards(dict(decoder_layers(model)), lambda path, layer: _body_forward(path, layer, body)):
        yield


def _body_forward(path: str, layer: Any, body: Body) -> Callable[..., torch.Tensor]:
    gemma = hasattr(layer, "pre_feedforward_layernorm")

    def forward(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        held = getattr(kwargs.get(CACHE_NAME), "layers", ())  # a static cache has keys behind those of the prompt
        keys = getattr(held[0], "max_cache_len", hidden.shape[1]) if held else hidden.shape[1]
        mask = body.mask(f"{path}.self_attn", hidden.shape[1], keys)
        kwargs = kwargs if mask is None else {**kwargs, "attention_mask": mask[None, None]}
        mixed, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)
        mixed = layer.post_attention_layernorm(mixed) if gemma else mixed
        hidden = body.joined(f"{path}.self_attn", hidden, hidden + mixed)
        if gemma:
            branch = layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(hidden)))
        else:
            branch = layer.mlp(layer.post_attention_layernorm(hidden))
        return body.joined(f"{path}.mlp", hidden, hidden + branch)

    return forward


@dataclass(frozen=True)
class SublayerStatistics:
    """What one sublayer did to the stream in one call, a value a token: float64, ``(batch, tokens)``.

    ``cosine`` is that of a and b, ``before`` and ``after`` are their norms.
    """

    cosine: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor

    @property
    def similarity(self) -> float:
        """Mean cosine over the tokens (paper Eq. 2)."""
        return self.cosine.mean().item()

    @property
    def scale_token(self) -> float:
        """Mean over the tokens of ``||b|| / ||a||`` (paper Eq. 3)."""
        return (self.after / self.before).mean().item()

    @property
    def scale_frobenius(self) -> float:
        """Ratio of the norms of the whole tensors (the authors' code)."""
        return (self.after.square().sum().sqrt() / self.before.square().sum().sqrt()).item()


def measure(before: torch.Tensor, after: torch.Tensor) -> SublayerStatistics:
    """Measure the stream ``before`` and ``after`` a sublayer, both ``(batch, tokens, width)``."""
    a, b = before.double(), after.double()
    norm_a, norm_b = a.square().sum(-1).sqrt(), b.square().sum(-1).sqrt()
    return SublayerStatistics((a * b).sum(-1) / (norm_a * norm_b), norm_a, norm_b)


@contextmanager
def hook_statistics(model: nn.Module) -> Iterator[list[dict[str, SublayerStatistics]]]:
    """Record, for each call of ``model``, the statistics of every sublayer that runs, by path.

    Works inside :func:`omit_sublayers` too: sublayers that are omitted have no statistics.
    """
    calls: list[dict[str, SublayerStatistics]] = []
    handles = [model.register_forward_pre_hook(lambda *_: calls.append({}))]
    for path, layer in decoder_layers(model):
        for norm, part in (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")):
            handles += _hook_sublayer(layer, norm, part, f"{path}.{part}", calls)
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _hook_sublayer(
    layer: Any, norm: str, part: str, path: str, calls: list[dict[str, SublayerStatistics]]
) -> list[Any]:
    stream: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        stream[:] = args[:1]

    def record(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        branch = result[0] if isinstance(result, tuple) else result
        calls[-1][path] = measure(stream[0], stream[0] + branch)

    return [
        getattr(layer, norm).register_forward_pre_hook(keep),
        getattr(layer, part).register_forward_hook(record),
    ]


def run_request(
    model: Any, prompt: torch.Tensor, forced: torch.Tensor, *, cache: Any, mask: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Return the logits of the last token after ``prompt`` and after each token of ``forced``.

    ``prompt`` is ``(batch, tokens)``, ``forced`` ``(batch, steps)``, ``mask`` like ``prompt``, 0 where a row
    is padded on its left. The steps share ``cache``, which is the request's own.
    """
    logits = []
    seen = torch.ones_like(prompt) if mask is None else mask
    with torch.no_grad():
        for step, ids in enumerate([prompt, *forced.split(1, dim=1)]):
            if step:
                seen = torch.cat([seen, torch.ones_like(ids)], dim=1)
            positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            padded = None if mask is None else seen
            how = {"use_cache": True, CACHE_NAME: cache}
            result = model(ids, attention_mask=padded, position_ids=positions, **how)
            logits.append(result.logits[:, -1])
    return logits
