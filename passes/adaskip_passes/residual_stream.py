"""Find the residual stream of a decoder graph, by structure alone.

The stream is the chain of values from the embedding to the final norm that each sublayer adds a
branch to: ``x_{k+1} = x_k + branch_k(x_k)``. An add belongs to it when one operand, seen through
casts, views, dropout and multipliers, is an ancestor of another operand. That keeps out token +
position embeddings (neither depends on the other) and RMSNorm's epsilon (a number). Adds that lie
inside another add's branch (the cubic of a tanh GELU, an SSM's skip term) are dropped, and those that
remain must form one chain.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import fx

from adaskip_passes.dependence import Dependence
from adaskip_passes.effects import find_effects, op_name
from adaskip_passes.errors import UnknownSublayerError
from adaskip_passes.graph import fake_tensor
from adaskip_passes.state import find_state
from adaskip_passes.sublayer_names import name_sublayers

_ADDS = frozenset({"add", "add_", "iadd", "__add__", "__radd__"})
_CASTS = frozenset("to float half bfloat16 type type_as _to_copy".split())
_SAME_LAST_DIM = frozenset(
    "view reshape flatten unsqueeze squeeze contiguous clone detach expand alias _unsafe_view".split()
)
_DROPOUTS = frozenset({"dropout", "dropout_", "native_dropout"})
_MULTIPLIERS = frozenset({"mul", "mul_", "imul", "div", "div_", "truediv", "itruediv"})
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "imatmul", "__matmul__"})
_ATTENTION = frozenset({"scaled_dot_product_attention", "flex_attention"})
_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})


@dataclass(frozen=True)
class Sublayer:
    """One sublayer of the stream: everything between two consecutive values of it.

    ``stream_in`` is a, the stream before (``(batch, seq, d_model)``); ``stream_out`` is b, the add
    that follows; ``branch`` the operand that the sublayer contributes to it. ``nodes`` is its region
    in graph order: what depends on a and not on b, then b itself.

    ``writes`` are the region's in-place writes that outlive it; ``cache_inputs`` the caller's tensors
    that only this sublayer reads or writes, its K and V or its state; ``cache_outputs`` the positions
    of the graph outputs that only it produces. ``shared_with`` names later sublayers that read values
    of the region beside the stream, as layers that share K and V do.
    """

    index: int
    path: str
    kind: str
    stateful: bool
    stream_in: fx.Node
    stream_out: fx.Node
    branch: fx.Node
    nodes: tuple[fx.Node, ...] = field(repr=False)
    writes: tuple[fx.Node, ...] = ()
    cache_inputs: tuple[fx.Node, ...] = ()
    cache_outputs: tuple[int, ...] = ()
    shared_with: tuple[str, ...] = ()

    def mapped(self, to: Callable[[fx.Node], fx.Node]) -> Sublayer:
        """Return this sublayer with every node replaced by its image under ``to``."""
        return replace(
            self,
            stream_in=to(self.stream_in),
            stream_out=to(self.stream_out),
            branch=to(self.branch),
            nodes=tuple(map(to, self.nodes)),
            writes=tuple(map(to, self.writes)),
            cache_inputs=tuple(map(to, self.cache_inputs)),
        )


@dataclass(frozen=True)
class ResidualStream:
    """The sublayers of a graph in stream order, or the problems that keep it from having one.

    ``phase`` is ``"decode"`` where the stream holds one token a row, else ``"prefill"``. ``skipped``
    and ``probed`` are the paths that passes have since skipped or probed, in stream order.
    """

    sublayers: tuple[Sublayer, ...]
    problems: tuple[str, ...] = ()
    phase: str = "prefill"
    skipped: tuple[str, ...] = ()
    probed: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all sublayers in stream order."""
        return tuple(sublayer.path for sublayer in self.sublayers)

    @property
    def kept(self) -> tuple[Sublayer, ...]:
        """The sublayers that no pass has skipped."""
        return tuple(sublayer for sublayer in self.sublayers if sublayer.path not in self.skipped)

    def by_path(self, path: str) -> Sublayer:
        """Return the sublayer of that path; :class:`UnknownSublayerError` lists what there is."""
        for sublayer in self.sublayers:
            if sublayer.path == path:
                return sublayer
        near = difflib.get_close_matches(path, self.paths, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise UnknownSublayerError(
            f"no sublayer {path!r} in this graph{hint}; it has: {', '.join(self.paths) or 'none'}"
        )

    def mapped(self, to: Callable[[fx.Node], fx.Node]) -> ResidualStream:
        """Return this stream over a copy of its graph; ``to`` gives each node's copy."""
        return replace(self, sublayers=tuple(sublayer.mapped(to) for sublayer in self.sublayers))

    def __str__(self) -> str:
        if self.problems:
            return "no residual stream: " + "; ".join(self.problems)
        width = max(map(len, self.paths))
        return "\n".join(
            f"{sublayer.index:>4}  {sublayer.path:<{width}}  {sublayer.kind:<9}  "
            f"{'stateful' if sublayer.stateful else 'stateless'}"
            for sublayer in self.sublayers
        )


@dataclass(frozen=True)
class _Candidate:
    """An add that may be the end of a sublayer; ``stream`` is the peeled operand that the others depend on."""

    add: fx.Node
    stream: fx.Node
    branch: fx.Node


def find_residual_stream(gm: fx.GraphModule) -> ResidualStream:
    """Find the residual stream of ``gm``. Never mutates it, and never raises for want of a stream.

    Where there is none, ``problems`` says why and ``sublayers`` is empty.
    """
    effects = find_effects(gm)
    dependence = Dependence(gm, effects)
    candidates = _drop_nested([found for node in gm.graph.nodes if (found := _candidate(node, dependence))], dependence)
    chain = _chain(candidates, dependence)
    problems = _problems(candidates, chain, dependence)
    if problems:
        return ResidualStream((), problems, _phase(chain))
    regions = [tuple(dependence.between(link.stream, link.add)) for link in chain]
    state = find_state(gm, regions, effects)
    sublayers = [
        Sublayer(
            index=index,
            path="",
            kind=_kind(region, owned.exists, dependence),
            stateful=owned.exists,
            stream_in=link.stream,
            stream_out=link.add,
            branch=link.branch,
            nodes=(*region, link.add),
            writes=owned.writes,
            cache_inputs=owned.inputs,
            cache_outputs=owned.outputs,
        )
        for index, (link, region, owned) in enumerate(zip(chain, regions, state, strict=True))
    ]
    return ResidualStream(name_sublayers(sublayers, effects, dependence), (), _phase(chain))


def _candidate(node: fx.Node, dependence: Dependence) -> _Candidate | None:
    value = fake_tensor(node)
    if not _is_tensor_add(node) or value is None or value.dim() not in (2, 3) or not value.is_floating_point():
        return None  # rank 4 is what attention scores and their masks have
    if any(_is_tensor_add(user) and _addends(node, user) for user in node.users) and len(node.users) == 1:
        return None  # an inner add of a tree: the outermost one stands for it
    leaves = _leaves(node)
    for leaf in sorted(leaves, key=dependence.position.__getitem__):
        stream = _peel(leaf)
        branches = [other for other in leaves if other is not leaf and dependence.depends(other, stream)]
        if branches and _last_dim(stream) == _last_dim(node):
            return _Candidate(node, stream, branches[-1])
    return None


def _is_tensor_add(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or op_name(node) not in _ADDS or len(node.args) < 2:
        return False
    return all(fake_tensor(operand) is not None for operand in node.args[:2])


def _addends(inner: fx.Node, outer: fx.Node) -> bool:
    """Tell whether ``inner`` is an operand of ``outer`` over the same width (not a broadcast bias)."""
    return inner in outer.args[:2] and _last_dim(inner) == _last_dim(outer)


def _leaves(node: fx.Node) -> list[fx.Node]:
    """Return the operands of an add tree; an inner add belongs to it when the tree is its only user."""
    leaves: list[fx.Node] = []
    for operand in node.args[:2]:
        assert isinstance(operand, fx.Node)
        if _is_tensor_add(operand) and len(operand.users) == 1:
            leaves.extend(_leaves(operand))
        else:
            leaves.append(operand)
    return leaves


def _peel(node: fx.Node) -> fx.Node:
    """Walk back from ``node`` through casts, views, dropout and multipliers."""
    while (inner := _peeled_once(node)) is not None:
        node = inner
    return node


def _peeled_once(node: fx.Node) -> fx.Node | None:
    if node.op not in ("call_function", "call_method") or not node.args or fake_tensor(node.args[0]) is None:
        return _multiplied(node)
    name, inner = op_name(node), node.args[0]
    assert isinstance(inner, fx.Node)
    if name in _CASTS or name in _DROPOUTS:
        return inner
    if name in _SAME_LAST_DIM and _last_dim(inner) == _last_dim(node):
        return inner
    return _multiplied(node)


def _multiplied(node: fx.Node) -> fx.Node | None:
    """Return the tensor that ``node`` multiplies by a number or by a 0-d or 1-d tensor, or None."""
    if node.op not in ("call_function", "call_method") or op_name(node) not in _MULTIPLIERS or len(node.args) < 2:
        return None
    tensors = [operand for operand in node.args[:2] if _rank(operand) >= 2]
    return tensors[0] if len(tensors) == 1 and isinstance(tensors[0], fx.Node) else None


def _rank(operand: object) -> int:
    value = fake_tensor(operand)
    return 0 if value is None else value.dim()


def _last_dim(node: fx.Node) -> object:
    value = fake_tensor(node)
    return value.shape[-1] if value is not None and value.dim() else None


def _drop_nested(candidates: list[_Candidate], dependence: Dependence) -> list[_Candidate]:
    """Drop the adds that lie inside the branch of another."""

    def inside(inner: _Candidate, outer: _Candidate) -> bool:
        return (
            inner is not outer
            and dependence.depends(inner.add, outer.stream)
            and dependence.reaches(inner.add, outer.branch)
            and not dependence.reaches(inner.add, outer.stream)
        )

    return [inner for inner in candidates if not any(inside(inner, outer) for outer in candidates)]


def _chain(candidates: list[_Candidate], dependence: Dependence) -> list[_Candidate]:
    """Return the longest run of candidates of which each one's stream reaches back to the add before."""
    best: list[list[_Candidate]] = []
    for index, candidate in enumerate(candidates):
        before = [best[i] for i in range(index) if dependence.reaches(candidates[i].add, candidate.stream)]
        best.append([*max(before, key=len, default=[]), candidate])
    return max(best, key=len, default=[])


def _problems(candidates: list[_Candidate], chain: list[_Candidate], dependence: Dependence) -> tuple[str, ...]:
    if not chain:
        return ("no add joins a value with a branch computed from it",)
    beside = [
        candidate.add.name
        for candidate in candidates
        if candidate not in chain and dependence.depends(candidate.add, chain[0].stream)
    ]
    if beside:
        return (f"several streams: {len(beside)} residual adds lie beside the longest chain, {beside[0]} first",)
    return ()


def _phase(chain: list[_Candidate]) -> str:
    value = fake_tensor(chain[0].stream) if chain else None
    if value is not None and value.dim() >= 3 and isinstance(value.shape[-2], int) and value.shape[-2] == 1:
        return "decode"
    return "prefill"


def _kind(region: tuple[fx.Node, ...], stateful: bool, dependence: Dependence) -> str:
    if _attends(region, set(region), dependence):
        return "attention"
    return "ssm" if stateful else "ffn"


def _attends(region: tuple[fx.Node, ...], inside: set[fx.Node], dependence: Dependence) -> bool:
    """Tell whether the region mixes tokens by softmax: SDPA, or a softmax over a product of two activations."""
    if any(op_name(node) in _ATTENTION or "attention" in op_name(node) for node in region):
        return True
    products = [node for node in region if op_name(node) in _PRODUCTS and _activation_product(node, inside)]
    softmaxes = [node for node in region if op_name(node) in _SOFTMAX]
    return any(dependence.depends(softmax, product) for softmax in softmaxes for product in products)


def _activation_product(node: fx.Node, inside: set[fx.Node]) -> bool:
    return len([source for source in node.all_input_nodes if source in inside]) >= 2
