"""What does profiling cost beside plain forward passes over the same samples, its capture included?

Each round profiles from nothing, as a process of its own would (Dynamo forgets its captures before), and runs the eager
model over the same samples, as it comes and with the logits of the last token alone, which is what profiling asks for.

    python -m bench.profiling_cost --model smollm2 --samples 20 --length 2048 --json bench/results/profiling_cost.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import adaskip_compile
from adaskip_compile.checkpoints import load_checkpoint
from bench.recording import bench_parser, cell, numbers, write


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write JSON where asked to."""
    arguments = bench_parser(str(__doc__), samples=20, length=2048, rounds=3).parse_args(argv)
    torch.set_num_threads(arguments.threads)
    model, _ = load_checkpoint(arguments.model, dtype=getattr(torch, arguments.dtype))
    shape = (arguments.samples, 1, arguments.length)
    samples = list(torch.randint(10, model.config.vocab_size, shape, generator=torch.manual_seed(0)))
    ways: dict[str, Callable[[], Any]] = {
        "all logits": lambda: _plain(model, samples),
        "last logits": lambda: _plain(model, samples, logits_to_keep=1),
        "profile": lambda: _profile(model, samples),
    }
    _plain(model, samples[:1])  # touches the weights once; not timed
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(arguments.rounds):
        for way, work in ways.items():
            started = time.perf_counter()
            work()
            seconds[way].append(time.perf_counter() - started)
    rows = [
        {
            "way": way,
            "seconds": numbers(times),
            "profile_vs_this": numbers([ours / plain for ours, plain in zip(seconds["profile"], times, strict=True)]),
        }
        for way, times in seconds.items()
    ]
    out = sys.stderr if arguments.json == "-" else sys.stdout
    print("| forwards | seconds | profile takes |", "| --- | --- | --- |", sep="\n", file=out)
    for row in rows:
        print(f"| {row['way']} | {cell(row['seconds'], 1, 1)} | {cell(row['profile_vs_this'])} |", file=out)
    write({"rows": rows}, arguments)
    return 0


@torch.no_grad()
def _plain(model: Any, samples: Sequence[torch.Tensor], **more: int) -> None:
    for ids in samples:
        model(ids, **more)


def _profile(model: Any, samples: Sequence[torch.Tensor]) -> None:
    torch._dynamo.reset()
    adaskip_compile.profile(model, samples, max_samples=len(samples), progress=False)


if __name__ == "__main__":
    raise SystemExit(main())
