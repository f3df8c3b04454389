"""The rules that hold before and after every pass.

A graph lints, its names are unique, every value has a fake value, which is what its node computes,
its inputs are those it was captured with (a pass may append some, and tells of them), its outputs keep their shapes
and dtypes (a pass may append one), and no write to memory that outlives the call is lost, except
those of skipped sublayers; one to memory that only the outputs name may become a value. Every node
that the residual stream names is in the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from adaskip_passes.analysis.effects import OPENING, find_effects, written_inputs
from adaskip_passes.analysis.regions import Region, regions_of
from adaskip_passes.analysis.touched_values import ValueCheck
from adaskip_passes.errors import VerificationError
from adaskip_passes.ir.graph import fake_tensor, known_size, op_name, output_values
from adaskip_passes.stream.stream import ResidualStream, Sublayer


@dataclass(frozen=True)
class Contract:
    """What a pass must not change: input names, output types, the names of nodes that write, and fake values.

    A write of ``results`` is to memory that only the outputs name: it may become a value of its own. ``owners`` gives, by
    the name of a node that writes, the path of its sublayer, with which it may go.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    writes: frozenset[str]
    results: frozenset[str]
    owners: Mapping[str, str]
    values: ValueCheck = field(repr=False)

    @classmethod
    def of(cls, gm: fx.GraphModule, stream: ResidualStream) -> Contract:
        """Read the contract off a graph."""
        lasting, results = _writes(gm)
        return cls(
            tuple(node.name for node in gm.graph.nodes if node.op == "placeholder"),
            tuple(_type(node) for node in output_values(gm)),
            lasting - _adds(stream),
            results - _adds(stream),
            {name: one.path for one in stream.sublayers for node in _writers(one) for name, _ in _named(node)},
            ValueCheck.of(gm),
        )

    def of_copy(self, gm: fx.GraphModule) -> Contract:
        """Return what a copy offers, whose nodes have the names of those that it is of."""
        return replace(self, values=ValueCheck.of(gm))


def verify(
    gm: fx.GraphModule, contract: Contract | None, stream: ResidualStream, *, after: str, added: tuple[str, ...] = ()
) -> Contract:
    """Return the contract that ``gm`` offers to the next pass, None given for the first; ``added`` are inputs told of.

    Raises:
        VerificationError: ``gm`` breaks a rule; the message names the pass ``after``.
    """
    for problem in _own_problems(gm):
        raise VerificationError(f"after {after}: {problem}")
    try:
        offered = Contract.of(gm, stream)
        broken = list[str]()
        if contract is not None:
            broken += [*_breaches(gm, contract, offered, stream, added), *contract.values.problems(gm)]
    except Exception as error:  # whatever an analysis trips over in a graph of a kind that it does not know
        raise VerificationError(f"after {after}: cannot be verified: {type(error).__name__}: {error}") from error
    for problem in (*broken, *_erased(gm, stream)):
        raise VerificationError(f"after {after}: {problem}")
    return offered


def _own_problems(gm: fx.GraphModule) -> Iterator[str]:
    try:
        gm.graph.lint()
    except Exception as error:  # noqa: BLE001 - lint raises whatever it trips over
        yield f"the graph does not lint: {error}"
        return
    for node in gm.graph.nodes:
        # What opens a scope yields no value, but what closes it by.
        computed = node.op in ("call_function", "call_method") and node.users and op_name(node) not in OPENING
        if computed and "example_value" not in node.meta and "val" not in node.meta:
            yield f"node {node.name} has no fake value"


def _erased(gm: fx.GraphModule, stream: ResidualStream) -> Iterator[str]:
    nodes = set(gm.graph.nodes)
    for sublayer in stream.sublayers:
        gone = next((node for node in sublayer.all_nodes if node not in nodes), None)
        if gone is not None:
            yield f"the stream names {gone.name} of {sublayer.path}, which is no node of the graph"


def _breaches(
    gm: fx.GraphModule, contract: Contract, offered: Contract, stream: ResidualStream, added: tuple[str, ...]
) -> Iterator[str]:
    if offered.inputs[: len(contract.inputs)] != contract.inputs:
        yield "inputs were removed, renamed or reordered"
    elif offered.inputs[len(contract.inputs) :] != added:
        found = ", ".join(offered.inputs[len(contract.inputs) :]) or "none"
        yield f"the pass tells of the inputs {', '.join(added) or 'none'} that it has added, and these are new: {found}"
    for position, (was, now) in enumerate(zip(contract.outputs, offered.outputs, strict=False)):
        if was != now:
            yield f"output {position} was {was} and is now {now}"
    before, now = len(contract.outputs), len(offered.outputs)
    if not 0 <= now - before <= 1:
        yield f"there were {before} outputs and are now {now}; a pass may append one"
    lost = contract.writes - offered.writes - _adds(stream)
    results = contract.results - offered.results - _adds(stream)
    lost |= results - _values(gm) if results else results
    lost = {name for name in lost if contract.owners.get(name) not in stream.skipped}
    if lost:
        yield f"writes to memory that outlives the call were lost: {', '.join(sorted(lost))}"


def _writes(gm: fx.GraphModule) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the writes, those within regions too: to what the caller passed in, and to what only it gets back."""
    effects = find_effects(gm)
    returned = {effects.roots[node] for node in output_values(gm) if node is not None}
    lasting, results = set[str](), set[str]()
    for node in dict.fromkeys(write.node for write in effects.writes):
        for name, target in _named(node):
            root = effects.roots[target]
            # What a region gives out may be memory of the caller's: nothing tells from outside.
            if root.op in ("placeholder", "get_attr") or isinstance(root.target, Region):
                lasting.add(name)
            elif root in returned:
                results.add(name)
    return frozenset(lasting), frozenset(results)


def _writers(sublayer: Sublayer) -> Iterator[fx.Node]:
    yield from sublayer.writes
    yield from (node for node in sublayer.nodes if isinstance(node.target, Region))


def _named(node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    """Yield the writes that ``node`` makes, by their names as captured, each with what it writes to."""
    if not isinstance(node.target, Region):
        yield from ((node.name, target) for target in written_inputs(node))
        return
    inner = node.target.gm
    given = dict(zip(inner.graph.find_nodes(op="placeholder"), node.args, strict=True))
    for write in find_effects(inner).writes:
        if write.root in given:
            yield write.node.name, given[write.root]  # type: ignore[misc]


def _values(gm: fx.GraphModule) -> frozenset[str]:
    """Return the names of nodes that are values of their own: that write nothing, or lie within a region."""
    inner = (node for region in regions_of(gm) for node in region.gm.graph.nodes)
    return frozenset(node.name for node in (*(one for one in gm.graph.nodes if not [*written_inputs(one)]), *inner))


def _adds(stream: ResidualStream) -> frozenset[str]:
    """Return the names of the residual adds: written in place (``x += branch``) they are still values that passes replace."""
    return frozenset(sublayer.stream_out.name for sublayer in stream.sublayers)


def _type(node: fx.Node | None) -> str:
    value = fake_tensor(node)
    if not isinstance(value, torch.Tensor):
        return "constant"
    # By the sizes at capture: a skipped sublayer's cache output may have got another layer's symbol.
    return f"{value.dtype} {tuple(map(known_size, value.shape))} on {value.device}"
