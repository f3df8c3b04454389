"""Whether what a pass has touched still computes the fake values that are written beside it.

Every analysis reads shapes and dtypes off the fake values in ``node.meta``. A pass that puts a branch of another shape
into an add leaves the old value at the add: all that comes after would believe it. So what is new, and what reads
something else than before, is computed again on fake values. What only reads another value of the same kind is not:
most of what passes do, and it costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from adaskip_passes.analysis.effects import CLOSING, OPENING, written_inputs
from adaskip_passes.analysis.kept import same_structure, structure
from adaskip_passes.analysis.regions import Region
from adaskip_passes.ir.graph import fake_mode, fake_value, known_size, op_name, output_values, size_expression

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class _Before:
    """What a node was: the very objects, so that what is untouched is known by identity."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    value: Any

    @classmethod
    def of(cls, node: fx.Node) -> _Before:
        return cls(node.target, node.args, node.kwargs, fake_value(node))


@dataclass
class ValueCheck:
    """A graph as it was at one time, to tell later which of its nodes were touched since."""

    nodes: dict[fx.Node, _Before]

    @classmethod
    def of(cls, gm: fx.GraphModule) -> ValueCheck:
        """Remember ``gm`` as it is."""
        return cls({node: _Before.of(node) for node in gm.graph.nodes})

    def unchanged(self, gm: fx.GraphModule) -> bool:
        """Tell whether ``gm`` consists of the very objects that it did, names aside."""
        before = (
            part for node, was in self.nodes.items() for part in (node, was.target, was.args, was.kwargs, was.value)
        )
        return same_structure([*before], structure(gm.graph))

    def problems(self, gm: fx.GraphModule) -> list[str]:
        """Return what is wrong with the values of nodes that were touched since, in graph order."""
        mode = fake_mode(gm.graph)
        if not isinstance(mode, FakeTensorMode):
            return []
        with torch.no_grad(), mode, enable_python_dispatcher(), _learning_nothing(mode):
            return list(_Check(self.nodes).problems(gm))


