"""Append new keys and values to the cache in place, where the graph copies the whole cache to append them.

A cache that grows comes back from a graph as ``cat([past, new])``: every step copies all that is there, two times
a layer. With :class:`AppendInPlace` the caller hands in the tensor that the concatenation would make, as a view of
memory with room to spare that already holds the past, and the graph writes the new tokens alone.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from adaskip_passes.ir.graph import (
    add_placeholder,
    call,
    fake_mode,
    fake_tensor,
    fake_value,
    named_arguments,
    op_name,
    output_values,
    tensor_of,
)
from adaskip_passes.ir.module_paths import held_by_module, module_marks
from adaskip_passes.pipeline.pipeline import AddedInput, PassResult
from adaskip_passes.stream.stream import ResidualStream, Sublayer

GROWN_INPUT = "adaskip_grown"
GROWN = "grown"
# Keys and values are (batch, heads, tokens, head_dim); tokens come last but one in every layout known here.
_TOKENS = -2


@dataclass(frozen=True)
class Append:
    """One concatenation ``result = cat([past, new])`` that appends tokens to a cache entry and hands it out.

    ``path`` is its sublayer, ``position`` that of the output. ``past`` is the input that it extends, None where
    the cache begins with this call: then all but the output go on reading the concatenation. ``grown`` is the fake value of the result in memory with room to spare, and
    ``relaid`` are the later nodes whose layout changes with it, and their fake values.
    """

    path: str
    position: int
    result: fx.Node
    past: fx.Node | None
    new: fx.Node
    grown: torch.Tensor
    relaid: tuple[tuple[fx.Node, Any], ...]


@dataclass(frozen=True)
class AppendInPlace:
    """Replace each concatenation that appends to a cache entry by a write to memory that the caller hands in.

    Each gets a new last input ``adaskip_grown_N``, N being the position of the output that it was: the cache entry
    as it shall be, ``(batch, heads, past + new tokens, head_dim)``, the tokens outermost in memory
    (:func:`token_major`). Its first rows must hold the past; the graph fills in the rest, and gives the input back
    as that output::

        before:  %keys = cat([%past, %k], dim=-2)            after:  %last = narrow(%adaskip_grown_1, -2, -1, 1)
                 %mixed = sdpa(%q, %keys, %values)                   %copy_ = copy_(%last, %k)
                 output(%logits, %keys)                              %mixed = sdpa(%q, %adaskip_grown_1, ...)
                                                                     output(%logits, %adaskip_grown_1)

    What appends in another way is left as it is: a sliding window, of which only a part of the concatenation is
    kept, a buffer that was allocated in full, a state that does not grow.
    """

    name: ClassVar[str] = "append-in-place"

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Rewrite every append of ``gm``; ``matched`` counts them."""
        appends = find_appends(gm, stream)
        added: dict[str, dict[fx.Node, tuple[fx.Node, ...]]] = {}
        inputs: dict[str, list[fx.Node]] = {}
        for append in appends:
            grown = add_placeholder(gm.graph, f"{GROWN_INPUT}_{append.position}", append.grown)
            added.setdefault(append.path, {})[append.result] = _rewritten(gm.graph, append, grown)
            inputs.setdefault(append.path, []).append(grown)
        sublayers = tuple(
            _with_writes(one, added[one.path], inputs[one.path]) if one.path in added else one
            for one in stream.sublayers
        )
        given = tuple(AddedInput(f"{GROWN_INPUT}_{one.position}", GROWN, one.path) for one in appends)
        return PassResult(replace(stream, sublayers=sublayers), bool(appends), len(appends), given)


def find_appends(gm: fx.GraphModule, stream: ResidualStream) -> tuple[Append, ...]:
    """Return the appends of ``gm`` in the order of its sublayers and outputs. Never mutates it.

    Only those whose new tokens are the tokens of the call, and which every reader takes in the new layout.
    """
    returned = list(output_values(gm))
    found: dict[fx.Node, Append] = {}
    values: dict[fx.Node, Any] = {}
    mode = fake_mode(gm.graph)
    if not isinstance(mode, FakeTensorMode):
        return ()
    for sublayer in stream.sublayers:
        for position in sublayer.cache_outputs:
            node = returned[position]
            operands = _operands(node, stream)
            if node is None or operands is None or node in found or node not in sublayer.nodes:
                continue
            grown = _in_token_major(fake_tensor(node), mode)
            begins = operands[0] is None
            relaid = dict[fx.Node, Any]() if begins else _relaid(node, {**values, node: grown}, mode)
            if relaid is not None:
                found[node] = Append(sublayer.path, position, node, *operands, grown, tuple(relaid.items()))
                values |= {} if begins else {node: grown, **relaid}
    return tuple(found.values())


def token_major(shape: Sequence[Any]) -> tuple[Any, ...]:
    """Return the strides of memory for ``shape`` in which the tokens, the last dimension but one, lie outermost.

    They do not depend on the number of tokens, so that neither room to spare nor growing into it changes them.

    >>> token_major((2, 3, 100, 64))
    (192, 64, 384, 1)
    """
    strides: list[Any] = [1] * len(shape)
    step: Any = 1
    tokens = len(shape) + _TOKENS
    for dim in [*(dim for dim in reversed(range(len(shape))) if dim != tokens), tokens]:
        strides[dim] = step
        step = step * shape[dim]
    return tuple(strides)


