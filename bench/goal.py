"""Does a plan for a speed-up reach it on the clock, in prefill and in decode?

Calibrates this machine at the context length, plans for each speed-up with the times measured, then runs the full
model and each plan in turn in each round, all compiled, and compares the ratios with what was asked and predicted.

    python -m bench.goal --model smollm2 --context 4096 --speedups 1.25 --json bench/results/goal.json
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

import adaskip_compile
from adaskip_compile.checkpoints import load_checkpoint
from adaskip_compile.costs.timers import Measured
from adaskip_compile.evaluation.calibration import calibrate
from adaskip_compile.evaluation.timing import take_turns
from adaskip_compile.inspection.inspection import inspect_model
from adaskip_compile.planning.predicted_times import predict_times
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.profiling.profiles import Profile
from adaskip_compile.texts import choose_samples
from bench.recording import bench_parser, cell, generate_under, ratios, write

FULL = "full"


def main(argv: Sequence[str] | None = None) -> int:
    """Profile, calibrate, plan, measure, print a table, and write JSON where asked to."""
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_checkpoint(arguments.model, dtype=getattr(torch, arguments.dtype))
    samples = choose_samples(tokenizer, None, arguments.samples, 1024)
    profile = adaskip_compile.profile(model, samples, progress=False)
    times = _times(model, arguments)
    plans = {
        speedup: adaskip_compile.plan(
            profile, speedup=speedup, context=arguments.context, times=times, policy=arguments.policy
        )
        for speedup in arguments.speedups
    }
    rows = _measure(model, profile, times, plans, arguments)
    _show(rows)
    write({"rows": rows}, arguments)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = bench_parser(str(__doc__), context=4096, rounds=5)
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.25], metavar="X")
    parser.add_argument("--policy", default="adaskip")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="windows of 1,024 tokens to profile on")
    parser.add_argument(
        "--calibration", metavar="PATH", help="times measured before; measured now where there are none"
    )
    parser.add_argument("--new-tokens", type=int, default=24, metavar="N", help="decoded a round")
    return parser.parse_args(argv)


def _times(model: Any, arguments: argparse.Namespace) -> Measured:
    if arguments.calibration:
        return Measured.load(arguments.calibration)
    found = inspect_model(model, name=arguments.model)
    return calibrate(
        model,
        found,
        contexts=(arguments.context,),
        rounds=arguments.rounds,
        new_tokens=arguments.new_tokens,
        inner=arguments.inner,
    )


def _measure(
    model: Any,
    profile: Profile,
    times: Measured,
    plans: dict[float, SkipPlan],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    ids = torch.randint(10, model.config.vocab_size, (1, arguments.context), generator=torch.manual_seed(0))
    ways = {FULL: partial(generate_under, model, ids, SkipPlan.none(), arguments)}
    ways |= {str(speedup): partial(generate_under, model, ids, plan, arguments) for speedup, plan in plans.items()}
    take_turns(ways, 1)  # captures and compiles; not timed
    rounds = take_turns(ways, arguments.rounds)
    predicted = predict_times(profile, arguments.context, times)
    rows = []
    for speedup, plan in plans.items():
        for phase, skipped in (("prefill", frozenset(plan.paths)), ("decode", plan.paths_at(math.inf))):
            measured = ratios(rounds[FULL], rounds[str(speedup)], phase)
            attentions = sum(one.kind == "attention" and one.path in skipped for one in profile.sublayers)
            rows.append(
                {
                    "asked": speedup,
                    "phase": phase,
                    "attentions": attentions,
                    "others": len(skipped) - attentions,
                    "predicted": predicted.speedup(phase, skipped),
                    "measured": measured,
                    "error": measured[0] / speedup - 1,
                }
            )
    return rows


def _show(rows: Sequence[dict[str, Any]]) -> None:
    print("| asked | phase | attentions skipped | others | predicted | measured | measured / asked - 1 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [f"{row['asked']:g}", row["phase"], str(row["attentions"]), str(row["others"])]
        print(f"| {' | '.join(cells)} | {row['predicted']:.3f} | {cell(row['measured'], 1, 3)} | {row['error']:+.1%} |")


if __name__ == "__main__":
    raise SystemExit(main())
