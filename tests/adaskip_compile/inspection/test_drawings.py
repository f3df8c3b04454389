from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import networkx
import pytest
import torch

from adaskip_compile.costs.timers import ROOFLINES, predict
from adaskip_compile.inspection.drawings import dot, graphml, node_data
from adaskip_compile.inspection.inspection import Inspection, inspect_model
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_passes.errors import DamagedFileError, MissingFileError, OptionError
from tests.models import plain

SKIPPED = "blocks.1.attention"
CPU = ROOFLINES["cpu"]


@functools.cache
def inspected() -> Inspection:
    return inspect_model(plain(layers=3), name="plain", plan=SkipPlan.from_scales({SKIPPED: 0.97}))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("program") / "prefill.pt2"
    torch.export.save(torch.export.export(plain(layers=3), (torch.ones(1, 6, dtype=torch.long),)), file)
    return file


def test_graphml_holds_every_node_and_edge_with_its_sublayer(tmp_path: Path):
    (tmp_path / "graph.graphml").write_text(graphml(inspected()))
    drawn = networkx.read_graphml(tmp_path / "graph.graphml")
    graph = inspected().graphs[0].gm.graph
    assert set(drawn.nodes) == {node.name for node in graph.nodes}
    assert set(drawn.edges) == {(source.name, node.name) for node in graph.nodes for source in node.all_input_nodes}
    owned = {data["sublayer"] for _, data in drawn.nodes(data=True)} - {""}
    assert owned == {one.path for one in inspected().sublayers}
    assert {data["sublayer"] for _, data in drawn.nodes(data=True) if data["skipped"]} == {SKIPPED}


def test_dot_draws_the_stream_as_a_chain():
    text = dot(inspected())
    chain = re.findall(r"(x\d+) -> (x\d+) \[penwidth=2", text)
    assert chain == [(f"x{index}", f"x{index + 1}") for index in range(6)]
    kept = re.findall(r'(x\d+) -> "([\w.]+)" -> (x\d+);', text)
    assert [path for _, path, _ in kept] == [one.path for one in inspected().sublayers if one.path != SKIPPED]
    assert 'x2 -> x3 [penwidth=2, label="0.97"]' in text
    assert text.count("{") == text.count("}")


def test_node_data_names_the_nodes_of_the_program(program: Path):
    data = json.loads(node_data(inspected(), program, CPU, 64))["graph"]
    graph = torch.export.load(program).graph_module.graph
    assert set(data["results"]) <= {node.name for node in graph.nodes}
    linear = [node for node in graph.nodes if "linear" in str(node.target)]
    time = predict(inspected(), CPU, "prefill", 64)
    for node in linear[:-1]:  # the last is the head
        path = next(one.path for one in inspected().sublayers if one.path in str(node.meta["nn_module_stack"]))
        group = next(one.group for one in inspected().sublayers if one.path == path)
        assert data["results"][node.name]["value"] == pytest.approx(100 * time.groups[group] / time.full, abs=1e-4)
    assert linear[-1].name not in data["results"]
    assert [stop["stop"] for stop in data["gradient"]] == [0, 1]


def test_node_data_says_what_is_wrong(program: Path, tmp_path: Path):
    with pytest.raises(MissingFileError, match=r"none\.pt2: there is no such file"):
        node_data(inspected(), tmp_path / "none.pt2", CPU, 64)
    (tmp_path / "bad.pt2").write_text("bad")
    with pytest.raises(DamagedFileError, match=r"bad\.pt2: no program that torch\.export saved"):
        node_data(inspected(), tmp_path / "bad.pt2", CPU, 64)
    with pytest.raises(OptionError, match="similarity was not measured"):
        node_data(inspected(), program, CPU, 64, "similarity")
    other = tmp_path / "other.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), other)
    with pytest.raises(OptionError, match="no node of it is of a sublayer of plain"):
        node_data(inspected(), other, CPU, 64)
