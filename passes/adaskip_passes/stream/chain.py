"""Order residual add trees into the chain that is the stream, and share its nodes out to branches.

A link of the chain is one add tree. Most links have one branch. Where a tree joins several, each one
that mixes tokens (attention, or one that keeps state) is a part of its own, and the others together are
one: ``x + attention + ffn`` has two parts, ``x + routed experts + shared expert`` one.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from adaskip_passes.analysis.dependence import Dependence
from adaskip_passes.ir.graph import fake_tensor, op_name, output_values
from adaskip_passes.stream.add_trees import AddTree, find_add_trees, find_weighted, is_add, leaves_of
from adaskip_passes.stream.problems import entries_outside, stream_problems
from adaskip_passes.stream.state import State, find_state
from adaskip_passes.stream.stream import Kind

_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "imatmul", "__matmul__"})
_ATTENTION = frozenset({"scaled_dot_product_attention", "flex_attention"})
_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})


@dataclass(frozen=True)
class Part:
    """What one sublayer computes: the operands that it contributes to its tree, its nodes, its state and its kind."""

    branches: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    state: State
    kind: Kind


@dataclass(frozen=True)
class Link:
    """One add tree of the stream, its parts in graph order, and all nodes between its stream and its add."""

    tree: AddTree
    parts: tuple[Part, ...]
    region: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Chain:
    """The links of a stream in order, or the problems that keep a graph from having one."""

    links: tuple[Link, ...]
    trees: tuple[AddTree, ...]
    problems: tuple[str, ...]


def find_chain(gm: fx.GraphModule, dependence: Dependence) -> Chain:
    """Find the chain of residual adds of ``gm`` and what each one joins."""
    weighted = find_weighted(gm)
    candidates = find_add_trees(gm, dependence, weighted)
    trees = _longest_run(candidates, dependence)
    problems = tuple(stream_problems(gm, candidates, trees, dependence, weighted))
    if problems:
        return Chain((), tuple(trees), problems)
    links = tuple(_links(gm, trees, dependence))
    # A value of the stream may be handed out as well: the hidden states of all layers.
    inside = {node for link in links for node in (*link.region, link.tree.stream, link.tree.add)}
    problems = tuple(entries_outside(gm, inside, trees[-1].add, dependence, weighted))
    return Chain(() if problems else links, tuple(trees), problems)


def _longest_run(trees: Sequence[AddTree], dependence: Dependence) -> list[AddTree]:
    """Return the longest run of trees of which each one's stream reaches back to the add before."""
    before: list[int | None] = []
    length: list[int] = []
    by_length: list[tuple[int, int]] = []
    for index, tree in enumerate(trees):
        found = next((i for _, i in reversed(by_length) if dependence.reaches(trees[i].add, tree.stream)), None)
        before.append(found)
        length.append(1 if found is None else length[found] + 1)
        bisect.insort(by_length, (length[index], index))
    last = max(range(len(trees)), key=length.__getitem__, default=None)
    run: list[AddTree] = []
    while last is not None:
        run.append(trees[last])
        last = before[last]
    return run[::-1]


def _links(gm: fx.GraphModule, trees: Sequence[AddTree], dependence: Dependence) -> list[Link]:
    regions = _regions(gm, trees, dependence)
    parts = _parts(gm, trees, [[(branch,) for branch in tree.branches] for tree in trees], regions, dependence)
    if any(len(found) > 1 for found in parts):
        parts = _parts(gm, trees, [_grouped(found) for found in parts], regions, dependence)
    return [Link(tree, tuple(found), tuple(region)) for tree, found, region in zip(trees, parts, regions, strict=True)]


def _regions(gm: fx.GraphModule, trees: Sequence[AddTree], dependence: Dependence) -> list[list[fx.Node]]:
    """Return, for each tree, the nodes that depend on its stream and on no later value of the stream.

    The last value of the stream that a node depends on tells its region, so one sweep does.
    """
    marks = dependence.bits([node for tree in trees for node in (tree.stream, tree.add)])
    start = {tree.stream: index for index, tree in enumerate(trees)}
    regions: list[list[fx.Node]] = [[] for _ in trees]
    for node in gm.graph.nodes:
        last = None if node.op == "output" else dependence.last_before(node, marks)
        if last in start and node is not trees[start[last]].add:
            regions[start[last]].append(node)
    return regions


def _grouped(parts: Sequence[Part]) -> list[tuple[fx.Node, ...]]:
    """Return the branches of each sublayer: every mixer alone, all others as one."""
    groups = [part.branches for part in parts if part.kind != "ffn"]
    others = [part for part in parts if part.kind == "ffn"]
    branches = tuple(branch for part in others for branch in part.branches)
    if any(part.nodes for part in others) or not groups:
        # In graph order, by the last branch of each.
        before = parts[: parts.index(others[-1])]
        groups.insert(sum(part.kind != "ffn" for part in before), branches)
    elif branches:
        groups[-1] += branches  # a bias, or what comes from beside the stream
    return groups


