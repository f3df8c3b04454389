"""The attention of a sublayer within a window, for most queries of a prompt.

::

    %o = sdpa(%q, %k, %v, is_causal=True)        %o = banded_attention(%q, %k, %v, 0, 64, scale, sinks=1, tail=16)

In deep layers most of what a prompt's tokens read lies close by. The first keys stay in sight, and the last queries see
all, as every query does once decoding begins (StreamingLLM, arXiv 2309.17453, does so in every layer and for good).
"""

from __future__ import annotations

from dataclasses import replace

from adaskip_passes.ir.graph import op_name, size_expression, tensor_of
from adaskip_passes.kernels.banded_attention import ALL_KEYS, Band, causal_band
from adaskip_passes.stream.stream import Sublayer

_ATTENTIONS = frozenset(("scaled_dot_product_attention", "banded_attention", "flex_attention"))


def window_attention(sublayer: Sublayer, window: int, sinks: int, tail: int) -> bool:
    """Rewrite the attentions of ``sublayer`` in place; return whether there are any, and all are causal ones of its rows.

    Those that have a window of their own keep it.
    """
    bands = {node: causal_band(node) for node in sublayer.nodes if op_name(node) in _ATTENTIONS}
    if not bands or not all(band is not None and _is_of_rows(band, sublayer) for band in bands.values()):
        return False
    for node, band in bands.items():
        if band is not None and band.window == ALL_KEYS:
            replace(band, window=window, sinks=sinks, tail=tail).write(node)
    return True


def _is_of_rows(band: Band, sublayer: Sublayer) -> bool:
    """Tell whether the queries are the rows of the stream ``(batch, rows, d_model)``."""
    queries, rows = tensor_of(band.query).shape[2], tensor_of(sublayer.stream_in).shape[1]
    return bool(size_expression(queries) == size_expression(rows))
