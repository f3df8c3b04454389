"""Attention of one query a row, written so that a CPU reads the cache at the speed of memory.

While decoding, each query looks at all keys and values once: two operations a number read. Attention kernels are built
for many queries, which share what is read; for one they take half as long again as reading alone. Spelled out, an inner
compiler makes plain loops of it, and needs neither a copy of the keys for each group of queries nor the
tokens innermost in memory::

    %o = sdpa(%q, %k, %v)          %s = sum(mul(%q, %k), -1)        f32[batch, heads, group, tokens]
                                   %p = softmax(%s, -1)
                                   %o = sum(mul(%p, %v), -2)        f32[batch, heads, group, head_dim]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from adaskip_passes.ir.graph import ATTENTION_ARGUMENTS, call, fake_tensor, named_arguments, tensor_of
from adaskip_passes.ir.plain_tensors import is_plain
from adaskip_passes.pipeline.pipeline import PassResult
from adaskip_passes.stream.stream import ResidualStream


@dataclass(frozen=True)
class DecomposeOneQueryAttention:
    """Spell out the attentions on the CPU that have one query a row.

    16-bit floats are multiplied and summed in 32 bits, as the kernels do.
    """

    name: ClassVar[str] = "decompose-one-query-attention"

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Rewrite ``gm`` in place."""
        found = [(node, given) for node in gm.graph.nodes if (given := _one_query(node)) is not None]
        replaced: dict[fx.Node, fx.Node] = {}
        for node, given in found:
            with gm.graph.inserting_before(node):
                replaced[node] = _spelled_out(gm.graph, node, given)
            node.replace_all_uses_with(replaced[node])
            gm.graph.erase_node(node)
        return PassResult(stream.mapped(lambda node: replaced.get(node, node)), bool(found), len(found))


def _one_query(node: fx.Node) -> dict[str, Any] | None:
    """Return the arguments of an attention that can be spelled out, by name; None for any other node."""
    if node.op != "call_function" or node.target is not torch.nn.functional.scaled_dot_product_attention:
        return None
    given = named_arguments(node, ATTENTION_ARGUMENTS)
    q, k, v = (fake_tensor(given.get(name)) for name in ATTENTION_ARGUMENTS[:3])
    if q is None or k is None or v is None or q.device.type != "cpu" or not all(map(is_plain, (q, k, v))):
        return None
    result = fake_tensor(node)
    if result is None or not q.dtype == k.dtype == v.dtype == result.dtype:  # not so under autocast
        return None
    if any(value.dim() != 4 for value in (q, k, v)) or not isinstance(q.shape[2], int) or q.shape[2] != 1:
        return None
    heads, groups = q.shape[1], k.shape[1]
    plain = (
        not given.get("dropout_p")
        and not given.get("is_causal")
        and isinstance(given.get("scale"), (float, type(None)))
    )
    if not plain or not isinstance(heads, int) or heads % groups or (heads != groups and not given.get("enable_gqa")):
        return None
    return given if _fits(given.get("attn_mask"), heads) else None


def _fits(mask: Any, heads: int) -> bool:
    value = fake_tensor(mask)
    if value is None:
        return mask is None
    return value.dim() == 4 and value.shape[1] in (1, heads) and isinstance(value.shape[2], int) and value.shape[2] == 1


def _spelled_out(graph: fx.Graph, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    query, key, value = (given[name] for name in ATTENTION_ARGUMENTS[:3])
    q, k, result = map(tensor_of, (query, key, node))
    groups, each = k.shape[1], q.shape[1] // k.shape[1]
    if q.dtype.itemsize < 4:
        query, key, value = (call(graph, "float", one) for one in (query, key, value))
    scale = given.get("scale")
    scaled = call(graph, torch.mul, query, q.shape[-1] ** -0.5 if scale is None else scale)
    # (batch, heads, group, 1, width) by (batch, heads, 1, tokens, width)
    rows = call(graph, "unflatten", scaled, 1, (groups, each))
    scores = call(graph, "sum", call(graph, torch.mul, rows, call(graph, "unsqueeze", key, 2)), -1)
    weights = _weights(graph, scores, given.get("attn_mask"), groups, each)
    mixed = call(graph, torch.mul, call(graph, "unsqueeze", weights, -1), call(graph, "unsqueeze", value, 2))
    flat = call(graph, "flatten", call(graph, "sum", mixed, -2, True), 1, 2)
    return call(graph, "to", flat, result.dtype) if q.dtype.itemsize < 4 else flat


def _weights(graph: fx.Graph, scores: fx.Node, mask: fx.Node | None, groups: int, each: int) -> fx.Node:
    """Return the softmax of ``scores``, ``(batch, heads, group, tokens)``, under a mask ``(batch, 1 or heads, 1, tokens)``."""
    if mask is None:
        return call(graph, "softmax", scores, -1)
    allowed = tensor_of(mask)
    inner = (groups, each) if allowed.shape[1] != 1 else (1, 1)
    wide = call(graph, "squeeze", call(graph, "unflatten", mask, 1, inner), 3)
    if allowed.dtype == torch.bool:
        masked = call(graph, torch.where, wide, scores, float("-inf"))
    else:
        masked = call(graph, torch.add, scores, wide)
    # A row that may look at nothing is zero, as it is in the kernels, and not NaN.
    return call(graph, torch.ops.aten._safe_softmax.default, masked, -1)
