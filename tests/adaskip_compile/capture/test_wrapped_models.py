"""Models that other people have wrapped, patched and adapted: sublayers are found by the tensors that the model holds."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from torch import nn

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.files.model_identity import identify
from adaskip_passes.errors import ForeignFileError, UnknownSublayerError
from tests.generation import generate
from tests.models import redraw, tiny, tokens
from tests.reference import omit_sublayers

ATTENTION, FFN = "model.layers.1.self_attn", "model.layers.0.mlp"
SCALES = {ATTENTION: 0.8, FFN: 0.9}
STEPS = 4


@pytest.fixture
def llama():
    return tiny("llama")


def plain_wrapper(model):
    """Hide ``forward`` under a function that takes what comes, as decorators do."""
    forward = type(model).forward

    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        return forward(*args, **kwargs)

    model.forward = functools.partial(wrapped, model)
    return model


def closure(model):
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return model


def bound(model):
    """Put a bound function in the place of ``forward``, as monkey patches do; its first argument has a name of its own."""

    def forward(module, *args, **kwargs):
        return type(module).forward(module, *args, **kwargs)

    model.forward = types.MethodType(forward, model)
    return model


def patched_ffns(model):
    """Have every FFN compute by a function that reads the weights itself and calls none of its modules."""

    def forward(module, x):
        up = nn.functional.linear(x, module.up_proj.weight)
        return nn.functional.linear(
            module.act_fn(nn.functional.linear(x, module.gate_proj.weight)) * up, module.down_proj.weight
        )

    for layer in model.model.layers:
        layer.mlp.forward = types.MethodType(forward, layer.mlp)
    return model


def mapped(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(model, {"": "cpu"})


WAYS = [plain_wrapper, closure, bound, patched_ffns, mapped]


def omitting(model, ids, scales=SCALES):
    """Return the tokens and the prompt's logits of the eager model that omits the sublayers by hand."""
    with torch.no_grad(), omit_sublayers(model, scales):
        return generate(model, ids, torch.ones_like(ids), STEPS), model(ids).logits


def require_skips(model, ids, wanted, scales=SCALES):
    with torch.no_grad():
        assert torch.equal(generate(model, ids, torch.ones_like(ids), STEPS), wanted[0])
        torch.testing.assert_close(model(ids).logits, wanted[1])
    found = adaskip_compile.report(model)
    assert found.requests
    assert all(set(request.skipped) == set(scales) for request in found.requests)


@pytest.mark.parametrize("wrap", WAYS)
@pytest.mark.parametrize("door", ["compile", "model.compile", "torch.compile"])
def test_a_wrapped_forward_skips_what_the_plan_says(llama, wrap, door):
    ids = tokens(1, 9)
    wanted = omitting(llama, ids)
    model, plan = wrap(llama), SkipPlan.from_scales(SCALES)
    if door == "torch.compile":
        options: Any = {"plan": plan, "inner": "eager"}
        compiled = torch.compile(model, backend="adaskip", options=options)
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids).logits, wanted[1])
        [request] = adaskip_compile.report(model).requests
        assert set(request.skipped) == set(SCALES)
        return
    if door == "compile":
        adaskip_compile.compile(model, plan, inner="eager")
    else:
        model.compile(backend="adaskip", options={"plan": plan, "inner": "eager"})
    require_skips(model, ids, wanted)


@pytest.mark.parametrize("wrap", WAYS)
def test_a_wrapped_model_has_the_sublayers_of_the_model(llama, wrap):
    paths = adaskip_compile.analyze(llama).paths
    model = wrap(llama)
    assert adaskip_compile.analyze(model).paths == paths
    profile = adaskip_compile.profile(model, [tokens(1, 9)])
    assert tuple(found.path for found in profile.sublayers) == paths


def test_hooks_that_cannot_be_captured_are_told(llama):
    accelerate = pytest.importorskip("accelerate")
    ids = tokens(1, 9)
    with torch.no_grad():
        wanted = llama(ids).logits
        model = accelerate.dispatch_model(llama, {"": "cpu"}, force_hooks=True)
        adaskip_compile.compile(model, SkipPlan.from_scales(SCALES), inner="eager")
        torch.testing.assert_close(model(ids).logits, wanted)
    [session] = adaskip_compile.report(model).sessions
    assert not session.graphs
    assert any("capture broke the forward in pieces" in note and "hooks.py" in note for note in session.notes)


@pytest.mark.parametrize("door", ["compile", "torch.compile"])
def test_a_foreign_plan_is_refused_however_the_forward_is_wrapped(llama, tmp_path, door):
    other = tiny("llama", seed=1)
    plan = adaskip_compile.plan(adaskip_compile.profile(other, [tokens(1, 9)]), skip=2)
    plan.save(tmp_path / "plan.json")
    model = plain_wrapper(llama)
    if door == "compile":
        with pytest.raises(ForeignFileError):
            adaskip_compile.compile(model, tmp_path / "plan.json", inner="eager")
        return
    compiled = torch.compile(model, backend="adaskip", options={"plan": str(tmp_path / "plan.json"), "inner": "eager"})
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="was made for another"):
        compiled(tokens(1, 9))


