"""Where the tokens of a sequence are in a value, and which operations keep them apart.

The row rules (:mod:`adaskip_passes.analysis.row_rules`) follow one dimension whose rows are tokens in order. A mixture of
experts flattens the batch, makes k rows of each token, sorts them by expert, multiplies each group by the matrix of its
expert, and puts the rows back. Each value on the way still has rows of which each belongs to one token; a layout says
which. An operation keeps tokens apart if each row of its result is computed from rows of the same token, by a function
that knows neither the other tokens nor the place of the row.

Here is what can be said of a value; :mod:`adaskip_passes.analysis.token_rules` and
:mod:`adaskip_passes.analysis.routing_rules` say it of each operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from adaskip_passes.ir.graph import size_expression


class UnprovenError(Exception):
    """That ``node`` keeps tokens apart follows from no rule."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node.name)
        self.node = node


@dataclass(frozen=True)
class Tokens:
    """A tensor each of whose elements belongs to one token, and depends on no other.

    The dimensions ``start`` to ``stop`` count ``per`` rows a token, in row-major order. The rows stand in the order of
    the tokens, or in that which the sort ``order`` has put them in. ``ids`` is the choice of which these are the numbers,
    each once: whole numbers from 0.
    """

    start: int
    stop: int
    per: int
    order: fx.Node | None = None
    ids: fx.Node | None = None

    def along(self, start: int, stop: int) -> Tokens:
        """Return the layout of what has these rows in other dimensions, and other numbers in them."""
        return Tokens(start, stop, self.per, self.order)

    @property
    def first(self) -> bool:
        """Whether the first dimension alone counts the rows."""
        return (self.start, self.stop) == (0, 1)


@dataclass(frozen=True)
class Sorted:
    """Both results of a sort of the rows ``keys``."""

    keys: Tokens


@dataclass(frozen=True)
class Places:
    """Integers, one a row: where the row was before the sort ``order`` (where it is, if None), divided by ``divisor``."""

    per: int
    divisor: int
    order: fx.Node | None


@dataclass(frozen=True)
class Inverse:
    """Integers, one a row: where the row is after the sort ``order``."""

    per: int
    order: fx.Node


@dataclass(frozen=True)
class Blank:
    """Memory of ``per`` numbers a token that nothing has been written to."""

    per: int


@dataclass(frozen=True)
class Counts:
    """How often each number occurs among ``ids``; ``summed``: it or a smaller one."""

    ids: fx.Node
    summed: bool = False


Layout = Tokens | Sorted | Places | Inverse | Blank | Counts | None


class Layouts:
    """The layouts of values, each found from those of its operands; a node that has none depends on no token.

    ``tokens`` is how many tokens there are.
    """

    def __init__(self, source: fx.Node, rows: Tokens, tokens: sympy.Expr) -> None:
        self._of: dict[fx.Node, Layout] = {source: rows}
        self._tokens = tokens

    def __getitem__(self, node: fx.Node) -> Layout:
        return self._of[node]

    def put(self, node: fx.Node, layout: Layout) -> None:
        """Note the layout of ``node``, from where it is in the order of the graph."""
        self._of[node] = layout

    def of(self, value: Any) -> Layout:
        """Return the layout of an argument, None where it depends on no token."""
        return self._of.get(value) if isinstance(value, fx.Node) else None

    def rows_a_token(self, shape: Any, start: int = 0) -> tuple[int, int] | None:
        """Return (stop, per) of the fewest dimensions from ``start`` that count the rows of all tokens, None without such."""
        rows = sympy.Integer(1)
        for dim in range(start, len(shape)):
            rows = rows * size_expression(shape[dim])
            per = rows / self._tokens
            if per.is_Integer and per >= 1:
                return dim + 1, int(per)
        return None
