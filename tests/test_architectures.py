"""Architectures in CI: at least one for every structural rule. ``make architectures`` runs them all."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import adaskip_compile
import adaskip_passes
from adaskip_compile.inspection.analyze import analyze
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.runtime.session import sessions_of
from adaskip_passes.analysis.dependence import Dependence
from adaskip_passes.analysis.effects import find_effects
from adaskip_passes.canonicalise.straighten_stream import StraightenStream
from adaskip_passes.errors import LegalityError
from adaskip_passes.stream.chain import find_chain
from adaskip_passes.stream.find_stream import find_residual_stream
from tests.architecture_checks import examine, verdict
from tests.architectures import tiny_architecture
from tests.models import PlainAttention, PlainDecoder, capture, plain, redraw, tokens
from tests.reference import omit_sublayers
from tests.rewriting import applied

ROOT = Path(__file__).parent.parent

# type -> the rule that it meets.
MET = {
    "llama": "pre-norm",
    "bert": "post-norm",
    "gemma2": "sandwich norms, scaled embedding",
    "olmo2": "norm after each branch",
    "granite": "branch multipliers",
    "minimax": "multipliers on both sides, linear attention",
    "gpt2": "token + position embeddings",
    "opt": "rows flattened for the FFN",
    "bloom": "dropout between branch and add",
    "cohere": "parallel, the stream innermost",
    "gptj": "parallel, the stream outermost",
    "falcon": "parallel, summed in place under dropout",
    "falcon_h1": "attention and state space side by side",
    "deepseek_v3": "latent attention, shared experts",
    "mixtral": "experts",
    "gemma3_text": "sliding and full attention",
    "gemma4_text": "inputs of each layer",
    "big_bird": "a tanh GELU in the head",
    "qwen3_next": "gated delta rule",
    "falcon_mamba": "state space alone, scans under vmap",
    "zamba": "side path into a branch",
    "lfm2": "short convolutions",
}
# type -> the structural reason that it has no single stream.
REASONS = {
    "gemma3n_text": "mixed by weights beside it",
    "hrm_text": "cache entries are computed outside the stream",
    "deepseek_v4": "mixes several streams with one another",
}


@pytest.mark.parametrize("family", MET)
def test_sublayers_are_found_and_skipped(family):
    found = examine(family, tiny_architecture(family), plans=2)
    found.streams = []
    assert verdict(found) == "yes", found


@pytest.mark.parametrize("family", REASONS)
def test_without_a_single_stream_a_model_runs_unskipped_and_says_why(family):
    found = examine(family, tiny_architecture(family))
    assert REASONS[family] in found.reason
    assert (found.sublayers, found.zero) == (0, "yes")


def test_parallel_branches_are_told_apart_only_where_one_mixes_tokens():
    prefill, _ = capture(tiny_architecture("gptj"))
    assert [item.kind for item in find_residual_stream(prefill.gm).sublayers] == ["attention", "attention"]
    assert applied(StraightenStream(), prefill.gm) > 0
    stream = find_residual_stream(prefill.gm)
    assert [item.kind for item in stream.sublayers] == ["attention", "ffn"] * 2
    assert [item.stateful for item in stream.sublayers] == [True, False] * 2
    for before, after in zip(stream.sublayers, stream.sublayers[1:], strict=False):
        assert after.stream_in is before.stream_out
        assert not set(before.nodes) & set(after.nodes)
    experts, _ = capture(tiny_architecture("deepseek_v3"))
    applied(StraightenStream(), experts.gm)
    assert len(find_residual_stream(experts.gm).sublayers) == 4


@pytest.mark.parametrize("family", ["llama", "gptj", "falcon"])
def test_straightening_keeps_values_and_happens_once(family):
    for captured in capture(tiny_architecture(family)):
        applied(StraightenStream(), captured.gm)
        assert applied(StraightenStream(), captured.gm) == 0
        inputs = [value.clone() if isinstance(value, torch.Tensor) else value for value in captured.inputs]
        for got, wanted in zip(captured.gm.forward(*inputs), captured.outputs, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


class _InPlace(nn.Module):
    """A residual block that adds to its stream in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(128, 16), nn.Linear(16, 128)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x += functional.relu(layer(x))
        return self.head(x)


