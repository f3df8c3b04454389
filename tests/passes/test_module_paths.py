import pytest
import torch
from torch import nn

from adaskip_passes.module_paths import module_path, normalise_source, source_name
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
    assert names["past_key_values.layers.0.keys"] == ""
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
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(wrap(plain(layers=1)), backend=backend)(tokens())
    paths = call_paths(graphs[0])
    assert f"{prefix}blocks.0.attention.qkv" in paths
    assert f"{prefix}blocks.0.ffn.2" in paths
    names = {source_name(node) for node in graphs[0].graph.find_nodes(op="placeholder")}
    assert f"{prefix}blocks.0.attention.qkv.weight" in names
