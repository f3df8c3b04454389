"""Which nodes write memory, and whose memory it is.

A write matters beyond its data flow: ``keys.index_copy_(2, position, k)`` has no user, since its
readers take ``keys`` itself. Every analysis that asks "what depends on what" or "what may be
erased" therefore needs the edges that this module finds: from a write to the later readers of the
same alias class.

An alias class is named by its root: the node that made the memory, reached by walking back through
views. Ops that return a view only sometimes (``reshape``, ``contiguous``, ``to``) count as views.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaskip_passes.analysis.kept import kept_on_graph
from adaskip_passes.ir.graph import fake_value, op_name

# What may return its input's memory though no schema says so: Python's own, and conversions to the type that it has.
_VIEWS = frozenset(
    "getattr _get_data_attr getitem __getitem__ T H type type_as float half bfloat16 double bool byte char short int long "
    "cuda atleast_1d atleast_2d atleast_3d unsafe_chunk unsafe_split unsafe_split_with_sizes diag _unsafe_view".split()
)
_IN_PLACE_OPERATORS = frozenset(
    "setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor imatmul ilshift irshift".split()
)
_IN_PLACE_METHODS = frozenset(f"__{name}__" for name in _IN_PLACE_OPERATORS)
_CHECKS = frozenset({"_assert", "_assert_async", "_assert_scalar", "_check", "_check_is_size", "sym_constrain_range"})
# They open and close what the nodes between them run under.
OPENING = frozenset({"_vmap_increment_nesting", "_enter_autocast", "_enter_inference_mode"})
CLOSING = frozenset({"_vmap_decrement_nesting", "_exit_autocast", "_exit_inference_mode"})
SCOPES = OPENING | CLOSING | {"lazy_load_decompositions", "_set_grad_enabled"}
_ACTS = _CHECKS | SCOPES
# PyTorch calls it impure, so that no wait is lost. It waits for its own value: where that goes, the collective goes too.
_WAITS = frozenset({"wait_tensor"})


@dataclass(frozen=True)
class Write:
    """An in-place write: ``node`` changes the memory that ``root`` made."""

    node: fx.Node
    root: fx.Node


@dataclass(frozen=True)
class Effects:
    """The writes of a graph in order, its alias roots, and the nodes whose effect is neither a value nor a write.

    ``checks`` holds those: they check a value, open and close a scope, or draw random numbers.
    """

    writes: tuple[Write, ...]
    roots: dict[fx.Node, fx.Node]
    checks: frozenset[fx.Node]

    def written(self) -> dict[fx.Node, list[fx.Node]]:
        """Return node -> the roots that it writes, for the nodes that write."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for write in self.writes:
            found.setdefault(write.node, []).append(write.root)
        return found

    def writers(self) -> dict[fx.Node, list[fx.Node]]:
        """Return root -> its writers in graph order."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for write in self.writes:
            found.setdefault(write.root, []).append(write.node)
        return found


@kept_on_graph
def find_effects(gm: fx.GraphModule) -> Effects:
    """Find the in-place writes, alias classes and other effects of ``gm``. Never mutates it."""
    roots: dict[fx.Node, fx.Node] = {}
    writes: list[Write] = []
    checks: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            roots[node] = node
            continue
        written = list(written_inputs(node))
        base = written[0] if written else _viewed_input(node)
        roots[node] = node if base is None else roots[base]
        writes.extend(Write(node, roots[target]) for target in written)
        if node.op == "call_function" and not written and base is None and _acts(node):
            checks.add(node)
    return Effects(tuple(writes), roots, frozenset(checks))


def positions_written(gm: fx.GraphModule) -> tuple[int, ...]:
    """Return the positions of the inputs that ``gm`` writes in place, in the order of the writes."""
    places = {node: place for place, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    roots = dict.fromkeys(write.root for write in find_effects(gm).writes)
    return tuple(places[root] for root in roots if root in places)


def is_check(node: fx.Node) -> bool:
    """Tell whether ``node`` only checks a value, and fails where that is not what the rest of the graph takes it for."""
    return node.op == "call_function" and op_name(node) in _CHECKS


def _acts(node: fx.Node) -> bool:
    if hasattr(node.target, "written_inputs") or op_name(node) in _WAITS:
        return False
    return op_name(node) in _ACTS or node.is_impure()


def _viewed_input(node: fx.Node) -> fx.Node | None:
    """Return the input whose memory the value of ``node`` may share though ``node`` does not write, or None."""
    if node.op not in ("call_function", "call_method") or not _is_view(op_name(node)):
        return None
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


@functools.cache
def _is_view(name: str) -> bool:
    """Tell whether an operation of this name may return memory of its input, as the schemas of PyTorch's operators say."""
    packet = getattr(torch.ops.aten, name, None)  # of "__eq__" it is no operator
    is_operator = isinstance(packet, torch._ops.OpOverloadPacket)
    overloads = [getattr(packet, one) for one in packet.overloads()] if is_operator else []
    returns = (value for one in overloads for value in one._schema.returns)
    return name in _VIEWS or any(value.alias_info is not None and not value.alias_info.is_write for value in returns)


def written_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """Yield those of the inputs of ``node`` that it writes in place."""
    if node.op not in ("call_function", "call_method"):
        return
    region_writes = getattr(node.target, "written_inputs", None)  # of a region that was outlined
    if region_writes is not None:
        yield from (node.args[place] for place in region_writes)
        return
    is_operator = isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
    schema = _mutable_schema(node.target) if is_operator else None
    if schema is not None:
        yield from _written_by_schema(node, schema)
        return
    yield from _nodes_in(node.kwargs.get("out"))
    if _writes_first_argument(node):
        yield from _nodes_in(node.args[0])


def _nodes_in(value: object) -> Iterator[fx.Node]:
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(item, fx.Node):
            yield item


def _writes_first_argument(node: fx.Node) -> bool:
    if not node.args or not any(_may_be_tensor(source) for source in _nodes_in(node.args[0])):
        return False
    name = op_name(node)
    if getattr(node.target, "__module__", None) == "_operator":
        return name in _IN_PLACE_OPERATORS  # not operator.and_, which only looks like a write
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_METHODS or _asked_in_place(node)


def _may_be_tensor(node: fx.Node) -> bool:
    value = fake_value(node)
    return value is None or isinstance(value, torch.Tensor)


def _asked_in_place(node: fx.Node) -> bool:
    """Tell whether the call says ``inplace=True``, as activations and dropout may."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    position = _place_of_inplace(node.target)
    return position is not None and position < len(node.args) and bool(node.args[position])


@functools.cache
def _place_of_inplace(target: object) -> int | None:
    if not inspect.isfunction(target):
        return None
    names = list(inspect.signature(target).parameters)
    return names.index("inplace") if "inplace" in names else None


@functools.cache
def _mutable_schema(target: Any) -> torch.FunctionSchema | None:
    """Return the schema by which the operator ``target`` writes its arguments; None where it writes nothing."""
    packet = isinstance(target, torch._ops.OpOverloadPacket)
    overloads = [getattr(target, name) for name in target.overloads()] if packet else [target]
    return next((overload._schema for overload in overloads if overload._schema.is_mutable), None)


def _written_by_schema(node: fx.Node, schema: torch.FunctionSchema) -> Iterator[fx.Node]:
    for index, formal in enumerate(schema.arguments):
        if formal.alias_info is None or not formal.alias_info.is_write:
            continue
        yield from _nodes_in(node.args[index] if index < len(node.args) else node.kwargs.get(formal.name))