def _operands(node: fx.Node | None, stream: ResidualStream) -> tuple[fx.Node | None, fx.Node] | None:
    """Return what ``node`` concatenates, ``past`` None where it is empty; None where ``node`` is no append."""
    value, parts = fake_tensor(node), _concatenated(node)
    if value is None or parts is None:
        return None
    past, new = parts
    if not _alike(past, value) or not _alike(new, value) or not _of_this_call(new, stream):
        return None
    before = fake_tensor(past)
    if before is not None and tuple(before.shape) == (0,):
        return None, new
    given_in = past.op == "placeholder" and not held_by_module(past)
    return (past, new) if given_in and before is not None and before.dim() == value.dim() else None


def _concatenated(node: fx.Node | None) -> tuple[fx.Node, fx.Node] | None:
    """Return the two values that ``node`` joins along their tokens, None where it does not."""
    value = fake_tensor(node)
    if node is None or value is None or node.op != "call_function" or op_name(node) not in ("cat", "concat"):
        return None
    given = named_arguments(node, ("tensors", "dim"))
    tensors, dim = given.get("tensors", ()), given.get("dim", 0)
    if value.dim() < 3 or dim not in (_TOKENS, value.dim() + _TOKENS):
        return None
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 2:
        return None
    return tuple(tensors)


def _alike(node: Any, value: torch.Tensor) -> bool:
    one = fake_tensor(node)
    return one is not None and one.dtype == value.dtype and one.device == value.device


def _of_this_call(new: fx.Node, stream: ResidualStream) -> bool:
    """Tell whether ``new`` has a row for each token of the stream, and its other sizes are known before the call."""
    value, first = fake_tensor(new), fake_tensor(stream.sublayers[0].stream_in)
    if value is None or first is None or first.dim() != 3:
        return False
    batch, tokens, _ = first.shape
    *others, rows, width = value.shape
    known = (isinstance(size, int) or str(size) == str(batch) for size in (*others, width))
    return str(rows) == str(tokens) and all(known)


def _in_token_major(value: torch.Tensor | None, mode: FakeTensorMode) -> torch.Tensor:
    assert value is not None
    with mode:
        return torch.empty_strided(value.shape, token_major(value.shape), dtype=value.dtype, device=value.device)


def _relaid(node: fx.Node, values: Mapping[fx.Node, Any], mode: FakeTensorMode) -> dict[fx.Node, Any] | None:
    """Return the nodes behind ``node`` whose layout changes where some nodes have ``values``; None where one cannot take it."""
    changed: dict[fx.Node, Any] = {}
    pending = list(node.users)
    while pending:
        reader = min(pending)  # in graph order
        pending = [other for other in pending if other is not reader]
        if reader.op == "output":
            continue
        try:
            value = _evaluated(reader, {**values, **changed}, mode)
        except (RuntimeError, TypeError, ValueError):
            return None
        if _layout(value) != _layout(fake_value(reader)):
            changed[reader] = value
            pending += reader.users
    return changed


def _evaluated(node: fx.Node, given: Mapping[fx.Node, Any], mode: FakeTensorMode) -> Any:
    args, kwargs = fx.node.map_arg(
        (node.args, node.kwargs), lambda source: given[source] if source in given else fake_value(source)
    )
    function = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
    with torch.no_grad(), mode, enable_python_dispatcher():
        return function(*args, **kwargs)


def _layout(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(map(_layout, value))
    return (str(value.shape), str(value.stride())) if isinstance(value, torch.Tensor) else None


def _rewritten(graph: fx.Graph, append: Append, grown: fx.Node) -> tuple[fx.Node, ...]:
    """Put a write to ``grown`` in the place of the concatenation; return the nodes that this takes, the write last."""
    if append.past is None:
        return _begun(graph, append, grown)
    with graph.inserting_before(append.result):
        added = _last_rows(graph, grown, append.new)
        added.append(call(graph, "copy_", added[-1], append.new, like=fake_tensor(added[-1])))
    for node in added:
        node.meta.update(module_marks(append.result))
    append.result.replace_all_uses_with(grown)
    graph.erase_node(append.result)
    for node, value in append.relaid:
        node.meta["example_value"] = value
    return tuple(added)


def _begun(graph: fx.Graph, append: Append, grown: fx.Node) -> tuple[fx.Node, ...]:
    """Write to ``grown`` beside the concatenation, which its readers keep.

    Where a cache begins, attention of many queries reads the keys many times, and faster as the graph lays them out.
    """
    with graph.inserting_after(append.result):
        write = call(graph, "copy_", grown, append.result, like=append.grown)
    write.meta.update(module_marks(append.result))
    append.result.replace_all_uses_with(grown, delete_user_cb=lambda user: user.op == "output")
    return append.result, write


def _last_rows(graph: fx.Graph, grown: fx.Node, new: fx.Node) -> list[fx.Node]:
    """Add a view of as many last rows of ``grown`` as ``new`` has; return the nodes that this takes, the view last."""
    value = tensor_of(new)
    rows = value.shape[_TOKENS]
    if isinstance(rows, int):
        return [call(graph, "narrow", grown, _TOKENS, -rows, rows)]
    size = call(graph, "size", new, _TOKENS)
    start = call(graph, operator.neg, size)
    return [size, start, call(graph, "narrow", grown, _TOKENS, start, size)]


def _with_writes(
    sublayer: Sublayer, added: Mapping[fx.Node, tuple[fx.Node, ...]], inputs: Sequence[fx.Node]
) -> Sublayer:
    def nodes() -> Iterator[fx.Node]:
        for node in sublayer.nodes:
            yield from added.get(node, (node,))

    writes = tuple(new[-1] for new in added.values())
    return replace(
        sublayer,
        nodes=tuple(nodes()),
        writes=(*sublayer.writes, *writes),
        cache_inputs=(*sublayer.cache_inputs, *inputs),
    )
