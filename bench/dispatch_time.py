"""What does a decoded token cost beside its graph? Time in the dispatcher less time in what it runs.

Whose cache a call's is, which variant runs, room for its token, and what is noted of it: all of that is the dispatcher's. Each
plan decodes after a short prompt, by turns; a step's time is split by a clock around the dispatcher and one around the variant.

    python -m bench.dispatch_time --model smollm2 --threads 1 --json bench/results/dispatch_time.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

import adaskip_compile
from adaskip_compile.checkpoints import load_checkpoint
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.runtime.dispatch import Dispatcher
from adaskip_compile.runtime.session import sessions_of
from bench.recording import bench_parser, cell, generate_under, numbers, write


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write JSON where asked to."""
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    model, _ = load_checkpoint(arguments.model, dtype=getattr(torch, arguments.dtype))
    ids = torch.randint(10, model.config.vocab_size, (1, arguments.context), generator=torch.manual_seed(0))
    attentions = [item.path for item in adaskip_compile.analyze(model).sublayers if item.kind == "attention"]
    skipping = SkipPlan.from_scales(dict.fromkeys(attentions[3:11], 1.0), window=0)
    plans = {"nothing skipped": SkipPlan.none(), "8 skipped": skipping}
    for plan in plans.values():
        generate_under(model, ids, plan, arguments)  # captures and compiles; not timed
    rounds: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(arguments.rounds):
        for name, plan in plans.items():
            with _timed(model) as (whole, inside):
                generate_under(model, ids, plan, arguments)
            rounds[name].append(
                1e6 * statistics.median(all_of - part for all_of, part in zip(whole, inside, strict=True))
            )
    results = {name: numbers(found) for name, found in rounds.items()}
    out = sys.stderr if arguments.json == "-" else sys.stdout
    for name, value in results.items():
        print(f"{name:18} {cell(value, digits=0)} us a token", file=out)
    write(results, arguments)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = bench_parser(str(__doc__), context=64, rounds=7)
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="decoded a round")
    return parser.parse_args(argv)


@contextmanager
def _timed(model: Any) -> Iterator[tuple[list[float], list[float]]]:
    """Within it, yield the seconds of each decode step in the dispatcher, and those of them in the variant."""
    whole: list[float] = []
    inside: list[float] = []
    decoding = [graph for one in sessions_of(model) for graph in one.graphs if graph.stream.phase == "decode"]
    kept = [dict(graph.variants.made) for graph in decoding]
    for graph in decoding:
        timed = {key: replace(one, run=_clocked(one.run, inside)) for key, one in graph.variants.made.items()}
        graph.variants.made.update(timed)
    call = Dispatcher.__call__

    def clocked(dispatcher: Dispatcher, *inputs: Any) -> Any:
        began = time.perf_counter()
        outputs = call(dispatcher, *inputs)
        if dispatcher.stream.phase == "decode":
            whole.append(time.perf_counter() - began)
        return outputs

    Dispatcher.__call__ = clocked  # type: ignore[method-assign]
    try:
        yield whole, inside
    finally:
        Dispatcher.__call__ = call  # type: ignore[method-assign]
        for graph, made in zip(decoding, kept, strict=True):
            graph.variants.made.update(made)


def _clocked(run: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*values: Any) -> Any:
        began = time.perf_counter()
        outputs = run(*values)
        seconds.append(time.perf_counter() - began)
        return outputs

    return timed


if __name__ == "__main__":
    raise SystemExit(main())
