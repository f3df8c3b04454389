"""Products of several rows with a matrix of weights, by whichever matrix library is faster on the machine they run on.

Prompts have many rows. The decode steps of a batch have a few, and have them again and again: reading the weights should
be all their time, but MKL's products of two or three rows take up to three times as long as oneDNN's.

::

    %y = linear(%x, %w, %b)        %y = many_row_linear(%x, %w, %b)        f32[..., rows, out], on a CPU
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import fx

from adaskip_passes.ir.graph import LINEAR_ARGUMENTS, fake_tensor, named_arguments
from adaskip_passes.kernels import onednn

# Numbers of rows that are tried one by one: batches that are decoded together.
_BATCH = range(2, 9)
# Between them and this many rows a product is a short prompt's, and is made once: oneDNN makes a kernel for each number of
# rows, in a millisecond or more.
_MANY_ROWS = 32
# A trial multiplies this many rows with a square matrix as wide: some milliseconds.
_TRIAL = 768
# A batch is tried with a matrix that no core's cache holds, since a decode step reads each weight out of memory: what
# lies in a cache, both libraries multiply alike.
_BATCH_TRIAL = (8192, 768)

torch.library.define("adaskip::many_row_linear", "(Tensor input, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl("adaskip::many_row_linear", "CPU")
def many_row_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
    """Return what ``linear`` returns, ``f32[..., out]`` of ``f32[..., in]`` and ``f32[out, in]``.

    A graph does not know how many rows it is called with, nor on which machine: both are looked at here.
    """
    rows = math.prod(input.shape[:-1])
    if (rows in _BATCH or rows >= _MANY_ROWS) and onednn.enabled() and _onednn_pays_for(rows):
        return onednn.multiply(input, weight, bias)
    return torch.nn.functional.linear(input, weight, bias)


@torch.library.register_fake("adaskip::many_row_linear")
def _(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
    return input.new_empty(*input.shape[:-1], weight.shape[0])


# What graphs call.
MANY_ROW_LINEAR = torch.ops.adaskip.many_row_linear.default


def _onednn_pays_for(rows: int) -> bool:
    threads = torch.get_num_threads()
    return onednn_pays(threads) if rows >= _MANY_ROWS else onednn_pays_for_batch(threads, rows)


@cache
def onednn_pays(threads: int) -> bool:
    """Return whether oneDNN multiplies clearly faster than ``linear`` here, with ``threads``; tried once, in 0.1 s."""
    square = onednn.operand(_TRIAL, _TRIAL)
    return onednn.pays(f"products with {threads} threads", torch.nn.functional.linear, onednn.multiply, square, square)


@cache
def onednn_pays_for_batch(threads: int, batch: int) -> bool:
    """Return the same of products of ``batch`` rows; tried once for each number, in 0.05 s."""
    rows, weight = onednn.operand(batch, _BATCH_TRIAL[1]), onednn.operand(*_BATCH_TRIAL)
    name = f"products of {batch} rows with {threads} threads"
    return onednn.pays(name, torch.nn.functional.linear, onednn.multiply, rows, weight)


def choose_many_row_products(gm: fx.GraphModule) -> int:
    """Rewrite the ``linear`` calls of ``gm`` in place that multiply 32-bit floats on the CPU.

    Returns:
        How many there were. Of products whose rows the graph counts, only a batch's are rewritten: one row and prompts
        of one length are left alone.
    """
    found = [node for node in gm.graph.nodes if _has_rows_to_choose_for(node)]
    for node in found:
        given = named_arguments(node, LINEAR_ARGUMENTS)
        operands = given["input"], given["weight"], given.get("bias")
        node.target, node.args, node.kwargs = MANY_ROW_LINEAR, operands, dict[str, Any]()
    if found:
        gm.graph.lint()
        gm.recompile()
    return len(found)


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
    return weight.dim() == 2 and (any(isinstance(size, torch.SymInt) for size in rows) or math.prod(rows) in _BATCH)
