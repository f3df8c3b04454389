"""What goes wrong, and what is said about it, where requests run; files and options have tests of their own."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import adaskip_compile
from adaskip_compile import ForeignFileError, LegalityError, SkipPlan, UnknownSublayerError
from adaskip_compile.kv_cache.cache_argument import cache_argument
from tests.generation import make_cache
from tests.models import plain, tiny, tokens
from tests.reference import run_request

ATTENTION = {"model.layers.1.self_attn": 0.97}
INSIDE = {"model.layers.1.self_attn.q_proj": 0.97}


@pytest.fixture
def llama():
    return tiny("llama", num_hidden_layers=3)


def raw(model: nn.Module, **options) -> Any:
    return torch.compile(model, backend="adaskip", options={"inner": "eager", **options})


def test_a_plan_that_names_no_module_is_refused_at_once(llama):
    with pytest.raises(UnknownSublayerError, match=r"skips model\.layers\.9\.mlp, which LlamaForCausalLM lacks"):
        adaskip_compile.compile(llama, SkipPlan.from_scales({"model.layers.9.mlp": 1.0}))
    assert llama._compiled_call_impl is None


@pytest.mark.parametrize("path", ["model.layers.9.mlp", "model.layers.1.self_attn.q_proj", "mlp"])
def test_a_plan_that_names_no_sublayer_is_refused_when_it_runs(llama, path):
    call = raw(llama, plan=SkipPlan.from_scales({path: 1.0}))
    with pytest.raises(UnknownSublayerError) as caught, torch.no_grad():
        call(tokens(1, 9))
    assert path in str(caught.value)
    for known in ("model.layers.0.self_attn", "model.layers.2.mlp"):
        assert known in str(caught.value)


def test_a_module_that_is_no_sublayer_is_refused_when_it_runs(llama):
    adaskip_compile.compile(llama, SkipPlan.from_scales(INSIDE), inner="eager")
    with pytest.raises(UnknownSublayerError, match="q_proj"), torch.no_grad():
        llama(tokens(1, 9))


def test_a_skipped_attention_cannot_run_again(llama):
    cache = make_cache("dynamic", llama)
    with torch.no_grad():
        raw(llama, plan=SkipPlan.from_scales(ATTENTION))(tokens(1, 9), use_cache=True, **cache_argument(llama, cache))
        full = raw(llama, plan=SkipPlan.none())
        with pytest.raises(
            LegalityError, match=r"model\.layers\.1\.self_attn.*start a new request with an empty cache"
        ):
            full(tokens(1, 1), use_cache=True, **cache_argument(llama, cache))


def test_a_request_refuses_to_run_its_holes(llama):
    adaskip_compile.compile(llama, SkipPlan.from_scales(ATTENTION), inner="eager")
    run_request(llama, tokens(1, 9), tokens(1, 1), cache=make_cache("dynamic", llama))
    from adaskip_compile.runtime.session import sessions_of

    [request] = sessions_of(llama)[0].requests.history
    request.scales.clear()
    with pytest.raises(LegalityError, match=r"request 1: model\.layers\.1\.self_attn was skipped earlier"):
        request.check(frozenset(request.skipped))


def test_training_mode_runs_unskipped_and_says_so(llama, caplog):
    wanted = llama(tokens(1, 9)).logits
    adaskip_compile.compile(llama, SkipPlan.from_scales(ATTENTION), inner="eager")
    llama.train()  # this model has no dropout
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="adaskip_compile"):
        torch.testing.assert_close(llama(tokens(1, 9)).logits, wanted)
    [session] = adaskip_compile.report(llama).sessions
    assert session.notes == ("the model is in training mode: it runs unskipped; call model.eval() first",)
    assert "training mode" in caplog.text
    assert not session.requests
    assert "note: the model is in training mode" in str(adaskip_compile.report(llama))
    llama.eval()
    with torch.no_grad():
        assert (llama(tokens(1, 9)).logits - wanted).abs().max() > 1e-2


def test_needed_gradients_are_right_and_it_says_so(llama, caplog):
    def gradient() -> torch.Tensor:
        llama.zero_grad()
        llama(tokens(1, 9), use_cache=False).logits.square().sum().backward()
        return llama.model.layers[1].self_attn.q_proj.weight.grad.clone()

    wanted = gradient()
    adaskip_compile.compile(llama, SkipPlan.from_scales(ATTENTION), inner="eager")
    with caplog.at_level(logging.WARNING, logger="adaskip_compile"):
        torch.testing.assert_close(gradient(), wanted, rtol=1e-4, atol=1e-4)
    [session] = adaskip_compile.report(llama).sessions
    reason = "gradients are needed: runs unskipped; call it under torch.no_grad()"
    assert session.unskipped_graphs == (reason,)
    assert reason in caplog.text
    assert reason in str(adaskip_compile.report(llama))


class Streamless(nn.Module):
    """A language model without residual adds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(128, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 128))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers(ids)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_graph_without_a_residual_stream_runs_and_says_so(inner, caplog):
    model = Streamless().eval()
    adaskip_compile.compile(model, SkipPlan.none(), inner=inner)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="adaskip_compile"):
        got = model(tokens(1, 9))
        model._compiled_call_impl = None
        torch.testing.assert_close(got, model(tokens(1, 9)))
    [reason] = adaskip_compile.report(model).sessions[0].unskipped_graphs
    assert reason.startswith("no residual stream: ")
    assert reason.endswith("; runs unskipped")
    assert reason in caplog.text
    assert reason in str(adaskip_compile.report(model))


