"""Causal attention of a prompt, by whichever way is faster on the machine it runs on.

::

    %o = sdpa(%q, %k, %v, is_causal=True)        %o = banded_attention(%q, %k, %v, 0, all keys, scale)

The operation chooses as it runs, by the number of queries and by what the machine is good at
(:mod:`adaskip_passes.kernels.banded_attention`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from adaskip_passes.ir.graph import ATTENTION_ARGUMENTS, fake_tensor, named_arguments
from adaskip_passes.kernels import onednn
from adaskip_passes.kernels.banded_attention import ALL_KEYS, BANDED_ATTENTION
from adaskip_passes.pipeline.pipeline import PassResult
from adaskip_passes.stream.stream import ResidualStream


@dataclass(frozen=True)
class UseBandedAttention:
    """Compute by bands the causal attentions that are of 32-bit floats on the CPU and of any number of queries.

    With a mask beside it, attention is left to PyTorch's kernel.
    """

    name: ClassVar[str] = "use-banded-attention"

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Rewrite ``gm`` in place."""
        attention = torch.nn.functional.scaled_dot_product_attention
        found = [node for node in gm.graph.find_nodes(op="call_function", target=attention) if _is_of_any_prompt(node)]
        for node in found:
            given = named_arguments(node, ATTENTION_ARGUMENTS)
            operands = *(given[name] for name in ATTENTION_ARGUMENTS[:3]), 0, ALL_KEYS, given.get("scale")
            node.target, node.args, node.kwargs = BANDED_ATTENTION, operands, dict[str, Any]()
        return PassResult(stream, bool(found), len(found))


def _is_of_any_prompt(node: fx.Node) -> bool:
    given = named_arguments(node, ATTENTION_ARGUMENTS)
    operands = [fake_tensor(given.get(name)) for name in ATTENTION_ARGUMENTS[:3]]
    if not onednn.serves(*operands, fake_tensor(node)) or any(one is None or one.dim() != 4 for one in operands):
        return False
    query, key, value = operands
    assert query is not None
    assert key is not None
    assert value is not None
    heads, groups = query.shape[1], key.shape[1]
    return (
        given.get("is_causal") is True
        and given.get("attn_mask") is None
        and not given.get("dropout_p")
        and isinstance(given.get("scale"), (float, type(None)))
        and isinstance(query.shape[2], torch.SymInt)
        and isinstance(heads, int)
        and groups == value.shape[1]
        and (heads == groups or (bool(given.get("enable_gqa")) and heads % groups == 0))
    )
