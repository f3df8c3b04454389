import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.nn import functional

from adaskip_passes.analysis import touched_values
from adaskip_passes.analysis.regions import Region, regions_of
from adaskip_passes.errors import VerificationError
from adaskip_passes.ir.graph import add_placeholder, call, copy_graph, fake_mode, op_name
from adaskip_passes.pipeline import verifier
from adaskip_passes.pipeline.pipeline import AddedInput, PassResult, run_pipeline
from adaskip_passes.pipelines import CUT, LOWER, canonicalised
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.outline_regions import OutlineRegions
from adaskip_passes.specialise.skip_sublayers import SkipSublayers
from adaskip_passes.stream.find_stream import find_residual_stream
from adaskip_passes.stream.stream import NO_STREAM
from tests.captures import first_graph, shared_captures, stream_of
from tests.models import weights


@pytest.fixture(scope="module")
def decode():
    return shared_captures("llama", "static")[1]


@pytest.fixture(scope="module")
def first_prefill():
    return shared_captures("llama", "static")[0]


@pytest.fixture
def computed(monkeypatch):
    """The nodes whose values the verifier has computed again."""
    nodes, real = list[Any](), touched_values._evaluated
    monkeypatch.setattr(touched_values, "_evaluated", lambda node: (nodes.append(node), real(node))[1])
    return nodes


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


def branch_into_first_add(graph):
    """Return the first residual add and its branch."""
    add = next(
        node for node in graph.nodes if op_name(node) == "add" and "linear" in map(op_name, node.all_input_nodes)
    )
    _, branch = add.args
    assert op_name(branch) == "linear"
    return add, branch


def branch_of_two_tokens(graph):
    add, branch = branch_into_first_add(graph)
    with graph.inserting_before(add):
        add.args = (add.args[0], call(graph, torch.cat, [branch, branch], 1))


def branch_of_half_the_width(graph):
    add, branch = branch_into_first_add(graph)
    with graph.inserting_before(add):
        add.args = (add.args[0], call(graph, "narrow", branch, -1, 0, 32))


def lie_about_a_new_value(graph):
    add, branch = branch_into_first_add(graph)
    with graph.inserting_before(add):
        add.args = (add.args[0], call(graph, "double", branch, like=branch.meta["example_value"]))


def another_operator(graph):
    _, branch = branch_into_first_add(graph)
    branch.target, branch.args = torch.sum, branch.args[:1]


def change_a_value_and_not_those_that_read_it(graph):
    _, branch = branch_into_first_add(graph)
    value = branch.args[0].meta["example_value"]
    with value.fake_mode:
        branch.args[0].args = (branch.args[0].args[0],)
        branch.args[0].target = "flatten"
        branch.args[0].meta["example_value"] = value.flatten()


