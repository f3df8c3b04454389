"""Given skip sets, in whole requests: logits equal those of two references that know nothing of the rewriter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.texts import profiling_texts
from adaskip_passes.ir.module_paths import naming
from tests.generation import CACHES, greedy_loop, make_cache
from tests.models import tiny, tokens
from tests.reference import omit_sublayers, reference_backend, run_request

STEPS = 32


def skip_sets(layers: int) -> dict[str, dict[str, float]]:
    """Return skip sets for a decoder of ``layers`` layers; 30 layers make them those of the paper's size."""
    many, few = max(2, layers * 8 // 30), max(1, layers * 4 // 30)
    spread = [layers * index // many for index in range(many)]
    attentions = [f"model.layers.{layer}.self_attn" for layer in spread if layer]
    ffns = [f"model.layers.{layer}.mlp" for layer in range(layers)]
    last = f"model.layers.{layers - 1}.self_attn"
    chosen = {
        "attention": [*attentions, last],
        "attention-and-ffn": [*attentions[:few], *ffns[1 : 1 + few]],
        "first-attention": ["model.layers.0.self_attn", *attentions[:few]],
        "adjacent": ["model.layers.2.self_attn", "model.layers.2.mlp"],
        "third-of-ffns": ffns[layers // 3 : 2 * layers // 3],
    }
    # Scales of their own for each sublayer: swapping two would show.
    return {name: {path: 0.96 + 0.02 * place for place, path in enumerate(paths)} for name, paths in chosen.items()}


SETS = tuple(skip_sets(6))


@dataclass
class Subject:
    """A model, its prompt and forced tokens, and the same forward compiled to be interpreted as a reference."""

    model: Any
    kind: str
    prompt: torch.Tensor
    forced: torch.Tensor
    scales: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.interpreted = torch.compile(
            self.model._call_impl, backend=naming(self.model, reference_backend(self.scales)), dynamic=True
        )

    def run(self, call: Any) -> tuple[torch.Tensor, int]:
        """Return logits ``(steps + 1, batch, vocabulary)`` and the tokens that the cache counts at the end."""
        cache = make_cache(self.kind, self.model, self.prompt.shape[1] + STEPS)
        logits = torch.stack(run_request(call, self.prompt, self.forced, cache=cache))
        return logits, int(cache.get_seq_length())

    def eager(self, scales: dict[str, float]) -> tuple[torch.Tensor, int]:
        self.model._compiled_call_impl = None
        with omit_sublayers(self.model, scales):
            return self.run(self.model)


def check(subject: Subject, scales: dict[str, float], tolerance: float) -> None:
    """Compare a request through the driver with both references, and with no skip at all."""
    adaskip_compile.compile(subject.model, SkipPlan.from_scales(scales), inner="eager")
    got, length = subject.run(subject.model)
    last = adaskip_compile.report(subject.model).requests[-1]
    assert last.skipped == scales
    assert last.tokens == {"prefill": subject.prompt.shape[1], "window": 0, "steady": STEPS}

    omitted, wanted_length = subject.eager(scales)
    assert length == wanted_length == subject.prompt.shape[1] + STEPS
    torch.testing.assert_close(got, omitted, rtol=tolerance, atol=tolerance)

    subject.scales.clear()
    subject.scales.update(scales)
    interpreted, _ = subject.run(subject.interpreted)
    torch.testing.assert_close(got, interpreted, rtol=tolerance, atol=tolerance)

    full, _ = subject.eager({})
    assert ((got - full).abs().amax(dim=(1, 2)) > 100 * tolerance).all(), "skipping must show in every step"


@pytest.fixture(scope="module", autouse=True)
def fresh_dynamo():
    """Keep captures for a whole module: all skip sets share them."""
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module", params=CACHES)
def llama(request):
    model = tiny("llama", num_hidden_layers=6)
    return Subject(model, request.param, tokens(2, 11), tokens(2, STEPS, seed=1))


@pytest.mark.parametrize("name", SETS)
def test_logits_of_a_tiny_model(llama, name):
    check(llama, skip_sets(6)[name], tolerance=2e-5)


@pytest.fixture(scope="module", params=CACHES)
def real(request):
    model, tokenizer = request.getfixturevalue("smollm2" if request.param == "dynamic" else "part_of_smollm2")
    ids = tokenizer(profiling_texts(1)[0].text, return_tensors="pt")["input_ids"]
    yield Subject(model, request.param, ids[:, :96], ids[:, 96 : 96 + STEPS])
    model._compiled_call_impl = None


@pytest.mark.pretrained
@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_logits_of_a_real_model(real, name):
    # Logits of this model reach 30; skipping moves them by several units.
    check(real, skip_sets(real.model.config.num_hidden_layers)[name], tolerance=2e-3)


def test_the_sets_are_those_of_the_issue():
    sets = {name: list(scales) for name, scales in skip_sets(30).items()}
    assert [len(paths) for paths in sets.values()] == [8, 8, 5, 2, 10]
    assert all(path.endswith("self_attn") for path in sets["attention"])
    assert sum(path.endswith("self_attn") for path in sets["attention-and-ffn"]) == 4


def test_models_through_one_compiled_code():
    """Without ``dynamic=True`` each layer's length has a symbol of its own, and the first region tells that they are one.

    A scaling factor that differs from the model's before becomes an input, which attention takes for a constant.
    """
    torch._dynamo.reset()
    for head_dim in (32, 16):
        model, ids = tiny("llama", seed=1, head_dim=head_dim), tokens(1, 8)
        mask, scales = torch.ones_like(ids), {"model.layers.1.mlp": 0.91}
        with omit_sublayers(model, scales):
            wanted = greedy_loop(model, ids, mask, 4, cache=make_cache("dynamic", model))
        options: Any = {"plan": SkipPlan.from_scales(scales), "inner": "inductor"}
        call = torch.compile(model, backend="adaskip", options=options)
        assert torch.equal(greedy_loop(call, ids, mask, 4, cache=make_cache("dynamic", model)), wanted)
