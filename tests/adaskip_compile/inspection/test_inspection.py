from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from adaskip_compile.costs.model_costs import REST
from adaskip_compile.costs.timers import ROOFLINES, Measured, Roofline, predict
from adaskip_compile.files.model_identity import identify
from adaskip_compile.inspection.forecasts import likely_skips
from adaskip_compile.inspection.inspection import inspect_model
from adaskip_compile.inspection.phase_graphs import capture_phases, hollow_copy
from adaskip_compile.inspection.report import inspection_report
from adaskip_compile.planning.prompt_skips import Trade
from adaskip_compile.planning.quality import Quality
from adaskip_compile.planning.skip_plan import RampStep, SkipPlan
from adaskip_passes.analysis.cost import find_costs
from adaskip_passes.canonicalise.straighten_stream import StraightenStream
from adaskip_passes.errors import OptionError, UnknownSublayerError
from adaskip_passes.stream.find_stream import find_residual_stream
from tests.models import FAMILIES, SIZES, capture, plain, tiny
from tests.rewriting import applied

ATTENTION, FFN = "model.layers.{}.self_attn", "model.layers.{}.mlp"


def on_meta(family: str, **overrides):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **overrides})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "cohere"])
def test_what_is_captured_without_weights_costs_what_the_real_model_costs(family: str):
    hollow = {graph.phase: find_costs(graph.gm, graph.stream) for graph in capture_phases(on_meta(family))}
    for captured in capture(tiny(family)):
        applied(StraightenStream(), captured.gm)
        real = find_costs(captured.gm, find_residual_stream(captured.gm))
        query, context = (33, 33) if captured.phase == "prefill" else (1, 77)
        assert [str(cost.at(q=query, t=context)) for cost in hollow[captured.phase].costs.values()] == [
            str(cost.at(q=query, t=context)) for cost in real.costs.values()
        ]


def test_the_window_of_a_sliding_attention_is_told_from_full_attention():
    decode = capture_phases(on_meta("gemma3_text"))[1]
    sliding, full = (find_costs(decode.gm, decode.stream)[ATTENTION.format(layer)] for layer in range(2))
    assert sliding.at(t=1000).flops == sliding.at(t=5000).flops
    assert full.at(t=1000).flops < full.at(t=5000).flops


@pytest.mark.newest("before, how a mask is made is captured, and the window stays a mask")
def test_a_sliding_attention_of_a_prompt_on_the_cpu_costs_its_window():
    prefill = capture_phases(tiny("gemma3_text", sliding_window=16))[0]
    sliding, full = (find_costs(prefill.gm, prefill.stream)[ATTENTION.format(layer)] for layer in range(2))
    products = [sliding.at(q=length).flops - full.at(q=length).flops for length in (16, 1000)]
    heads, width = 4, 16
    assert products == [0, 2 * heads * 1000 * (16 - 1000) * 2 * width]


def test_a_model_is_captured_in_the_memory_of_its_names_and_left_as_it_is():
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hollow = hollow_copy(model)
    assert {value.untyped_storage().nbytes() for value in hollow.parameters()} == {4}
    assert identify(hollow).structure == identify(model).structure
    capture_phases(model)
    assert model._compiled_call_impl is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_moe", "cohere"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_sublayer_or_is_named(family: str, tied: bool):
    found = inspect_model(on_meta(family, tie_word_embeddings=tied))
    assert found.problems == ()
    assert sum(one.parameters for one in (*found.sublayers, *found.unmatched)) == found.parameters
    assert len({one.name for one in found.unmatched}) == len(found.unmatched)
    assert "embed" in found.unmatched[0].name or "wte" in found.unmatched[0].name
    assert found.unmatched[0].reason == "read before the first sublayer"


def test_sublayers_that_cost_the_same_are_a_group():
    found = inspect_model(on_meta("llama", num_hidden_layers=3))
    assert [(group.kind, group.count) for group in found.groups] == [("attention", 3), ("ffn", 3)]
    assert [one.group for one in found.sublayers] == [0, 1, 0, 1, 0, 1]


def test_a_plan_is_carried_out_on_paper_in_each_phase():
    plan = SkipPlan.from_scales({ATTENTION.format(1): 0.9, FFN.format(0): 1.1})
    found = inspect_model(on_meta("llama"), plan=plan)
    assert found.skipped == {ATTENTION.format(1), FFN.format(0)}
    assert {step.phase for step in found.steps} == {"prefill", "steady"}
    skips = [step for step in found.steps if step.text.startswith("skip-sublayers")]
    assert [(step.matched, step.modified) for step in skips] == [(2, True), (2, True)]
    assert all("+%select: f32[] = .select(%adaskip_scales, 0, 1)" in step.diff for step in skips)
    dead = [step for step in found.steps if step.text.startswith("eliminate-dead-code")]
    assert all(step.nodes_after < step.nodes_before and "down_proj" in step.diff for step in dead)


