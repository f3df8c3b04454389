"""Which nodes write memory, and whose memory it is.

A write matters beyond its data flow: ``keys.index_copy_(2, position, k)`` has no user, since its
readers take ``keys`` itself. Every analysis that asks "what depends on what" or "what may be
erased" therefore needs the edges that this module finds: from a write to the later readers of the
same alias class.

An alias class is named by its root: the node that made the memory, reached by walking back through
views. Ops that return a view only sometimes (``reshape``, ``contiguous``, ``to``) count as views.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from adaskip_passes.graph import fake_tensor

_VIEWS = frozenset(
    "alias as_strided chunk contiguous detach diagonal expand expand_as flatten getitem movedim moveaxis "
    "narrow permute ravel reshape reshape_as select slice split squeeze swapaxes swapdims t tensor_split to "
    "transpose type_as unbind unflatten unfold unsqueeze view view_as _unsafe_view float half bfloat16 double type".split()
)
_VIEW_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul")
)
_CHECKS = frozenset({"_assert", "_assert_async", "_assert_scalar", "_check", "_check_is_size", "sym_constrain_range"})
# They open and close what the nodes between them run under.
_SCOPES = frozenset(
    "_vmap_increment_nesting _vmap_decrement_nesting lazy_load_decompositions _set_grad_enabled _enter_autocast "
    "_exit_autocast _enter_inference_mode _exit_inference_mode".split()
)


def op_name(node: fx.Node) -> str:
    """Return the bare name of what ``node`` calls: ``add`` for ``operator.add``, ``torch.add``, ``Tensor.add``, ``aten.add.Tensor``."""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    return getattr(target, "__name__", str(target))


@dataclass(frozen=True)
class Write:
    """An in-place write: ``node`` changes the memory that ``root`` made."""

    node: fx.Node
    root: fx.Node


@dataclass(frozen=True)
class Effects:
    """The writes of a graph in order, its alias roots, and the nodes that check or open and close a scope instead of computing."""

    writes: tuple[Write, ...]
    roots: dict[fx.Node, fx.Node]
    checks: frozenset[fx.Node]

    def written_by(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Return the roots that ``node`` writes; empty for most nodes."""
        return tuple(write.root for write in self.writes if write.node is node)

    def writers(self) -> dict[fx.Node, list[fx.Node]]:
        """Return root -> its writers in graph order."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for write in self.writes:
            found.setdefault(write.root, []).append(write.node)
        return found


def find_effects(gm: fx.GraphModule) -> Effects:
    """Find the in-place writes, alias classes and checks of ``gm``. Never mutates it."""
    roots: dict[fx.Node, fx.Node] = {}
    writes: list[Write] = []
    checks: set[fx.Node] = set()
    for node in gm.graph.nodes:
        base = _aliased_input(node)
        roots[node] = node if base is None else roots[base]
        writes.extend(Write(node, roots[target]) for target in _written_inputs(node))
        if node.op == "call_function" and op_name(node) in _CHECKS | _SCOPES:
            checks.add(node)
    return Effects(tuple(writes), roots, frozenset(checks))


def _aliased_input(node: fx.Node) -> fx.Node | None:
    """Return the input whose memory the value of ``node`` may share, or None."""
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.target is getattr and node.args[1] in _VIEW_ATTRIBUTES:
        return node.args[0]
    if op_name(node) in _VIEWS or next(_written_inputs(node), None) is node.args[0]:
        return node.args[0]
    return None


def _written_inputs(node: fx.Node) -> Iterator[fx.Node]:
    if node.op not in ("call_function", "call_method"):
        return
    if isinstance(node.target, torch._ops.OpOverload):
        yield from _written_by_schema(node)
        return
    if isinstance(node.kwargs.get("out"), fx.Node):
        yield node.kwargs["out"]
    if _writes_first_argument(node) and isinstance(node.args[0], fx.Node):
        yield node.args[0]


def _writes_first_argument(node: fx.Node) -> bool:
    if not node.args:
        return False
    if node.target is operator.setitem or node.target in _IN_PLACE_OPERATORS:
        return fake_tensor(node.args[0]) is not None
    name = op_name(node)
    return name.endswith("_") and not name.endswith("__") and fake_tensor(node.args[0]) is not None


def _written_by_schema(node: fx.Node) -> Iterator[fx.Node]:
    schema = node.target._schema  # type: ignore[union-attr]
    for index, formal in enumerate(schema.arguments):
        if formal.alias_info is None or not formal.alias_info.is_write:
            continue
        actual = node.args[index] if index < len(node.args) else node.kwargs.get(formal.name)
        for value in actual if isinstance(actual, (list, tuple)) else [actual]:
            if isinstance(value, fx.Node):
                yield value
