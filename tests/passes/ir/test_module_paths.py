from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from adaskip_passes.ir.module_paths import (
    held_by_module,
    module_path,
    naming,
    normalise_source,
    shared_by_modules,
    source_name,
)
from adaskip_passes.stream.find_stream import find_residual_stream
from tests.generation import CACHE_NAME
from tests.models import capture, plain, tiny, tokens


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self'].model.layers.0.mlp", "model.layers.0.mlp"),
        ("L['self']._modules['model']._modules['layers']._modules['0']._modules['mlp']", "model.layers.0.mlp"),
        ("L['fn']._modules['layers']._modules['3']", "layers.3"),
        ("G['net'].blocks[2].ffn", "blocks.2.ffn"),
        ("L['s']._modules['inner']._orig_mod._modules['blocks']._modules['0']", "inner.blocks.0"),
        ("L['self'].model._checkpoint_wrapped_module.layers.1", "model.layers.1"),
        ("L['self']", ""),
    ],
)
def test_sources_become_paths(source, path):
    assert normalise_source(source)[1] == path


def call_paths(gm):
    return {module_path(node) for node in gm.graph.nodes if node.op != "placeholder"} - {""}


def test_every_path_names_a_submodule():
    model = tiny("llama")
    prefill, _ = capture(model)
    for path in call_paths(prefill.gm):
        model.get_submodule(path)
    assert "model.layers.1.self_attn.q_proj" in call_paths(prefill.gm)


def test_placeholders_are_named_by_their_holder():
    _, decode = capture(tiny("llama"))
    names = {source_name(node): module_path(node) for node in decode.gm.graph.find_nodes(op="placeholder")}
    assert names["model.layers.0.mlp.down_proj.weight"] == "model.layers.0.mlp.down_proj"
    assert names["model.layers.1.self_attn.scaling"] == "model.layers.1.self_attn"
    assert names[f"{CACHE_NAME}.layers.0.keys"] == ""
    assert names["input_ids"] == ""


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner(ids)


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda model: model, ""),
        (lambda model: model.forward, ""),
        (lambda model: lambda ids: model(ids), ""),
        (Wrapper, "inner."),
        (lambda model: Wrapper(torch.compile(model, backend="eager")), "inner."),
    ],
    ids=["model", "method", "closure", "wrapped", "compiled-inside"],
)
def test_paths_hold_however_the_model_is_compiled(wrap, prefix):
    gm = named_graph(wrap(plain(layers=1)), None)
    paths = call_paths(gm)
    assert f"{prefix}blocks.0.attention.qkv" in paths
    assert f"{prefix}blocks.0.ffn.2" in paths
    names = {source_name(node) for node in gm.graph.find_nodes(op="placeholder")}
    assert f"{prefix}blocks.0.attention.qkv.weight" in names


def named_graph(function, model):
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=naming(model, backend))(tokens())
    return graphs[0]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: lambda *given: model(*given),
        lambda model: lambda ids, parts=(0, {"deep": model}): parts[1]["deep"](ids),
        lambda model: partial(lambda held, ids: held(ids), Wrapper(model)),
        lambda model: Wrapper(torch.compile(model, backend="eager")),
    ],
    ids=["variable-arguments", "in-a-dictionary", "in-a-wrapper", "compiled-inside"],
)
def test_names_are_the_models_own_whatever_way_led_to_it(wrap):
    model = plain(layers=2)
    gm = named_graph(wrap(model), model)
    assert {"blocks.0.attention.qkv", "blocks.1.ffn.2"} <= call_paths(gm)
    assert find_residual_stream(gm).paths == tuple(
        f"blocks.{i}.{part}" for i in (0, 1) for part in ("attention", "ffn")
    )
    held = {source_name(node) for node in gm.graph.find_nodes(op="placeholder") if held_by_module(node)}
    assert held >= dict(model.named_parameters()).keys()


def test_names_below_a_part_of_the_model_are_those_of_the_whole():
    model = Wrapper(plain(layers=1))
    gm = named_graph(model.inner, model)
    assert find_residual_stream(gm).paths == ("inner.blocks.0.attention", "inner.blocks.0.ffn")


def test_of_layers_that_share_weights_each_goes_by_its_own_path():
    model: Any = plain(layers=2)
    model.blocks[1].ffn[0].weight = model.blocks[0].ffn[0].weight
    model.blocks[1].ffn[2].weight = model.blocks[0].ffn[2].weight
    gm = named_graph(model, model)
    assert any(map(shared_by_modules, gm.graph.find_nodes(op="placeholder")))
    assert find_residual_stream(gm).paths == tuple(
        f"blocks.{i}.{part}" for i in (0, 1) for part in ("attention", "ffn")
    )


def test_what_the_caller_passes_is_not_the_models():
    gm = named_graph(lambda ids: plain_model(ids), plain_model := plain(layers=1))
    [ids] = [node for node in gm.graph.find_nodes(op="placeholder") if source_name(node) == "ids"]
    assert not held_by_module(ids)
    assert module_path(ids) == ""
