"""What does a skip set cost that was never seen before? Time of its first steps, captures, compilations, memory.

One process meets random skip sets, a request each. Compared within a request: its first decode step, which has
to wire the new set, with the median of those that follow; and with the first step of requests whose set is known,
since a first step after a prefill is slow by itself.

    python -m bench.skip_sets --model smollm2 --sets 200 --json bench/results/skip_sets.json
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import psutil
import torch

import adaskip_compile
from adaskip_compile.capture.dynamo import capture_count
from adaskip_compile.checkpoints import load_checkpoint
from adaskip_compile.kv_cache.cache_argument import cache_argument, cache_of
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.runtime.session import sessions_of
from bench.recording import bench_parser, cell, numbers, write

STEPS = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write JSON where asked to."""
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    model, _ = load_checkpoint(arguments.model, dtype=getattr(torch, arguments.dtype))
    adaskip_compile.compile(model, SkipPlan.none(), inner=arguments.inner)
    ids = torch.randint(10, model.config.vocab_size, (1, arguments.context), generator=torch.manual_seed(0))
    _request(model, ids)  # captures and compiles
    paths = sessions_of(model)[0].graphs[0].stream.paths
    draw = random.Random(0)
    known = [_request(model, ids) for _ in range(10)]
    before = (capture_count(), _compiled(model))
    new: list[list[float]] = []
    memory: list[int] = []
    for _ in range(arguments.sets):
        chosen = draw.sample(paths, draw.randint(1, len(paths) // 3))
        adaskip_compile.compile(model, SkipPlan.from_scales(dict.fromkeys(chosen, 1.0)), inner=arguments.inner)
        new.append(_request(model, ids))
        memory.append(_memory())
    captured, compiled = (now - then for now, then in zip((capture_count(), _compiled(model)), before, strict=True))
    results = {
        "prefill_new_vs_known": numbers([run[0] / statistics.median(one[0] for one in known) for run in new]),
        "first_step_new_vs_ordinary": numbers([run[1] / statistics.median(run[2:]) for run in new]),
        "first_step_known_vs_ordinary": numbers([run[1] / statistics.median(run[2:]) for run in known]),
        "captures": captured,
        "compilations": compiled,
        "memory_growth_in_second_half_MB": (memory[-1] - memory[len(memory) // 2]) / 1e6,
    }
    out = sys.stderr if arguments.json == "-" else sys.stdout
    print(f"{arguments.model}, {arguments.context} tokens, {arguments.sets} random skip sets", file=out)
    for name, value in results.items():
        print(f"{name:34} {cell(value) if isinstance(value, tuple) else value}", file=out)
    write(results, arguments)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = bench_parser(str(__doc__), context=128)
    parser.add_argument("--sets", type=int, default=200, metavar="N")
    return parser.parse_args(argv)


def _memory() -> int:
    """Return the bytes of memory in use; what is free, and only kept by the C library, does not count."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
    return psutil.Process().memory_info().rss


def _compiled(model: Any) -> int:
    return sum(graph.variants.lowering.compiled for session in sessions_of(model) for graph in session.graphs)


@torch.no_grad()
def _request(model: Any, ids: torch.Tensor) -> list[float]:
    """Return the seconds of a prefill and of each decode step after it."""
    seconds: list[float] = []
    cache, tokens = None, ids
    for _ in range(1 + STEPS):
        started = time.perf_counter()
        result = model(tokens, use_cache=True, logits_to_keep=1, **cache_argument(model, cache))
        seconds.append(time.perf_counter() - started)
        cache, tokens = cache_of(result), result.logits[:, -1:].argmax(-1)
    return seconds


if __name__ == "__main__":
    raise SystemExit(main())
