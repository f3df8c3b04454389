"""Find the adds that may end a sublayer, by structure alone.

An add tree is a residual one when one of its leaves, seen through casts, views, dropout and
multipliers, is an ancestor of another leaf, and weights stand between the two. That keeps out token +
position embeddings (neither depends on the other), RMSNorm's epsilon (a number) and the cubic of a
tanh GELU (no weights). Trees inside another tree's branch (an SSM's skip term) are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from adaskip_passes.analysis.dependence import Dependence
from adaskip_passes.ir.graph import fake_tensor, op_name
from adaskip_passes.ir.module_paths import held_by_module

_ADDS = frozenset({"add", "add_", "iadd", "__add__", "__radd__"})
_CASTS = frozenset("to float half bfloat16 type type_as _to_copy".split())
_SAME_LAST_DIM = frozenset(
    "view reshape flatten unsqueeze squeeze contiguous clone detach expand alias _unsafe_view".split()
)
_DROPOUTS = frozenset({"dropout", "dropout_", "native_dropout"})
# By a number, or a number a channel. Those that work in place are none of them: what they leave is another value
# in the same memory.
_SCALINGS = frozenset({"mul", "div", "truediv", "add", "sub"})


@dataclass(frozen=True)
class AddTree:
    """A residual add: ``add`` is its outermost add, ``leaf`` its operand on the stream's side.

    ``stream`` is what the branches are computed from: that operand, or what it is seen through casts,
    views and multipliers. ``branches`` are the other operands, in graph order.
    """

    add: fx.Node
    leaf: fx.Node
    stream: fx.Node
    branches: tuple[fx.Node, ...]


def find_add_trees(gm: fx.GraphModule, dependence: Dependence, weighted: Sequence[fx.Node]) -> list[AddTree]:
    """Return the residual add trees of ``gm`` in graph order, without those inside another's branch.

    ``weighted`` are the nodes that :func:`find_weighted` found.
    """
    matrices = dependence.bits(weighted)
    trees = [tree for node in gm.graph.nodes if (tree := _tree(node, dependence, matrices)) is not None]
    return _drop_nested(trees, dependence)


def _tree(node: fx.Node, dependence: Dependence, weighted: int) -> AddTree | None:
    value = fake_tensor(node)
    if not is_add(node) or value is None or value.dim() not in (2, 3) or not value.is_floating_point():
        return None  # rank 4 is what attention scores and their masks have
    if len(node.users) == 1 and any(is_add(user) and _addends(node, user) for user in node.users):
        return None  # an inner add of a tree: the outermost one stands for it
    leaves = sorted(
        (leaf for operand in node.args[:2] for leaf in leaves_of(operand)),  # type: ignore[arg-type]
        key=dependence.position.__getitem__,
    )
    for leaf in leaves:
        others = tuple(other for other in leaves if other is not leaf)
        for stream in peelings(leaf):
            if _last_dim(stream) == _last_dim(node) and _branch_off(stream, others, dependence, weighted):
                return AddTree(node, leaf, stream, others)
    return None


def _branch_off(stream: fx.Node, branches: Sequence[fx.Node], dependence: Dependence, weighted: int) -> bool:
    """Tell whether a branch is computed from ``stream`` by weights."""
    return any(
        dependence.depends(branch, stream) and dependence.any_between(stream, branch, weighted) for branch in branches
    )


def find_weighted(gm: fx.GraphModule) -> tuple[fx.Node, ...]:
    """Return the nodes that read a matrix that the model holds, as it is or computed from such alone."""
    weights: set[fx.Node] = set()
    found = []
    for node in gm.graph.nodes:
        tensors = [source for source in node.all_input_nodes if fake_tensor(source) is not None]
        if node.op == "get_attr" or held_by_module(node) or (tensors and weights.issuperset(tensors)):
            weights.add(node)
        elif any(source in weights and _rank(source) >= 2 for source in tensors):
            found.append(node)
    return tuple(found)


def is_add(node: fx.Node) -> bool:
    """Tell whether ``node`` adds two tensors."""
    if node.op not in ("call_function", "call_method") or op_name(node) not in _ADDS or len(node.args) < 2:
        return False
    return "alpha" not in node.kwargs and all(fake_tensor(operand) is not None for operand in node.args[:2])


def _addends(inner: fx.Node, outer: fx.Node) -> bool:
    """Tell whether ``inner`` is an operand of ``outer`` over the same width (not a broadcast bias)."""
    return inner in outer.args[:2] and _last_dim(inner) == _last_dim(outer)


def leaves_of(operand: fx.Node) -> Iterator[fx.Node]:
    """Yield the leaves below an operand of an add tree: itself, unless it is an inner add.

    An inner add belongs to the tree when the tree is its only user.
    """
    if is_add(operand) and len(operand.users) == 1:
        for inner in operand.args[:2]:
            yield from leaves_of(inner)  # type: ignore[arg-type]
    else:
        yield operand


def peelings(node: fx.Node) -> Iterator[fx.Node]:
    """Yield ``node`` and what it is seen through casts, views, dropout and multipliers, nearest first."""
    inner: fx.Node | None = node
    while inner is not None:
        yield inner
        inner = _peeled_once(inner)


def _peeled_once(node: fx.Node) -> fx.Node | None:
    if node.op not in ("call_function", "call_method") or not node.args or fake_tensor(node.args[0]) is None:
        return _scaled(node)
    name, inner = op_name(node), node.args[0]
    assert isinstance(inner, fx.Node)
    if name in _CASTS or name in _DROPOUTS:
        return inner
    if name in _SAME_LAST_DIM and _last_dim(inner) == _last_dim(node):
        return inner
    return _scaled(node)


def _scaled(node: fx.Node) -> fx.Node | None:
    """Return the tensor that ``node`` scales or shifts by a number or by a 0-d or 1-d tensor, or None."""
    if node.op not in ("call_function", "call_method") or op_name(node) not in _SCALINGS or len(node.args) < 2:
        return None
    tensors = [operand for operand in node.args[:2] if _rank(operand) >= 2]
    return tensors[0] if len(tensors) == 1 and isinstance(tensors[0], fx.Node) else None


def _rank(operand: object) -> int:
    value = fake_tensor(operand)
    return 0 if value is None else value.dim()


def _last_dim(node: fx.Node) -> object:
    value = fake_tensor(node)
    return value.shape[-1] if value is not None and value.dim() else None


def _drop_nested(trees: list[AddTree], dependence: Dependence) -> list[AddTree]:
    """Drop the trees that lie inside the branch of another; only those that span it can hold it."""
    position = dependence.position
    waiting = sorted(trees, key=lambda tree: position[tree.stream], reverse=True)
    spanning: list[AddTree] = []
    kept = []
    for inner in trees:
        here = position[inner.add]
        while waiting and position[waiting[-1].stream] < here:
            spanning.append(waiting.pop())
        spanning = [tree for tree in spanning if position[tree.add] >= here]
        if not any(_inside(inner, outer, dependence) for outer in spanning):
            kept.append(inner)
    return kept


def _inside(inner: AddTree, outer: AddTree, dependence: Dependence) -> bool:
    return (
        inner is not outer
        and dependence.depends(inner.add, outer.stream)
        and any(dependence.reaches(inner.add, branch) for branch in outer.branches)
        and not dependence.reaches(inner.add, outer.stream)
    )
