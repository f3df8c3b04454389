import functools

import expecttest
import pytest
import torch
from torch import fx, nn

from adaskip_passes.ir.printer import diff_graphs, print_graph
from tests.golden_files import assert_golden
from tests.models import capture, capture_all, plain, tiny


def graph_module(build):
    graph = fx.Graph()
    build(graph)
    return fx.GraphModule(nn.Module(), graph)


class TestText(expecttest.TestCase):
    def test_every_kind_of_argument(self):
        def build(graph):
            x = graph.placeholder("x")
            picked = graph.call_function(torch.ops.aten.slice.Tensor, (x, 0, 1, None))
            part = graph.call_method("__getitem__", (x, (..., None, slice(None, picked), slice(0, 8, 2))))
            nested = graph.call_function(
                torch.cat, ([x, [part, (picked,)]], {"a": {picked: 1.5}}), {"dim": -1, "some": {3, 1}}
            )
            typed = graph.call_method(
                "to",
                (nested,),
                {"dtype": torch.bfloat16, "device": torch.device("cuda:1"), "memory_format": torch.channels_last},
            )
            called = graph.call_function(functools.reduce, (typed, "text", None, float("inf")))
            graph.output({"first": called, "rest": (x,)})

        gm = graph_module(build)
        called = next(node for node in gm.graph.nodes if node.target is functools.reduce)
        called.args = (max, functools.partial(sum, start=1), nn.ReLU, *called.args)
        self.assertExpectedInline(
            print_graph(gm),
            """\
%x = placeholder
%slice_tensor = aten.slice.Tensor(%x, 0, 1, None)
%getitem = .__getitem__(%x, (..., None, :%slice_tensor, 0:8:2))
%cat = torch.cat([%x, [%getitem, (%slice_tensor,)]], {'a': {%slice_tensor: 1.5}}, dim=-1, some={1, 3})
%to = .to(%cat, dtype=bf16, device=cuda:1, memory_format=channels_last)
%reduce = _functools.reduce(builtins.max, partial(builtins.sum, start=1), torch.nn.modules.activation.ReLU, %to, 'text', None, inf)
output({'first': %reduce, 'rest': (%x,)})""",
        )

    def test_a_decoder_with_its_own_cache(self):
        _, decode = capture(plain(layers=1, cached=True))
        body = [line for line in print_graph(decode.gm).splitlines() if "placeholder" not in line]
        self.assertExpectedInline(
            "\n".join(body[-16:]),
            """\
%reshape: f32[1, 1, 64] = .reshape(%transpose_1, 1, 1, 64)  # blocks.0.attention
%mixed_1: f32[1, 1, 64] = nn.linear(%reshape, %blocks.0.attention.out.weight, %blocks.0.attention.out.bias)  # blocks.0.attention.out
%item_3: float(f2) = .item(%blocks.0.shape.multiplier)  # blocks.0
%mul: f32[1, 1, 64] = operator.mul(%item_3, %mixed_1)  # blocks.0
%x_1: f32[1, 1, 64] = operator.add(%x, %mul)  # blocks.0
%item_4: float(1e-05) = .item(%blocks.0.norm2.eps)  # blocks.0.norm2
%layer_norm_1: f32[1, 1, 64] = nn.functional.layer_norm(%x_1, (64,), %blocks.0.norm2.weight, %blocks.0.norm2.bias, %item_4)  # blocks.0.norm2
%input_1: f32[1, 1, 96] = nn.linear(%layer_norm_1, %blocks.0.ffn.0.weight, %blocks.0.ffn.0.bias)  # blocks.0.ffn.0
%input_2: f32[1, 1, 96] = nn.gelu(%input_1, approximate='none')  # blocks.0.ffn.1
%input_3: f32[1, 1, 64] = nn.linear(%input_2, %blocks.0.ffn.2.weight, %blocks.0.ffn.2.bias)  # blocks.0.ffn.2
%mul_1: f32[1, 1, 64] = operator.mul(%item_3, %input_3)  # blocks.0
%x_2: f32[1, 1, 64] = operator.add(%x_1, %mul_1)  # blocks.0
%item_5: float(1e-05) = .item(%norm.eps)  # norm
%layer_norm_2: f32[1, 1, 64] = nn.functional.layer_norm(%x_2, (64,), %norm.weight, %norm.bias, %item_5)  # norm
%logits: f32[1, 1, 128] = nn.linear(%layer_norm_2, %head.weight, None)  # head
output(%logits, %k_1, %v_1)""",
        )

    def test_subgraphs_are_indented(self):
        def function(x):
            return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

        self.assertExpectedInline(
            print_graph(first_graph(function, torch.ones(2))),
            """\
%x: f32[2] = placeholder
%sum_1: f32[] = .sum(%x)
%gt: bool[] = operator.gt(%sum_1, 0)
%cond_true_0 = get_attr cond_true_0
    %l_x__1: f32[2] = placeholder
    %add: f32[2] = operator.add(%l_x__1, 1)
    output(%add)
%cond_false_0 = get_attr cond_false_0
    %l_x__1: f32[2] = placeholder
    %sub: f32[2] = operator.sub(%l_x__1, 1)
    output(%sub)
%cond: (f32[2]) = torch.ops.higher_order.cond(%gt, %cond_true_0, %cond_false_0, (%x,))
%getitem: f32[2] = operator.getitem(%cond, 0)
output(%getitem)""",
        )

    def test_a_diff_shows_what_changed(self):
        before = "%a = placeholder\n%b = torch.neg(%a)\noutput(%b)"
        self.assertExpectedInline(
            diff_graphs(before, before.replace("neg", "abs")),
            """\
--- before
+++ after
@@ -1,3 +1,3 @@
 %a = placeholder
-%b = torch.neg(%a)
+%b = torch.abs(%a)
 output(%b)""",
        )
        assert diff_graphs(before, before) == ""


