"""Is the speed-up that `adaskip inspect` predicts the one that is measured?

Calibrates this machine, then measures prefill and decode with each number of attention sublayers skipped at
each context length, full and skipped in turn in each round, and compares the ratios with the predicted ones,
by the calibration and by the roofline of round figures.

    python -m bench.prediction --model smollm2 --contexts 1024 2048 4096 --skips 4 8 16 --json bench/results/prediction.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from adaskip_compile.checkpoints import load_checkpoint
from adaskip_compile.costs.timers import ROOFLINES, Timer, predict
from adaskip_compile.evaluation.calibration import calibrate
from adaskip_compile.evaluation.timing import Spread, take_turns
from adaskip_compile.inspection.inspection import Inspection, inspect_model
from adaskip_compile.planning.skip_plan import SkipPlan
from bench.recording import bench_parser, generate_under, write


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate, measure, print a table, and write JSON where asked to."""
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    model, _ = load_checkpoint(arguments.model, dtype=getattr(torch, arguments.dtype))
    found = inspect_model(model, name=arguments.model)
    how = {"contexts": arguments.calibrate_at, "rounds": arguments.rounds, "inner": arguments.inner}
    timers: dict[str, Timer] = {"calibrated": calibrate(model, found, **how), "roofline": ROOFLINES["cpu"]}
    rows: list[dict[str, Any]] = []
    for context in arguments.contexts:
        rows += _measure(model, found, timers, context, arguments)
    _show(rows)
    write({"rows": rows}, arguments)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = bench_parser(str(__doc__), rounds=5)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096], metavar="TOKENS")
    parser.add_argument("--calibrate-at", type=int, nargs="+", default=[512, 1536, 4096], metavar="TOKENS")
    parser.add_argument("--skips", type=int, nargs="+", default=[4, 8, 16], metavar="K")
    parser.add_argument("--new-tokens", type=int, default=16, metavar="N", help="decoded a round")
    return parser.parse_args(argv)


def _measure(
    model: Any, found: Inspection, timers: dict[str, Timer], context: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    ids = torch.randint(10, model.config.vocab_size, (1, context), generator=torch.manual_seed(0))
    attentions = [one.path for one in found.sublayers if one.kind == "attention"]
    sets = {count: attentions[3 : 3 + count] for count in (0, *arguments.skips)}
    plans = {
        count: SkipPlan.from_scales(dict.fromkeys(chosen, 1.0)) if chosen else SkipPlan.none()
        for count, chosen in sets.items()
    }
    ways = {str(count): partial(generate_under, model, ids, plan, arguments) for count, plan in plans.items()}
    take_turns(ways, 1)
    rounds = take_turns(ways, arguments.rounds)
    rows = []
    for phase in found.phases:
        full = [run.seconds(phase) for run in rounds["0"]]
        for count in arguments.skips:
            ratios = [base / run.seconds(phase) for base, run in zip(full, rounds[str(count)], strict=True)]
            measured = Spread.of(ratios)
            row: dict[str, Any] = {"context": context, "phase": phase, "skipped": count, "measured": measured.median}
            row |= {"low": measured.low, "high": measured.high}
            for name, timer in timers.items():
                predicted = predict(found, timer, phase, context).speedup(found, sets[count])
                row |= {name: predicted, f"{name}_error": predicted / measured.median - 1}
            rows.append(row)
    return rows


def _show(rows: Sequence[dict[str, Any]]) -> None:
    print("| context | phase | skipped | measured | calibrated | error | roofline | error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        spread = f"{row['measured']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        cells = [f"{row['context']}", row["phase"], f"{row['skipped']}", spread]
        for name in ("calibrated", "roofline"):
            cells += [f"{row[name]:.3f}", f"{row[f'{name}_error']:+.1%}"]
        print(f"| {' | '.join(cells)} |")
    for name in ("calibrated", "roofline"):
        print(f"largest error, {name}: {max(abs(row[f'{name}_error']) for row in rows):.1%}")


if __name__ == "__main__":
    raise SystemExit(main())