def test_adds_in_place_become_values_of_their_own():
    prefill = capture(_InPlace().eval())[0]
    assert applied(StraightenStream(), prefill.gm) == 3
    assert len(find_residual_stream(prefill.gm).sublayers) == 3
    torch.testing.assert_close(prefill.gm.forward(*prefill.inputs), prefill.outputs, rtol=0, atol=0)


def test_a_plain_decoder_with_parallel_branches_needs_no_help():
    stream = analyze(plain(parallel=True), ids=tokens())
    assert [item.kind for item in stream.sublayers] == ["attention", "ffn"] * 2


@torch.library.custom_op("adaskip_tests::mix_heads", mutates_args=())
def mix_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


@mix_heads.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    return torch.empty_like(q)


class _CustomAttention(PlainAttention):
    def attend(self, q, k, v, causal):
        return mix_heads(q, k, v, causal)


@pytest.mark.parametrize("custom", [False, True])
def test_a_decoder_that_nobody_has_seen_is_skipped_as_the_reference_says(custom):
    model = plain(layers=3, cached=True)
    if custom:
        for block in model.blocks:
            block.attention = redraw(_CustomAttention(model.shape), seed=0)
    reference = copy.deepcopy(model)
    reference.blocks[1].forward = lambda x, past: (x * 0.9 * 1.1, None)
    wanted = request(reference)
    plan = SkipPlan.from_scales({"blocks.1.attention": 0.9, "blocks.1.ffn": 1.1})
    compiled = adaskip_compile.compile(model, plan, inner="eager")
    torch.testing.assert_close(request(compiled), wanted, rtol=1e-4, atol=1e-4)
    for stream in (graph.stream for session in sessions_of(compiled) for graph in session.graphs):
        assert [(item.kind, item.stateful) for item in stream.sublayers] == [("attention", True), ("ffn", False)] * 3


class _BreaksInDecode(PlainDecoder):
    """Its decode is captured in pieces, its prefill whole."""

    def forward(self, ids: torch.Tensor, past: list | None = None):
        if past is not None:
            torch._dynamo.graph_break()
        return super().forward(ids, past)