def test_with_a_threshold_the_window_is_probed():
    plan = replace(SkipPlan.from_scales({ATTENTION.format(1): 0.9}, window=4), beta=0.9)
    found = inspect_model(on_meta("llama"), plan=plan)
    assert found.watched == {FFN.format(0), FFN.format(1)}
    [probes] = [step for step in found.steps if step.text.startswith("insert-probes") and step.modified]
    assert (probes.phase, probes.matched) == ("window", 2)
    row = inspection_report(found, ROOFLINES["cpu"], 64)["sublayers"][1]
    assert row["phases"] == {"prefill": "kept", "window": "probed", "steady": "open"}


def test_a_ramp_is_carried_out_on_paper_where_decode_ends():
    more = SkipPlan.from_scales({ATTENTION.format(1): 0.9}).skipped
    plan = SkipPlan.from_scales({FFN.format(0): 1.1})
    plan = replace(plan, ramp=(RampStep(0, more), RampStep(3, (), (FFN.format(0),))), window=2, beta=0.9)
    found = inspect_model(on_meta("llama"), plan=plan)
    skips = {step.phase: step.text for step in found.steps if step.text.startswith("skip-sublayers") and step.modified}
    assert skips == {
        "prefill": f"skip-sublayers{{paths=({FFN.format(0)!r},)}}",
        "window": f"skip-sublayers{{paths=({FFN.format(0)!r}, {ATTENTION.format(1)!r})}}",
        "steady": f"skip-sublayers{{paths=({ATTENTION.format(1)!r},)}}",
    }
    report = inspection_report(found, ROOFLINES["cpu"], 64)
    assert report["skip_sets"] == {"plan": [FFN.format(0)], "plan in decode": [ATTENTION.format(1)]}
    phases = {row["path"]: row["phases"] for row in report["sublayers"]}
    assert phases[FFN.format(0)] == {"prefill": "skipped", "window": "skipped", "steady": "kept"}
    assert phases[ATTENTION.format(1)] == {"prefill": "kept", "window": "skipped", "steady": "skipped"}
    assert json.loads(json.dumps(report["plan"]))["ramp"][1]["resumed"] == [FFN.format(0)]


def test_a_prompt_with_a_body_costs_what_is_left_of_it():
    """Keys and values of all rows, scores and FFN of the edges alone, and the maps: counted by hand."""
    paths = [FFN.format(0), ATTENTION.format(1)]
    plan = SkipPlan.from_prompt_scales(dict.fromkeys(paths, 0.9), head=1, tail=4)
    quality = Quality(0.02, 0.005, found=0.9, found_full=1.0, answer_loss=0.01)
    assert plan.prompt is not None
    plan = replace(plan, prompt=replace(plan.prompt, measured=Trade(1, 1, 1.2, within=True, quality=quality)))
    found = inspect_model(on_meta("llama", num_hidden_layers=3), plan=plan)
    ffn, scores, projection = 2 * 3 * 64 * 96, 2 * 2 * 64, 2 * 64 * 64
    at = {path: cost.at(q=100, t=100).flops for path, cost in found.body_left.items()}
    assert at == {paths[0]: 5 * ffn, paths[1]: 100 * projection + 5 * 2 * projection + 5 * 100 * scores}
    assert found.saved_shares("decode", 100) == found.saved_shares("prefill", 19) == {}
    saved = found.saved_shares("prefill", 100)
    assert saved[paths[0]] == pytest.approx(0.95)
    time = predict(found, ROOFLINES["cpu"], "prefill", 100)
    less = sum(share * time.groups[index] for share, index in zip(saved.values(), (1, 0), strict=True))
    assert time.speedup(found, (), saved) == pytest.approx(time.full / (time.full - less))
    report = json.loads(json.dumps(inspection_report(found, ROOFLINES["cpu"], 100)))
    rows = {row["path"]: row for row in report["sublayers"]}
    assert rows[paths[0]]["phases"] == {"prefill": "body", "window": "kept", "steady": "kept"}
    assert rows[ATTENTION.format(0)]["body_left"] is None
    [row] = [row for row in report["predictions"] if row["context"] == 100]
    assert row["prefill"]["speedup"]["plan"] == pytest.approx(time.speedup(found, (), saved), 1e-5)
    assert row["decode"]["speedup"]["plan"] == 1
    assert report["plan"]["prompt_from"] == 20
    advice = "\n".join(report["advice"])
    assert "the 2 sublayers of the plan for the body of a prompt" in advice
    assert "+2.02 % (+-0.50) of perplexity, and of facts 90 % of 100 % found" in advice


