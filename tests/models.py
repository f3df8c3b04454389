"""Tiny random decoders, and the graphs that Dynamo captures from them.

Two sources of models: hand-written ``nn.Module`` decoders that know nothing of any library
(:class:`PlainDecoder`), and tiny random configurations of ``transformers`` families
(:func:`tiny`). :func:`capture` records the graphs of one of them.

The weights are drawn wide (unit gain a matrix, norms and biases off their identity), so that each
sublayer moves the stream by a tenth or more: skipping the wrong one cannot pass a comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.nn import functional

from adaskip_compile.kv_cache.cache_argument import cache_argument
from adaskip_passes.ir.module_paths import naming
from adaskip_passes.stream.stream import Phase

Model = TypeVar("Model", bound=nn.Module)

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

# What each family needs beyond SIZES to stay tiny. The keys are transformers' model types.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_inner": 96},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, **MOE},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": {},
    "phi": {},
    "cohere": {},
    "stablelm": {"use_parallel_residual": True},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "bloom": {},
    "mamba": {"state_size": 8},
}


def tiny(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """Return a tiny random causal language model of a ``transformers`` family, in eval mode.

    ``overrides`` go to the configuration (``num_hidden_layers=4``, ``tie_word_embeddings=True``).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    return redraw(model, seed)


def redraw(model: Model, seed: int) -> Model:
    """Draw all parameters of ``model`` again, wide, and return it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    return model


def tokens(batch: int = 1, length: int = 8, *, vocabulary: int = 128, seed: int = 0) -> torch.Tensor:
    """Return random token ids ``(batch, length)`` that avoid the special ids 0, 1 and 2."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


@dataclass(frozen=True)
class PlainShape:
    """What a :class:`PlainDecoder` looks like; sizes are elements.

    ``norms`` is where norms stand, see :class:`PlainBlock`; ``multiplier`` what every branch is multiplied by.
    """

    layers: int = 2
    width: int = 64
    heads: int = 4
    inner: int = 96
    vocabulary: int = 128
    parallel: bool = False
    cached: bool = False
    kv_heads: int = 4
    norms: str = "pre"
    multiplier: float = 1.0
    tied: bool = False
    experts: int = 0


class PlainAttention(nn.Module):
    """Causal self-attention; concatenates to ``past`` keys and values where it gets them."""

    def __init__(self, shape: PlainShape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = shape.heads, shape.kv_heads, shape.width // shape.heads
        self.qkv = nn.Linear(shape.width, (shape.heads + 2 * shape.kv_heads) * self.size)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None):
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, -1, self.size).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mixed = self.attend(q, k, v, past is None)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width)), (k, v)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        grouped = self.kv_heads < self.heads
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


class PlainExperts(nn.Module):
    """A mixture of FFNs, each of which all tokens run through, weighted by a router."""

    def __init__(self, shape: PlainShape) -> None:
        super().__init__()
        self.router = nn.Linear(shape.width, shape.experts)
        self.experts = nn.ModuleList(_ffn(shape) for _ in range(shape.experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.router(x).softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], -1)
        return (outputs * weights.unsqueeze(-2)).sum(-1)


def _ffn(shape: PlainShape) -> nn.Module:
    return nn.Sequential(nn.Linear(shape.width, shape.inner), nn.GELU(), nn.Linear(shape.inner, shape.width))


class PlainBlock(nn.Module):
    """A block whose attention and FFN stand one after the other or side by side, with norms where ``norms`` says.

    ``"pre"`` norms what a branch reads, ``"post"`` the sum after it, ``"sandwich"`` what it reads and
    what it gives.
    """

    def __init__(self, shape: PlainShape) -> None:
        super().__init__()
        self.shape = shape
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        if shape.norms == "sandwich":
            self.norm3, self.norm4 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.attention = PlainAttention(shape)
        self.ffn = PlainExperts(shape) if shape.experts else _ffn(shape)

    def forward(self, x: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None):
        norms, by = self.shape.norms, self.shape.multiplier
        mixed, present = self.attention(x if norms == "post" else self.norm1(x), past)
        if norms == "sandwich":
            mixed = self.norm3(mixed)
        if self.shape.parallel:
            return x + by * mixed + by * self.ffn(self.norm2(x)), present
        x = x + by * mixed
        if norms == "post":
            x = self.norm1(x)
            return self.norm2(x + by * self.ffn(x)), present
        fed = self.ffn(self.norm2(x))
        return x + by * (self.norm4(fed) if norms == "sandwich" else fed), present