def made_for_another(tmp_path, kind: str) -> tuple[Any, str]:
    other = tiny("llama", num_hidden_layers=3, seed=1)
    profile = adaskip_compile.profile(other, [tokens(1, 9)[0]], progress=False)
    made = profile if kind == "profile" else adaskip_compile.plan(profile, skip=2)
    path = tmp_path / f"{kind}.json"
    made.save(path)
    return made, str(path)


@pytest.mark.parametrize("kind", ["profile", "plan"])
def test_what_was_made_for_another_model_is_refused(llama, tmp_path, kind):
    made, path = made_for_another(tmp_path, kind)
    message = "was made for another LlamaForCausalLM: it has the same structure but other weights"
    for given, source in ((made, f"this {kind}"), (path, f"{kind}.json")):
        how: dict[str, Any] = {kind: given}
        with pytest.raises(ForeignFileError, match=f"{source} {message}"):
            adaskip_compile.compile(llama, **how)
        with pytest.raises(BackendCompilerFailed, match=message) as caught, torch.no_grad():
            raw(llama, **{kind: given})(tokens(1, 9))
        assert isinstance(caught.value.inner_exception, ForeignFileError)
    if kind == "plan":
        with pytest.raises(ForeignFileError, match=message):
            adaskip_compile.compile(llama, made)


def test_an_unknown_option_is_refused_with_the_nearest(llama):
    with (
        pytest.raises(BackendCompilerFailed, match=r"unknown option 'widnow': did you mean 'window'\?"),
        torch.no_grad(),
    ):
        raw(llama, widnow=4)(tokens(1, 9))
    with pytest.raises(adaskip_compile.OptionError, match="did you mean 'window'"):
        adaskip_compile.compile(llama, widnow=4)


def test_a_report_on_a_model_that_never_ran_says_what_to_do():
    assert "use model.compile(backend='adaskip')" in str(adaskip_compile.report(plain()))


def test_a_request_that_has_skipped_cannot_go_on_in_training_mode(llama):
    adaskip_compile.compile(llama, SkipPlan.from_scales(ATTENTION), inner="eager")
    cache = make_cache("dynamic", llama)
    with torch.no_grad():
        llama(tokens(1, 9), use_cache=True, **cache_argument(llama, cache))
        llama.train()
        with pytest.raises(LegalityError, match=r"model\.layers\.1\.self_attn.*training mode"):
            llama(tokens(1, 1), use_cache=True, **cache_argument(llama, cache))
        llama.eval()
        llama(tokens(1, 1), use_cache=True, **cache_argument(llama, cache))


@pytest.mark.parametrize("model", [None, lambda ids: ids])
def test_what_is_no_module_is_refused(model: Any):
    with pytest.raises(adaskip_compile.OptionError, match=r"takes a torch\.nn\.Module, which is compiled in place"):
        adaskip_compile.compile(model)
    with pytest.raises(adaskip_compile.OptionError, match=r"takes a torch\.nn\.Module, or what torch\.compile made"):
        adaskip_compile.restore(model)


def test_a_wrapped_model_is_not_compiled_in_place(llama):
    with pytest.raises(
        adaskip_compile.OptionError, match=r"compile that model itself, which .*restore\(\.\.\.\) returns"
    ):
        adaskip_compile.compile(raw(llama))


def test_what_is_no_plan_is_refused(llama):
    plan: Any = ATTENTION
    with pytest.raises(adaskip_compile.OptionError, match=r"SkipPlan\.from_scales makes one of a dict"):
        adaskip_compile.compile(llama, plan)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ([1, 2, 3], "sample 0 is a list: takes text, or a tensor"),
        (torch.ones(1, 4), "sample 0 is a Tensor: takes text, or a tensor of token ids"),
        (torch.zeros(0, 4, dtype=torch.long), "sample 0 has no rows"),
        (torch.zeros(1, 0, dtype=torch.long), "sample 0 has 0 tokens"),
    ],
)
def test_what_is_no_sample_is_refused(sample: Any, message: str, llama):
    with pytest.raises(adaskip_compile.ProfileError, match=message):
        adaskip_compile.profile(llama, [sample], progress=False)


def test_a_model_without_weights_is_not_profiled(llama):
    with pytest.raises(adaskip_compile.CaptureError, match="on the meta device, where it holds no weights"):
        adaskip_compile.profile(llama.to("meta"), [tokens(1, 9)], progress=False)
