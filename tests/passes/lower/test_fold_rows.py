"""Products of strided rows: one matrix for all rows, not a copy of it for each row of the batch."""

from __future__ import annotations

import operator

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from adaskip_passes.ir.printer import print_graph
from adaskip_passes.lower.fold_rows import FoldRows
from tests.captures import first_graph
from tests.models import weights
from tests.rewriting import applied

PRODUCTS = {
    "linear": lambda x, w: (functional.linear(x[:, -1:], w),),
    "keywords": lambda x, w: (functional.linear(weight=w, input=x[:, -1:]),),
    "matmul": lambda x, w: (torch.matmul(x[:, -1:], w.t()),),
    "method": lambda x, w: (x[:, -1:].matmul(w.t()),),
    "operator": lambda x, w: (operator.matmul(x[:, -1:], w.t()),),
}


def products(function, values):
    """Return what :class:`FoldRows` counts in the graph of ``function``, and the products of it before and after."""
    found = []

    def backend(gm, _):
        return lambda *inputs: run(gm, inputs)

    def names(gm, inputs):
        """Return the products that PyTorch makes of ``gm`` where it hands it to an inner compiler."""
        traced = make_fx(gm.forward, tracing_mode="symbolic")(*inputs)
        return [node.target.overloadpacket.__name__ for node in traced.graph.nodes if "mm" in str(node.target)]

    def run(gm, inputs):
        before = names(gm, inputs)
        found.extend([applied(FoldRows(), gm), before, names(gm, inputs)])
        return gm.forward(*inputs)

    torch._dynamo.reset()
    with torch.no_grad():
        [result] = torch.compile(function, backend=backend, dynamic=True)(*values)
    return *found, result


@pytest.mark.parametrize("kind", PRODUCTS)
def test_strided_rows_are_folded_into_one_matrix(kind):
    values = torch.randn(3, 5, 8), weights(12, 8)
    # At first a product of the weights expanded to the batch.
    count, before, after, got = products(PRODUCTS[kind], values)
    assert (count, before, after) == (1, ["bmm"], ["mm"])
    torch.testing.assert_close(got, *PRODUCTS[kind](*values))


def test_bias_is_added():
    def biased(x, w, b):
        return (functional.linear(x[:, -1:], w, b),)

    values = torch.randn(3, 5, 8), weights(12, 8), weights(12)
    count, before, after, got = products(biased, values)
    assert (count, before, after) == (1, ["bmm"], ["addmm"])
    torch.testing.assert_close(got, *biased(*values))


def test_it_happens_once():
    gm = first_graph(PRODUCTS["linear"], torch.randn(3, 5, 8), weights(12, 8), dynamic=True)
    assert applied(FoldRows(), gm) == 1
    text = print_graph(gm)
    assert applied(FoldRows(), gm) == 0
    assert print_graph(gm) == text


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, w: (functional.linear(x[:, -1], w),), [(3, 5, 8), (12, 8)]),
        (lambda x, y: (x @ y,), [(3, 5, 8), (3, 8, 4)]),
        (lambda x, y: (x @ y,), [(5, 8), (3, 8, 4)]),
    ],
    ids=["two dimensions", "a matrix for each row", "the matrix first"],
)
def test_others_are_left_alone(function, shapes):
    gm = first_graph(function, *(torch.randn(shape) for shape in shapes), dynamic=True)
    text = print_graph(gm)
    assert applied(FoldRows(), gm) == 0
    assert print_graph(gm) == text


def test_one_product_of_what_another_gives():
    """As in a low-rank map: up @ (down @ x)."""

    def chain(x, w):
        return (functional.linear(functional.linear(x[:, -1:], w), w.t()),)

    values = torch.randn(3, 5, 8), weights(12, 8)
    count, _, after, got = products(chain, values)
    assert (count, after) == (2, ["mm", "mm"])
    torch.testing.assert_close(got, *chain(*values))