class _Check:
    """One check of a graph against what its nodes were before."""

    def __init__(self, before: Mapping[fx.Node, _Before]) -> None:
        self._before = before
        self._by_name = {node.name: known for node, known in before.items()}
        self._changed: set[fx.Node] = set()  # those that have a value of another kind now
        self._computed: dict[str, Any] = {}
        self._kinds: dict[Any, int] = {}
        self._texts: dict[int, str] = {}

    def problems(self, gm: fx.GraphModule) -> Iterator[str]:
        """Yield the problems; under the fake mode of the graph."""
        depth = 0
        for node in gm.graph.nodes:
            touched = self._touched(node)
            if touched and isinstance(node.target, Region) and self._outlined(node.target):
                yield from self._misfit(node, node.target)
            elif node.op in ("call_function", "call_method"):
                # What runs under a scope (autocast, vmap) computes something else on its own.
                depth += (op_name(node) in OPENING) - (op_name(node) in CLOSING)
                if touched and depth == 0:
                    yield from self._problem(node)

    def _touched(self, node: fx.Node) -> bool:
        """Tell whether ``node`` is new, or has or reads a value of another kind than before."""
        before = self._before.get(node)
        if before is None:
            # What has only been copied is what it was.
            return not self._copied(node) or not self._changed.isdisjoint(node.all_input_nodes)
        value = fake_value(node)
        if value is not before.value and self._text(value) != self._text(before.value):
            self._changed.add(node)
            return True
        if before.target != node.target:
            return True
        if before.args is node.args and before.kwargs is node.kwargs:
            return bool(self._changed) and not self._changed.isdisjoint(node.all_input_nodes)
        return self._inputs(before.args, before.kwargs, before=True) != self._inputs(node.args, node.kwargs)

    def _outlined(self, region: Region) -> bool:
        """Tell whether ``region`` consists of what was there before and has been moved into it."""
        return all(self._copied(node) for node in region.gm.graph.nodes if node.op != "output")

    def _copied(self, node: fx.Node) -> bool:
        """Tell whether there was a node of this name that did the same; of an input, one that had its value."""
        known = self._by_name.get(node.name)
        if known is None or known.value is not fake_value(node):
            return False
        return node.op == "placeholder" or (known.target is node.target and _call_text(known) == _call_text(node))

    def _misfit(self, node: fx.Node, region: Region) -> Iterator[str]:
        """Yield what is wrong with the call ``node`` of a region: its values have the names that they had."""
        if [one.name for one in node.args] != [one.name for one in region.gm.graph.find_nodes(op="placeholder")]:  # type: ignore[union-attr]
            yield f"node {node.name} gives {region.__name__} other inputs than it takes"
        made = [None if one is None else one.name for one in output_values(region.gm)]
        if any(made[int(item.args[1])] != item.name for item in node.users):  # type: ignore[arg-type]
            yield f"node {node.name} takes other results from {region.__name__} than it makes"

    def _inputs(self, args: Any, kwargs: Any, *, before: bool = False) -> str:
        """Return a text of what a node reads, by kind and not by name."""

        def kind(source: fx.Node) -> Any:
            known = self._before.get(source) if before else None
            return _Kind(self._text(fake_value(source) if known is None else known.value))

        return repr(fx.node.map_arg((args, kwargs), kind))

    def _text(self, value: Any) -> str:
        """Return a text that stands for all that is known of a value.

        Values are told by identity first: the same is at many nodes, and lives on. Sizes are compared, not printed.
        """
        text = self._texts.get(id(value))
        if text is None:
            number = self._kinds.setdefault(_exact(value), len(self._kinds))
            text = self._texts[id(value)] = f"#{number}"
        return text

    def _problem(self, node: fx.Node) -> Iterator[str]:
        recorded = fake_value(node)
        # Nothing is known of graphs within the graph; and what has no users may have no value.
        if recorded is None or any(fake_value(source) is None for source in node.all_input_nodes):
            return
        # Regions of one key compute the same.
        key = f"{getattr(node.target, 'key', node.target)} {self._inputs(node.args, node.kwargs)}"
        if key not in self._computed:
            try:
                self._computed[key] = _hints(_evaluated(node))
            except Exception as error:  # noqa: BLE001 - whatever an operator raises at what it cannot take
                yield f"node {node.name} cannot compute what it is given: {str(error).strip().partition(chr(10))[0]}"
                return
        if self._computed[key] != _hints(recorded):
            found, said = _shown(self._computed[key]), _shown(_hints(recorded))
            yield f"node {node.name} computes {found}, and its fake value says {said}"


def _call_text(node: fx.Node | _Before) -> str:
    """Return the arguments of a node as a text, other nodes by their names."""
    return repr(fx.node.map_arg((node.args, node.kwargs), lambda source: _Kind(source.name)))  # type: ignore[arg-type]


def _learning_nothing(mode: FakeTensorMode) -> AbstractContextManager[Any]:
    """Return a context in which sizes are compared, and nothing is assumed of them that the capture does not know."""
    return nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()


def _evaluated(node: fx.Node) -> Any:
    written = set(written_inputs(node))

    def given(source: fx.Node) -> Any:
        # What is written is a tensor of its own: some operators change its shape.
        return fake_value(source).detach() if source in written else fake_value(source)

    function: Any = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), given)
    return function(*args, **kwargs)


class _Kind:
    """What is known of a value, as the text that stands for it."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _exact(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        sizes, strides = (tuple(map(size_expression, some)) for some in (value.shape, value.stride()))
        return (value.dtype, sizes, strides, value.device)
    if isinstance(value, (tuple, list)):
        return tuple(map(_exact, value))
    return (type(value), value.node.expr if isinstance(value, _SYMBOLIC) else repr(value))


def _hints(value: Any) -> Any:
    """Return dtype, sizes and device by what they were at capture: an entry of a cache may have got another layer's symbol."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(map(known_size, value.shape)), value.device)
    if isinstance(value, (tuple, list)):
        return tuple(map(_hints, value))
    return known_size(value) if isinstance(value, (int, torch.SymInt)) else type(value).__name__


def _shown(kind: Any) -> str:
    if isinstance(kind, tuple) and len(kind) == 3 and isinstance(kind[0], torch.dtype):
        dtype, sizes, device = kind
        return f"{dtype} {sizes} on {device}"
    return f"({', '.join(map(_shown, kind))})" if isinstance(kind, tuple) else str(kind)
