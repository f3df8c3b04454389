"""What the sublayers of a model cost in each phase, as expressions: what predictions are made from.

An inspection has them of the graphs of both phases. A profile has them of the prefill graph that it measured, and
an estimate for decode, so that a plan can be made for a goal without the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any, Protocol

import sympy
from torch import fx

from adaskip_passes.analysis.cost import B, Cost, CostTable, Q, T, find_costs
from adaskip_passes.errors import DamagedFileError, ProfileError
from adaskip_passes.ir.expressions import from_text
from adaskip_passes.ir.graph import tensor_of
from adaskip_passes.specialise.append_in_place import find_appends
from adaskip_passes.stream.stream import ResidualStream

REST = "embedding, final norm and head"
_SYMBOLS = {symbol.name: symbol for symbol in (B, Q, T)}


@dataclass(frozen=True)
class Group:
    """Sublayers of one kind whose cost is the same in every phase; ``cost`` is by phase."""

    index: int
    kind: str
    count: int
    cost: Mapping[str, Cost] = field(hash=False)


@dataclass(frozen=True)
class CostedSublayer:
    """One sublayer and the group that it is of; ``shared_with`` names those that read its values beside the stream."""

    path: str
    group: int
    shared_with: tuple[str, ...] = ()


class Grouped(Protocol):
    """A sublayer that is of a group."""

    @property
    def path(self) -> str:
        """Its module path."""
        ...

    @property
    def group(self) -> int:
        """The index of its group."""
        ...


class Costed(Protocol):
    """What predictions are made from: an inspection, or the costs in a profile."""

    @property
    def sublayers(self) -> Sequence[Grouped]:
        """All sublayers, in stream order."""
        ...

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of sublayers that cost the same, by index."""
        ...

    @property
    def rest(self) -> Mapping[str, Cost]:
        """What costs that is in no sublayer, by phase."""
        ...


@dataclass(frozen=True)
class ModelCosts:
    """The costs of one model. ``rest`` is by phase what all else costs that is in no sublayer.

    ``width`` is d_model, ``element_bytes`` the size of one number of the residual stream, ``device`` the kind of
    device that the graph was captured for (``cpu``, ``cuda``).
    """

    sublayers: tuple[CostedSublayer, ...]
    groups: tuple[Group, ...]
    rest: Mapping[str, Cost] = field(hash=False)
    width: int
    element_bytes: int
    device: str

    def __post_init__(self) -> None:
        if any(not 0 <= one.group < len(self.groups) for one in self.sublayers):
            raise ProfileError("a sublayer's cost is of a group that is not there")

    def to_payload(self) -> dict[str, Any]:
        """Return the costs as dicts, lists, strings and numbers; expressions are text in ``b``, ``q`` and ``t``."""
        return {
            "sublayers": {one.path: one.group for one in self.sublayers},
            "shared_with": {one.path: list(one.shared_with) for one in self.sublayers if one.shared_with},
            "groups": [{"kind": group.kind, "count": group.count, "cost": _texts(group.cost)} for group in self.groups],
            "rest": _texts(self.rest),
            "width": self.width,
            "element_bytes": self.element_bytes,
            "device": self.device,
        }

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> ModelCosts:
        """Return the costs that :meth:`to_payload` wrote.

        Raises:
            KeyError, TypeError, ValueError, ProfileError, DamagedFileError: Something else wrote it.
        """
        groups = tuple(
            Group(index, str(entry["kind"]), int(entry["count"]), _costs(entry["cost"]))
            for index, entry in enumerate(payload["groups"])
        )
        shared = payload["shared_with"]
        sublayers = tuple(
            CostedSublayer(path, group, tuple(shared.get(path, ()))) for path, group in payload["sublayers"].items()
        )
        sizes = {name: int(payload[name]) for name in ("width", "element_bytes")}
        return cls(sublayers, groups, _costs(payload["rest"]), **sizes, device=str(payload["device"]))


