"""Does skipping in the prompt pay what its arithmetic says? Full, eager and plans that keep keys and values, in turn.

A plan skips the deepest ``A`` attentions and ``F`` FFNs of layers below the last one, and with ``A,F,W`` the attentions of the
deepest ``W`` that it does not skip have a window; ``--sets`` names several. Ideal is what
is left to multiply: keys and values, edges and maps counted. What maps hold makes no difference to time, so they are random here.

    python -m bench.prompts --model smollm2 --contexts 1024 4096 --sets 10,10 --json bench/results/prompts.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from adaskip_compile.checkpoints import load_checkpoint
from adaskip_compile.evaluation.timing import take_turns
from adaskip_compile.fitting.depths import Depths, layers_from_the_end
from adaskip_compile.fitting.loss_budget import prompt_flops
from adaskip_compile.inspection.phase_graphs import capture_phases
from adaskip_compile.planning.prompt_skips import PromptSkips
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.planning.skipped_sublayer import SkippedSublayer
from adaskip_compile.profiling.stream_maps import StreamMap
from adaskip_passes.pipeline.derived_graph import DerivedGraph
from adaskip_passes.pipelines import row_passes
from adaskip_passes.specialise.stream_maps import part_shapes
from adaskip_passes.stream.stream import ResidualStream
from bench.recording import bench_parser, cell, generate_eagerly, generate_under, numbers, ratios, write

EAGER, FULL = "eager", "full"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write JSON where asked to."""
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    model, _ = load_checkpoint(arguments.model, dtype=getattr(torch, arguments.dtype))
    prefill, _ = capture_phases(model)
    plans = {str(one): _plan(model, prefill.stream, one, arguments) for one in arguments.sets}
    rows = [row for context in arguments.contexts for row in _rows(model, prefill, plans, context, arguments)]
    _show(rows, arguments)
    write({"rows": rows}, arguments)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = bench_parser(str(__doc__), rounds=5)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024], metavar="N", help="tokens of the prompts")
    parser.add_argument(
        "--sets", type=depths, nargs="+", default=[Depths(10, 10)], metavar="A,F,W", help="how deep to skip"
    )
    parser.add_argument("--rank", type=int, metavar="N", help="of the maps (default: a quarter of the width)")
    parser.add_argument(
        "--unit-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of FFNs' units in gated maps, 0 for low-rank ones",
    )
    parser.add_argument("--new-tokens", type=int, default=6, metavar="N", help="decoded a round")
    return parser.parse_args(argv)


def depths(text: str) -> Depths:
    """Parse how many attentions, how many FFNs, and of how many layers the attentions have a window."""
    attentions, ffns, *windows = map(int, text.split(","))
    return Depths(attentions, ffns, *windows)


def _plan(model: Any, stream: ResidualStream, deep: Depths, arguments: argparse.Namespace) -> SkipPlan:
    layers = layers_from_the_end(stream)
    chosen = set(deep.skipped(layers))
    taken = [one for one in stream.sublayers if one.path in chosen]
    width = int(stream.sublayers[0].stream_in.meta["example_value"].shape[-1])
    low_rank, units = arguments.rank or width // 4, round(arguments.unit_share * model.config.intermediate_size)
    maps = {
        one.path: _random_map("gated", width, units)
        if units and one.kind == "ffn"
        else _random_map("low_rank", width, low_rank)
        for one in taken
    }
    skipped = tuple(SkippedSublayer(one.path, "", None, 1.0, None) for one in taken)
    return replace(SkipPlan.none(), policy="explicit", prompt=PromptSkips(skipped, maps, windows=deep.windowed(layers)))


def _random_map(form: str, width: int, rank: int) -> StreamMap:
    shapes = part_shapes(form, width, rank)
    return StreamMap(form, {name: torch.randn(shape) / width for name, shape in shapes.items()}, None)


def _rows(
    model: Any, prefill: Any, plans: dict[str, SkipPlan], context: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    ids = torch.randint(10, model.config.vocab_size, (1, context), generator=torch.manual_seed(0))
    ways: dict[str, Any] = {
        FULL: partial(generate_under, model, ids, SkipPlan.none(), arguments),
        EAGER: partial(generate_eagerly, model, ids, arguments.new_tokens),
        **{name: partial(generate_under, model, ids, plan, arguments) for name, plan in plans.items()},
    }
    take_turns(ways, 1)  # captures and compiles; not timed
    rounds = take_turns(ways, arguments.rounds)
    return [
        {
            "context": context,
            "way": way,
            "prompt": numbers([run.seconds("prefill") for run in runs]),
            "against_eager": ratios(rounds[EAGER], runs, "prefill"),
            "against_full": ratios(rounds[FULL], runs, "prefill"),
            "decode_against_full": ratios(rounds[FULL], runs, "decode"),
            "ideal": round(_ideal(prefill, plans[way], context), 3) if way in plans else None,
        }
        for way, runs in rounds.items()
    ]


def _ideal(prefill: Any, plan: SkipPlan, context: int) -> float:
    assert plan.prompt is not None
    body = plan.prompt.as_pass(prefill.stream.paths)
    graph = DerivedGraph(prefill.gm, prefill.stream).for_rows(body.least_rows, body.fewest_rows)
    full, short = (graph.run(row_passes(one)).gm for one in (None, body))
    return prompt_flops(full, context) / prompt_flops(short, context)


def _show(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    out = sys.stderr if arguments.json == "-" else sys.stdout
    print(f"{arguments.model}, {arguments.dtype}, {arguments.threads} threads", file=out)
    print("| tokens | way | prompt s | against eager | against full | ideal | share | decode against full |", file=out)
    print("| ---: | --- | ---: | --- | --- | ---: | ---: | --- |", file=out)
    for row in rows:
        ideal = row["ideal"]
        share = f"{ideal:.2f} | {row['against_full'][0] / ideal:.0%}" if ideal else "- | -"
        print(
            f"| {row['context']} | {row['way']} | {row['prompt'][0]:.2f} | {cell(row['against_eager'])} | "
            f"{cell(row['against_full'])} | {share} | {cell(row['decode_against_full'])} |",
            file=out,
        )


if __name__ == "__main__":
    sys.exit(main())
