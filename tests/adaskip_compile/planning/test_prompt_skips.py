"""Plans that skip for the body of a prompt and keep keys and values, through the driver, against both references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.planning.prompt_skips import PromptSkips
from adaskip_compile.planning.skipped_sublayer import SkippedSublayer
from adaskip_compile.profiling.stream_maps import StreamMap
from adaskip_passes.errors import LegalityError, PassError, PlanError
from adaskip_passes.ir.module_paths import naming
from tests.architectures import tiny_architecture
from tests.generation import CACHE_NAME, CACHES, generate, left_padded, make_cache
from tests.models import tiny, tokens
from tests.reference import Body, body_backend, replace_body, run_request

FAMILIES = ["llama", "qwen3", "gemma3_text", "mixtral"]
HEAD, TAIL = 1, 4
SCALES = {
    "model.layers.1.mlp": 0.9,
    "model.layers.2.self_attn": 1.1,
    "model.layers.2.mlp": 0.8,
    "model.layers.3.self_attn": 1.2,
    "model.layers.3.mlp": 0.7,
}


def a_map(seed: int, rank: int = 4, width: int = 64) -> StreamMap:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"down": (rank, width), "up": (width, rank), "shift": (width,)}
    return StreamMap(
        "low_rank", {name: torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}, None
    )


def a_gated_map(seed: int, units: int = 5, width: int = 64) -> StreamMap:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (units, width), "value": (units, width), "out": (width, units), "shift": (width,)}
    return StreamMap(
        "gated", {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}, None
    )


MAPS = {"model.layers.2.mlp": a_map(0), "model.layers.3.self_attn": a_map(1), "model.layers.3.mlp": a_gated_map(2)}
BODY = Body({path: MAPS.get(path, lambda a, scale=scale: scale * a) for path, scale in SCALES.items()}, HEAD, TAIL)


def body_plan(**changes: Any) -> SkipPlan:
    skipped = tuple(SkippedSublayer(path, "", None, scale, None) for path, scale in SCALES.items())
    return replace(SkipPlan.none(), prompt=PromptSkips(skipped, MAPS, HEAD, TAIL), **changes)


def model_of(family: str) -> Any:
    how: dict[str, Any] = (
        {"layer_types": ["sliding_attention", "full_attention"] * 2} if family == "gemma3_text" else {}
    )
    return tiny(family, num_hidden_layers=4, **how)


@pytest.mark.shares_captures
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_both_references(family: str, cache: str) -> None:
    model, prompt, forced = model_of(family), tokens(2, 40), tokens(2, 3, seed=1)

    def run(call: Any) -> torch.Tensor:
        return torch.stack(run_request(call, prompt, forced, cache=make_cache(cache, model)))

    with torch.no_grad():
        full = run(model)
        with replace_body(model, BODY):
            wanted = run(model)
        interpreted = run(torch.compile(model, backend=naming(model, body_backend(BODY)), dynamic=True))
    torch._dynamo.reset()
    adaskip_compile.compile(model, body_plan(), inner="eager")
    got = run(model)
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(interpreted, wanted, rtol=2e-5, atol=2e-5)
    assert ((got - full).abs().amax(dim=(1, 2)) > 2e-3).all(), "skipping must show in every step"
    [request] = adaskip_compile.report(model).requests
    assert request.body_tokens == 40 - HEAD - TAIL
    assert request.prompt_skipped == SCALES


@pytest.fixture
def llama() -> Any:
    torch._dynamo.reset()
    return model_of("llama")


def compiled(model: Any, plan: SkipPlan | None = None, *, inner: str = "eager") -> Any:
    return adaskip_compile.compile(model, body_plan() if plan is None else plan, inner=inner)


def wanted(model: Any, run: Any) -> Any:
    """Return what ``run`` gives of the eager model that replaces sublayers by hand."""
    before, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        with torch.no_grad(), replace_body(model, BODY):
            return run()
    finally:
        model._compiled_call_impl = before


def test_padded_rows(llama: Any) -> None:
    ids, mask = left_padded([tokens(1, 40)[0], tokens(1, 33, seed=2)[0]])
    forced = tokens(2, 3, seed=1)

    def run() -> torch.Tensor:
        return torch.stack(run_request(llama, ids, forced, cache=make_cache("dynamic", llama), mask=mask))

    reference = wanted(llama, run)
    compiled(llama)
    torch.testing.assert_close(run(), reference, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("cache", CACHES)
def test_a_prompt_in_chunks_and_a_second_turn(llama: Any, cache: str) -> None:
    """Each chunk of a prompt has a body and edges of its own, and so has what comes after an answer."""
    parts = [tokens(1, 40), tokens(1, 30, seed=1), tokens(1, 1, seed=2), tokens(1, 5, seed=3), tokens(1, 25, seed=4)]

    @torch.no_grad()
    def run() -> torch.Tensor:
        held = make_cache(cache, llama, 128)
        logits = []
        start = 0
        for ids in parts:
            positions = torch.arange(start, start + ids.shape[1])[None]
            start += ids.shape[1]
            how = {"use_cache": True, CACHE_NAME: held}
            logits.append(llama(ids, position_ids=positions, **how).logits)
        return torch.cat(logits, 1)

    reference = wanted(llama, run)
    compiled(llama)
    torch.testing.assert_close(run(), reference, rtol=2e-5, atol=2e-5)
    [request] = adaskip_compile.report(llama).requests
    assert request.body_tokens == 40 + 30 + 25 - 3 * (HEAD + TAIL), "5 tokens and 1 are no prompt"


def test_the_order_in_which_a_plan_names_sublayers_makes_no_difference(llama: Any) -> None:
    """Maps come in through inputs of equal shapes, in the order of the stream."""
    ids, plan = tokens(1, 40), body_plan()
    assert plan.prompt is not None
    reference = wanted(llama, lambda: llama(ids).logits)
    turned = replace(plan.prompt, skipped=plan.prompt.skipped[::-1])
    compiled(llama, replace(plan, prompt=turned))
    with torch.no_grad():
        torch.testing.assert_close(llama(ids).logits, reference, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {}], ids=["beams", "greedy"])
def test_generate(llama: Any, how: dict[str, Any]) -> None:
    ids = tokens(2, 40)

    def run() -> torch.Tensor:
        return generate(llama, ids, torch.ones_like(ids), 6, **how)

    reference = wanted(llama, run)
    compiled(llama)
    assert torch.equal(run(), reference)


def test_inductor(llama: Any) -> None:
    ids, forced = tokens(1, 48), tokens(1, 2, seed=1)

    def run() -> torch.Tensor:
        return torch.stack(run_request(llama, ids, forced, cache=make_cache("dynamic", llama)))

    reference = wanted(llama, run)
    compiled(llama, inner="inductor")
    torch.testing.assert_close(run(), reference, rtol=5e-5, atol=5e-5)


def test_inductor_in_half_precision(llama: Any) -> None:
    """Its products go another way to Inductor than those of 32-bit floats do."""
    model = llama.bfloat16()
    ids = tokens(1, 48)
    with torch.no_grad():
        full = model(ids).logits
        reference = wanted(model, lambda: model(ids).logits)
        compiled(model, inner="inductor")
        got = model(ids).logits
    assert (got - reference).norm() < 0.1 * (got - full).norm()


def test_a_short_prompt_runs_in_full(llama: Any) -> None:
    ids = tokens(1, 4 * (HEAD + TAIL) - 1)
    with torch.no_grad():
        eager = llama(ids).logits
        compiled(llama)
        torch.testing.assert_close(llama(ids).logits, eager, rtol=2e-5, atol=2e-5)
    [request] = adaskip_compile.report(llama).requests
    assert request.body_tokens == 0


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("first", [4, HEAD + TAIL + 1])
def test_the_first_prompt_may_be_too_short_to_have_a_body(llama: Any, first: int, inner: str) -> None:
    """The graph that it is captured in serves long prompts too."""
    ids = tokens(1, 40)
    reference = wanted(llama, lambda: llama(ids).logits)
    with torch.no_grad():
        short = llama(tokens(1, first)).logits
        compiled(llama, inner=inner)
        for _ in range(2):
            torch.testing.assert_close(llama(tokens(1, first)).logits, short, rtol=5e-5, atol=5e-5)
            torch.testing.assert_close(llama(ids).logits, reference, rtol=5e-5, atol=5e-5)
    report = adaskip_compile.report(llama)
    assert [one.body_tokens for one in report.requests] == [0, 40 - HEAD - TAIL] * 2
    assert [len(one.captures) for one in report.requests] == [1, 0, 0, 0]


def test_where_a_short_prompt_cannot_be_told_to_be_longer_the_report_says_so(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PassError("values of Odd cannot be told to have more rows")

    monkeypatch.setattr("adaskip_passes.pipeline.derived_graph.raise_hint", refuse)
    ids = tokens(1, 40)
    with torch.no_grad():
        full = llama(ids).logits
        compiled(llama)
        llama(tokens(1, 4))
        torch.testing.assert_close(llama(ids).logits, full, rtol=2e-5, atol=2e-5)
    report = adaskip_compile.report(llama)
    assert report.requests[-1].body_tokens == 0
    assert "prompts run in full: values of Odd cannot be told to have more rows" in str(report)


@pytest.mark.parametrize("door", ["model.compile", "torch.compile"])
def test_a_short_first_prompt_by_other_doors(llama: Any, door: str) -> None:
    ids, options = tokens(1, 40), dict[str, Any](plan=body_plan(), inner="eager")
    reference = wanted(llama, lambda: llama(ids).logits)
    with torch.no_grad():
        if door == "model.compile":
            llama.compile(backend="adaskip", options=options)
        call = llama if door == "model.compile" else torch.compile(llama, backend="adaskip", options=options)
        call(tokens(1, 4))
        torch.testing.assert_close(call(ids).logits, reference, rtol=2e-5, atol=2e-5)


def test_nothing_is_captured_anew_and_decoding_runs_in_full(llama: Any) -> None:
    compiled(llama, SkipPlan.none())
    ids = tokens(1, 40)
    generate(llama, ids, torch.ones_like(ids), 4)
    compiled(llama)
    generate(llama, ids, torch.ones_like(ids), 4)
    report = adaskip_compile.report(llama)
    assert report.requests[-1].captures == ()
    assert report.requests[-1].skipped == {}
    decode = [graph for graph in report.sessions[0].graphs if graph.phase == "decode"]
    assert {variant.skipped for graph in decode for variant in graph.variants} == {0}
    assert "5 skipped for 35 of 40 tokens, keys and values kept" in str(report)


def test_whoever_reads_all_logits_is_told_once(llama: Any) -> None:
    compiled(llama)

    def told() -> int:
        notes = adaskip_compile.report(llama).sessions[0].notes
        return sum("returns something of every token of a prompt" in note for note in notes)

    with torch.no_grad():
        llama(tokens(1, 40), logits_to_keep=1)
        assert told() == 0
        for seed in (0, 1):
            llama(tokens(1, 40, seed=seed), labels=tokens(1, 40))
    assert told() == 1


def test_recurrent_sublayers_are_refused() -> None:
    model = tiny("mamba")
    path = adaskip_compile.analyze(model, input_ids=tokens(1, 40)).paths[0]
    compiled(model, SkipPlan.from_prompt_scales({path: 1.0}))
    with (
        pytest.raises(LegalityError, match=f"skips {path} for the body of a prompt: its state .* is carried"),
        torch.no_grad(),
    ):
        model(tokens(1, 100))


HYBRID_SCALES = {
    "model.layers.1.self_attn": 1.1,
    "model.layers.1.feed_forward": 0.9,
    "model.layers.2.feed_forward": 0.8,
    "model.layers.3.self_attn": 1.2,
}
HYBRID = Body({path: lambda a, scale=scale: scale * a for path, scale in HYBRID_SCALES.items()}, HEAD, TAIL)


def hybrid_forward(path: str, layer: Any) -> Any:
    """Return the forward of a layer of Bamba, written by hand, with the replacements of ``HYBRID``."""

    def forward(hidden: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        normed = layer.input_layernorm(hidden)
        if hasattr(layer, "mamba"):
            mask = kwargs.get("attention_mask")
            mixed = layer.mamba(hidden_states=normed, cache_params=kwargs.get(CACHE_NAME), attention_mask=mask)
        else:
            mixed, _ = layer.self_attn(hidden_states=normed, **kwargs)
        hidden = HYBRID.joined(f"{path}.self_attn", hidden, hidden + mixed)
        branch = layer.feed_forward(layer.pre_ff_layernorm(hidden))
        return HYBRID.joined(f"{path}.feed_forward", hidden, hidden + branch), None

    return forward


def test_a_hybrid_skips_beside_its_state_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attentions and FFNs go for the body; what carries a state from token to token between them runs for all rows."""
    model, ids = tiny_architecture("bamba"), tokens(1, 40)

    @torch.no_grad()
    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return model(ids).logits[:, -1], generate(model, ids, torch.ones_like(ids), 6)

    full = run()
    with monkeypatch.context() as patched:
        for index, layer in enumerate(model.model.layers):
            patched.setattr(layer, "forward", hybrid_forward(f"model.layers.{index}", layer))
        reference = run()
    plan = SkipPlan.from_prompt_scales(HYBRID_SCALES, head=HEAD, tail=TAIL)
    interpreted = torch.compile(model, backend=naming(model, body_backend(HYBRID)), dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(interpreted(ids).logits[:, -1], reference[0], rtol=2e-5, atol=2e-5)
    torch._dynamo.reset()
    compiled(model, plan)
    got = run()
    torch.testing.assert_close(got[0], reference[0], rtol=2e-5, atol=2e-5)
    assert (got[0] - full[0]).abs().max() > 2e-3
    assert torch.equal(got[1], reference[1])
    assert adaskip_compile.report(model).requests[-1].prompt_skipped == HYBRID_SCALES


@pytest.mark.newest("before, experts of a mixture run for all rows of a prompt, and the report names the operation")
@pytest.mark.parametrize(
    ("family", "inner"), [("mixtral", "eager"), ("mixtral", "inductor"), ("qwen3_moe", "eager"), ("olmoe", "eager")]
)
def test_experts_run_for_the_edges_alone(family: str, inner: str) -> None:
    torch._dynamo.reset()
    model, ids = model_of(family), tokens(1, 40)

    def run() -> torch.Tensor:
        return model(ids).logits

    reference = wanted(model, run)
    compiled(model, inner=inner)
    with torch.no_grad():
        torch.testing.assert_close(run(), reference, rtol=2e-5, atol=2e-5)
        with torch.profiler.profile(record_shapes=True) as seen:
            run()
    config = model.config
    inside, width = getattr(config, "moe_intermediate_size", config.intermediate_size), config.hidden_size
    products = [one.input_shapes for one in seen.events() or () if one.name == "aten::mm"]
    # Two experts a token: of a layer that skips nothing, and of three that skip the body.
    expected = 2 * 40 + 3 * 2 * (HEAD + TAIL)
    for weights in ([width, 2 * inside], [inside, width]):
        assert sum(shapes[0][0] for shapes in products if shapes[1] == weights) == expected
    assert not told(model)


class Crowded(nn.Module):
    """An FFN through which only the first 20 tokens go that choose it: what one gives depends on those before it."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.ffn, self.router = ffn, nn.Linear(64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chooses = (self.router(x) > 0).to(x.dtype)
        return self.ffn(x) * chooses * (chooses.cumsum(1) <= 20)


def test_what_mixes_tokens_is_told_of() -> None:
    """It is computed of the whole prompt; the result is right, and the report says so."""
    torch._dynamo.reset()
    model, ids = model_of("llama"), tokens(1, 100)
    model.model.layers[2].mlp = Crowded(model.model.layers[2].mlp)

    def run() -> torch.Tensor:
        return model(ids).logits

    reference = wanted(model, run)
    compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(run(), reference, rtol=2e-5, atol=2e-5)
    [note] = told(model)
    assert note.startswith("model.layers.2.mlp: cumsum is not known to work row by row")


def told(model: Any) -> list[str]:
    """Return the notes on what is computed of the whole prompt."""
    notes = adaskip_compile.report(model).sessions[0].notes
    return [note for note in notes if "not known to work row by row" in note]


class TestPlans:
    def test_file(self, tmp_path: Any) -> None:
        plan = body_plan()
        plan.save(tmp_path / "plan.json")
        assert SkipPlan.load(tmp_path / "plan.json") == plan

    def test_describe(self) -> None:
        text = body_plan(policy="explicit").describe()
        assert text.startswith(
            "the prompt skips 5 sublayers for all but its first 1 token and its last 4 tokens, and keeps"
        )
        assert text.endswith("decoding runs in full")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tail": 0}, "tail is 0; it takes a number of rows, 1 or more"),
            ({"head": -1}, "head is -1; it takes a number of rows, 0 or more"),
            ({"maps": {"elsewhere": a_map(0)}}, "a map is given for elsewhere, which the prompt does not skip"),
        ],
    )
    def test_senseless(self, change: dict[str, Any], message: str) -> None:
        prompt = body_plan().prompt
        assert prompt is not None
        with pytest.raises(PlanError, match=message):
            replace(prompt, **change)

    def test_one_sublayer_in_both_ways(self) -> None:
        holes = SkipPlan.from_scales({"model.layers.2.mlp": 1.0})
        with pytest.raises(PlanError, match="with a hole in the cache, and with its keys and values kept"):
            replace(holes, prompt=body_plan().prompt)
