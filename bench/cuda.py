"""On a GPU: parity first, then speed of an 8B-shaped Llama with random weights, against eager and torch.compile.

    python -m bench.cuda --json results.json

Parity: in float32, a small model compiled with nothing skipped generates the tokens that eager generates, with a cache
that grows and with one of fixed size; and with a third of its sublayers skipped, those of the inner backend ``eager``.
The bench stops where that fails. Speed: prefill and decode at each context length with 0, 8 and 16 attentions skipped,
with both caches, against eager, ``torch.compile`` of the whole model, and what transformers does by itself with a cache
of fixed size (decode compiled with ``reduce-overhead``). These compile at the same time, each in a process with a model
of its own of the same weights; then all take turns, one at a time. ``first`` is the time of the first request, which
compiles; where it takes longer than ``--patience``, that way is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import cache, partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

import adaskip_compile
from adaskip_compile.evaluation.timing import Generation, generate
from adaskip_compile.planning.skip_plan import SkipPlan
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
EAGER = "eager"
# What transformers does with a cache of fixed size, but for compiling it.
STATIC: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, print a table, and write JSON where asked to."""
    arguments = _parse(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("error: PyTorch sees no CUDA device here\n")
        return 2
    crews = [Crew(names, arguments) for names in _crews(arguments)]
    try:
        for crew in crews:
            crew.tell(arguments.contexts[0])
        _check_parity(arguments)
        rows: list[dict[str, Any]] = []
        _show(None, arguments)
        for context in arguments.contexts:
            found = _at(context, crews, arguments)
            rows += found
            _show(found, arguments)
    finally:
        for crew in crews:
            crew.dismiss()
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
    write({"device_name": name, "rows": rows}, arguments)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a small model, to try the bench itself")
    parser.add_argument("--layers", type=int, metavar="N", help="another depth")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 32768], metavar="TOKENS")
    parser.add_argument("--skips", type=int, nargs="+", default=[8, 16], metavar="K")
    parser.add_argument("--caches", nargs="+", default=["dynamic", "static"], choices=("dynamic", "static"))
    parser.add_argument("--against", nargs="*", default=["default", "reduce-overhead"], metavar="MODE")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--rounds", type=int, default=4, metavar="N")
    parser.add_argument("--patience", type=float, default=3600, metavar="SECONDS", help="for a first request")
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
            for kind in arguments.caches:
                adaskip_compile.compile(model, plan, inner=inner)
                found[inner, kind] = generate(model, ids, 48, **_cache(kind)).tokens
        expected = found["eager", arguments.caches[0]] if plan.paths else wanted
        if any(tokens != expected for tokens in found.values()):
            raise SystemExit(f"parity fails with {len(plan.paths)} sublayers skipped: {found}, wanted {expected}")
    print("parity: tokens equal eager's, in full and skipping", file=sys.stderr, flush=True)


def _cache(kind: str) -> dict[str, Any]:
    return STATIC if kind == "static" else {}


