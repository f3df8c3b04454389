"""On a GPU: parity first, then speed of an 8B-shaped Llama with random weights, against eager and torch.compile.

    python -m bench.cuda --json results.json

Parity: in float32, a small model compiled with nothing skipped generates the tokens that eager generates; and with a
third of its sublayers skipped, those of the inner backend ``eager``. The bench stops where that fails. Speed: prefill and
decode at each context length with 0, 8 and 16 attentions skipped, in turn with eager and with ``torch.compile``
(default and reduce-overhead, the latter over a static cache, which it needs).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

import adaskip_compile
from adaskip_compile.cli.measure import Generation, generate, take_turns
from adaskip_compile.plans import SkipPlan
from bench.recording import cell, numbers, write

# Llama 3.1 8B.
SIZES: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
SMALL: dict[str, Any] = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, print a table, and write JSON where asked to."""
    arguments = _parse(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("error: PyTorch sees no CUDA device here\n")
        return 2
    _check_parity(arguments)
    rows = [row for context in arguments.contexts for row in _at(context, arguments)]
    _show(rows, arguments)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
    write({"device_name": name, "rows": rows}, arguments)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a small model, to try the bench itself")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 32768], metavar="TOKENS")
    parser.add_argument("--skips", type=int, nargs="+", default=[8, 16], metavar="K")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--rounds", type=int, default=4, metavar="N")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--json", metavar="PATH|-")
    return parser.parse_args(argv)


def _model(sizes: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=None)).eval()
    finally:
        torch.set_default_dtype(before)


def _check_parity(arguments: argparse.Namespace) -> None:
    model = _model(SMALL, torch.float32, arguments.device)
    ids = torch.randint(3, SMALL["vocab_size"], (1, 300), device=arguments.device)
    paths = adaskip_compile.analyze(model).paths
    wanted = generate(model, ids, 48).tokens
    for plan in (SkipPlan.none(), SkipPlan.from_scales(dict.fromkeys(paths[2::3], 0.97))):
        found = {}
        for inner in ("eager", arguments.inner):
            adaskip_compile.compile(model, plan, inner=inner)
            found[inner] = generate(model, ids, 48).tokens
        expected = found["eager"] if plan.paths else wanted
        if any(tokens != expected for tokens in found.values()):
            raise SystemExit(f"parity fails with {len(plan.paths)} sublayers skipped")
    print("parity: tokens equal eager's, in full and skipping", file=sys.stderr)


def _at(context: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    model = _model(SMALL if arguments.small else SIZES, dtype, arguments.device)
    ids = torch.randint(3, model.config.vocab_size, (1, context), device=arguments.device)
    attentions = [one.path for one in adaskip_compile.analyze(model).sublayers if one.kind == "attention"]
    ways: dict[str, Callable[[], Generation]] = {"eager": partial(_eager, model, ids, arguments.new_tokens)}
    for mode in ("default", "reduce-overhead"):
        ways[f"torch.compile, {mode}"] = partial(_inductor, model, ids, arguments.new_tokens, mode)
    for count in (0, *arguments.skips):
        plan = SkipPlan.from_scales(dict.fromkeys(attentions[2 : 2 + count], 1.0)) if count else SkipPlan.none()
        ways[f"adaskip, {len(plan.paths)} skipped"] = partial(_ours, model, ids, plan, arguments)
    take_turns(ways, 1)  # captures and compiles; not timed
    rounds = take_turns(ways, arguments.rounds)
    return [_row(context, name, rounds) for name in ways]


def _eager(model: Any, ids: torch.Tensor, new_tokens: int) -> Generation:
    model._compiled_call_impl = None
    return generate(model, ids, new_tokens)


@cache  # compiled once
def _compiled(model: Any, mode: str) -> Any:
    model.compile(mode=mode, dynamic=None if mode == "reduce-overhead" else True)
    return model._compiled_call_impl


def _inductor(model: Any, ids: torch.Tensor, new_tokens: int, mode: str) -> Generation:
    model._compiled_call_impl = _compiled(model, mode)
    cache = {"cache_implementation": "static"} if mode == "reduce-overhead" else {}
    return generate(model, ids, new_tokens, **cache)


def _ours(model: Any, ids: torch.Tensor, plan: SkipPlan, arguments: argparse.Namespace) -> Generation:
    adaskip_compile.compile(model, plan, inner=arguments.inner)
    return generate(model, ids, arguments.new_tokens)


def _row(context: int, name: str, rounds: dict[str, list[Generation]]) -> dict[str, Any]:
    row: dict[str, Any] = {"context": context, "way": name, "kv_bytes": rounds[name][-1].cache_bytes}
    for phase in ("prefill", "decode"):
        times = [run.seconds(phase) for run in rounds[name]]
        bases = [run.seconds(phase) for run in rounds["eager"]]
        row[phase] = numbers(times)
        row[f"{phase}_vs_eager"] = numbers([base / one for base, one in zip(bases, times, strict=True)])
    return row


def _show(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    out = sys.stderr if arguments.json == "-" else sys.stdout
    print("| tokens | way | prefill ms | vs eager | decode ms | vs eager | KV MB |", file=out)
    print("| --- | --- | --- | --- | --- | --- | --- |", file=out)
    for row in rows:
        cells = [str(row["context"]), row["way"]]
        for phase in ("prefill", "decode"):
            cells += [cell(row[phase], 1e3, 2), cell(row[f"{phase}_vs_eager"])]
        print(f"| {' | '.join(cells)} | {row['kv_bytes'] / 1e6:.1f} |", file=out)


if __name__ == "__main__":
    raise SystemExit(main())
