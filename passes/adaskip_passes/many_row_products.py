"""Products of many rows with a matrix of weights, by whichever matrix library is faster on the machine they run on.

::

    %y = linear(%x, %w, %b)        %y = many_row_linear(%x, %w, %b)        f32[..., rows, out], on a CPU
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import fx

from adaskip_passes import onednn
from adaskip_passes.graph import LINEAR_ARGUMENTS, fake_tensor, named_arguments

# Fewer rows wait for the weights to be read, and oneDNN makes a kernel for each number of rows: a millisecond or more.
_FEW_ROWS = 32
# A trial multiplies this many rows with a square matrix as wide: some milliseconds.
_TRIAL = 768

torch.library.define("adaskip::many_row_linear", "(Tensor input, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl("adaskip::many_row_linear", "CPU")
def many_row_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
    """Return what ``linear`` returns, ``f32[..., out]`` of ``f32[..., in]`` and ``f32[out, in]``.

    A graph does not know how many rows it is called with, nor on which machine: both are looked at here.
    """
    many = input.numel() >= _FEW_ROWS * input.shape[-1]
    if many and onednn.enabled() and onednn_pays(torch.get_num_threads()):
        return onednn.multiply(input, weight, bias)
    return torch.nn.functional.linear(input, weight, bias)


@torch.library.register_fake("adaskip::many_row_linear")
def _(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
    return input.new_empty(*input.shape[:-1], weight.shape[0])


# What graphs call.
MANY_ROW_LINEAR = torch.ops.adaskip.many_row_linear.default


@cache
def onednn_pays(threads: int) -> bool:
    """Return whether oneDNN multiplies clearly faster than ``linear`` here, with ``threads``; tried once, in 0.1 s."""
    square = onednn.operand(_TRIAL, _TRIAL)
    return onednn.pays(f"products with {threads} threads", torch.nn.functional.linear, onednn.multiply, square, square)


def choose_many_row_products(gm: fx.GraphModule) -> int:
    """Rewrite the ``linear`` calls of ``gm`` in place that multiply 32-bit floats on the CPU, in any number of rows.

    Returns:
        How many there were. Products whose rows the graph counts are left alone: a decode step has few.
    """
    found = [node for node in gm.graph.nodes if _has_any_number_of_rows(node)]
    for node in found:
        given = named_arguments(node, LINEAR_ARGUMENTS)
        operands = given["input"], given["weight"], given.get("bias")
        node.target, node.args, node.kwargs = MANY_ROW_LINEAR, operands, dict[str, Any]()
    if found:
        gm.graph.lint()
        gm.recompile()
    return len(found)


def _has_any_number_of_rows(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is not torch.nn.functional.linear:
        return False
    given = named_arguments(node, LINEAR_ARGUMENTS)
    operands = [fake_tensor(given[name]) for name in LINEAR_ARGUMENTS if given.get(name) is not None]
    if not onednn.serves(*operands, fake_tensor(node)):
        return False
    x, weight = operands[:2]
    assert x is not None
    assert weight is not None
    return weight.dim() == 2 and any(isinstance(size, torch.SymInt) for size in x.shape[:-1])
