import pytest
import torch
from transformers import DynamicCache, StaticCache

from adaskip_passes.ir.module_paths import naming
from tests.models import capture_all, tiny, tokens
from tests.reference import (
    InterpreterReference,
    hook_statistics,
    measure,
    omit_sublayers,
    reference_backend,
    run_request,
    sublayer_skips,
)

PROMPT, FORCED = tokens(2, 9), tokens(2, 5, seed=1)
LEFT_PADDED = torch.ones_like(PROMPT)
LEFT_PADDED[0, :3] = 0

SKIPS = [
    {"model.layers.0.self_attn": 0.9},
    {"model.layers.2.mlp": 1.1},
    {"model.layers.1.self_attn": 0.8, "model.layers.1.mlp": 1.2},
    {"model.layers.0.self_attn": 1.0, "model.layers.2.self_attn": 0.7, "model.layers.0.mlp": 1.05},
]


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", num_hidden_layers=3)


def make_cache(kind, model):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=32)
    return DynamicCache(config=model.config)


def assert_same(got, wanted, tolerance=1e-5):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def interpreted(model, scales, cache, mask=None):
    torch._dynamo.reset()
    compiled = torch.compile(model._call_impl, backend=naming(model, reference_backend(scales)), dynamic=True)
    return run_request(compiled, PROMPT, FORCED, cache=cache, mask=mask)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_no_skip_is_plain_eager(llama, kind):
    plain = run_request(llama, PROMPT, FORCED, cache=make_cache(kind, llama), mask=LEFT_PADDED)
    with omit_sublayers(llama, {}):
        omitted = run_request(llama, PROMPT, FORCED, cache=make_cache(kind, llama), mask=LEFT_PADDED)
    assert_same(omitted, plain, tolerance=0)
    assert_same(interpreted(llama, {}, make_cache(kind, llama), LEFT_PADDED), plain)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_an_interpreter_without_skips_runs_the_graph(family):
    for captured in capture_all(tiny(family), cache="static", requests=2):
        inputs = [value.clone() if isinstance(value, torch.Tensor) else value for value in captured.inputs]
        outputs = InterpreterReference(captured.gm, {}).run(*inputs)
        torch.testing.assert_close(tuple(outputs), captured.outputs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("skips", SKIPS, ids=["attention-0", "mlp", "adjacent", "three"])
def test_the_two_references_agree(llama, skips, kind):
    plain = run_request(llama, PROMPT, FORCED, cache=make_cache(kind, llama))
    cache = make_cache(kind, llama)
    with omit_sublayers(llama, skips):
        omitted = run_request(llama, PROMPT, FORCED, cache=cache)
    assert int(cache.get_seq_length()) == PROMPT.shape[1] + FORCED.shape[1]
    assert_same(interpreted(llama, skips, make_cache(kind, llama)), omitted)
    assert all((one - other).abs().max() > 1e-2 for one, other in zip(omitted, plain, strict=True))


def test_the_references_agree_on_padded_rows(llama):
    with omit_sublayers(llama, SKIPS[0]):
        omitted = run_request(llama, PROMPT, FORCED, cache=DynamicCache(), mask=LEFT_PADDED)
    assert_same(interpreted(llama, SKIPS[0], DynamicCache(), LEFT_PADDED), omitted)


def test_omission_ends_with_its_context(llama):
    before = run_request(llama, PROMPT, FORCED, cache=DynamicCache())
    with omit_sublayers(llama, SKIPS[2]):
        pass
    assert_same(run_request(llama, PROMPT, FORCED, cache=DynamicCache()), before, tolerance=0)


def test_scales_are_read_at_each_call(llama):
    scales = {"model.layers.1.mlp": 0.5}
    with omit_sublayers(llama, scales):
        first = llama(PROMPT).logits
        scales.clear()
        assert not torch.equal(llama(PROMPT).logits, first)


def test_unknown_names_are_refused(llama):
    with pytest.raises(KeyError, match=r"layers\.9\.mlp"), omit_sublayers(llama, {"model.layers.9.mlp": 1.0}):
        pass
    captured = capture_all(llama)[0]
    with pytest.raises(KeyError, match="nothing_here"):
        InterpreterReference(captured.gm, {"nothing_here": (1.0, "inputs_embeds")})
    assert len(sublayer_skips(captured.gm, SKIPS[3])) == 3


def test_statistics_on_numbers_worked_by_hand():
    seen = measure(torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[6.0, 8.0], [0.0, 3.0]]]))
    assert seen.cosine.tolist() == [[1.0, 0.0]]
    assert seen.similarity == 0.5
    assert seen.scale_token == 2.5
    assert seen.scale_frobenius == pytest.approx((109 / 26) ** 0.5, rel=1e-12)


def test_hooks_see_the_stream_that_the_model_shows(llama):
    with hook_statistics(llama) as calls:
        run_request(llama, PROMPT, FORCED, cache=DynamicCache())
    assert [len(call) for call in calls] == [6] * 6
    hidden = llama(PROMPT, output_hidden_states=True).hidden_states
    first = calls[0]
    torch.testing.assert_close(first["model.layers.1.self_attn"].before.float(), hidden[1].norm(dim=-1))
    torch.testing.assert_close(first["model.layers.0.mlp"].after.float(), hidden[1].norm(dim=-1))
    torch.testing.assert_close(first["model.layers.0.self_attn"].after, first["model.layers.0.mlp"].before)
    assert calls[1]["model.layers.0.mlp"].cosine.shape == (2, 1)


def test_omitted_sublayers_have_no_statistics(llama):
    scales = SKIPS[3]
    with omit_sublayers(llama, scales), hook_statistics(llama) as calls:
        run_request(llama, PROMPT, FORCED, cache=DynamicCache())
    assert all(not scales.keys() & call.keys() and len(call) == 3 for call in calls)
    scaled = calls[0]["model.layers.1.self_attn"].before
    embedded = llama.model.embed_tokens(PROMPT).double().norm(dim=-1)
    torch.testing.assert_close(scaled, embedded * 1.0 * 1.05, rtol=1e-5, atol=1e-5)
