"""A product of several rows with a matrix of weights, by whichever matrix library is faster on the machine it runs on.

Prompts have many rows. The decode steps of a batch have a few, and have them again and again: reading the weights should
be all their time, but MKL's products of two or three rows take up to three times as long as oneDNN's.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from adaskip_passes.kernels import onednn

# Numbers of rows that are tried one by one: batches that are decoded together.
BATCH = range(2, 9)
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
    if (rows in BATCH or rows >= _MANY_ROWS) and onednn.enabled() and _onednn_pays_for(rows):
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
