"""Which part of a sublayer computes a value token by token from the residual stream, and may run on fewer tokens.

:mod:`adaskip_passes.analysis.routing_rules` proves of each operation that it keeps tokens apart. Here is what that proof
takes for granted: that the operations are all there is to it, and that what they write is theirs alone.
"""

from __future__ import annotations

import bisect
import functools
from dataclasses import dataclass

import sympy
from torch import fx

from adaskip_passes.analysis.dependence import Dependence
from adaskip_passes.analysis.effects import SCOPES, Effects, written_inputs
from adaskip_passes.analysis.routing_rules import find_layout
from adaskip_passes.analysis.token_layouts import Layouts, Tokens, UnprovenError
from adaskip_passes.analysis.token_rules import FILLS, VIEWS
from adaskip_passes.ir.graph import fake_tensor, fake_value, op_name, size_expression
from adaskip_passes.stream.stream import ResidualStream


@dataclass(frozen=True)
class TokenBranch:
    """The ``nodes``, in graph order, that compute ``result`` of the values ``reads`` and of ``source``, token by token.

    Dimension ``dim`` of ``source`` counts what dimension ``result_dim`` of ``result`` counts.
    """

    source: fx.Node
    dim: int
    result: fx.Node
    result_dim: int
    nodes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    layouts: Layouts


# The memory that a node made: of several results, which.
_Memory = tuple[fx.Node, int | None]


