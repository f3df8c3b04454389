"""Operations whose rows are computed one by one, as a proof over layouts, and those that make or rename rows.

:func:`row_by_row` is the rule of every operation that has no rule of its own: it asks the row rules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from adaskip_passes.analysis.row_rules import Rows, operand_rows, result
from adaskip_passes.analysis.token_layouts import Blank, Layout, Layouts, Places, Tokens, UnprovenError
from adaskip_passes.ir.graph import fake_tensor, fake_value, op_name, size_expression

Rule = Callable[[Layouts, fx.Node], Layout]

# They are given the shape of their result, or have it from that of their operand: all that they do is to name it anew.
VIEWS = frozenset("view reshape _unsafe_view flatten unflatten squeeze".split())
# Every element of their result is the same number, or (``empty``) none that anybody may read.
_BLANK = frozenset("empty empty_like new_empty".split())
FILLS = _BLANK | frozenset("zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full".split())
# Which argument says the number.
_PLACE_OF_NUMBER = {"full": 1, "full_like": 1, "new_full": 2}
# Their result is positions in a dimension: whole numbers from 0.
_CHOICE = frozenset("argmax argsort".split())
CASTS = frozenset("to float double int long contiguous clone detach".split())
# They hold the number of any expert exactly.
EXACT = frozenset({torch.int32, torch.int64, torch.float32, torch.float64})


def tensor_of(node: fx.Node) -> torch.Tensor:
    """Return the fake tensor of ``node``, of several results the first; :class:`UnprovenError` where it is none."""
    value = fake_value(node)
    tensors = value if isinstance(value, (tuple, list)) else [value]
    if not tensors or not isinstance(tensors[0], torch.Tensor):
        raise UnprovenError(node)
    return result(node)


def tokens_of(layouts: Layouts, node: fx.Node, value: Any) -> Tokens:
    """Return the rows of the operand ``value`` of ``node``; :class:`UnprovenError` where it is no tensor of rows."""
    found = layouts.of(value)
    if not isinstance(found, Tokens):
        raise UnprovenError(node)
    return found


def row_by_row(layouts: Layouts, node: fx.Node) -> Layout:
    """Prove by the row rules that every dimension that counts the rows of the operands counts those of the result."""
    given = {one: layouts.of(one) for one in node.all_input_nodes if layouts.of(one) is not None}
    kinds = set(given.values())
    rows = {(one.stop - one.start, one.per, one.order) for one in kinds if isinstance(one, Tokens)}
    if len(rows) != 1 or not all(isinstance(one, Tokens) for one in kinds):
        raise UnprovenError(node)
    [(length, per, order)] = rows
    rank = tensor_of(node).dim()
    for start in range(rank - length + 1):
        if all(_counts_rows(node, given, start, at) for at in range(length)):
            return Tokens(start, start + length, per, order, _ids_after(layouts, node))
    raise UnprovenError(node)


def _counts_rows(node: fx.Node, given: dict[fx.Node, Layout], start: int, at: int) -> bool:
    """Tell whether dimension ``start + at`` of the result counts what every operand counts in its own ``at``-th of rows."""
    demands = operand_rows(node, Rows(start + at, 1, 1))
    if demands is None:
        return False
    needed = {operand: rows for operand, rows in demands if rows.count}
    return needed == {one: Rows(rows.start + at, 1, 1) for one, rows in given.items() if isinstance(rows, Tokens)}


def _ids_after(layouts: Layouts, node: fx.Node) -> fx.Node | None:
    """Return the choice whose numbers ``node`` gives."""
    name = op_name(node)
    if name in _CHOICE or (name in ("cat", "concat") and _all_choices(layouts, node)):
        return node
    before = layouts.of(node.args[0]) if node.args and name in CASTS else None
    kept = isinstance(before, Tokens) and tensor_of(node).dtype in EXACT
    return before.ids if kept else None


def _all_choices(layouts: Layouts, node: fx.Node) -> bool:
    parts = [layouts.of(one) for one in node.all_input_nodes]
    return all(isinstance(one, Tokens) and one.ids is not None for one in parts)


def _view(layouts: Layouts, node: fx.Node) -> Layout:
    """Find the rows again in another shape: the numbers of a token stay side by side."""
    x = fake_tensor(node.args[0])
    rows = tokens_of(layouts, node, node.args[0])
    # A view as another dtype has other numbers.
    known = x is not None and x.dtype == tensor_of(node).dtype
    if x is None or not known or any(layouts.of(one) is not None for one in node.all_input_nodes[1:]):
        raise UnprovenError(node)
    wanted = sympy.Mul(*map(size_expression, x.shape[: rows.start]))
    shape = tensor_of(node).shape
    before = sympy.Integer(1)
    for start in range(len(shape)):
        if before == wanted:
            found = layouts.rows_a_token(shape, start)
            # Rows in another order are no block of their token.
            if found is not None and (rows.order is None or found[1] == rows.per):
                return Tokens(start, *found, rows.order, rows.ids)
            break
        before = before * size_expression(shape[start])
    raise UnprovenError(node)


def _fill(layouts: Layouts, node: fx.Node) -> Layout:
    """Of equal numbers any layout holds; of memory that nothing was written to, none."""
    found = layouts.rows_a_token(tensor_of(node).shape)
    one_dimension = tensor_of(node).dim() == 1
    if found is None or not _numbers_are_given(node) or (op_name(node) in _BLANK and not one_dimension):
        raise UnprovenError(node)
    stop, per = found
    if op_name(node) in _BLANK:
        return Blank(per)
    like = layouts.of(node.args[0]) if op_name(node).endswith("_like") else None
    return replace(like, ids=None) if isinstance(like, Tokens) else Tokens(0, stop, per)


def _numbers_are_given(node: fx.Node) -> bool:
    """Tell whether what fills ``node`` is no value of the graph."""
    filled = [*node.args[_PLACE_OF_NUMBER.get(op_name(node), len(node.args)) :][:1], node.kwargs.get("fill_value")]
    return not any(isinstance(one, fx.Node) for one in filled)


def _arange(layouts: Layouts, node: fx.Node) -> Layout:
    """Count the rows from 0: where each is."""
    found = layouts.rows_a_token(tensor_of(node).shape)
    if found is None or len(node.args) != 1 or not node.kwargs.keys() <= {"device", "dtype"}:
        raise UnprovenError(node)
    return Places(found[1], 1, None)


SHAPE_RULES: dict[str, Rule] = {
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(FILLS, _fill),
    "arange": _arange,
}
