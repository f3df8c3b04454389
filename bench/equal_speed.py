"""How much of the paper's loss is left at the same measured speed-up, the cost of compensation included?

The paper's plan (most similar sublayers, a scale in their place) at each count, the same with low-rank maps, and, at the
same count and some more, with maps tuned together on its choice (maps tuned) and on that of the joint order (ours). All
are compiled and run in turn in each round; the page names those that are as fast as the paper's in both prefill and
decode. Needles and in-context classification tell what the losses mean for tasks. Profile, order and tuning are those of
`bench.compensation`, which this bench shares a folder of plans with.

    python -m bench.equal_speed --model smollm2 --skips 8 16 --extra 0 1 2 --plans DIR [--texts NAME=DIR ...]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import adaskip_compile
from adaskip_compile.cli.measure import Generation, take_turns
from adaskip_compile.compensated_plans import compensated
from adaskip_compile.evaluation.domains import mixed_windows
from adaskip_compile.evaluation.scores import Scores
from adaskip_compile.evaluation.suite import Sizes, make_measures
from adaskip_compile.inspection import PHASES
from adaskip_compile.plans import SkipPlan
from bench.compensation import learned, tuned
from bench.recording import cell, generate_under, numbers
from bench.studies import Study, mean_over_domains, study_parser

FULL = "full"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the page."""
    sizes = {"samples": 24, "length": 1024, "windows": 2, "judged": 4, "steps": 150, "needles": 9, "questions": 32}
    parser = study_parser(str(__doc__), **sizes, context=2048, new_tokens=24, rounds=7)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096], metavar="TOKENS", help="of needles")
    parser.add_argument("--skips", type=int, nargs="+", default=[8, 16], metavar="K")
    parser.add_argument("--extra", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="more sublayers in ours")
    parser.add_argument("--plans", type=Path, metavar="DIR", help="keep what is learned here, and take it from here")
    parser.add_argument("--inner", choices=("eager", "inductor"), default="inductor", help="to time with")
    arguments = parser.parse_args(argv)
    study = Study("equal_speed", "How much of the paper's loss is left at equal measured speed-up?", arguments)
    texts = mixed_windows(study.domains, study.tokenizer, "profiling", arguments.samples, arguments.length)
    counts = sorted({skip + extra for skip in arguments.skips for extra in arguments.extra})
    profile = learned(study, texts, ["low_rank"], max(counts))
    papers = {f"paper, {skip}": adaskip_compile.plan(profile, skip=skip) for skip in arguments.skips}
    maps = {f"maps, {skip}": compensated(papers[f"paper, {skip}"], profile, "low_rank") for skip in arguments.skips}
    ours = {f"ours, {count}": tuned(study, profile, "joint order", count, texts) for count in counts}
    similar = {f"maps tuned, {count}": tuned(study, profile, "most similar", count, texts) for count in counts}
    plans = papers | maps | similar | ours
    losses = _losses(study, plans)
    _tasks(study, plans)
    speedups = _speedups(study, plans)
    for skip in arguments.skips:
        others = [f"{name}, {skip + extra}" for name in ("maps tuned", "ours") for extra in arguments.extra]
        _compare(study, f"paper, {skip}", [f"maps, {skip}", *others], losses, speedups)
    study.write()
    return 0


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


def _tasks(study: Study, plans: Mapping[str, SkipPlan]) -> None:
    """Add a table of what part of the needles are found, and of the questions answered, under each plan."""
    how = study.arguments
    sizes = Sizes(needles=how.needles, questions=how.questions, contexts=tuple(how.contexts))
    measures = make_measures(("needle", "classification"), study.model, study.tokenizer, study.domains, sizes)
    rows = []
    for name, plan in {FULL: SkipPlan.none(), **plans}.items():
        adaskip_compile.compile(study.model, plan, inner="eager")
        rows.append((name, *(Scores(measure.run(study.model)) for measure in measures)))
    study.say("## Tasks", "")
    study.table(("plan", *(measure.name for measure in measures)), rows)


def _speedups(study: Study, plans: Mapping[str, SkipPlan]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return median, least and greatest speed-up of each plan over the compiled full model, by phase."""
    how = study.arguments
    [ids] = study.domains[0].windows(study.tokenizer, "evaluation", 1, how.context)
    ways = {
        name: partial(generate_under, study.model, ids[None], plan, how)
        for name, plan in {FULL: SkipPlan.none(), **plans}.items()
    }
    take_turns(ways, 1)  # captures and compiles; not timed
    rounds = take_turns(ways, how.rounds)
    return {name: {phase: _ratios(rounds[FULL], rounds[name], phase) for phase in PHASES} for name in plans}


def _ratios(full: Sequence[Generation], ours: Sequence[Generation], phase: str) -> tuple[float, float, float]:
    pairs = zip(full, ours, strict=True)
    return numbers([before.seconds(phase) / after.seconds(phase) for before, after in pairs])


def _compare(
    study: Study,
    paper: str,
    others: Sequence[str],
    losses: Mapping[str, Mapping[str, float]],
    speedups: Mapping[str, Mapping[str, Sequence[float]]],
) -> None:
    study.say(f"## {paper} sublayers skipped", "")
    columns = ("prefill speed-up", "decode speed-up", *(f"NLL lost: {name} (share)" for name in losses[paper]))
    rows = [
        (
            name,
            *(cell(speedups[name][phase], 1, 3) for phase in PHASES),
            *(f"{loss:+.3f} ({loss / losses[paper][domain]:.2f})" for domain, loss in losses[name].items()),
        )
        for name in (paper, *others)
    ]
    study.table(("plan", *columns), rows)
    fast = [name for name in others if all(speedups[name][phase][0] >= speedups[paper][phase][0] for phase in PHASES)]
    if not fast:
        study.say("None of them is as fast in both phases: give larger --extra.", "")
        return
    shares = (f"{name}, with {losses[name]['mean'] / losses[paper]['mean']:.2f} of the loss" for name in fast)
    study.say(f"As fast in both phases: {'; '.join(shares)}.", "")


if __name__ == "__main__":
    raise SystemExit(main())
