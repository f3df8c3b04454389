from __future__ import annotations

import json
from dataclasses import replace

import pytest

import adaskip_compile
from adaskip_compile import SkipPlan
from tests.models import tiny, tokens

ATTENTION, FFN = "model.layers.0.self_attn", "model.layers.1.mlp"
# Any FFN reaches this threshold, so that all of them are added after the window.
EAGER_PLAN = replace(SkipPlan.from_scales({ATTENTION: 0.9}, window=2), beta=-1.0)


def run(model, ids, steps: int = 6) -> None:
    model.generate(ids, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)


@pytest.fixture
def model():
    compiled = tiny("llama")
    adaskip_compile.compile(compiled, EAGER_PLAN, inner="eager")
    run(compiled, tokens(length=7))
    return compiled


def test_each_phase_has_its_tokens_times_and_skip_set(model):
    [request] = adaskip_compile.report(model).requests
    assert [(phase.phase, phase.tokens) for phase in request.phases] == [("prefill", 7), ("window", 2), ("steady", 3)]
    sets = {phase.phase: set(phase.skipped) for phase in request.phases}
    assert sets["prefill"] == sets["window"] == {ATTENTION}
    assert sets["steady"] == {ATTENTION, "model.layers.0.mlp", FFN}
    assert all(phase.seconds > 0 for phase in request.phases)
    assert sum(phase.seconds for phase in request.phases) == sum(request.seconds.values())


def test_the_memory_is_that_of_the_attentions_that_ran(model):
    [request] = adaskip_compile.report(model).requests
    heads, width, held, float32 = 2, 16, 7 + 64, 4  # the prompt, and room for as many tokens more
    assert request.kv_bytes == 1 * 2 * heads * width * held * float32


def test_a_capture_is_told_with_its_reason_and_request(model):
    run(model, tokens(length=11))
    run(model, tokens(batch=2, length=7))
    report = adaskip_compile.report(model)
    reasons = [graph.captured_because for graph in report.sessions[0].graphs]
    assert reasons[0] is None
    assert None not in reasons[1:]
    [batch] = [reason for reason in reasons[1:] if reason is not None and "input_ids" in reason]
    assert "size mismatch at index 0. expected 1, actual 2" in batch
    first, second, third = report.requests
    assert first.captures[0] == "prefill: the first graph"
    assert {capture.partition(":")[0] for capture in first.captures} == {"prefill", "decode"}
    assert second.captures == ()
    assert third.captures[0] == f"prefill: {batch}"


def test_the_report_is_text_and_json(model):
    report = adaskip_compile.report(model)
    data = json.loads(json.dumps(report.to_dict()))
    [request] = data["sessions"][0]["requests"]
    assert [phase["phase"] for phase in request["phases"]] == ["prefill", "window", "steady"]
    assert request["captures"] == list(report.requests[0].captures)
    assert "captured because this did not hold: " in str(report)
    assert "captured graphs for it: prefill, decode" in str(report)