def test_edges_longer_than_the_prompt_that_was_captured():
    """A graph is captured with few tokens, and the plan is for prompts that have a body."""
    path, ffn = FFN.format(0), 2 * 3 * 64 * 96
    found = inspect_model(on_meta("llama"), plan=SkipPlan.from_prompt_scales({path: 0.9}, head=4, tail=60))
    assert found.problems == ()
    assert found.body_left[path].at(q=1000, t=1000).flops == 64 * ffn
    assert found.saved_shares("prefill", 255) == {}


def test_a_plan_of_another_model_is_refused():
    with pytest.raises(UnknownSublayerError, match=r"model\.layers\.7\.mlp"):
        inspect_model(on_meta("llama"), plan=SkipPlan.from_scales({FFN.format(7): 1.0}))


def test_a_model_without_a_stream_says_why_and_what_to_do():
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    found = inspect_model(model)
    assert found.sublayers == ()
    assert found.problems
    report = inspection_report(found, ROOFLINES["cpu"], 64)
    assert "nothing can be skipped" in report["advice"][0]
    json.dumps(report)


def test_a_model_of_no_library_is_inspected_too():
    found = inspect_model(plain(layers=3, cached=True))
    assert [one.path for one in found.sublayers][:2] == ["blocks.0.attention", "blocks.0.ffn"]
    assert found.phases == ("prefill", "decode")


def test_a_roofline_is_the_longer_of_computing_and_moving():
    found = inspect_model(on_meta("llama"))
    attention, ffn = found.groups
    compute, memory = Roofline(1.0, math.inf), Roofline(math.inf, 1.0)
    flops = 24576 * 10 + 256 * 10**2
    assert predict(found, compute, "prefill", 10).groups == (flops, 36864 * 10)
    moved = [sum(map(int, group.cost["decode"].at(t=99).parts()[1:3])) for group in (attention, ffn)]
    assert predict(found, memory, "decode", 99).groups == tuple(moved)


def test_the_speed_up_is_the_time_in_full_by_the_time_of_what_is_kept():
    found = inspect_model(on_meta("llama"))
    times = Measured((16, 64), {"prefill": ((1.0, 3.0), (2.0, 2.0), (4.0, 4.0)), "decode": ((5.0, 7.0),) * 3})
    prefill = predict(found, times, "prefill", 32)
    attention = 1.0 + 2.0 * 16 / 48
    assert prefill.full == pytest.approx(32 * (2 * attention + 2 * 2.0 + 4.0))
    skipped = {ATTENTION.format(0), FFN.format(1)}
    assert prefill.speedup(found, skipped) == pytest.approx(prefill.full / (32 * (attention + 2.0 + 4.0)))
    assert predict(found, times, "decode", 64).full == pytest.approx(5 * 7.0)


def test_noise_never_has_a_longer_context_take_no_time():
    found = inspect_model(on_meta("llama"))
    falling = Measured((16, 64), {"prefill": ((3.0, 1.0),) * 3, "decode": ((3.0, 1.0),) * 3})
    assert predict(found, falling, "decode", 4096).full == pytest.approx(5 * 1.0)
    assert predict(found, falling, "decode", 1).full == pytest.approx(5 * 3.0)


def test_a_calibration_of_another_model_is_refused():
    found = inspect_model(on_meta("llama"))
    with pytest.raises(OptionError, match="measured on another model"):
        Measured((16,), {"prefill": ((1.0,),) * 2, "decode": ((1.0,),) * 2}).check(
            found.model, found.phases, len(found.groups)
        )


def test_without_a_plan_attentions_are_spread_and_never_all_skipped():
    found = inspect_model(on_meta("llama", num_hidden_layers=4))
    assert likely_skips(found, 2) == {ATTENTION.format(0), ATTENTION.format(2)}
    assert len(likely_skips(found, 16)) == 3


def test_the_report_is_json_and_its_shares_add_up():
    found = inspect_model(on_meta("llama"))
    report = json.loads(json.dumps(inspection_report(found, ROOFLINES["cpu"], 128)))
    rest = predict(found, ROOFLINES["cpu"], "prefill", 128)
    assert sum(row["share"]["prefill"] for row in report["sublayers"]) == pytest.approx(1 - rest.rest / rest.full, 1e-4)
    assert [row["context"] for row in report["predictions"]] == [128, 256]
    assert report["groups"][0]["cost"]["decode"]["flops"]["text"] == "256*t + 24576"
    assert report["advice"][-1].startswith("times are those of a roofline")
    assert REST not in {row["path"] for row in report["sublayers"]}
