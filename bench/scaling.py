"""Does every skipped sublayer pay its full share? Measured speed-ups against ideal ones, in one run.

Ideal is the time of the full model's step less the time that exactly the skipped sublayers take in it: their regions
are timed inside of that step, call by call, on this machine (so on the CPU, where a call returns when it is done).
Attentions, FFNs and both mixed are skipped, spread evenly over the depth; all sets take turns in each round, and
ratios are taken within a round. ``inductor`` is ``torch.compile`` with its default backend on the whole graph.

    python -m bench.scaling --prefill 512 2048 4096 --decode 2048 6000 --json bench/results/scaling.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

import adaskip_compile
from adaskip_compile.checkpoints import load_checkpoint
from adaskip_compile.evaluation.timing import Generation, generate, take_turns
from adaskip_compile.lowering.executor import Executor
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.runtime.session import CapturedGraph, sessions_of
from adaskip_passes.analysis.regions import Region
from bench.recording import bench_parser, cell, generate_under, numbers, ratios, write

FULL, EAGER, WHOLE = "full", "eager", "inductor"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON and a plot where asked to."""
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    model, _ = load_checkpoint(arguments.model, dtype=getattr(torch, arguments.dtype))
    sets = _sets(model, arguments.skips)
    rows: list[dict[str, Any]] = []
    for context in sorted({*arguments.prefill, *arguments.decode}):
        rows += _at(model, sets, context, arguments)
        _show([row for row in rows if row["context"] == context], arguments)
    write({"rows": rows}, arguments)
    if arguments.plot:
        _plot(rows, arguments)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = bench_parser(str(__doc__), rounds=3)
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 2048, 4096], metavar="TOKENS")
    parser.add_argument("--decode", type=int, nargs="+", default=[2048, 6000], metavar="TOKENS")
    parser.add_argument("--skips", type=int, nargs="+", default=[4, 8, 16, 24], metavar="K")
    parser.add_argument("--new-tokens", type=int, default=16, metavar="N", help="decoded a round")
    parser.add_argument(
        "--whole", action="store_true", help="time torch.compile with Inductor too; compiles for minutes"
    )
    parser.add_argument("--plot", metavar="PATH", help="draw measured against ideal")
    return parser.parse_args(argv)