def _parts(
    gm: fx.GraphModule,
    trees: Sequence[AddTree],
    groups: Sequence[Sequence[tuple[fx.Node, ...]]],
    regions: Sequence[list[fx.Node]],
    dependence: Dependence,
) -> list[list[Part]]:
    shares = [
        _shared_out(tree.add, region, branches, dependence)
        for tree, region, branches in zip(trees, regions, groups, strict=True)
    ]
    returned = tuple(output_values(gm))
    states = iter(find_state(gm, [share for found in shares for share in found], dependence.effects))
    return [
        [
            Part(branches, share, state, _kind(share, state, returned, dependence))
            for branches, share, state in zip(tree_groups, found, states, strict=False)
        ]
        for tree_groups, found in zip(groups, shares, strict=True)
    ]


def _shared_out(
    add: fx.Node, region: Sequence[fx.Node], groups: Sequence[tuple[fx.Node, ...]], dependence: Dependence
) -> list[tuple[fx.Node, ...]]:
    """Share the nodes of the region before ``add`` out to the groups of branches that they feed.

    What feeds several (a norm before both) belongs to none. What feeds none, a cache entry that
    attention does not read back, goes with its inputs, unless a later part of the graph reads it: then
    it is a path beside the stream, and belongs to none either.
    """
    feeds = [0] * len(groups)
    for index, branches in enumerate(groups):
        for branch in branches:
            feeds[index] |= dependence.as_read(branch, add)
    aside = _read_later(region, dependence)
    owner: dict[fx.Node, int] = {}
    for node in region:
        position = dependence.position[node]
        fed = [index for index, bits in enumerate(feeds) if bits >> position & 1]
        if not fed and dependence.depends(add, node):
            leaves = set(leaves_of(node))  # a sum inside the tree
            fed = [index for index, branches in enumerate(groups) if leaves.issubset(branches)]
        elif not fed and node not in aside:
            fed = [owner[source] for source in node.all_input_nodes if source in owner][:1]
        if len(fed) == 1:
            owner[node] = fed[0]
    return [tuple(node for node in region if owner.get(node) == index) for index in range(len(groups))]


def _read_later(region: Sequence[fx.Node], dependence: Dependence) -> set[fx.Node]:
    """Return the nodes of a region whose value a node outside it depends on (the graph's outputs apart)."""
    inside = set(region)
    found: set[fx.Node] = set()
    for node in reversed(region):
        if any(
            user in found or (user not in inside and dependence.depends(user, node))
            for user in node.users
            if user.op != "output"
        ):
            found.add(node)
    return found


def _kind(
    region: tuple[fx.Node, ...], state: State, returned: Sequence[fx.Node | None], dependence: Dependence
) -> Kind:
    if _attends(region, set(region), dependence):
        return "attention"
    if not state.exists:
        return "ffn"
    kept = [*state.inputs, *(returned[position] for position in state.outputs)]
    return "attention" if any(_grows(node) for node in kept) else "ssm"


def _grows(node: fx.Node | None) -> bool:
    """Tell whether what a region keeps has an entry a token, as keys and values do, whatever op reads them."""
    value = fake_tensor(node)
    return value is not None and any(isinstance(size, torch.SymInt) for size in value.shape[1:])


def _attends(region: tuple[fx.Node, ...], inside: set[fx.Node], dependence: Dependence) -> bool:
    """Tell whether the region mixes tokens by softmax: SDPA, or a softmax over a product of two activations."""
    if any(op_name(node) in _ATTENTION or "attention" in op_name(node) for node in region):
        return True
    products = [node for node in region if op_name(node) in _PRODUCTS and _activation_product(node, inside)]
    softmaxes = [node for node in region if op_name(node) in _SOFTMAX]
    return any(dependence.depends(softmax, product) for softmax in softmaxes for product in products)


def _activation_product(node: fx.Node, inside: set[fx.Node]) -> bool:
    return len([source for source in node.all_input_nodes if source in inside]) >= 2


def is_decode(stream: fx.Node) -> bool:
    """Tell whether a value of the stream holds one token a row."""
    value = fake_tensor(stream)
    return value is not None and value.dim() >= 3 and isinstance(value.shape[-2], int) and value.shape[-2] == 1


def joined(link: Link) -> Part:
    """Return the parts of a link as one."""
    parts = link.parts
    if len(parts) == 1:
        return parts[0]
    state = State(
        tuple(node for part in parts for node in part.state.writes),
        tuple(node for part in parts for node in part.state.inputs),
        tuple(position for part in parts for position in part.state.outputs),
    )
    kinds = {part.kind for part in parts}
    return Part(
        tuple(branch for part in parts for branch in part.branches),
        link.region,
        state,
        next(kind for kind in ("attention", "ssm", "ffn") if kind in kinds),
    )


def straight_sums(link: Link) -> list[fx.Node] | None:
    """Return the sum after each part of a link, or None where its tree does not add one part after the other.

    ``((x + a) + b) + c`` adds a, b and c in turn, its last sum being the tree itself.
    """
    sums: list[fx.Node] = []
    node = link.tree.add
    for part in reversed(link.parts):
        sums.append(node)
        rest = _less(node, part.branches)
        if rest is None:
            return None
        node = rest
    return sums[::-1] if node is link.tree.leaf else None


def _less(node: fx.Node, branches: tuple[fx.Node, ...]) -> fx.Node | None:
    """Return the operand that is left of an add when the one that joins just ``branches`` is taken away."""
    if not is_add(node):
        return None
    for taken, left in (node.args[:2], node.args[1::-1]):
        if set(leaves_of(taken)) == set(branches):  # type: ignore[arg-type]
            return left  # type: ignore[return-value]
    return None