HOW = {function.__name__: function for function in (
    remove_output, change_dtype, change_shape, append_outputs, lose_write, rename_input, swap_inputs,
    forget_fake_value, use_before_definition, share_a_name, branch_of_two_tokens, branch_of_half_the_width,
    lie_about_a_new_value, another_operator, change_a_value_and_not_those_that_read_it,
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
    "branch_of_two_tokens": r"node \w+ computes torch\.float32 \(1, 2, 64\) .* says torch\.float32 \(1, 1, 64\)",
    "branch_of_half_the_width": r"node \w+ cannot compute what it is given: .*broadcast",
    "lie_about_a_new_value": r"node double computes torch\.float64 .* says torch\.float32",
    "another_operator": r"node \w+ computes torch\.float32 \(\) .* says torch\.float32 \(1, 1, 64\)",
    "change_a_value_and_not_those_that_read_it": r"node \w+ computes torch\.float32 \(64,\) .* \(1, 1, 64\)",
}


@pytest.mark.parametrize("how", MESSAGES)
def test_a_broken_rule_is_reported_with_the_pass_that_broke_it(decode, how):
    passes = (EliminateDeadCode(), Break(how), EliminateDeadCode())
    with pytest.raises(VerificationError, match=rf"after break-it\{{how='{how}'\}}: .*{MESSAGES[how]}"):
        run_pipeline(decode.gm, stream_of(decode.gm), passes)


@dataclass(frozen=True)
class EraseUnsaid:
    """A pass that erases a node of a sublayer and returns the stream that still names it."""

    name: ClassVar[str] = "erase-unsaid"

    def apply(self, gm, stream):
        norm = next(node for node in stream.sublayers[0].nodes if op_name(node) == "to" and node.args[0].users)
        norm.replace_all_uses_with(norm.args[0])
        gm.graph.erase_node(norm)
        return PassResult(stream, True, 1)


def test_a_stream_that_names_an_erased_node_is_the_fault_of_the_pass_that_returned_it(decode):
    passes = (EraseUnsaid(), SkipSublayers((stream_of(decode.gm).paths[0],)))
    with pytest.raises(VerificationError, match=r"after erase-unsaid\{\}: the stream names \w+ of .*self_attn"):
        run_pipeline(decode.gm, stream_of(decode.gm), passes)


@pytest.mark.parametrize("passes", [1, 2])
def test_the_stream_of_a_rewritten_graph_names_nodes_of_that_graph_alone(decode, passes):
    paths = stream_of(decode.gm).paths
    items = (SkipSublayers((paths[0], paths[3])), EliminateDeadCode())[:passes]
    result = run_pipeline(decode.gm, stream_of(decode.gm), items)
    own = set(result.gm.graph.nodes)
    assert all(own.issuperset(sublayer.all_nodes) for sublayer in result.stream.sublayers)
    # So it is the stream of a graph like any other.
    again = run_pipeline(result.gm, result.stream, (SkipSublayers((paths[1],)), EliminateDeadCode()))
    assert again.stream.skipped == (paths[0], paths[1], paths[3])


def test_what_was_not_touched_is_not_computed_again(decode, computed):
    paths = stream_of(decode.gm).paths
    run_pipeline(decode.gm, stream_of(decode.gm), (SkipSublayers((paths[0], paths[3])), EliminateDeadCode()))
    # The scale of each sublayer, one product for both, since they are alike, and nothing that reads the stream.
    assert len(computed) == 3


def test_a_lost_write_to_a_cache_that_the_graph_itself_makes_is_noticed(first_prefill):
    with pytest.raises(VerificationError, match="were lost: index_copy_"):
        run_pipeline(first_prefill.gm, stream_of(first_prefill.gm), (Break("lose_write"),))


def test_a_graph_that_came_broken_is_no_pass_s_fault(decode):
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


def swap_inputs_of_a_region(gm):
    node = next(node for node in gm.graph.nodes if isinstance(node.target, Region) and len(node.args) > 1)
    first, second, *rest = node.args
    node.args = (second, first, *rest)


def take_another_result(gm):
    node = next(node for node in gm.graph.nodes if isinstance(node.target, Region) and len(node.users) > 1)
    first, second = list(node.users)[:2]
    first.args, second.args = second.args, first.args


def lose_a_write_inside(gm):
    region = next(region for region in regions_of(gm) if "index_copy_" in map(op_name, region.gm.graph.nodes))
    lose_write(region.gm.graph)


INSIDE = {
    swap_inputs_of_a_region: r"node region_\d+ gives region_\d+ other inputs than it takes",
    take_another_result: r"node region_\d+ takes other results from region_\d+ than it makes",
    lose_a_write_inside: r"writes to memory that outlives the call were lost: index_copy_",
}


@pytest.mark.parametrize("how", INSIDE, ids=lambda how: how.__name__)
def test_a_graph_that_is_cut_wrong_is_noticed(decode, how):
    @dataclass(frozen=True)
    class CutWrong:
        name: ClassVar[str] = "cut-wrong"

        def apply(self, gm, stream):
            result = OutlineRegions().apply(gm, stream)
            how(gm)
            return result

    with pytest.raises(VerificationError, match=rf"after cut-wrong\{{\}}: .*{INSIDE[how]}"):
        run_pipeline(decode.gm, stream_of(decode.gm), (CutWrong(),))


def test_what_is_cut_right_is_not_computed_again(decode, computed):
    run_pipeline(decode.gm, stream_of(decode.gm), (OutlineRegions(),))
    assert not any(isinstance(node.target, Region) for node in computed)


def test_a_region_in_which_something_was_changed_is_computed(decode, computed):
    @dataclass(frozen=True)
    class CutAndChange:
        name: ClassVar[str] = "cut-and-change"

        def apply(self, gm, stream):
            result = OutlineRegions().apply(gm, stream)
            nodes = [node for region in regions_of(gm) for node in region.gm.graph.nodes]
            epsilon = next(node for node in nodes if op_name(node) == "add" and isinstance(node.args[1], float))
            epsilon.args = (epsilon.args[0], 3.0)
            return result

    run_pipeline(decode.gm, stream_of(decode.gm), (CutAndChange(),))
    assert sum(isinstance(node.target, Region) for node in computed) == 1


def test_numbers_that_are_read_out_of_tensors_may_be_named_anew():
    """Fake mode gives ``x.item()`` another symbol each time: what the wiring keeps of it is a copy, and not computed."""

    def function(x, first, second, positions):
        number = positions.max().item()
        x = x + functional.linear(x, first)
        return x + functional.linear(x, second), number

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        gm = first_graph(function, torch.ones(2, 3, 4), weights(4, 4), weights(4, 4), torch.arange(3))
    straight = canonicalised(gm)
    assert not straight.stream.problems
    mode: Any = fake_mode(gm.graph)
    mode.epoch += 1
    cut = run_pipeline(straight.gm, straight.stream, CUT)
    assert "item" in map(op_name, cut.gm.graph.nodes)


def test_sizes_that_are_known_only_at_run_time_are_compared_by_name():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        gm = first_graph(lambda x: (torch.nonzero(x), x + 1), torch.ones(3))
    assert canonicalised(gm).stream.problems == find_residual_stream(gm).problems


def test_what_cannot_be_verified_is_a_problem_and_no_crash(decode, monkeypatch):
    monkeypatch.setattr(verifier, "find_effects", lambda gm: {}["nothing"])
    with pytest.raises(VerificationError, match="after capture: cannot be verified: KeyError: 'nothing'"):
        run_pipeline(decode.gm, NO_STREAM, ())
    assert "cannot be verified" in canonicalised(decode.gm).stream.problems[0]


@pytest.mark.parametrize("told", [(), ("another",), ("extra", "another")])
def test_a_pass_tells_of_the_inputs_that_it_adds(decode, told):
    @dataclass(frozen=True)
    class AddInput:
        name: ClassVar[str] = "add-input"

        def apply(self, gm, stream):
            add_placeholder(gm.graph, "extra", torch.ones(2))
            return PassResult(stream, True, 1, tuple(AddedInput(name, "mine") for name in told))

    told_of = re.escape(", ".join(told) or "none")
    with pytest.raises(VerificationError, match=f"the pass tells of the inputs {told_of} .* and these are new: extra"):
        run_pipeline(decode.gm, stream_of(decode.gm), (AddInput(),))


def test_what_is_lowered_as_a_whole_keeps_its_stream(decode):
    result = run_pipeline(decode.gm, stream_of(decode.gm), LOWER)
    assert result.stream.paths == stream_of(decode.gm).paths
    assert result.history[0].matched > 0


def test_a_write_to_what_only_the_outputs_name_may_become_a_value():
    """``x.mul_(2)`` and ``x * 2`` return the same; without either the output is another one."""
    gm = first_graph(lambda x: (x + 1).mul_(2), torch.ones(3))

    @dataclass(frozen=True)
    class Replace:
        name: ClassVar[str] = "replace"
        target: str | None = None

        def apply(self, gm, stream):
            node = next(node for node in gm.graph.nodes if op_name(node) == "mul_")
            if self.target is None:
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
            else:
                node.target = self.target
            return PassResult(stream, True, 1)

    assert run_pipeline(gm, NO_STREAM, (Replace("mul"),)).history[0].modified
    with pytest.raises(VerificationError, match=r"after replace\{.*were lost: mul_"):
        run_pipeline(gm, NO_STREAM, (Replace(),))


def test_a_write_that_is_there_still_and_returned_no_more_is_lost():
    gm = first_graph(lambda x: (x + 1).clone().mul_(2), torch.ones(3))

    @dataclass(frozen=True)
    class ReturnEarlier:
        name: ClassVar[str] = "return-earlier"

        def apply(self, gm, stream):
            clone = next(node for node in gm.graph.nodes if op_name(node) == "clone")
            gm.graph.output_node().args = ((clone.args[0],),)
            return PassResult(stream, True, 1)

    with pytest.raises(VerificationError, match="were lost: mul_"):
        run_pipeline(gm, NO_STREAM, (ReturnEarlier(),))