def find_model_costs(phases: Mapping[str, tuple[fx.GraphModule, ResidualStream]]) -> ModelCosts:
    """Return the costs read from the graph of each phase; sublayers that cost the same in all of them are one group."""
    tables = {phase: _cost_table(gm, stream) for phase, (gm, stream) in phases.items()}
    _, first = next(iter(phases.values()))
    keys: dict[tuple[object, ...], int] = {}
    sublayers: list[CostedSublayer] = []
    groups: list[Group] = []
    for sublayer in first.sublayers:
        cost = {phase: table.costs.get(sublayer.path, Cost()) for phase, table in tables.items()}
        key = (sublayer.kind, sublayer.stateful, *(one.parts() for one in cost.values()))
        if key not in keys:
            groups.append(Group(len(keys), sublayer.kind, 0, cost))
        index = keys.setdefault(key, len(keys))
        groups[index] = Group(index, sublayer.kind, groups[index].count + 1, cost)
        sublayers.append(CostedSublayer(sublayer.path, index, sublayer.shared_with))
    rest = {phase: table[REST] for phase, table in tables.items()}
    stream = tensor_of(first.sublayers[0].stream_in)
    width, size, device = int(stream.shape[-1]), stream.dtype.itemsize, stream.device.type
    return ModelCosts(tuple(sublayers), tuple(groups), rest, width, size, device)


def costs_of_prefill(gm: fx.GraphModule, stream: ResidualStream) -> ModelCosts:
    """Return the costs read from a prefill graph, with an estimate for decode."""
    found = find_model_costs({"prefill": (gm, stream)})
    groups = tuple(
        Group(group.index, group.kind, group.count, {**group.cost, "decode": decode_estimate(group.cost["prefill"])})
        for group in found.groups
    )
    rest = {**found.rest, "decode": decode_estimate(found.rest["prefill"])}
    return ModelCosts(found.sublayers, groups, rest, found.width, found.element_bytes, found.device)


def decode_estimate(prefill: Cost) -> Cost:
    """Return about what one more token costs at ``t`` tokens, given what a prefill of ``q`` tokens costs.

    A token's share of a prefill of ``t`` tokens; all the weights that one token reads; and its cache, read once.

    >>> print(decode_estimate(Cost(flops=2 * Q**2, weight_bytes=sympy.Integer(64), cache_bytes=8 * Q)))
    2*t flops, 64 weight bytes, 8*t activation bytes, 8*t cache bytes
    """
    whole = Cost(*(part.xreplace({Q: T}) for part in prefill.parts()))
    return Cost(
        flops=sympy.expand(whole.flops / T),
        weight_bytes=prefill.weight_bytes.xreplace({Q: sympy.Integer(1)}),
        activation_bytes=sympy.expand(whole.activation_bytes / T) + whole.cache_bytes,
        cache_bytes=whole.cache_bytes,
    )


def _cost_table(gm: fx.GraphModule, stream: ResidualStream) -> CostTable:
    inside = {node for sublayer in stream.sublayers for node in sublayer.nodes}
    nodes = tuple(node for node in gm.graph.nodes if node not in inside)
    # All nodes that are in no sublayer, in the form of one: the cost analysis takes it for one.
    outside = SimpleNamespace(path=REST, kind="rest", nodes=nodes, stream_out=stream.sublayers[0].stream_in)
    appended = {append.result: append.new for append in find_appends(gm, stream) if append.past is not None}
    return find_costs(gm, SimpleNamespace(sublayers=(*stream.sublayers, outside)), appended)


def _texts(costs: Mapping[str, Cost]) -> dict[str, dict[str, str]]:
    return {
        phase: {one.name: str(part) for one, part in zip(fields(Cost), cost.parts(), strict=True)}
        for phase, cost in costs.items()
    }


def _costs(texts: Mapping[str, Mapping[str, str]]) -> dict[str, Cost]:
    for parts in texts.values():
        if {*parts} != {one.name for one in fields(Cost)}:
            raise DamagedFileError(f"a cost has the parts {', '.join(parts)}")
    return {
        phase: Cost(**{name: from_text(text, _SYMBOLS) for name, text in parts.items()})
        for phase, parts in texts.items()
    }
