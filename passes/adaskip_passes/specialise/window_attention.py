"""The attention of a sublayer within a window, for most queries of a prompt.

::

    %o = sdpa(%q, %k, %v, is_causal=True)        %o = banded_attention(%q, %k, %v, 0, 64, scale, sinks=1, tail=16)

In deep layers most of what a prompt's tokens read lies close by. The first keys stay in sight, and the last queries see
all, as every query does once decoding begins (StreamingLLM, arXiv 2309.17453, does so in every layer and for good).
"""

from __future__ import annotations

from typing import Any

from torch import fx

from adaskip_passes.ir.graph import ATTENTION_ARGUMENTS, fake_tensor, named_arguments, op_name, size_expression
from adaskip_passes.kernels.banded_attention import ALL_KEYS, BANDED_ATTENTION, band_of
from adaskip_passes.stream.stream import Sublayer


def window_attention(sublayer: Sublayer, window: int, sinks: int, tail: int) -> bool:
    """Rewrite the attentions of ``sublayer`` in place; return whether there are any, and all of them are known.

    Those that have a shorter window of their own stay as they are.
    """
    found = [node for node in sublayer.nodes if op_name(node) in _ATTENTIONS]
    operands = [_causal_operands(node, sublayer) for node in found]
    if not found or any(one is None for one in operands):
        return False
    for node, one in zip(found, operands, strict=True):
        assert one is not None
        if not _is_banded(node):
            query, key, value, scale = one
            node.target, node.args, node.kwargs = (
                BANDED_ATTENTION,
                (query, key, value, 0, window, scale, sinks, tail),
                dict[str, Any](),
            )
    return True


_ATTENTIONS = ("scaled_dot_product_attention", "banded_attention", "flex_attention")


def _is_banded(node: fx.Node) -> bool:
    """Tell whether an attention has a window."""
    return node.target is BANDED_ATTENTION and band_of(node).window != ALL_KEYS


def _causal_operands(node: fx.Node, sublayer: Sublayer) -> tuple[Any, Any, Any, Any] | None:
    """Return query, key, value and scale of a causal attention of all rows of the stream, None of any other."""
    if node.target is BANDED_ATTENTION:
        band = band_of(node)
        return (band.query, band.key, band.value, band.scale)
    if op_name(node) != "scaled_dot_product_attention":
        return None
    given = named_arguments(node, ATTENTION_ARGUMENTS)
    stream = fake_tensor(sublayer.stream_in)
    query, key, value = (fake_tensor(given.get(name)) for name in ATTENTION_ARGUMENTS[:3])
    if stream is None or query is None or key is None or value is None:
        return None
    heads, groups = query.shape[1], key.shape[1]
    known = (
        given.get("is_causal") is True
        and given.get("attn_mask") is None
        and not given.get("dropout_p")
        and isinstance(given.get("scale"), (float, type(None)))
        and all(one.dim() == 4 for one in (query, key, value))
        and size_expression(query.shape[2]) == size_expression(stream.shape[1])
        and isinstance(heads, int)
        and groups == value.shape[1]
        and (heads == groups or (bool(given.get("enable_gqa")) and heads % groups == 0))
    )
    return (*(given[name] for name in ATTENTION_ARGUMENTS[:3]), given.get("scale")) if known else None
