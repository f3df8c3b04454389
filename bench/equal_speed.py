"""How much of the paper's loss is left at the same measured speed-up, the cost of compensation included?

The paper's plan (most similar sublayers, a scale in their place) at each count against low-rank maps at the same count
and some more, as they are fitted and tuned together. All are compiled and run in turn in each round, and compared with
the full model and with the paper's plan within the round; the page names those that are as fast as the paper's in both
prefill and decode. Tuned maps run the code of those that are not, and are timed with them. Profile, order and tuning are
those of `bench.compensation`, which this bench shares a folder of plans with.

    python -m bench.equal_speed --model smollm2 --skips 8 16 --extra 0 1 2 --plans DIR [--texts NAME=DIR ...]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from adaskip_compile.evaluation.domains import mixed_windows
from adaskip_compile.evaluation.timing import Generation, take_turns
from adaskip_compile.inspection.inspection import PHASES
from adaskip_compile.planning.compensated_plans import compensated
from adaskip_compile.planning.skip_plan import SkipPlan
from bench.compensation import MAPS, ORDERS, SIMILAR, compensation_parser, learned, tuned
from bench.recording import cell, generate_under, ratios
from bench.studies import Study, mean_over_domains

FULL = "full"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the page."""
    parser = compensation_parser(str(__doc__), context=2048, new_tokens=24, rounds=7)
    parser.add_argument("--extra", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="more sublayers in ours")
    parser.add_argument("--inner", choices=("eager", "inductor"), default="inductor", help="to time with")
    arguments = parser.parse_args(argv)
    study = Study("equal_speed", "How much of the paper's loss is left at equal measured speed-up?", arguments)
    texts = mixed_windows(study.domains, study.tokenizer, "profiling", arguments.samples, arguments.length)
    counts = sorted({skip + extra for skip in arguments.skips for extra in arguments.extra})
    profile = learned(study, texts, [MAPS], max(counts))
    plans = {_paper(skip): ORDERS[SIMILAR](profile, skip) for skip in arguments.skips}
    for order in arguments.orders:
        for count in counts:
            plans[_ours(order, count)] = compensated(ORDERS[order](profile, count), profile, MAPS)
            if arguments.steps:
                plans[_ours(order, count, "tuned")] = tuned(study, profile, order, count, texts)
    losses = _losses(study, plans)
    runs = _runs(study, plans)
    for skip in arguments.skips:
        counts = [skip + extra for extra in arguments.extra]
        ours = [_ours(order, count, *how) for order in arguments.orders for count in counts for how in ((), ("tuned",))]
        _compare(study, _paper(skip), [name for name in ours if name in plans], losses, runs)
    study.write()
    return 0


def _paper(skip: int) -> str:
    return f"paper, {skip}"


def _ours(order: str, count: int, *how: str) -> str:
    return ", ".join((order, str(count), *how))


def _losses(study: Study, plans: Mapping[str, SkipPlan]) -> dict[str, dict[str, float]]:
    """Return the NLL above the full model's of each plan, by domain and in the mean."""
    windows = study.windows()
    full = study.nlls(SkipPlan.none(), windows)
    found = {}
    for name, plan in plans.items():
        scores = study.nlls(plan, windows)
        found[name] = {domain: scores[domain].mean - full[domain].mean for domain in full}
        found[name]["mean"] = mean_over_domains(scores) - mean_over_domains(full)
    return found


def _runs(study: Study, plans: Mapping[str, SkipPlan]) -> dict[str, list[Generation]]:
    """Return what generating took under each plan and in full, a value a round; plans with the same code share theirs."""
    how = study.arguments
    [ids] = study.domains[0].windows(study.tokenizer, "evaluation", 1, how.context)
    codes = {name: (plan.paths, plan.map_forms(plan.paths)) for name, plan in {FULL: SkipPlan.none(), **plans}.items()}
    timed = {code: name for name, code in reversed(codes.items())}
    ways = {
        name: partial(generate_under, study.model, ids[None], plans.get(name, SkipPlan.none()), how)
        for name in timed.values()
    }
    take_turns(ways, 1)  # captures and compiles; not timed
    rounds = take_turns(ways, how.rounds)
    return {name: rounds[timed[code]] for name, code in codes.items()}


def _compare(
    study: Study,
    paper: str,
    others: Sequence[str],
    losses: Mapping[str, Mapping[str, float]],
    runs: Mapping[str, Sequence[Generation]],
) -> None:
    """Add a table of speed-ups and losses, and say which of ``others`` are as fast as ``paper``."""
    study.say(f"## {paper} sublayers skipped", "")
    beside = {name: [ratios(runs[paper], runs[name], phase) for phase in PHASES] for name in others}
    columns = (
        *(f"{phase} speed-up" for phase in PHASES),
        *(f"{phase}, beside the paper's" for phase in PHASES),
        *(f"NLL lost: {name} (share)" for name in losses[paper]),
    )
    rows = [
        (
            name,
            *(cell(ratios(runs[FULL], runs[name], phase), 1, 3) for phase in PHASES),
            *(f"{ratio[0]:.3f}" for ratio in beside.get(name, [(1.0,), (1.0,)])),
            *(f"{loss:+.3f} ({loss / losses[paper][domain]:.2f})" for domain, loss in losses[name].items()),
        )
        for name in (paper, *others)
    ]
    study.table(("plan", *columns), rows)
    fast = [name for name in others if all(ratio[0] >= 1 for ratio in beside[name])]
    if not fast:
        study.say("None of ours is as fast in both phases: give larger --extra.", "")
        return
    shares = (f"{name}, with {losses[name]['mean'] / losses[paper]['mean']:.2f} of the loss" for name in fast)
    study.say(f"As fast in both phases: {'; '.join(shares)}.", "")


if __name__ == "__main__":
    raise SystemExit(main())