class Crew:
    """A process with a model of its own, which runs the ways ``names`` when it is told to."""

    def __init__(self, names: Sequence[str], arguments: argparse.Namespace) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.names, self._patience = list(names), arguments.patience
        self._process = context.Process(target=_work, args=(theirs, list(names), arguments), daemon=True)
        self._process.start()
        self.told: int | None = None

    def tell(self, context: int) -> None:
        """Have it run each of its ways once at ``context``; :meth:`ready` tells how long each took."""
        if self.names and self.told != context:
            self.told, self._since = context, time.monotonic()
            self._pipe.send(context)

    def ready(self) -> dict[str, float | str]:
        """Return the seconds that each way took, or why it did not work; those that took too long are left out."""
        found: dict[str, float | str] = {}
        for name in self.names:
            left = self._patience - (time.monotonic() - self._since)
            if not self._pipe.poll(max(left, 0)):
                late = self.names[len(found) :]
                self.dismiss()
                self.names = []
                return found | dict.fromkeys(late, f"no first token after {self._patience:.0f} s")
            found[name] = self._pipe.recv()
        self.names = [name for name in self.names if not isinstance(found[name], str)]
        return found

    def run(self, name: str) -> Generation:
        """Have it run one way, and return what it measured."""
        self._pipe.send(name)
        return self._pipe.recv()

    def dismiss(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _crews(arguments: argparse.Namespace) -> list[list[str]]:
    """Return the names of all ways, those of one process together."""
    ours = [_name(count, kind) for kind in arguments.caches for count in (0, *arguments.skips)]
    return [[EAGER, *ours], *([mode] for mode in arguments.against)]


def _name(count: int, kind: str) -> str:
    return f"adaskip, {count} skipped" + (", fixed cache" if kind == "static" else "")


def _work(pipe: Connection, names: Sequence[str], arguments: argparse.Namespace) -> None:
    """Run what comes through ``pipe``: a number is a context, for which all ways run once, and a text one of ``names``."""
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    sizes = dict(SMALL if arguments.small else SIZES)
    model = _model(
        sizes | ({"num_hidden_layers": arguments.layers} if arguments.layers else {}), dtype, arguments.device
    )
    ways = _ways(model, arguments)
    ids = torch.empty(0)
    while True:
        told = pipe.recv()
        if isinstance(told, str):
            pipe.send(ways[told](ids))
            continue
        generator = torch.Generator().manual_seed(told)
        ids = torch.randint(3, sizes["vocab_size"], (1, told), generator=generator).to(arguments.device)
        for name in names:
            started = time.perf_counter()
            try:
                ways[name](ids)
                pipe.send(time.perf_counter() - started)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other ways go on, and the table tells it
                traceback.print_exc()
                pipe.send(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


def _ways(model: Any, arguments: argparse.Namespace) -> dict[str, Callable[[torch.Tensor], Generation]]:
    attentions = [one.path for one in adaskip_compile.analyze(model).sublayers if one.kind == "attention"]
    ways: dict[str, Callable[[torch.Tensor], Generation]] = {EAGER: partial(_eager, model, arguments)}
    ways["default"] = partial(_compiled, model, arguments)
    ways["reduce-overhead"] = partial(_by_transformers, model, arguments)
    for kind in arguments.caches:
        for count in (0, *arguments.skips):
            plan = SkipPlan.from_scales(dict.fromkeys(attentions[2 : 2 + count], 1.0)) if count else SkipPlan.none()
            ways[_name(count, kind)] = partial(_ours, model, arguments, plan, kind)
    return ways


def _eager(model: Any, arguments: argparse.Namespace, ids: torch.Tensor) -> Generation:
    model._compiled_call_impl = None
    return generate(model, ids, arguments.new_tokens)


@cache  # compiled once
def _whole(model: Any) -> Any:
    model.compile(dynamic=True)
    return model._compiled_call_impl


def _compiled(model: Any, arguments: argparse.Namespace, ids: torch.Tensor) -> Generation:
    model._compiled_call_impl = _whole(model)
    return generate(model, ids, arguments.new_tokens)


def _by_transformers(model: Any, arguments: argparse.Namespace, ids: torch.Tensor) -> Generation:
    model._compiled_call_impl = None
    return generate(model, ids, arguments.new_tokens, cache_implementation="static")


def _ours(model: Any, arguments: argparse.Namespace, plan: SkipPlan, kind: str, ids: torch.Tensor) -> Generation:
    adaskip_compile.compile(model, plan, inner=arguments.inner)
    return generate(model, ids, arguments.new_tokens, **_cache(kind))


def _at(context: int, crews: Sequence[Crew], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    for crew in crews:
        crew.tell(context)
    first: dict[str, float | str] = {}
    for crew in crews:
        first |= crew.ready()
    rounds: dict[str, list[Generation]] = {name: [] for crew in crews for name in crew.names}
    for _ in range(arguments.rounds):
        for crew in crews:
            for name in crew.names:
                rounds[name].append(crew.run(name))
    return [_row(context, name, seconds, rounds) for name, seconds in first.items()]


def _row(context: int, name: str, first: float | str, rounds: dict[str, list[Generation]]) -> dict[str, Any]:
    row: dict[str, Any] = {"context": context, "way": name}
    if isinstance(first, str):
        return {**row, "failed": first}
    row |= {"first": round(first, 1), "kv_bytes": rounds[name][-1].cache_bytes}
    for phase in ("prefill", "decode"):
        times = [run.seconds(phase) for run in rounds[name]]
        bases = [run.seconds(phase) for run in rounds[EAGER]]
        row[phase] = numbers(times)
        row[f"{phase}_vs_eager"] = numbers([base / one for base, one in zip(bases, times, strict=True)])
    return row


def _show(rows: Sequence[dict[str, Any]] | None, arguments: argparse.Namespace) -> None:
    """Print ``rows`` of the table, or its head where they are None."""
    out = sys.stderr if arguments.json == "-" else sys.stdout
    if rows is None:
        print("| tokens | way | first s | prefill ms | vs eager | decode ms | vs eager | KV MB |", file=out)
        print("| --- | --- | ---: | --- | --- | --- | --- | ---: |", file=out, flush=True)
    for row in rows or ():
        cells = [str(row["context"]), row["way"]]
        if "failed" in row:
            print(f"| {' | '.join(cells)} | {row['failed']} |", file=out, flush=True)
            continue
        cells.append(f"{row['first']:.1f}")
        for phase in ("prefill", "decode"):
            cells += [cell(row[phase], 1e3, 2), cell(row[f"{phase}_vs_eager"])]
        print(f"| {' | '.join(cells)} | {row['kv_bytes'] / 1e6:.1f} |", file=out, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
