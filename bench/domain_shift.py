"""What does a plan lose that was profiled on one kind of text and is used on another? (The paper's open question 2.)

Plans are made from the profiling half of each domain and of all of them mixed, and each is measured on the evaluation
half of every domain: the mean NLL above the full model's.

    python -m bench.domain_shift --model smollm2 [--texts NAME=DIR ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import adaskip_compile
from adaskip_compile.evaluation.scores import Scores
from adaskip_compile.planning.skip_plan import SkipPlan
from bench.studies import Study, mean_over_domains, study_parser

MIXED = "all, mixed"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the page."""
    parser = study_parser(str(__doc__), samples=12, length=1024, windows=2)
    parser.add_argument("--skips", type=int, nargs="+", default=[8], metavar="K")
    parser.add_argument("--compensations", nargs="+", default=["scale"], metavar="NAME")
    arguments = parser.parse_args(argv)
    study = Study("domain_shift", "What does a plan lose on other texts than it was profiled on?", arguments)
    windows = study.windows()
    sources = {domain.name: [domain] for domain in study.domains} | {MIXED: list(study.domains)}
    profiles = {
        name: study.profile(domains, compensations=arguments.compensations) for name, domains in sources.items()
    }
    full = study.nlls(SkipPlan.none(), windows)
    study.say("NLL of the full model, nats a token:", "")
    study.table(("", *windows), [("full model", *(str(scores) for scores in full.values()))])
    for compensation in arguments.compensations:
        for skip in arguments.skips:
            plans = {
                name: adaskip_compile.plan(profile, skip=skip, compensation=compensation)
                for name, profile in profiles.items()
            }
            study.say(f"## {skip} sublayers skipped, compensation: {compensation}", "")
            _matrix(study, plans, windows, full)
    study.write()
    return 0


def _matrix(study: Study, plans: dict[str, SkipPlan], windows: dict[str, Any], full: dict[str, Scores]) -> None:
    """Add a table of losses: a row for each text profiled on, a column for each text measured on."""
    rows = []
    for source, plan in plans.items():
        scores = study.nlls(plan, windows)
        losses = [f"{scores[name].mean - full[name].mean:+.3f}" for name in windows]
        rows.append((source, *losses, f"{mean_over_domains(scores) - mean_over_domains(full):+.3f}"))
    study.table(("profiled on", *windows, "mean"), rows)
    attentions = {name: sum(each.kind == "attention" for each in plan.skipped) for name, plan in plans.items()}
    common = frozenset.intersection(*(frozenset(plan.paths) for plan in plans.values()))
    skipped = len(next(iter(plans.values())).paths)
    study.say(
        f"Sublayers that all {len(plans)} plans skip: {len(common)} of {skipped}. "
        f"Attentions among those skipped: {', '.join(f'{name} {count}' for name, count in attentions.items())}.",
        "",
    )


if __name__ == "__main__":
    raise SystemExit(main())
