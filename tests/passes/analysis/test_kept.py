import operator

import pytest
import torch
from torch import fx

from adaskip_passes.analysis.effects import find_effects
from adaskip_passes.analysis.kept import kept_on_graph
from adaskip_passes.ir.graph import copy_graph


def traced():
    def function(x, y):
        z = torch.add(x, y, alpha=2)
        w = torch.relu(z)
        return torch.mul(w, z), torch.neg(y)

    gm = fx.symbolic_trace(function)
    for node in gm.graph.nodes:
        node.meta["example_value"] = torch.zeros(2)
    return gm


def find(gm, name):
    return next(node for node in gm.graph.nodes if node.name == name)


def insert(gm):
    with gm.graph.inserting_before(find(gm, "mul")):
        gm.graph.call_function(torch.abs, (find(gm, "relu"),))


CHANGES = {
    "another target": lambda gm: setattr(find(gm, "relu"), "target", torch.abs),
    "other arguments": lambda gm: setattr(find(gm, "relu"), "args", (find(gm, "x"),)),
    "one argument": lambda gm: find(gm, "mul").update_arg(1, find(gm, "y")),
    "one keyword": lambda gm: find(gm, "add").update_kwarg("alpha", 3),
    "another input": lambda gm: find(gm, "mul").replace_input_with(find(gm, "add"), find(gm, "y")),
    "another value for all readers": lambda gm: find(gm, "add").replace_all_uses_with(find(gm, "x")),
    "another output": lambda gm: gm.graph.output_node().replace_input_with(find(gm, "neg"), find(gm, "y")),
    "another order": lambda gm: find(gm, "add").prepend(find(gm, "neg")),
    "a new node": insert,
    "a node less": lambda gm: (
        find(gm, "neg").replace_all_uses_with(find(gm, "y")),
        gm.graph.erase_node(find(gm, "neg")),
    ),
    "another value": lambda gm: find(gm, "relu").meta.update(example_value=3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_that_has_changed_is_analysed_again(change):
    runs: list[fx.GraphModule] = []
    analysis = kept_on_graph(lambda gm: runs.append(gm) or len(gm.graph.nodes))
    gm = traced()
    assert analysis(gm) == analysis(gm) == len(gm.graph.nodes)
    assert len(runs) == 1
    CHANGES[change](gm)
    assert analysis(gm) == analysis(gm) == len(gm.graph.nodes)
    assert len(runs) == 2


def test_what_names_and_compiled_code_are_is_no_change():
    gm = traced()
    known = find_effects(gm)
    find(gm, "relu").name = "rectified"
    gm.recompile()
    assert find_effects(gm) is known


def test_a_copy_has_analyses_of_its_own():
    gm = traced()
    known = find_effects(gm)
    assert find_effects(gm) is known
    copied, images = copy_graph(gm)
    assert find_effects(copied).roots == {images[node]: images[root] for node, root in known.roots.items()}


def test_each_analysis_is_kept_beside_the_others():
    gm = traced()
    first, second = kept_on_graph(operator.attrgetter("graph")), kept_on_graph(lambda gm: len(gm.graph.nodes))
    assert (first(gm), second(gm), first(gm)) == (gm.graph, len(gm.graph.nodes), gm.graph)
