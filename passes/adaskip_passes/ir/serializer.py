"""Keep a captured graph in a JSON file, with the fake values that passes work on and without any weight.

A file holds data only: what a node calls is kept by its name, sizes as expression trees, and nothing is run
when it is read. So a graph can be rewritten again where neither the model nor its library is installed:
passes run captured operations at the most on fake values, where they change what those read, and an operation that is
not to be found has a stub.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from adaskip_passes.ir.expressions import from_tree, to_tree
from adaskip_passes.ir.graph import fake_value
from adaskip_passes.ir.module_paths import NAMES
from adaskip_passes.ir.values import ValueReader, write_value

__all__ = ["read_graph", "write_graph"]


def write_graph(gm: fx.GraphModule) -> dict[str, Any]:
    """Return ``gm`` as JSON-able data: its nodes in order, and what is known of its symbols. Never mutates it."""
    symbols: dict[str, dict[str, Any]] = {}
    return {"nodes": [_write_node(gm, node, symbols) for node in gm.graph.nodes], "symbols": symbols}


def _write_node(gm: fx.GraphModule, node: fx.Node, symbols: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": node.name, "op": node.op, "target": write_value(node.target)}
    if node.args:
        entry["args"] = [write_value(item) for item in node.args]
    if node.kwargs:
        entry["kwargs"] = {name: write_value(item) for name, item in node.kwargs.items()}
    value = fake_value(node)
    if value is not None:
        entry["value"] = write_value(value)
        _note_symbols(value, symbols)
    source = getattr(getattr(node, "_dynamo_source", None), "name", "")
    if source:
        entry["source"] = source
    stack = node.meta.get("nn_module_stack")
    if stack:
        entry["module"] = list(stack.values())[-1][0]
    if NAMES in node.meta:
        entry["names"] = list(node.meta[NAMES])
    if node.op in ("get_attr", "call_module"):
        entry["attribute"] = _write_attribute(gm, str(node.target))
    return entry


def _write_attribute(gm: fx.GraphModule, path: str) -> Any:
    value = functools.reduce(lambda owner, name: getattr(owner, name, None), path.split("."), gm)
    return {"graph": write_graph(value)} if isinstance(value, fx.GraphModule) else write_value(value)


def _note_symbols(value: Any, symbols: dict[str, dict[str, Any]]) -> None:
    """Note the size that each symbol of ``value`` had when the graph was captured."""
    if isinstance(value, torch.Tensor):
        value = (*value.shape, *value.stride(), value.storage_offset())
    if isinstance(value, (tuple, list)):
        for item in value:
            _note_symbols(item, symbols)
    elif isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        env = value.node.shape_env
        made_with, now = value.node._expr.free_symbols, value.node.expr.free_symbols
        for symbol in made_with | now | {one for known in made_with for one in env.replace(known).free_symbols}:
            hint, known = env.backed_var_to_val.get(symbol), env.var_to_range.get(symbol)
            ends = () if known is None else (known.lower, known.upper)
            # None for an end that is open, and for that of a float
            limits = [int(end) if end.is_Integer else None for end in ends]
            about = {"hint": None if hint is None else to_tree(hint), "range": limits}
            if (found := env.replace(symbol)) != symbol:
                about["is"] = to_tree(found)  # found equal to it since
            symbols.setdefault(symbol.name, about)


def read_graph(data: dict[str, Any], *, stubs: bool = True) -> fx.GraphModule:
    """Return the graph that :func:`write_graph` wrote, its values under a new fake mode.

    An operation that is not installed here has a stub, so that the graph can be rewritten but not run; without
    ``stubs`` it is refused.

    Raises:
        DamagedFileError: ``data`` names a symbol, type or function that is unknown.
    """
    return _read_graph(data, ValueReader(_make_symbols(data["symbols"]), stubs=stubs))


def _read_graph(data: dict[str, Any], reader: ValueReader) -> fx.GraphModule:
    graph, root = fx.Graph(), torch.nn.Module()
    nodes: dict[str, fx.Node] = {}
    reader = reader.with_nodes(nodes)
    for entry in data["nodes"]:
        if "attribute" in entry:
            _put_attribute(root, entry["target"], entry["attribute"], reader)
        args = tuple(map(reader.read, entry.get("args", ())))
        kwargs = {name: reader.read(item) for name, item in entry.get("kwargs", {}).items()}
        node = graph.create_node(entry["op"], reader.read(entry["target"]), args, kwargs, name=entry["name"])
        node.name = entry["name"]
        if "value" in entry:
            # Two inputs that are one object would be taken for one input.
            read = reader.read if entry["op"] == "placeholder" else reader.read_known
            node.meta["example_value"] = read(entry["value"])
        if "module" in entry:
            node.meta["nn_module_stack"] = {"": (entry["module"], torch.nn.Module)}
        if "source" in entry:
            node._dynamo_source = _Source(entry["source"])  # type: ignore[attr-defined]
        if "names" in entry:
            node.meta[NAMES] = tuple(map(str, entry["names"]))
        nodes[entry["name"]] = node
    return fx.GraphModule(root, graph)


class _Source:
    """Where an input came from, as Dynamo says it: all of it that analyses read."""

    def __init__(self, name: str) -> None:
        self.name = name


def _put_attribute(root: torch.nn.Module, path: str, data: Any, reader: ValueReader) -> None:
    *owners, name = path.split(".")
    for owner in owners:
        if not hasattr(root, owner):
            setattr(root, owner, torch.nn.Module())
        root = getattr(root, owner)
    is_graph = isinstance(data, dict) and "graph" in data
    setattr(root, name, _read_graph(data["graph"], reader) if is_graph else reader.read(data))


def _make_symbols(known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return new symbols of a new shape environment, by the names that they had; the environment is under ``""``."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges

    env = ShapeEnv()
    made: dict[str, Any] = {"": env}
    for name, about in known.items():
        hint = about["hint"]
        if hint is None:
            unbacked = env.create_unbacked_symint() if name.startswith("u") else env.create_unbacked_symfloat()
            made[name] = unbacked.node.expr
            continue
        value = from_tree(hint, {})
        number = float(value) if value.is_Float else int(value)
        symbol = env.create_symbol(
            number, ConstantSource(f"saved_{name}"), DimDynamic.DYNAMIC, None, None, do_not_specialize_zero_one=True
        )
        lower, upper = about.get("range") or (None, None)
        if lower is not None:
            env.var_to_range[symbol] = ValueRanges(lower, int_oo if upper is None else upper)
        made[name] = symbol
    for name, about in known.items():
        if "is" in about:
            env._set_replacement(made[name], from_tree(about["is"], made), "saved")
    return made
