"""The operations by which rows find their experts and come back, and which layouts they have.

%h                                   tokens in order
%ids = reshape(topk(%scores)[1])     k rows a token, in order
%sorted, %perm = sort(%ids)          the same rows in another order; which row came from where
%x = getitem(%h, floordiv(%perm, k)) k rows a token, in that order
%offsets = cumsum(histc(%sorted))    where the rows of each expert end
%y = grouped_mm(%x, %w, %offsets)    row by row: the sort has put each row into the group of its own expert
%inverse[%perm] = arange(...)        the order undone
%out = getitem(%y, %inverse)         k rows a token, in order
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from adaskip_passes.analysis.effects import written_inputs
from adaskip_passes.analysis.token_layouts import (
    Blank,
    Counts,
    Inverse,
    Layout,
    Layouts,
    Places,
    Sorted,
    Tokens,
    UnprovenError,
)
from adaskip_passes.analysis.token_rules import CASTS, EXACT, SHAPE_RULES, Rule, row_by_row, tensor_of, tokens_of
from adaskip_passes.ir.graph import fake_tensor, fake_value, named_arguments, op_name

# Their second result is positions in a dimension: whole numbers from 0.
_CHOICES = frozenset("topk max min sort".split())


def find_layout(layouts: Layouts, node: fx.Node) -> Layout:
    """Return the layout of ``node`` by those of its operands, None for one that is called for what it writes alone.

    Raises:
        UnprovenError: Nothing proves that it keeps tokens apart.
    """
    if not node.args:
        raise UnprovenError(node)
    written = list(written_inputs(node))
    rule = _WRITES.get(op_name(node)) if written else _RULES.get(op_name(node))
    found = (rule or row_by_row)(layouts, node)
    if written and rule is None:
        before = layouts.of(written[0]) if len(written) == 1 else None
        # Numbers of which more is known must stay.
        if not isinstance(before, Tokens) or before.ids is not None or found != before:
            raise UnprovenError(node)
    return found


def _sort(layouts: Layouts, node: fx.Node) -> Layout:
    given = named_arguments(node, ("input", "dim", "descending"))
    places = layouts.of(given["input"])
    if isinstance(places, Places) and op_name(node) == "argsort":
        return _inverse(node, places)
    rows = tokens_of(layouts, node, given["input"])
    x = tensor_of(node)
    if rows.stop <= given.get("dim", -1) % x.dim():
        return row_by_row(layouts, node)
    plain = rows.first and x.dim() == 1 and rows.order is None
    # From the smallest to the largest, equal ones in any order.
    if not plain or not given.keys() <= {"input", "dim", "stable"}:
        raise UnprovenError(node)
    return Sorted(rows) if op_name(node) == "sort" else Places(rows.per, 1, node)


def _inverse(node: fx.Node, places: Places) -> Layout:
    """Find in which order a sort of ``places``, each of which there is once, puts the rows: that before."""
    if places.order is None or places.divisor != 1 or len(node.args) != 1 or node.kwargs:
        raise UnprovenError(node)
    return Inverse(places.per, places.order)


def _item(layouts: Layouts, node: fx.Node) -> Layout:
    source, index = node.args
    held = layouts.of(source)
    if isinstance(held, Sorted):
        assert isinstance(source, fx.Node)
        return replace(held.keys, order=source) if index == 0 else Places(held.keys.per, 1, source)
    if isinstance(fake_value(source), (tuple, list)):  # type: ignore[arg-type]
        chosen = isinstance(source, fx.Node) and op_name(source) in _CHOICES and index == 1
        return replace(tokens_of(layouts, node, source), ids=node if chosen else None)
    return _taken(layouts, node, source, index) if isinstance(index, fx.Node) else row_by_row(layouts, node)


def _index_select(layouts: Layouts, node: fx.Node) -> Layout:
    given = named_arguments(node, ("input", "dim", "index"))
    if given.get("dim") != 0 or given.keys() != {"input", "dim", "index"}:
        raise UnprovenError(node)
    return _taken(layouts, node, given["input"], given["index"])


def _taken(layouts: Layouts, node: fx.Node, source: Any, index: fx.Node) -> Layout:
    """Take the rows ``index`` of ``source``."""
    rows, which = layouts.of(source), layouts.of(index)
    if rows is None and isinstance(which, Tokens):
        # Of a table, one entry a row; a mask would take as many as there are.
        numbers = fake_tensor(index)
        if numbers is not None and not numbers.is_floating_point() and numbers.dtype not in (torch.bool, torch.uint8):
            return Tokens(which.start, which.stop, which.per, which.order)
    if isinstance(rows, Tokens) and rows.first:
        if isinstance(which, Places) and rows.order is None and rows.per * which.divisor == which.per:
            return Tokens(0, 1, which.per, which.order)
        if isinstance(which, Inverse) and (rows.order, rows.per) == (which.order, which.per):
            return Tokens(0, 1, rows.per)
    raise UnprovenError(node)


def _floordiv(layouts: Layouts, node: fx.Node) -> Layout:
    places, by = layouts.of(node.args[0]), node.args[1]
    if isinstance(places, Places) and isinstance(by, int) and by > 0:
        return replace(places, divisor=places.divisor * by)
    return row_by_row(layouts, node)


def _invert(layouts: Layouts, node: fx.Node) -> Layout:
    """Let ``target[places] = arange`` undo the order that ``places`` come from."""
    target, index, value = node.args
    assert isinstance(target, fx.Node)
    memory, places, numbers = layouts.of(target), layouts.of(index), layouts.of(value)
    if not isinstance(memory, Blank) or not isinstance(places, Places) or places.order is None:
        raise UnprovenError(node)
    if numbers != Places(memory.per, 1, None) or (places.per, places.divisor) != (memory.per, 1):
        raise UnprovenError(node)
    layouts.put(target, Inverse(memory.per, places.order))
    return None


def _index_add(layouts: Layouts, node: fx.Node) -> Layout:
    """Add each row to one of its own token."""
    given = named_arguments(node, ("input", "dim", "index", "source"))
    if given.keys() - {"alpha"} != {"input", "dim", "index", "source"} or given["dim"] != 0:
        raise UnprovenError(node)
    target, added = (tokens_of(layouts, node, given[name]) for name in ("input", "source"))
    places = layouts.of(given["index"])
    known = target.first and added.first and target.order is None and target.ids is None
    if not known or not isinstance(places, Places) or target.per * places.divisor != places.per:
        raise UnprovenError(node)
    if (places.order, places.per) != (added.order, added.per):
        raise UnprovenError(node)
    return target


def _repeat_interleave(layouts: Layouts, node: fx.Node) -> Layout:
    given = named_arguments(node, ("input", "repeats", "dim"))
    rows, repeats = tokens_of(layouts, node, given["input"]), given.get("repeats")
    plain = rows.first and rows.order is None and given.get("dim") == 0 and isinstance(repeats, int)
    if not plain or given.keys() != {"input", "repeats", "dim"}:
        raise UnprovenError(node)
    return Tokens(0, 1, rows.per * repeats)


def _histc(layouts: Layouts, node: fx.Node) -> Layout:
    """Count whole numbers, each in a bin of its own."""
    given = named_arguments(node, ("input", "bins", "min", "max"))
    ids, bins = tokens_of(layouts, node, given["input"]).ids, given.get("bins")
    if ids is None or not isinstance(bins, int) or given.get("min") != 0 or given.get("max") not in (bins - 1, bins):
        raise UnprovenError(node)
    return Counts(ids)


def _cumsum(layouts: Layouts, node: fx.Node) -> Layout:
    counts = layouts.of(node.args[0])
    given = named_arguments(node, ("input", "dim"))
    if not isinstance(counts, Counts) or counts.summed or given.get("dim") not in (0, -1):
        raise UnprovenError(node)
    return replace(counts, summed=True)


def _grouped_mm(layouts: Layouts, node: fx.Node) -> Layout:
    """Multiply each row by the matrix of its group, where the groups are those of the numbers that the rows are sorted by."""
    given = named_arguments(node, ("input", "weight", "offs"))
    rows, ends = tokens_of(layouts, node, given["input"]), layouts.of(given.get("offs"))
    order = layouts.of(rows.order)
    sort_of_ids = isinstance(order, Sorted) and isinstance(ends, Counts) and ends.summed and order.keys.ids is ends.ids
    others = [value for name, value in given.items() if name not in ("input", "offs")]
    weight = fake_tensor(given.get("weight"))
    if (
        len(node.args) > 3
        or not sort_of_ids
        or not rows.first
        or weight is None
        or weight.dim() != 3
        or tensor_of(node).dim() != 2
    ):
        raise UnprovenError(node)
    if any(layouts.of(one) is not None for one in others):
        raise UnprovenError(node)
    return rows.along(0, 1)


def _cast(layouts: Layouts, node: fx.Node) -> Layout:
    """Give counts and ends another dtype that holds them."""
    counts = layouts.of(node.args[0])
    alone = not any(layouts.of(one) is not None for one in node.all_input_nodes[1:])
    if isinstance(counts, Counts) and alone and tensor_of(node).dtype in EXACT:
        return counts
    return row_by_row(layouts, node)


_RULES: dict[str, Rule] = {
    **SHAPE_RULES,
    **dict.fromkeys(("sort", "argsort"), _sort),
    **dict.fromkeys(("getitem", "__getitem__"), _item),
    "index_select": _index_select,
    "floordiv": _floordiv,
    "index_add": _index_add,
    "repeat_interleave": _repeat_interleave,
    "histc": _histc,
    "cumsum": _cumsum,
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped_mm),
}
_WRITES: dict[str, Rule] = {"setitem": _invert, "index_add_": _index_add}