class _BreaksAmongLayers(nn.Module):
    """A block after which decode is captured in pieces."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None):
        x, present = self.block(x, past)
        if past is not None:
            torch._dynamo.graph_break()
        return x, present


def test_a_part_of_the_model_captured_on_its_own_keeps_its_place():
    model = _BreaksInDecode(plain(cached=True).shape).eval()
    model = redraw(model, seed=0)
    reference = copy.deepcopy(model)
    reference.blocks[1].forward = lambda x, past: (x * 0.9, None)
    plan = SkipPlan.from_scales({"blocks.1.attention": 0.9, "blocks.1.ffn": 1.0})
    compiled = adaskip_compile.compile(model, plan, inner="eager")
    torch.testing.assert_close(request(compiled), request(reference), rtol=1e-4, atol=1e-4)


def in_pieces():
    torch._dynamo.reset()  # it never captures a forward again whose layers it once gave up in a loop
    model = plain(layers=3, cached=True)
    model.blocks[0] = _BreaksAmongLayers(model.blocks[0])
    return model


def test_a_forward_in_pieces_runs_unskipped_and_says_so():
    model = in_pieces()
    wanted = request(model)
    compiled = adaskip_compile.compile(model, SkipPlan.none(), inner="eager")
    torch.testing.assert_close(request(compiled), wanted, rtol=1e-4, atol=1e-4)
    assert "runs unskipped" in str(adaskip_compile.report(compiled))


def test_a_forward_in_pieces_never_reads_a_hole():
    compiled = adaskip_compile.compile(in_pieces(), SkipPlan.from_scales({"blocks.1.attention": 0.9}), inner="eager")
    with pytest.raises(
        LegalityError, match=r"blocks\.1\.attention was skipped earlier.*other sublayers than the first"
    ):
        request(compiled)


def request(model):
    """Return the logits of a prompt and four more tokens."""
    with torch.no_grad():
        logits, past = model(tokens(1, 9))
        found = [logits[:, -1]]
        for step in range(4):
            logits, past = model(tokens(1, 1, seed=step + 1), past)
            found.append(logits[:, -1])
    return torch.stack(found)


@pytest.fixture
def llava():
    """Return a tiny model of text and images: a Llama that a vision tower hands embeddings."""
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

    sizes = {"intermediate_size": 96, "num_attention_heads": 4}
    text = LlamaConfig(hidden_size=64, num_hidden_layers=3, vocab_size=128, pad_token_id=0, eos_token_id=None, **sizes)
    vision = CLIPVisionConfig(hidden_size=32, num_hidden_layers=2, image_size=28, patch_size=14, **sizes)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=127, vision_feature_layer=-1)
    return redraw(AutoModelForImageTextToText.from_config(config).eval(), seed=0)


def test_a_multimodal_model_skips_in_its_language_model(llava):
    scales = {"model.language_model.layers.1.self_attn": 0.9, "model.language_model.layers.2.mlp": 1.1}
    ids = tokens(1, 9, vocabulary=127)
    image = torch.cat([ids[:, :3], torch.full((1, 4), 127), ids[:, 3:]], 1)  # four patches
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    wanted = {}
    with omit_sublayers(llava, scales), torch.no_grad():
        for name, how in (("text", {"input_ids": ids}), ("image", {"input_ids": image, "pixel_values": pixels})):
            wanted[name] = how, llava(**how).logits, llava.generate(**how, max_new_tokens=6, do_sample=False)
    adaskip_compile.compile(llava, SkipPlan.from_scales(scales), inner="eager")
    for how, logits, sequence in wanted.values():
        with torch.no_grad():
            torch.testing.assert_close(llava(**how).logits, logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(llava.generate(**how, max_new_tokens=6, do_sample=False), sequence)


def test_a_broken_graph_is_not_a_silent_match_of_nothing():
    prefill, _ = capture(tiny_architecture("llama"))
    adds = [item.stream_out for item in find_residual_stream(prefill.gm).sublayers]
    for add in adds:
        add.target = torch.maximum
    stream = find_residual_stream(prefill.gm)
    assert not stream.sublayers
    assert stream.problems == ("no add joins a value with a branch computed from it",)


def test_regions_are_disjoint_and_lie_between_their_adds():
    prefill, _ = capture(tiny_architecture("zamba"))
    dependence = Dependence(prefill.gm, find_effects(prefill.gm))
    chain = find_chain(prefill.gm, dependence)
    taken: set[object] = set()
    for link in chain.links:
        for part in link.parts:
            assert taken.isdisjoint(part.nodes)
            taken.update(part.nodes)
            assert all(dependence.depends(node, link.tree.stream) for node in part.nodes)
            assert not any(dependence.reaches(link.tree.add, node) for node in part.nodes)


def _code() -> Iterator[tuple[Path, str]]:
    for folder in (ROOT / "adaskip_compile", Path(adaskip_passes.__path__[0])):
        for path in folder.rglob("*.py"):
            yield path, path.read_text()


def test_no_model_type_or_class_is_named_in_the_code():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # Words with a meaning of their own, and the names of texts in docstrings' examples.
    ordinary = {"beam", "bart", "git", "opt", "ctrl", "flint", "fuyu"}
    types = {family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family not in ordinary}
    classes = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    for path, text in _code():
        strings = set(re.findall(r"""["']([\w-]+)["']""", text))
        words = set(re.findall(r"\w+", text))
        assert not strings & types, path
        assert not words & classes, path