def test_the_plan_of_a_model_inside_a_module_says_what_to_compile(llama):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.llm = llama
            self.head = nn.Linear(4, 4)

    with pytest.raises(UnknownSublayerError, match=r"has as llm\.model\.layers.* compile that, model\.llm"):
        adaskip_compile.compile(Outer(), SkipPlan.from_scales(SCALES))


def test_a_part_that_is_compiled_after_the_whole_has_a_report_of_its_own(llama):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.llm = llama

        def forward(self, ids):
            return self.llm(ids)

    outer, ids = Outer(), tokens(1, 9)
    adaskip_compile.compile(outer, SkipPlan.none(), inner="eager")
    with torch.no_grad():
        outer(ids)
        adaskip_compile.compile(llama, SkipPlan.from_scales(SCALES), inner="eager", learn=3)
        llama(ids)
    [request] = adaskip_compile.report(llama).requests
    assert set(request.skipped) == set(SCALES)
    assert len(adaskip_compile.report(outer).sessions) == 2


@pytest.fixture
def adapted(llama):
    peft = pytest.importorskip("peft")
    base = identify(llama)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.1)
    assert identify(model) == base
    return model


@pytest.mark.parametrize("merged", [False, True])
def test_lora_profile_plan_compile_generate(adapted, merged):
    ids = tokens(1, 9)
    if merged:
        adapted.merge_adapter()
    profile = adaskip_compile.profile(adapted, [ids, tokens(1, 12, seed=1)])
    plan = adaskip_compile.plan(profile, skip=2, window=0)
    scales = plan.scales
    assert set(scales) < set(adaskip_compile.analyze(adapted).paths)
    inner = adapted.get_base_model()
    wanted = omitting(inner, ids, scales)
    full = generate(adapted, ids, torch.ones_like(ids), STEPS)
    assert adaskip_compile.compile(adapted, plan, inner="eager") is adapted
    require_skips(adapted, ids, wanted, scales)
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, wanted[1])
    adaskip_compile.compile(adapted, SkipPlan.none(), inner="eager")
    assert torch.equal(generate(adapted, ids, torch.ones_like(ids), STEPS), full)


def test_the_plan_of_the_base_model_fits_its_adapted_self(llama):
    peft = pytest.importorskip("peft")
    plan = adaskip_compile.plan(adaskip_compile.profile(llama, [tokens(1, 9)]), skip=2, window=0)
    model = peft.get_peft_model(llama, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).eval()
    ids = tokens(1, 9)
    wanted = omitting(model.get_base_model(), ids, plan.scales)
    adaskip_compile.compile(model, plan, inner="eager")
    require_skips(model, ids, wanted, plan.scales)


def test_an_adapter_that_was_merged_into_the_weights_makes_another_model(adapted):
    plan = adaskip_compile.plan(adaskip_compile.profile(adapted, [tokens(1, 9)]), skip=2)
    with torch.no_grad():
        redraw(adapted.get_base_model(), 5)
    with pytest.raises(ForeignFileError, match="other weights"):
        adaskip_compile.compile(adapted, plan)


@pytest.mark.parametrize("door", ["model.compile", "torch.compile"])
def test_the_other_doors_take_an_adapted_model(adapted, door):
    ids = tokens(1, 9)
    plan = SkipPlan.from_scales(SCALES)
    wanted = omitting(adapted.get_base_model(), ids)
    options: Any = {"plan": plan, "inner": "eager"}
    if door == "model.compile":
        adapted.compile(backend="adaskip", options=options)
        call = adapted
    else:
        call = torch.compile(adapted, backend="adaskip", options=options)
    with torch.no_grad():
        torch.testing.assert_close(call(ids).logits, wanted[1])
    [request] = adaskip_compile.report(adapted).requests
    assert set(request.skipped) == set(SCALES)


class PackedLinear(nn.Module):
    """A linear layer whose weights are buffers of integers, made numbers of in each call, as HQQ holds them."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.packed.to(x.dtype) * self.scale)


def pack(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, PackedLinear(child))
    return model


def test_weights_that_are_packed_buffers_name_their_sublayers(llama):
    paths = adaskip_compile.analyze(llama).paths
    model = pack(llama)
    assert adaskip_compile.analyze(model).paths == paths
    ids = tokens(1, 9)
    plan = adaskip_compile.plan(adaskip_compile.profile(model, [ids]), skip=2, window=0)
    wanted = omitting(model, ids, plan.scales)
    adaskip_compile.compile(model, plan, inner="eager")
    require_skips(model, ids, wanted, plan.scales)
