"""What does each policy lose at equal skip counts, and how much faster is it? Prefill-only, decode-only, end-to-end.

Every policy skips as many sublayers of the same model. Prefill-only is measured where all tokens go through prefill
(NLL of windows, in-context classification); decode-only by the NLL of tokens decoded one by one after a prompt that ran
in full; end-to-end by the same after a prompt that skipped too, by needles, and by Rouge-L of greedy continuations
against the full model's. Speed-ups are those of a request, measured in rounds in turn (--inner inductor for what a user
gets; quality is measured with eager regions, which compute the same).

    python -m bench.baselines --model smollm2 --skips 8 [--policies adaskip early_exit ...] [--texts NAME=DIR ...]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import adaskip_compile
from adaskip_compile.cli.measure import Generation, Spread, generate, take_turns
from adaskip_compile.evaluation.candidates import FULL, make_plan
from adaskip_compile.evaluation.scores import Scores
from adaskip_compile.evaluation.suite import Measure, Sizes, kind_of, make_measures
from adaskip_compile.plans import SkipPlan
from adaskip_compile.policy_names import POLICIES
from adaskip_passes.errors import OptionError
from bench.studies import Study, study_parser

# Which measures tell of skipping in which phases.
PHASES = {
    "prefill": ("nll", "classification"),
    "decode": ("decode",),
    "both": ("decode", "needle", "rouge"),
}
# loss_greedy tries sublayers out one by one first, which takes longer than all the rest.
QUICK = tuple(policy for policy in POLICIES if policy != "loss_greedy")

TITLES = {"prefill": "Prefill-only", "decode": "Decode-only", "both": "End-to-end"}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the page."""
    sizes = {"samples": 20, "length": 1024, "windows": 1, "decoded": 32, "needles": 6, "questions": 16, "prompts": 4}
    parser = study_parser(str(__doc__), **sizes, prompt_tokens=512, new_tokens=48, rounds=3)
    parser.add_argument("--skips", type=int, nargs="+", default=[8], metavar="K")
    parser.add_argument("--policies", nargs="+", default=list(QUICK), metavar="NAME")
    parser.add_argument("--compensations", nargs="+", default=["scale"], metavar="NAME")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024], metavar="TOKENS", help="of needles")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=list(PHASES))
    parser.add_argument(
        "--inner", choices=("eager", "inductor", "none"), default="none", help="to time with; none: do not"
    )
    arguments = parser.parse_args(argv)
    study = Study("baselines", "What does each policy lose at equal skip counts?", arguments)
    measures = _measures(study)
    profile = study.profile(
        policies=arguments.policies, compensations=arguments.compensations, most=max(arguments.skips)
    )
    for phase in arguments.phases:
        chosen = [measure for measure in measures if kind_of(measure.name) in PHASES[phase]]
        study.say(f"## {TITLES[phase]}", "")
        full = _row(study, SkipPlan.none(), chosen)
        for skip in arguments.skips:
            plans = _plans(study, profile, skip, phase)
            scores = {FULL: full} | {name: _row(study, plan, chosen) for name, plan in plans.items()}
            times = _times(study, plans) if arguments.inner != "none" else {}
            study.say(f"### {skip} sublayers skipped", "")
            _table(study, scores, times, phase)
    study.write()
    return 0


def _measures(study: Study) -> list[Measure]:
    how = study.arguments
    named = ("windows", "length", "decoded", "needles", "questions", "prompts", "prompt_tokens", "new_tokens")
    sizes = Sizes(**{name: getattr(how, name) for name in named}, contexts=tuple(how.contexts))
    wanted = [kind for phase in how.phases for kind in PHASES[phase]]
    adaskip_compile.compile(study.model, SkipPlan.none(), inner="eager")
    return make_measures(list(dict.fromkeys(wanted)), study.model, study.tokenizer, study.domains, sizes)


def _plans(study: Study, profile: Any, skip: int, phase: str) -> dict[str, SkipPlan]:
    """Return the plans that there are, by policy and compensation, and say which policies have none."""
    found: dict[str, SkipPlan] = {}
    for policy in study.arguments.policies:
        for compensation in study.arguments.compensations:
            name = policy if compensation == "scale" else f"{policy}, {compensation}"
            try:
                found[name] = make_plan(profile, skip=skip, policy=policy, compensation=compensation, phase=phase)
            except OptionError as error:
                study.say(f"- {name}: {error}", "")
    return found


def _row(study: Study, plan: SkipPlan, measures: Sequence[Measure]) -> dict[str, Scores]:
    adaskip_compile.compile(study.model, plan, inner="eager")
    return {measure.name: Scores(measure.run(study.model)) for measure in measures}


def _times(study: Study, plans: Mapping[str, SkipPlan]) -> dict[str, list[Generation]]:
    how = study.arguments
    [prompt] = study.domains[0].windows(study.tokenizer, "evaluation", 1, max(how.contexts))

    def timed(plan: SkipPlan) -> Generation:
        adaskip_compile.compile(study.model, plan, inner=how.inner)
        return generate(study.model, prompt[None], how.new_tokens)

    ways = {name: partial(timed, plan) for name, plan in {FULL: SkipPlan.none(), **plans}.items()}
    take_turns(ways, 1)
    return take_turns(ways, how.rounds)


def _table(
    study: Study, scores: Mapping[str, dict[str, Scores]], times: Mapping[str, list[Generation]], phase: str
) -> None:
    names = list(scores[FULL])
    rows = []
    for name, found in scores.items():
        cells = [f"{_loss(found, scores[FULL]):+.3f}", *(f"{found[measure]}" for measure in names)]
        rows.append((name, *(_speedups(times[FULL], times[name]) if times else ()), *cells))
    speeds = ("prefill speed-up", "decode speed-up") if times else ()
    study.table(("policy", *speeds, "loss (NLL)", *names), rows)


def _loss(found: Mapping[str, Scores], full: Mapping[str, Scores]) -> float:
    """Return the NLL above the full model's, the mean over the domains."""
    names = [name for name in found if kind_of(name) in ("nll", "decode")]
    return sum(found[name].mean - full[name].mean for name in names) / len(names)


def _speedups(full: Sequence[Generation], ours: Sequence[Generation]) -> tuple[str, str]:
    pairs = list(zip(full, ours, strict=True))
    prefill = Spread.of(before.first / after.first for before, after in pairs)
    decode = Spread.of(before.steady(20) / after.steady(20) for before, after in pairs)
    return prefill.format(1, 2, "x"), decode.format(1, 2, "x")


if __name__ == "__main__":
    raise SystemExit(main())