class PlainDecoder(nn.Module):
    """A decoder in the style of nanoGPT: ``forward(ids) -> logits``.

    With ``cached`` it is ``forward(ids, past=None) -> (logits, past)``, its cache a plain list of
    ``(keys, values)`` pairs of shape ``(batch, heads, tokens, head_dim)``.
    """

    def __init__(self, shape: PlainShape = PlainShape()) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(256, shape.width)
        self.blocks = nn.ModuleList(PlainBlock(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, past: list | None = None):
        start = 0 if past is None else past[0][0].shape[2]
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        x = self.embed(ids) + self.positions(positions)
        present = []
        for index, block in enumerate(self.blocks):
            x, pair = block(x, None if past is None else past[index])
            present.append(pair)
        logits = self.head(self.norm(x))
        return (logits, present) if self.shape.cached else logits


def plain(*, seed: int = 0, **shape: Any) -> PlainDecoder:
    """Return a random :class:`PlainDecoder` in eval mode; keywords are :class:`PlainShape`'s."""
    torch.manual_seed(seed)
    return redraw(PlainDecoder(PlainShape(**shape)).eval(), seed)


@dataclass(frozen=True)
class Captured:
    """One graph that Dynamo captured, and what its first call got and gave.

    ``inputs`` and ``outputs`` are real values, cloned before the call could write to them
    (parameters excepted), so that the graph can be run again and compared bit for bit. ``call`` counts
    the calls of the model: graphs of one call are the fragments that a graph break left.
    """

    gm: fx.GraphModule
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    phase: Phase
    call: int


def _keep(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter):
        return value
    return value.detach().clone()


class _Recorder:
    """A Dynamo backend that runs each graph as it is and records its first call."""

    def __init__(self) -> None:
        self.captured: list[Captured] = []
        self.phase: Phase = "prefill"
        self.call = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        index = len(self.captured)
        self.captured.append(Captured(gm, (), (), self.phase, self.call))

        def run(*inputs: Any) -> Any:
            if self.captured[index].inputs:
                return gm.forward(*inputs)
            kept = tuple(_keep(value) for value in inputs)
            outputs = gm.forward(*inputs)
            given = tuple(_keep(value) for value in outputs)
            self.captured[index] = replace(self.captured[index], inputs=kept, outputs=given)
            return outputs

        return run


def capture_all(
    model: nn.Module,
    *,
    cache: str = "dynamic",
    batch: int = 1,
    length: int = 8,
    dynamic: bool | None = True,
    requests: int = 1,
) -> list[Captured]:
    """Capture every graph of ``requests`` requests of ``length``, ``length + 3``, ... prompt tokens.

    ``model`` is compiled as ``model.compile`` does it and left as it was. A ``transformers`` model
    runs its own ``generate``; with ``cache="static"`` all requests share one cache, so the first one
    makes its buffers inside the graph and a second one is given them. Any other model is called with
    ids alone, then with what it returned as cache.
    """
    torch._dynamo.reset()
    recorder = _Recorder()
    compiled = torch.compile(model._call_impl, backend=naming(model, recorder), dynamic=dynamic)

    def call(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        recorder.phase = "prefill" if ids.shape[1] > 1 else "decode"
        recorder.call += 1
        return compiled(*args, **kwargs)

    run = partial(_generate, model, cache=_static_cache(model) if cache == "static" else None)
    if not hasattr(model, "generate"):
        run = _call_twice
    with torch.no_grad():
        for index in range(requests):
            run(call, tokens(batch, length + 3 * index, seed=index))
    return recorder.captured


def capture(model: nn.Module, **how: Any) -> tuple[Captured, Captured]:
    """Return the last prefill and the last decode graph of :func:`capture_all` (same keywords).

    The last, because Dynamo replaces a graph by a more general one where the first was too narrow.
    """
    captured = capture_all(model, **how)
    if len({one.call for one in captured}) < len(captured):
        raise RuntimeError("a call of the model was captured in several graphs")
    graphs = {one.phase: one for one in captured}
    return graphs["prefill"], graphs["decode"]


def _static_cache(model: Any) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=64)


def _generate(model: Any, call: Callable[..., Any], ids: torch.Tensor, *, cache: Any) -> None:
    if cache is not None:
        cache.reset()
    model._compiled_call_impl = call
    try:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **cache_argument(model, cache),
            max_new_tokens=5,
            do_sample=False,
            disable_compile=True,
        )
    finally:
        model._compiled_call_impl = None


def _call_twice(call: Callable[..., Any], ids: torch.Tensor) -> None:
    result = call(ids)
    if not isinstance(result, tuple):
        call(ids[:, :1])
        return
    for _ in range(3):
        result = call(ids[:, :1], result[1])


def weights(*shape: int) -> nn.Parameter:
    """Return a random matrix of weights for a function that is captured on its own: only a model's own are weights."""
    return nn.Parameter(torch.randn(*shape), requires_grad=False)
