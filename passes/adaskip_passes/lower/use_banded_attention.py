"""Causal attention of a prompt, by whichever way is faster on the machine it runs on.

::

    %o = sdpa(%q, %k, %v, is_causal=True)        %o = banded_attention(%q, %k, %v, 0, all keys, scale)

The operation chooses as it runs, by the number of queries and by what the machine is good at
(:mod:`adaskip_passes.kernels.banded_attention`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from adaskip_passes.ir.graph import fake_tensor, tensor_of
from adaskip_passes.kernels import onednn
from adaskip_passes.kernels.banded_attention import Band, causal_band
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
        calls = gm.graph.find_nodes(op="call_function", target=torch.nn.functional.scaled_dot_product_attention)
        found = [
            (node, band) for node in calls if (band := causal_band(node)) is not None and _is_of_any_prompt(node, band)
        ]
        for node, band in found:
            band.write(node)
        return PassResult(stream, bool(found), len(found))


def _is_of_any_prompt(node: fx.Node, band: Band) -> bool:
    operands = [tensor_of(one) for one in (band.query, band.key, band.value)]
    return onednn.serves(*operands, fake_tensor(node)) and isinstance(operands[0].shape[2], torch.SymInt)
