"""Models whose weights are no plain tensors: subclasses that hold numbers of 8 bits, and packed buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.mkldnn
from torch import nn
from torch.nn import functional

import adaskip_compile
from tests.models import plain, tiny, tokens
from tests.reference import omit_sublayers

aten = torch.ops.aten


class Int8Weight(torch.Tensor):
    """A matrix held as ``i8[out, in]`` and a scale for each row, which knows the products that it takes part in alone."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)

    def __init__(self, data, scale):
        self.data_8, self.scale = data, scale

    def __tensor_flatten__(self):
        return ["data_8", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, _context, _size, _stride):
        return cls(inner["data_8"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[override]
        if func in (aten.detach.default, aten.alias.default):
            return cls(*(func(part) for part in (args[0].data_8, args[0].scale)))
        if func not in (aten.t.default, aten.mm.default, aten.addmm.default):
            raise NotImplementedError(f"{func} of weights in 8 bits")
        return func(*(one.plain() if isinstance(one, cls) else one for one in args), **(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Int8Weight({tuple(self.shape)})"

    def plain(self):
        return self.data_8.to(self.scale.dtype) * self.scale


class PackedLinear(nn.Module):
    """A linear layer with buffers for weights: two numbers of 4 bits a byte, and a scale and zero point for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        low, high = linear.weight.aminmax(dim=1, keepdim=True)
        scale = (high - low) / 15
        numbers = ((linear.weight - low) / scale).round().to(torch.uint8)
        self.register_buffer("packed", numbers[:, ::2] | numbers[:, 1::2] << 4)
        self.register_buffer("scale", scale.detach())
        self.register_buffer("zero", (-low / scale).detach())

    def forward(self, x):
        numbers = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(1)
        return functional.linear(x, (numbers.to(x.dtype) - self.zero) * self.scale)


def in_8_bits(linear):
    scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    data = (linear.weight.detach() / scale).round().to(torch.int8)
    linear.weight = nn.Parameter(Int8Weight(data, scale), requires_grad=False)
    return linear


def by_torchao(model):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(version=2))


def replace_linears(model, make):
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, make(linear))


QUANTIZERS = {
    "subclass": lambda model: replace_linears(model, in_8_bits),
    "packed buffers": lambda model: replace_linears(model, PackedLinear),
    "torchao": by_torchao,
}


def generate(model, ids):
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return result.sequences, torch.stack(result.logits)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_quantized_weights_are_profiled_planned_compiled_and_run(kind):
    """Prompts of two and steps of one are products of many rows and of one, each of which has a rewrite of its own."""
    model = tiny("llama", num_hidden_layers=3, hidden_size=128, intermediate_size=256)
    QUANTIZERS[kind](model)
    profile = adaskip_compile.profile(model, [tokens(1, 12, seed=3)], progress=False)
    plan = adaskip_compile.plan(profile, skip=2, window=0)
    scales = {one.path: one.scale for one in plan.skipped}
    assert len(scales) == 2
    prompts = tokens(1, 9), tokens(2, 11)
    with omit_sublayers(model, scales):
        wanted = [generate(model, ids) for ids in prompts]
    adaskip_compile.compile(model, plan, inner="inductor")
    for ids, (sequences, logits) in zip(prompts, wanted, strict=True):
        got_sequences, got = generate(model, ids)
        torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(got_sequences, sequences)
    assert {tuple(request.skipped) for request in adaskip_compile.report(model).requests} == {plan.paths}


class OneDnnLinear(nn.Module):
    """A linear layer with its weights in oneDNN's own layout, which Dynamo traces in pieces."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().to_mkldnn())
        self.bias = linear.bias

    def forward(self, x):
        return aten.mkldnn_linear(x.to_mkldnn(), self.weight, None).to_dense() + self.bias


class SparseLinear(nn.Module):
    """A linear layer with sparse weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().to_sparse_csr())
        self.bias = linear.bias

    def forward(self, x):
        return (self.weight @ x.flatten(0, -2).t()).t().unflatten(0, x.shape[:-1]) + self.bias


LAYOUTS = {"oneDNN": OneDnnLinear, "sparse": SparseLinear, "to_mkldnn": torch.utils.mkldnn.to_mkldnn}


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_weights_without_strides_run_in_full_and_it_is_said(kind, inner):
    if kind == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch has no oneDNN")
    model = plain(layers=3)
    ffn = model.blocks[1].ffn
    ffn[0] = LAYOUTS[kind](ffn[0])  # type: ignore
    ids = tokens(2, 12)
    with torch.no_grad():
        wanted = model(ids)
        plan = adaskip_compile.SkipPlan.from_scales({"blocks.0.attention": 0.9}, window=0)
        adaskip_compile.compile(model, plan, inner=inner)
        torch.testing.assert_close(model(ids), wanted, rtol=1e-4, atol=1e-4)
    assert "runs unskipped" in str(adaskip_compile.report(model))


class Shifted(nn.Module):
    """A decoder that is called with a tensor of any layout beside its ids."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = plain(layers=3)

    def forward(self, ids, shift):
        return self.decoder(ids) + shift.to_dense()


def test_an_input_without_strides_runs_in_full_and_it_is_said():
    model, ids, shift = Shifted(), tokens(2, 12), torch.randn(2, 12, 128).to_mkldnn()
    with torch.no_grad():
        wanted = model(ids, shift)
        adaskip_compile.compile(model, adaskip_compile.SkipPlan.none(), inner="inductor")
        torch.testing.assert_close(model(ids, shift), wanted)
    assert "layout torch._mkldnn" in str(adaskip_compile.report(model))