def _sets(model: Any, counts: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """Return the skip sets by name: ``k`` attentions, FFNs, or half of each, spread over the depth but for its ends."""
    inner = adaskip_compile.analyze(model).sublayers[2:-1]
    kinds = {kind: [one.path for one in inner if one.kind == kind] for kind in ("attention", "ffn")}
    found = {}
    for count in counts:
        for kind, paths in kinds.items():
            found[f"{count} {kind}"] = _spread(paths, count)
        found[f"{count} mixed"] = (
            *_spread(kinds["attention"], count // 2),
            *_spread(kinds["ffn"], count - count // 2),
        )
    return found


def _spread(paths: Sequence[str], count: int) -> tuple[str, ...]:
    count = min(count, len(paths))
    return tuple(paths[place * len(paths) // count] for place in range(count))


def _at(
    model: Any, sets: Mapping[str, tuple[str, ...]], context: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    ids = torch.randint(10, model.config.vocab_size, (1, context), generator=torch.manual_seed(0))
    plans = {FULL: SkipPlan.none()}
    plans |= {name: SkipPlan.from_scales(dict.fromkeys(paths, 1.0)) for name, paths in sets.items()}
    ways: dict[str, Callable[[], Generation]] = {EAGER: partial(_eager, model, ids, arguments.new_tokens)}
    ways |= {name: partial(generate_under, model, ids, plan, arguments) for name, plan in plans.items()}
    if arguments.whole:
        ways[WHOLE] = partial(generate, _whole(model), ids, arguments.new_tokens)
    take_turns(ways, 1)  # captures and compiles; not timed
    rounds = take_turns(ways, arguments.rounds)
    shares = _shares(model, ids, arguments)
    phases = [name for name, at in (("prefill", arguments.prefill), ("decode", arguments.decode)) if context in at]
    return [
        _row(phase, context, name, rounds, shares[phase], sets.get(name, ())) for phase in phases for name in rounds
    ]


@cache  # one copy a process, whatever the context
def _whole(model: Any) -> Any:
    whole = copy.deepcopy(model)
    whole._compiled_call_impl = None
    whole.compile(dynamic=True)
    return whole


def _eager(model: Any, ids: torch.Tensor, new_tokens: int) -> Generation:
    with torch.compiler.set_stance("force_eager"):
        return generate(model, ids, new_tokens)


def _row(
    phase: str,
    context: int,
    name: str,
    rounds: Mapping[str, list[Generation]],
    shares: Mapping[str, float],
    skipped: Sequence[str],
) -> dict[str, Any]:
    faster = {base: ratios(rounds[base], rounds[name], phase) for base in (FULL, EAGER)}
    ideal = 1 / (1 - sum(shares[path] for path in skipped))
    return {
        "phase": phase,
        "context": context,
        "way": name,
        "seconds": numbers([run.seconds(phase) for run in rounds[name]]),
        "vs_full": faster[FULL],
        "vs_eager": faster[EAGER],
        "ideal": round(ideal, 4),
        "of_ideal": round(faster[FULL][0] / ideal, 4),
    }


def _shares(model: Any, ids: torch.Tensor, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the share of each sublayer in the time of the full model's step, as its caller sees it, by phase and path."""
    shares: dict[str, dict[str, list[float]]] = {"prefill": {}, "decode": {}}
    adaskip_compile.compile(model, SkipPlan.none(), inner=arguments.inner)
    session = next(one for one in sessions_of(model) if one.options.inner == arguments.inner)
    for _ in range(arguments.rounds):
        seconds: dict[str, dict[str, list[float]]] = {"prefill": {}, "decode": {}}
        with _timed(session.graphs, seconds):
            run = generate(model, ids, arguments.new_tokens)
        for phase, each in seconds.items():
            for path, values in each.items():
                shares[phase].setdefault(path, []).append(statistics.median(values) / run.seconds(phase))
    return {phase: {path: statistics.median(values) for path, values in each.items()} for phase, each in shares.items()}


@contextmanager
def _timed(graphs: Sequence[CapturedGraph], found: dict[str, dict[str, list[float]]]) -> Iterator[None]:
    """Have the full variant of each of ``graphs`` note how many seconds of every call each sublayer takes."""
    before = []
    for graph in graphs:
        variant = next((one for one in graph.variants.values() if not one.skipped and not one.probed), None)
        if variant is None or not isinstance(variant.run, Executor):
            continue
        # Of a prompt, the graph of the rows that are read.
        cut = graph.variants.prepared[graph.variants.lowering, None, graph.stream.phase == "prefill"]
        calls = [node for node in cut.gm.graph.nodes if isinstance(node.target, Region)]
        owner = {sublayer.branch: sublayer.path for sublayer in cut.stream.sublayers}
        executor = variant.run
        before.append((graph, executor, executor._steps, variant))
        taken: dict[str, float] = {}
        regions = iter(calls)
        executor._steps = [
            replace(step, function=_clocked(step.function, owner.get(next(regions)), taken)) if step.items else step
            for step in executor._steps
        ]
        noted = replace(variant, run=_noting(executor, taken, found[graph.stream.phase]))
        graph.variants.made.update({key: noted for key, one in graph.variants.made.items() if one is variant})
    try:
        yield
    finally:
        for graph, executor, steps, variant in before:
            executor._steps = steps
            graph.variants.made.update({key: variant for key, one in graph.variants.made.items() if not one.skipped})


def _clocked(function: Callable[..., Any], path: str | None, taken: dict[str, float]) -> Callable[..., Any]:
    def call(*values: Any) -> Any:
        started = time.perf_counter()
        result = function(*values)
        if path is not None:
            taken[path] = time.perf_counter() - started
        return result

    return call


def _noting(
    executor: Executor, taken: Mapping[str, float], found: dict[str, list[float]]
) -> Callable[..., tuple[Any, ...]]:
    def call(*inputs: Any) -> tuple[Any, ...]:
        outputs = executor(*inputs)
        for path, seconds in taken.items():
            found.setdefault(path, []).append(seconds)
        return outputs

    return call


def _show(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    out = sys.stderr if arguments.json == "-" else sys.stdout
    print("| phase | tokens | way | ms | vs full | ideal | of ideal | vs eager |", file=out)
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", file=out)
    for row in rows:
        cells = [row["phase"], str(row["context"]), row["way"], cell(row["seconds"], 1e3, 1), cell(row["vs_full"])]
        cells += [f"{row['ideal']:.2f}", f"{row['of_ideal']:.0%}", cell(row["vs_eager"])]
        print(f"| {' | '.join(cells)} |", file=out, flush=True)


def _plot(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    from adaskip_compile.display.plots import write_plot

    def draw(axes: Any) -> None:
        chosen = [row for row in rows if row["way"] not in (FULL, EAGER, WHOLE)]
        for phase, context in dict.fromkeys((row["phase"], row["context"]) for row in chosen):
            points = [row for row in chosen if (row["phase"], row["context"]) == (phase, context)]
            axes.scatter(
                [row["ideal"] for row in points], [row["vs_full"][0] for row in points], label=f"{phase}, {context:,}"
            )
        top = max(row["ideal"] for row in chosen)
        axes.plot([1, top], [1, top], color="grey")
        axes.plot([1, top], [0.95, 0.95 * top], color="grey", linestyle=":")
        axes.legend()

    title = "Speed-up by skipping: measured against ideal"
    write_plot(arguments.plot, draw, title=title, xlabel="ideal", ylabel="measured")


if __name__ == "__main__":
    raise SystemExit(main())
