import functools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adaskip_compile.kv_cache.cache_argument import cache_argument, cache_of
from adaskip_passes.analysis.cost import find_costs
from adaskip_passes.errors import OptionError
from adaskip_passes.specialise.append_in_place import find_appends
from adaskip_passes.stream.find_stream import find_residual_stream
from tests.models import capture, plain, tiny, tokens

FAMILIES = ["llama", "gpt2", "gemma3_text", "opt", "qwen3", "mixtral", "gpt_neox", "cohere", "olmo2", "bloom"]


def costs_of(model, **how):
    return [find_costs(one.gm, find_residual_stream(one.gm)) for one in capture(model, **how)]


@functools.cache
def llama_costs():
    return costs_of(tiny("llama"), batch=3, length=11)


def counted(model, run):
    """What torch's own counter sees in each module while ``run`` runs, by path."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    root = type(model).__name__
    seen = {path.removeprefix(f"{root}."): sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    # An FFN that is no module of its own is named after its first one.
    return {
        path: flops + seen.get(path.replace("fc1", "fc2"), 0) if "fc1" in path else flops
        for path, flops in seen.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_equal_the_counter_of_torch(family):
    model = tiny(family) if family == "gemma3_text" else tiny(family, num_hidden_layers=1)
    prefill, decode = costs_of(model, batch=3, length=11)
    if family == "mixtral":
        model.set_experts_implementation("eager")  # the counter does not see into a grouped product
    results = []
    seen = counted(model, lambda: results.append(model(tokens(3, 14), use_cache=True)))
    assert {path: cost.flops for path, cost in prefill.at(b=3, q=14).items()} == {path: seen[path] for path in prefill}
    past = cache_of(results[0])
    seen = counted(model, lambda: model(tokens(3, 1), use_cache=True, **cache_argument(model, past)))
    assert {path: cost.flops for path, cost in decode.at(b=3, q=1, t=15).items()} == {
        path: seen[path] for path in decode
    }


def test_an_append_in_place_moves_what_it_appends_alone():
    _, decode = capture(tiny("llama"), batch=3, length=11)
    stream = find_residual_stream(decode.gm)
    appended = {append.result: append.new for append in find_appends(decode.gm, stream)}
    copied, in_place = (
        find_costs(decode.gm, stream, how)["model.layers.0.self_attn"].at(b=3, t=100) for how in (None, appended)
    )
    entries = 2 * 3 * 2 * 16 * 4  # keys and values of one token: batch, heads, head_dim, bytes
    assert copied.activation_bytes - in_place.activation_bytes == entries * (99 + 1 + 100) - 2 * entries
    assert copied.cache_bytes == in_place.cache_bytes


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_cache_bytes_are_what_the_cache_holds(family):
    model = tiny(family)
    prefill, decode = costs_of(model, batch=3, length=11)
    with torch.no_grad():
        cache = cache_of(model(tokens(3, 14), use_cache=True))
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert prefill.at(b=3, q=14).total.cache_bytes == held
        cache = cache_of(model(tokens(3, 1), use_cache=True, **cache_argument(model, cache)))
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert decode.at(b=3, q=1, t=15).total.cache_bytes == held


def test_weight_bytes_are_the_parameters_of_the_layers():
    model = tiny("llama")
    held = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    for costs in llama_costs():
        assert costs.total.weight_bytes == held


def test_few_rows_read_few_experts():
    model = tiny("qwen3_moe")
    prefill, decode = costs_of(model, batch=3, length=11)
    experts = model.model.layers[0].mlp.experts
    one = (experts.gate_up_proj.nbytes + experts.down_proj.nbytes) // 4
    path = "model.layers.0.mlp"
    many, few = prefill.at(b=1, q=9)[path].weight_bytes, decode.at(b=1, t=9)[path].weight_bytes
    assert many - few == 2 * one


def test_a_static_cache_costs_its_whole_buffer():
    prefill, decode = costs_of(tiny("llama"), cache="static", batch=3, requests=2)
    path = "model.layers.0.self_attn"
    assert decode.at(b=3, t=64)[path].cache_bytes == 2 * 4 * 3 * 2 * 64 * 16
    assert prefill.at(b=3, q=9, t=64)[path].cache_bytes == decode.at(b=3, t=64)[path].cache_bytes
    assert decode.at(b=3, t=128)[path].flops > decode.at(b=3, t=64)[path].flops


@pytest.mark.newest("older ones capture how masks are made")
def test_the_table_reads_in_batch_query_and_context():
    prefill, decode = llama_costs()
    assert str(prefill["model.layers.0.self_attn"]) == (
        "256*b*q**2 + 24576*b*q flops, 49408 weight bytes, 9752*b*q activation bytes, 256*b*q cache bytes"
    )
    lines = str(decode).splitlines()
    assert lines[0].split() == ["sublayer", "flops", "weight", "bytes", "activation", "bytes", "cache", "bytes"]
    assert [line.split()[0] for line in lines[1:]] == [*decode, "total"]
    assert "256*b*t" in lines[1]


@pytest.mark.parametrize("shape", [{}, {"cached": True}, {"parallel": True}])
def test_a_plain_decoder_has_costs(shape):
    prefill, decode = costs_of(plain(**shape), batch=3, length=11)
    assert prefill.at(b=3, q=14).total.flops == 2 * 3 * 14 * (4 * 14 * 64 + 2 * (4 * 64 * 64 + 2 * 64 * 96))
    assert decode.at(b=3).total.flops > 0


def test_a_size_that_the_graph_does_not_leave_open_is_refused():
    prefill, decode = costs_of(tiny("llama"), batch=1)
    with pytest.raises(OptionError, match="captured with b = 1 and has no cost at b = 2"):
        prefill.at(b=2, q=4)
    with pytest.raises(OptionError, match="captured with t = q"):
        prefill.at(q=4, t=9)
    with pytest.raises(OptionError, match="captured with q = 1"):
        decode.at(q=4, t=9)


def test_a_graph_without_a_stream_costs_nothing():
    class Nothing:
        sublayers: tuple[object, ...] = ()

    prefill, _ = capture(plain())
    assert len(find_costs(prefill.gm, Nothing())) == 0
