"""Maps of the residual stream that can stand in the place of a skipped sublayer.

AdaSkip multiplies the stream by a number (Eq. 4). The forms here also put back what the sublayer's branch adds on
average for a stream ``a`` of that direction; each works on one token at a time, ``d`` wide:

========  =====================================================  ======================
form      b =                                                    numbers
========  =====================================================  ======================
channel   ``gain * a + shift``                                   ``2 d``
low_rank  ``a + up @ (down @ rms_norm(a)) + shift``              ``2 d r + d``, rank r
affine    ``a + weight @ rms_norm(a) + shift``                   ``d d + d``
gated     ``a + out @ (silu(gate @ x) * (value @ x)) + shift``   ``3 d r + d``, r units
          where x = ``rms_norm(a)``
========  =====================================================  ======================

The branch of a pre-norm decoder reads the stream through a norm, so it does not grow with the stream. The maps
that imitate it read it so too: tokens whose stream is a hundred times larger than the others' (attention sinks)
need no exception.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from adaskip_passes.ir.graph import call, tensor_of

# The names of the tensors that a map of each form has.
FORMS = {
    "channel": ("gain", "shift"),
    "low_rank": ("down", "up", "shift"),
    "affine": ("weight", "shift"),
    "gated": ("gate", "value", "out", "shift"),
}

EPSILON = 1e-6


def part_shapes(form: str, width: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a map of ``form`` for a stream ``width`` wide; ``rank`` counts for ``low_rank`` and ``gated``."""
    known = {
        "gain": (width,),
        "shift": (width,),
        "down": (rank, width),
        "up": (width, rank),
        "weight": (width, width),
        "gate": (rank, width),
        "value": (rank, width),
        "out": (width, rank),
    }
    return {part: known[part] for part in FORMS[form]}


def emit_map(graph: fx.Graph, form: str, a: fx.Node, parts: Sequence[fx.Node]) -> fx.Node:
    """Add the ops of a map to ``graph`` and return b; ``parts`` are the tensors that :data:`FORMS` names, in order."""
    stream = tensor_of(a)
    if form == "channel":
        gain, shift = parts
        return call(graph, torch.addcmul, shift, a, gain, like=stream)
    width = (stream.shape[-1],)
    branch = call(graph, torch.nn.functional.rms_norm, a, width, None, EPSILON, like=stream)
    *before, last, shift = parts
    inner = [branch, *(call(graph, torch.nn.functional.linear, branch, weight) for weight in before)]
    if form == "gated":
        gate = call(graph, torch.nn.functional.silu, inner[1], like=tensor_of(inner[1]))
        inner.append(call(graph, torch.mul, gate, inner[2], like=tensor_of(gate)))
    branch = call(graph, torch.nn.functional.linear, inner[-1], last, shift, like=stream)
    return call(graph, torch.add, a, branch, like=stream)
