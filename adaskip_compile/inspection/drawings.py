"""A model's graph in the formats of other tools: GraphML, DOT, and colours for Model Explorer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networkx
import torch

from adaskip_compile.costs.timers import Timer, predict
from adaskip_compile.inspection.inspection import InspectedSublayer, Inspection
from adaskip_passes.errors import DamagedFileError, MissingFileError, OptionError
from adaskip_passes.ir.graph import fake_tensor, op_name
from adaskip_passes.ir.module_paths import module_path, normalise_source

NODE_VALUES = ("share", "similarity")

_COLOURS = {"attention": "#bcd6fb", "ffn": "#f6d9b3", "ssm": "#dcc8f5"}
# What Model Explorer's adapter for exported programs calls their one graph.
_GRAPH_ID = "graph"
_GRADIENT = [{"stop": 0, "bgColor": "#f2f6fc"}, {"stop": 1, "bgColor": "#1f6fd6"}]


def graphml(found: Inspection) -> str:
    """Return the captured prefill graph as GraphML: a node an operation, with its sublayer, kind, shape and module."""
    captured = found.graphs[0]
    owner = {node: one for one in captured.stream.sublayers for node in one.nodes}
    drawn = networkx.DiGraph(model=found.model, phase=captured.phase)
    for node in captured.gm.graph.nodes:
        value, one = fake_tensor(node), owner.get(node)
        drawn.add_node(
            node.name,
            op=node.op if node.op in ("placeholder", "output") else op_name(node),
            module=module_path(node),
            shape="" if value is None else f"{value.dtype} {tuple(map(str, value.shape))}".removeprefix("torch."),
            sublayer="" if one is None else one.path,
            kind="" if one is None else one.kind,
            skipped=one is not None and one.path in found.skipped_in(captured.phase),
        )
        drawn.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    return "\n".join(networkx.generate_graphml(drawn)) + "\n"


def dot(found: Inspection) -> str:
    """Return the residual stream as DOT: a chain of its values from top to bottom, and each sublayer beside two of them.

    However deep a model is, the drawing is as wide as one path and can be read by scrolling.
    """
    lines = [
        "digraph stream {",
        "  rankdir=TB; ranksep=0.15; nodesep=0.3; edge [arrowsize=0.6, fontname=Helvetica];",
        '  node [shape=box, style=filled, fontname=Helvetica, height=0.3, margin="0.12,0.04"];',
    ]
    for index, one in enumerate(found.sublayers):
        before, after, name = f"x{index}", f"x{index + 1}", json.dumps(one.path)
        if one.skipped:
            lines.append(f'  {name} [style="dashed", color="{_COLOURS.get(one.kind, "#dddddd")}"];')
            lines.append(f'  {before} -> {after} [penwidth=2, label="{one.scale or 1:.4g}"];')
            continue
        lines.append(f'  {name} [fillcolor="{_COLOURS.get(one.kind, "#dddddd")}"];')
        lines += [f"  {before} -> {after} [penwidth=2];", f"  {before} -> {name} -> {after};"]
    points = " ".join(f"x{index};" for index in range(len(found.sublayers) + 1))
    return "\n".join([*lines, f"  {{ node [shape=point, width=0.08]; {points} }}", "}", ""])


def node_data(found: Inspection, program: str | Path, timer: Timer, context: int, value: str = "share") -> str:
    """Return colours for Model Explorer, keyed by the names of the nodes of an exported program.

    Args:
        found: What was found in the model that was exported.
        program: The ``.pt2`` file that ``torch.export.save`` wrote.
        timer: Tells the time of a sublayer.
        context: At how many tokens.
        value: What each node of a sublayer shows: ``share`` of the step's time, in percent, or ``similarity``.

    Raises:
        MissingFileError: There is no such program.
        DamagedFileError: It cannot be read.
        OptionError: ``value`` is unknown or was not measured, or no node of the program is of any sublayer.
    """
    if value not in NODE_VALUES:
        raise OptionError(f"node value {value!r}: takes one of {', '.join(NODE_VALUES)}")
    values = _sublayer_values(found, timer, context, value)
    results = {}
    for node in _load(Path(program)).graph.nodes:
        one = _sublayer_of(node, values)
        if one is not None and node.op not in ("placeholder", "output"):
            results[node.name] = {"value": values[one]}
    if not results:
        raise OptionError(f"{program}: no node of it is of a sublayer of {found.model}; is it that model, exported?")
    title = f"{found.model}: {'percent of the time' if value == 'share' else 'similarity'} at {context} tokens"
    return json.dumps({_GRAPH_ID: {"name": title, "results": results, "gradient": _GRADIENT}}, indent=1) + "\n"


def _sublayer_values(found: Inspection, timer: Timer, context: int, value: str) -> dict[str, float]:
    if value == "share":
        time = predict(found, timer, found.phases[0], context)
        return {one.path: round(100 * time.groups[one.group] / time.full, 4) for one in found.sublayers}
    measured: dict[str, InspectedSublayer] = {one.path: one for one in found.sublayers if one.similarity is not None}
    if not measured:
        raise OptionError("similarity was not measured: give --profile, or show the share of time")
    return {path: round(one.similarity or 0.0, 6) for path, one in measured.items()}


def _load(program: Path) -> torch.fx.GraphModule:
    if not program.is_file():
        raise MissingFileError(f"{program}: there is no such file")
    try:
        return torch.export.load(program).graph_module
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise DamagedFileError(f"{program}: no program that torch.export saved ({reason})") from error


def _sublayer_of(node: torch.fx.Node, values: Mapping[str, Any]) -> str | None:
    """Return the path of the sublayer that a node of an exported program is in: its module or one that holds it."""
    for path, _ in reversed(list(node.meta.get("nn_module_stack", {}).values())):
        name = normalise_source(path)[1].removeprefix("L__self___")
        while name:
            if name in values:
                return name
            name = name.rpartition(".")[0]
    return None
