"""Send products of any number of rows to :mod:`adaskip_passes.kernels.many_row_linear`.

::

    %y = linear(%x, %w, %b)        %y = many_row_linear(%x, %w, %b)        f32[..., rows, out], on a CPU
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from adaskip_passes.ir.graph import LINEAR_ARGUMENTS, fake_tensor, named_arguments
from adaskip_passes.kernels import onednn
from adaskip_passes.kernels.many_row_linear import BATCH, MANY_ROW_LINEAR
from adaskip_passes.pipeline.pipeline import PassResult
from adaskip_passes.stream.stream import ResidualStream


@dataclass(frozen=True)
class UseManyRowLinear:
    """Send to our operation the ``linear`` calls that multiply 32-bit floats on the CPU.

    Of products whose rows the graph counts, only a batch's are sent: one row and prompts of one length are left alone.
    """

    name: ClassVar[str] = "use-many-row-linear"

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Rewrite ``gm`` in place."""
        found = [node for node in gm.graph.nodes if _has_rows_to_choose_for(node)]
        for node in found:
            given = named_arguments(node, LINEAR_ARGUMENTS)
            operands = given["input"], given["weight"], given.get("bias")
            node.target, node.args, node.kwargs = MANY_ROW_LINEAR, operands, dict[str, Any]()
        return PassResult(stream, bool(found), len(found))


def _has_rows_to_choose_for(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is not torch.nn.functional.linear:
        return False
    given = named_arguments(node, LINEAR_ARGUMENTS)
    operands = [fake_tensor(given[name]) for name in LINEAR_ARGUMENTS if given.get(name) is not None]
    if not onednn.serves(*operands, fake_tensor(node)):
        return False
    x, weight = operands[:2]
    assert x is not None
    assert weight is not None
    rows = x.shape[:-1]
    return weight.dim() == 2 and (any(isinstance(size, torch.SymInt) for size in rows) or math.prod(rows) in BATCH)
