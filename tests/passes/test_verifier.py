from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from adaskip_passes.effects import op_name
from adaskip_passes.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.errors import VerificationError
from adaskip_passes.graph import call
from adaskip_passes.pipeline import PassResult, run_pipeline
from tests.captures import shared_captures, stream_of


@pytest.fixture(scope="module")
def decode():
    return shared_captures("llama", "static")[1]


@pytest.fixture(scope="module")
def first_prefill():
    return shared_captures("llama", "static")[0]


@dataclass(frozen=True)
class Break:
    """A pass that does something to a graph that no pass may do."""

    name: ClassVar[str] = "break-it"
    how: str = ""

    def apply(self, gm, stream):
        HOW[self.how](gm.graph)
        return PassResult(stream, True, 1)


def outputs_of(graph):
    return list(graph.output_node().args[0])


def remove_output(graph):
    graph.output_node().args = (tuple(outputs_of(graph)[:-1]),)


def change_dtype(graph):
    with graph.inserting_before(graph.output_node()):
        rounded = call(graph, "to", outputs_of(graph)[0], torch.bfloat16)
    graph.output_node().args = ((rounded, *outputs_of(graph)[1:]),)


def change_shape(graph):
    with graph.inserting_before(graph.output_node()):
        flat = call(graph, "flatten", outputs_of(graph)[0])
    graph.output_node().args = ((flat, *outputs_of(graph)[1:]),)


def append_outputs(graph):
    graph.output_node().args = ((*outputs_of(graph), *outputs_of(graph)[:1] * 2),)


def lose_write(graph):
    node = next(node for node in graph.nodes if op_name(node) == "index_copy_")
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


def rename_input(graph):
    graph.find_nodes(op="placeholder")[1].name = "another_name"


def swap_inputs(graph):
    first, second = graph.find_nodes(op="placeholder")[:2]
    second.append(first)


def forget_fake_value(graph):
    node = next(node for node in graph.nodes if node.op == "call_function" and node.users)
    del node.meta["example_value"]


def use_before_definition(graph):
    node = next(node for node in graph.nodes if op_name(node) == "linear")
    node.append(node.args[0])


def share_a_name(graph):
    first, second = [node for node in graph.nodes if op_name(node) == "linear"][:2]
    second.name = first.name


HOW = {function.__name__: function for function in (
    remove_output, change_dtype, change_shape, append_outputs, lose_write, rename_input, swap_inputs,
    forget_fake_value, use_before_definition, share_a_name,
)}  # fmt: skip

MESSAGES = {
    "remove_output": r"there were 1 outputs and are now 0",
    "change_dtype": r"output 0 was torch\.float32 .* and is now torch\.bfloat16",
    "change_shape": r"output 0 was torch\.float32 \(1, 1, 128\) on cpu and is now torch\.float32 \(128,\)",
    "append_outputs": r"there were 1 outputs and are now 3; a pass may append one",
    "lose_write": r"writes to memory that outlives the call were lost: index_copy_",
    "rename_input": "inputs were removed, renamed or reordered",
    "swap_inputs": "inputs were removed, renamed or reordered",
    "forget_fake_value": r"node \w+ has no fake value",
    "use_before_definition": "does not lint",
    "share_a_name": "does not lint",
}


@pytest.mark.parametrize("how", MESSAGES)
def test_a_broken_rule_is_reported_with_the_pass_that_broke_it(decode, how):
    passes = (EliminateDeadCode(), Break(how), EliminateDeadCode())
    with pytest.raises(VerificationError, match=rf"after break-it\{{how='{how}'\}}: .*{MESSAGES[how]}"):
        run_pipeline(decode.gm, stream_of(decode.gm), passes)


def test_a_lost_write_to_a_cache_that_the_graph_itself_makes_is_noticed(first_prefill):
    with pytest.raises(VerificationError, match="were lost: index_copy_"):
        run_pipeline(first_prefill.gm, stream_of(first_prefill.gm), (Break("lose_write"),))


def test_a_graph_that_came_broken_is_no_pass_s_fault(decode):
    from adaskip_passes.graph import copy_graph

    gm, images = copy_graph(decode.gm)
    forget_fake_value(gm.graph)
    with pytest.raises(VerificationError, match="after capture: node"):
        run_pipeline(gm, stream_of(decode.gm).mapped(images.__getitem__), (EliminateDeadCode(),))


def test_what_opens_a_scope_needs_no_value(decode):
    @dataclass(frozen=True)
    class OpenScope:
        name: ClassVar[str] = "open-scope"

        def apply(self, gm, stream):
            with gm.graph.inserting_before(outputs_of(gm.graph)[0]):
                opened = gm.graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", None, False, None))
                gm.graph.call_function(torch.amp.autocast_mode._exit_autocast, (opened,))
            return PassResult(stream, True, 1)

    result = run_pipeline(decode.gm, stream_of(decode.gm), (OpenScope(),))
    assert "_enter_autocast" in {op_name(node) for node in result.gm.graph.nodes if node.op == "call_function"}