def first_graph(function, *inputs):
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*inputs)
    return graphs[0]


@pytest.mark.newest("what Dynamo calls things")
def test_golden_llama_prefill():
    prefill, _ = capture(tiny("llama", num_hidden_layers=1))
    assert_golden("llama_prefill", print_graph(prefill.gm))


@pytest.mark.parametrize(
    ("family", "cache"), [("llama", "static"), ("gemma3_text", "dynamic"), ("qwen3_moe", "dynamic")]
)
def test_two_captures_print_the_same_text(family, cache):
    first, second = (capture_all(tiny(family), cache=cache, requests=2) for _ in range(2))
    assert [print_graph(one.gm) for one in first] == [print_graph(one.gm) for one in second]


def test_printing_changes_nothing_and_repeats():
    prefill, _ = capture(tiny("gpt2"))
    before = [(node.name, node.args, dict(node.kwargs), dict(node.meta)) for node in prefill.gm.graph.nodes]
    assert print_graph(prefill.gm) == print_graph(prefill.gm)
    assert before == [(node.name, node.args, dict(node.kwargs), dict(node.meta)) for node in prefill.gm.graph.nodes]


def test_no_two_nodes_share_a_name():
    for captured in capture_all(tiny("gemma3_text"), cache="static", requests=2):
        lines = print_graph(captured.gm).splitlines()
        names = [line.split(":")[0].split(" =")[0] for line in lines if line.startswith("%")]
        assert len(names) == len(set(names))


def test_the_text_holds_no_address_and_no_unknown_object():
    for captured in capture(tiny("qwen3_moe")):
        text = print_graph(captured.gm)
        assert "0x" not in text
        assert "<" not in text


def test_every_edit_of_a_graph_shows():
    prefill, _ = capture(tiny("llama"))
    text = print_graph(prefill.gm)
    linear = next(node for node in prefill.gm.graph.nodes if "silu" in str(node.target))
    linear.target = torch.nn.functional.gelu
    changed = print_graph(prefill.gm)
    assert changed != text
    assert diff_graphs(text, changed, context=0).count("\n") == 4
