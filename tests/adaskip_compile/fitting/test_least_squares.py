"""Compensation: maps fitted by least squares, and requests in which they stand in the place of sublayers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.fitting.least_squares import BranchStatistics, fit_map
from adaskip_compile.lowering.executor import Executor
from adaskip_compile.lowering.shape_checks import AssumptionCheck
from adaskip_compile.profiling.stream_maps import StreamMap
from adaskip_compile.runtime.session import sessions_of
from adaskip_passes.errors import DamagedFileError, MissingFileError, OptionError, PlanError, ProfileError
from adaskip_passes.specialise.stream_maps import FORMS, part_shapes
from tests.generation import CACHES, make_cache
from tests.models import tiny, tokens
from tests.reference import run_request

pytestmark = pytest.mark.shares_captures

WIDTH = 24


def random_map(form: str, width: int = 64, rank: int = 4, seed: int = 0) -> StreamMap:
    generator = torch.Generator().manual_seed(seed)
    shapes = part_shapes(form, width, rank)
    return StreamMap(form, {name: torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}, 0.5)


def by_hand(found: StreamMap, a: torch.Tensor) -> torch.Tensor:
    """What a map computes, in float64 and written out once more."""
    parts = {name: tensor.double() for name, tensor in found.tensors.items()}
    a = a.double()
    if found.form == "channel":
        return a * parts["gain"] + parts["shift"]
    x = a / (a.pow(2).sum(-1, keepdim=True) / a.shape[-1] + 1e-6).sqrt()
    if found.form == "gated":
        gate, value = (torch.einsum("...i,oi->...o", x, parts[name]) for name in ("gate", "value"))
        return a + torch.einsum("...i,oi->...o", gate / (1 + (-gate).exp()) * value, parts["out"]) + parts["shift"]
    matrix = parts["weight"] if found.form == "affine" else parts["up"] @ parts["down"]
    return a + torch.einsum("...i,oi->...o", x, matrix) + parts["shift"]


def branch(count: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a stream before and after a sublayer that is nearly affine, and the matrix that it multiplies with."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)) / 5
    a = torch.randn(count, WIDTH, generator=generator) * (0.5 + 4 * torch.rand(count, 1, generator=generator))
    x = a / a.pow(2).mean(-1, keepdim=True).sqrt()
    return a, a + x @ matrix.mT + 0.5 + 0.01 * torch.randn(count, WIDTH, generator=generator), matrix


def sums(count: int, seed: int = 0) -> BranchStatistics:
    found = BranchStatistics.zeros(WIDTH, torch.device("cpu"))
    found.add(*branch(count, seed=seed)[:2])
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_map_computes_what_its_form_says(form):
    found, a = random_map(form), torch.randn(2, 5, 64)
    torch.testing.assert_close(found(a).double(), by_hand(found, a), rtol=1e-5, atol=1e-5)


def test_an_affine_branch_is_found_again():
    found = fit_map("affine", sums(3000), sums(1000, seed=1))
    torch.testing.assert_close(found.tensors["weight"], branch(1)[2], rtol=0, atol=2e-3)
    torch.testing.assert_close(found.tensors["shift"], torch.full((WIDTH,), 0.5), rtol=0, atol=2e-3)
    assert found.error == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(("form", "rank"), [("affine", 0), ("low_rank", 6), ("channel", 0)])
def test_the_error_is_what_is_missed_on_tokens_held_out(form, rank):
    fitted, held_out = sums(3000), sums(1000, seed=1)
    found = fit_map(form, fitted, held_out, rank=rank)
    a, b, _ = (value.double() for value in branch(1000, seed=1))
    weight = 1 / (a.pow(2).mean(-1, keepdim=True) + 1e-6) if form == "channel" else torch.ones(1)
    missed = (weight * (by_hand(found, a) - b).pow(2)).sum() / (weight * (b - a).pow(2)).sum()
    assert found.error == pytest.approx(missed.item(), rel=0.05)


def test_a_higher_rank_misses_less_and_the_whole_rank_is_affine():
    fitted, held_out = sums(3000), sums(1000, seed=1)
    errors = [fit_map("low_rank", fitted, held_out, rank=rank).error or 0.0 for rank in (1, 4, 12, WIDTH)]
    assert errors == sorted(errors, reverse=True)
    whole = fit_map("low_rank", fitted, held_out, rank=WIDTH)
    affine = fit_map("affine", fitted, held_out)
    torch.testing.assert_close(whole.tensors["up"] @ whole.tensors["down"], affine.tensors["weight"], rtol=0, atol=1e-4)


def test_a_token_with_a_huge_stream_spoils_no_fit():
    fitted = sums(3000)
    a, b, _ = branch(1, seed=5)
    fitted.add(1e4 * a, 1e4 * a + (b - a))
    nothing = BranchStatistics.zeros(WIDTH, torch.device("cpu"))
    for form in ("affine", "channel"):
        clean, spoiled = (fit_map(form, one, nothing) for one in (sums(3000), fitted))
        for name, tensor in clean.tensors.items():
            torch.testing.assert_close(spoiled.tensors[name], tensor, rtol=0, atol=0.02)


def test_sums_merge_exactly_whatever_the_split():
    a, b, _ = branch(400)
    whole, parts = sums(400), BranchStatistics.zeros(WIDTH, torch.device("cpu"))
    for chunk in range(4):
        part = BranchStatistics.zeros(WIDTH, torch.device("cpu"))
        part.add(a[chunk::4], b[chunk::4])
        parts = parts.merge(part)
    assert parts.tokens == whole.tokens == 400
    torch.testing.assert_close(parts.inputs, whole.inputs, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(parts.channels, whole.channels, rtol=1e-6, atol=1e-6)


def test_no_tokens_and_an_overflow_are_errors():
    nothing = BranchStatistics.zeros(WIDTH, torch.device("cpu"))
    with pytest.raises(ProfileError, match="no tokens"):
        fit_map("affine", nothing, nothing)
    overflowed = sums(100)
    overflowed.outputs += torch.inf
    with pytest.raises(ProfileError, match="overflows"):
        fit_map("affine", overflowed, nothing)
    with pytest.raises(ProfileError, match="shapes"):
        StreamMap("affine", {"shift": torch.zeros(4)}, 0.0)


@pytest.fixture(scope="module")
def llama():
    yield tiny("llama", num_hidden_layers=4)
    torch._dynamo.reset()


SKIPPED = {
    "model.layers.1.self_attn": "low_rank",
    "model.layers.2.mlp": "affine",
    "model.layers.3.self_attn": "channel",
    "model.layers.3.mlp": None,
}


def plan_with_maps() -> SkipPlan:
    plan = SkipPlan.from_scales(dict.fromkeys(SKIPPED, 0.97))
    maps = {path: random_map(form, seed=place) for place, (path, form) in enumerate(SKIPPED.items()) if form}
    return replace(plan, maps=maps)


def eager_with_maps(model, plan, prompt, forced, cache):
    """Run a request eagerly with each skipped sublayer computed by hand in its place, through forward hooks."""
    handles = []

    def stand_in(module, path, norm):
        stream = []
        scale, found = plan.scales[path], plan.maps.get(path)

        def after(part, args, result):
            b = by_hand(found, stream[0]).to(stream[0]) if found else scale * stream[0]
            left = b - stream[0]
            return (left, *result[1:]) if isinstance(result, tuple) else left

        handles.append(norm.register_forward_pre_hook(lambda part, args: stream.__setitem__(slice(None), args)))
        handles.append(module.register_forward_hook(after))

    for index, layer in enumerate(model.model.layers):
        for part, norm in ((layer.self_attn, layer.input_layernorm), (layer.mlp, layer.post_attention_layernorm)):
            path = f"model.layers.{index}.{'self_attn' if part is layer.self_attn else 'mlp'}"
            if path in plan.scales:
                stand_in(part, path, norm)
    try:
        return run_request(model, prompt, forced, cache=cache)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("regions", ["shared", "whole"])
@pytest.mark.parametrize("kind", CACHES)
def test_a_request_with_maps_equals_one_by_hand(llama, kind, regions):
    plan, prompt, forced = plan_with_maps(), tokens(2, 11), tokens(2, 8, seed=1)
    llama._compiled_call_impl = None
    wanted = eager_with_maps(llama, plan, prompt, forced, make_cache(kind, llama, 32))
    adaskip_compile.compile(llama, plan, inner="eager", regions=regions)
    got = run_request(llama, prompt, forced, cache=make_cache(kind, llama, 32))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def low_rank_plan(*paths: str) -> SkipPlan:
    """Return a plan with maps whose tensors are views, as someone who makes maps by hand may have them."""
    maps = {}
    for seed, path in enumerate(paths):
        tensors = random_map("low_rank", seed=seed).tensors
        maps[path] = StreamMap("low_rank", {**tensors, "down": tensors["down"].mT.contiguous().mT}, None)
    return replace(SkipPlan.from_scales(dict.fromkeys(paths, 0.97)), maps=maps)


def test_maps_of_one_form_are_one_compiled_region():
    torch._dynamo.reset()  # what it has seen of other models decides which sizes are symbols
    model = tiny("llama", num_hidden_layers=3)
    first = low_rank_plan("model.layers.1.self_attn", "model.layers.1.mlp", "model.layers.2.mlp")
    second = low_rank_plan("model.layers.0.mlp", "model.layers.2.self_attn")
    scaled = SkipPlan.from_scales(dict.fromkeys(first.paths, 0.97))

    def request(plan, length, **options):
        adaskip_compile.compile(model, plan, **options)
        cache = make_cache("dynamic", model)
        return torch.stack(run_request(model, tokens(1, length), tokens(1, 3, seed=1), cache=cache))

    request(scaled, 11)
    graphs = sessions_of(model)[0].graphs
    assert [graph.stream.phase for graph in graphs] == ["prefill", "decode"]
    known = [set(graph.variants.lowering._artifacts) for graph in graphs]
    assert [graph.variants.lowering.compiled for graph in graphs] == [len(keys) for keys in known] == [4, 4]
    for plan, length in ((first, 11), (second, 17), (first, 23)):
        got = request(plan, length)
        for graph, keys in zip(graphs, known, strict=True):
            assert graph.variants.lowering.compiled == 5
            [added] = graph.variants.lowering._artifacts.keys() - keys
            run = list(graph.variants.values())[-1].run
            if isinstance(run, AssumptionCheck):  # whether sizes are assumed depends on what else was compiled before
                run = run._compiled
            assert isinstance(run, Executor)
            steps = [step.function for step in run._steps]
            assert steps.count(graph.variants.lowering._artifacts[added]) == len(plan.maps)
            assert not any(step in (functional.linear, functional.rms_norm) for step in steps)
        torch.testing.assert_close(got, request(plan, length, inner="eager"), rtol=1e-4, atol=1e-4)
        model._compiled_call_impl = None
        prompt, forced = tokens(1, length), tokens(1, 3, seed=1)
        wanted = eager_with_maps(model, plan, prompt, forced, make_cache("dynamic", model))
        torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-4, atol=1e-4)


def test_another_map_of_the_same_form_is_no_new_variant(llama):
    plan = plan_with_maps()
    path = "model.layers.1.self_attn"
    other = replace(plan, maps={**plan.maps, path: random_map("low_rank", seed=77)})
    outputs = []
    for one in (plan, other, plan):
        adaskip_compile.compile(llama, one, inner="eager", learn=3)  # a session of its own
        outputs.append(torch.stack(run_request(llama, tokens(1, 9), tokens(1, 2), cache=make_cache("dynamic", llama))))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1])
    [session] = [one for one in adaskip_compile.report(llama).sessions if len(one.requests) == 3]
    for graph in session.graphs:
        assert [variant.skipped for variant in graph.variants] == [len(plan.paths)]


def test_maps_are_kept_beside_the_plan_and_a_foreign_file_is_refused(tmp_path):
    plan = plan_with_maps()
    plan.save(tmp_path / "plan.json")
    assert SkipPlan.load(tmp_path / "plan.json") == plan
    [file] = tmp_path.glob("plan-*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedFileError, match="damaged or replaced"):
        SkipPlan.load(tmp_path / "plan.json")
    file.unlink()
    with pytest.raises(MissingFileError, match="keep both in one folder"):
        SkipPlan.load(tmp_path / "plan.json")


def test_a_map_for_a_sublayer_that_stays_is_an_error():
    with pytest.raises(PlanError, match="does not skip"):
        replace(plan_with_maps(), maps={"model.layers.0.mlp": random_map("channel")})


def test_fitting_on_a_model_finds_what_hooks_see(llama):
    llama._compiled_call_impl = None
    samples = [tokens(1, 40, seed=seed)[0] for seed in range(5)]
    profile = adaskip_compile.profile(llama, samples, progress=False)
    path = "model.layers.2.mlp"
    fitted = adaskip_compile.fit(llama, profile, samples, sublayers=[path], forms=("affine",), progress=False)
    expected = BranchStatistics.zeros(64, torch.device("cpu"))
    held_out = BranchStatistics.zeros(64, torch.device("cpu"))
    layer = llama.model.layers[2]
    stream: list[torch.Tensor] = []
    norm = layer.post_attention_layernorm
    handle = norm.register_forward_pre_hook(lambda part, args: stream.append(args[0]))
    with torch.no_grad():
        for number, sample in enumerate(samples, 1):
            llama(sample[None])
            a = stream[-1]
            b = a + layer.mlp(norm(a))
            (held_out if number % 4 == 0 else expected).add(a, b)
    handle.remove()
    wanted = fit_map("affine", expected, held_out)
    [found] = fitted.maps[path]
    for name, tensor in wanted.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-2, atol=1e-2)


def test_a_form_or_rank_that_cannot_be_is_an_error(llama):
    samples = [tokens(1, 12)[0]]
    profile = adaskip_compile.profile(llama, samples, progress=False)
    with pytest.raises(OptionError, match="forms="):
        adaskip_compile.fit(llama, profile, samples, forms=("quadratic",), progress=False)
    with pytest.raises(OptionError, match="rank="):
        adaskip_compile.fit(llama, profile, samples, rank=65, progress=False)