class TokenBranches:
    """Finds the branches of one graph, which must not change meanwhile."""

    def __init__(self, gm: fx.GraphModule, stream: ResidualStream, effects: Effects) -> None:
        self._gm, self._effects = gm, effects
        self._stateless = {node for one in stream.sublayers if not one.stateful for node in one.nodes}
        self._stream = [one.stream_in for one in stream.sublayers]
        self._found: dict[tuple[fx.Node, int], TokenBranch | fx.Node] = {}

    def find(self, result: fx.Node, dim: int) -> TokenBranch | None:
        """Return the branch of a stateless sublayer that computes ``result``, whose dimension ``dim`` counts the rows."""
        found = self._look_up(result, dim)
        return found if isinstance(found, TokenBranch) else None

    def stopped_by(self, result: fx.Node, dim: int) -> fx.Node:
        """Return the operation of which it is not known that it keeps tokens apart, where ``result`` has no branch."""
        found = self._look_up(result, dim)
        assert isinstance(found, fx.Node)
        return found

    def _look_up(self, result: fx.Node, dim: int) -> TokenBranch | fx.Node:
        key = (result, dim)
        if key not in self._found:
            try:
                self._found[key] = self._prove(result, dim)
            except UnprovenError as error:
                self._found[key] = error.node
        return self._found[key]

    @functools.cached_property
    def _dependence(self) -> Dependence:
        return Dependence(self._gm, self._effects)

    @functools.cached_property
    def _written(self) -> dict[_Memory, list[fx.Node]]:
        """The writers of each memory, in graph order."""
        found: dict[_Memory, list[fx.Node]] = {}
        for node in self._gm.graph.nodes:
            for target in written_inputs(node):
                found.setdefault(self._memory(target), []).append(node)
        return found

    def _memory(self, node: fx.Node) -> _Memory:
        root = self._effects.roots[node]
        while node is not root:
            [*written] = written_inputs(node)
            before = written[0] if written else node.args[0]
            assert isinstance(before, fx.Node)
            if before is root and isinstance(fake_value(root), (tuple, list)):
                return root, node.args[1]  # type: ignore[return-value]
            node = before
        return root, None

    def _prove(self, result: fx.Node, dim: int) -> TokenBranch:
        source = self._source(result)
        rows_dim, tokens = self._rows_of(source, result, dim)
        layouts = Layouts(source, Tokens(0, rows_dim + 1, 1), tokens)
        nodes, reads = self._slice(source, result, layouts)
        self._check_memory(nodes, (source, *reads), result)
        self._check_scopes(nodes, result)
        for node in nodes:
            layouts.put(node, find_layout(layouts, node))
        if layouts[result] != Tokens(0, dim + 1, 1):
            raise UnprovenError(result)
        return TokenBranch(source, rows_dim, result, dim, nodes, reads, layouts)

    def _source(self, result: fx.Node) -> fx.Node:
        """Return the last value of the residual stream before ``result``."""
        before = self._dependence.bits(self._stream)
        source = self._dependence.last_before(result, before) if result in self._stateless else None
        if source is None:
            raise UnprovenError(result)
        return source

    def _rows_of(self, source: fx.Node, result: fx.Node, dim: int) -> tuple[int, sympy.Expr]:
        """Return the dimension of ``source`` that counts the rows of ``result``, and how many tokens there are."""
        x, out = fake_tensor(source), fake_tensor(result)
        if x is None or out is None:
            raise UnprovenError(result)
        tokens = sympy.Mul(*map(size_expression, out.shape[: dim + 1]))
        before = sympy.Integer(1)
        for at, size in enumerate(x.shape):
            before = before * size_expression(size)
            if before == tokens and size_expression(size) == size_expression(out.shape[dim]):
                return at, tokens
        raise UnprovenError(result)

    def _slice(
        self, source: fx.Node, result: fx.Node, layouts: Layouts
    ) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
        """Return the nodes between ``source`` and ``result``, with what they write, and the other values that they read."""
        position = self._dependence.position
        nodes: set[fx.Node] = set()
        reads: set[fx.Node] = set()
        todo = [result]
        while todo:
            node = todo.pop()
            if node is source or node in nodes or node in reads:
                continue
            if not self._depends_on_tokens(node, source, layouts):
                reads.add(node)
                continue
            nodes.add(node)
            todo += operands(node)
            writers = self._written.get(self._memory(node), ())
            todo += writers[: bisect.bisect_left(writers, position[result], key=position.__getitem__)]
        return tuple(sorted(nodes, key=position.__getitem__)), tuple(sorted(reads, key=position.__getitem__))

    def _depends_on_tokens(self, node: fx.Node, source: fx.Node, layouts: Layouts) -> bool:
        """Tell whether ``node`` has values of tokens, or as many numbers as there are."""
        if self._dependence.depends(node, source):
            return True
        value = fake_tensor(node)
        made = op_name(node) in FILLS or op_name(node) == "arange"
        return value is not None and made and layouts.rows_a_token(value.shape) is not None

    def _check_scopes(self, nodes: tuple[fx.Node, ...], result: fx.Node) -> None:
        """Raise at a check, at random numbers, and where a scope opens or closes on the way: a copy would be outside of it."""
        position = self._dependence.position
        for node in sorted(self._effects.checks, key=position.__getitem__):
            between = op_name(node) in SCOPES and position[nodes[0]] < position[node] < position[result]
            if between or node in nodes:
                raise UnprovenError(node)

    def _check_memory(self, nodes: tuple[fx.Node, ...], reads: tuple[fx.Node, ...], result: fx.Node) -> None:
        """Raise where one of ``nodes`` writes what others see, or reads what others write, or through an older view.

        Whether an operation like ``reshape`` gives a view depends on sizes: with fewer rows it may copy instead.
        """
        members = set(nodes)
        written = {root for root, _ in self._written}
        for node in reads:
            if self._effects.roots[node] in written:
                raise UnprovenError(node)
        for node in nodes:
            memory = self._memory(node)
            writers = self._written.get(memory, [])
            lost = memory == self._memory(result) and not members.issuperset(writers)
            if writers and (memory[0] not in members or lost or self._is_old_view(node, memory, members)):
                raise UnprovenError(node)
            if any(not self._is_base(self._unwritten(target), self._memory(target)) for target in written_inputs(node)):
                raise UnprovenError(node)

    def _is_old_view(self, node: fx.Node, memory: _Memory, members: set[fx.Node]) -> bool:
        """Tell whether ``node`` gives a view of ``memory`` that one of ``members`` writes later."""
        position, writers = self._dependence.position, self._written[memory]
        if node in writers or self._is_base(node, memory):
            return False
        return any(position[node] < position[one] for one in writers if one in members)

    def _unwritten(self, node: fx.Node) -> fx.Node:
        """Return what a node that writes has written, which is what it gives, or what that one has."""
        written = list(written_inputs(node))
        return self._unwritten(written[0]) if written else node

    def _is_base(self, node: fx.Node, memory: _Memory) -> bool:
        """Tell whether ``node`` is all of a memory, and no view of a part."""
        root, item = memory
        return node is root or (item is not None and node.args[0] is root)


def operands(node: fx.Node) -> list[fx.Node]:
    """Return what ``node`` reads the values of, rather than the size of a result that grows with the tokens."""
    name = op_name(node)
    if name in VIEWS or name == "expand" or (name in FILLS and _is_like_another(name)):
        return list(node.all_input_nodes[:1])
    return [] if name in FILLS or name == "arange" else node.all_input_nodes


def _is_like_another(name: str) -> bool:
    return name.endswith("_like") or name.startswith("new_")
