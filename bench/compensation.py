"""How much of the paper's loss is left at the same number of skipped sublayers, with what calibration can add?

The paper's plan (most similar sublayers, a scale in their place) against other compensations of the same sublayers, the
sublayers of the joint order, and the low-rank maps of both tuned together. Profile, maps, order and tuning see the
profiling halves of all domains mixed; losses are NLL above the full model's on the evaluation halves, and their share of
the paper's loss. Needles and in-context classification tell what the losses mean for tasks, for the paper's plan and
those with low-rank maps.

    python -m bench.compensation --model smollm2 --skips 8 16 [--texts NAME=DIR ...]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import adaskip_compile
from adaskip_compile.evaluation.domains import mixed_windows
from adaskip_compile.evaluation.scores import Scores
from adaskip_compile.evaluation.suite import Measure, Sizes, make_measures
from adaskip_compile.planning.compensated_plans import compensated
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.profiling.profiles import Profile
from adaskip_passes.errors import OptionError
from bench.studies import Study, mean_over_domains, study_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the page."""
    parser = compensation_parser(str(__doc__), needles=18, questions=32)
    parser.add_argument("--forms", nargs="+", default=["channel", "low_rank", "affine"], metavar="NAME")
    parser.add_argument("--tasks", nargs="*", default=["needle", "classification"], metavar="NAME")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024], metavar="TOKENS", help="of needles")
    arguments = parser.parse_args(argv)
    study = Study("compensation", "How much of the paper's loss is left at equal skip counts?", arguments)
    texts = mixed_windows(study.domains, study.tokenizer, "profiling", arguments.samples, arguments.length)
    profile = learned(study, texts, arguments.forms, max(arguments.skips))
    windows = study.windows()
    sizes = Sizes(needles=arguments.needles, questions=arguments.questions, contexts=tuple(arguments.contexts))
    tasks = make_measures(arguments.tasks, study.model, study.tokenizer, study.domains, sizes)
    full = study.nlls(SkipPlan.none(), windows)
    study.say("NLL of the full model, nats a token:", "")
    study.table(("", *windows, "mean"), [_row("full model", full)])
    for skip in arguments.skips:
        study.say(f"## {skip} sublayers skipped", "")
        plans = _plans(study, profile, skip, texts)
        _losses(study, {name: study.nlls(plan, windows) for name, plan in plans.items()}, full)
        if tasks:
            judged = {name: plan for name, plan in plans.items() if name == PAPER or MAPS in name}
            _task_scores(study, {"full model": SkipPlan.none(), **judged}, tasks)
    study.write()
    return 0


def compensation_parser(description: str, **defaults: int) -> argparse.ArgumentParser:
    """Return a parser of what both benches that learn maps take, and of one integer for each of ``defaults``."""
    parser = study_parser(description, samples=24, length=1024, windows=2, judged=4, steps=150, **defaults)
    parser.add_argument("--skips", type=int, nargs="+", default=[8, 16], metavar="K")
    parser.add_argument("--orders", nargs="+", default=list(ORDERS), choices=list(ORDERS), help="of what is skipped")
    parser.add_argument("--rank", type=int, metavar="R", help="of low-rank maps (default: an eighth of the width)")
    parser.add_argument(
        "--plans",
        type=Path,
        metavar="DIR",
        help="keep the profile and the tuned plans here, and take them from here",
    )
    return parser


def learned(study: Study, texts: Sequence[Any], forms: Sequence[str], most: int) -> Profile:
    """Return a profile with maps, and a joint order of ``most`` where one is asked for; say what each step of it took."""
    how = study.arguments
    most = most if JOINT in how.orders else 0
    kept = _kept(study, "")
    if kept is not None and kept.exists() and _has(known := Profile.load(kept), forms, how.rank, most):
        return known
    more = {"max_samples": len(texts), "progress": True}
    profile = _timed(study, "profile", lambda: adaskip_compile.profile(study.model, texts, **more))
    profile = _timed(
        study, "fit", lambda: adaskip_compile.fit(study.model, profile, texts, forms=forms, rank=how.rank, **more)
    )
    if most:
        few = {"max_samples": how.judged, "max_tokens": 384, "most": most, "candidates": 2 * most}
        profile = _timed(
            study,
            "order",
            lambda: adaskip_compile.order_by_loss(study.model, profile, texts, compensation=MAPS, **few),
        )
    if kept is not None:
        profile.save(kept)
    return profile


def _has(profile: Profile, forms: Sequence[str], rank: int | None, most: int) -> bool:
    fitted = {found.form: found.rank for maps in profile.maps.values() for found in maps}
    asked = rank is None or fitted.get(MAPS) == rank
    return asked and fitted.keys() >= {*forms} and len(profile.joint_order) >= most


def _plans(study: Study, profile: Profile, skip: int, texts: Sequence[Any]) -> dict[str, SkipPlan]:
    how = study.arguments
    plans = {PAPER: ORDERS[SIMILAR](profile, skip)}
    for order in how.orders:
        chosen = ORDERS[order](profile, skip)
        plans |= {f"{order}, {form}": compensated(chosen, profile, form) for form in ("none", *how.forms)}
        if order != SIMILAR:
            plans[f"{order}, scale"] = chosen
        if how.steps:
            plans[f"{order}, {MAPS}, tuned"] = tuned(study, profile, order, skip, texts)
    return plans


def _task_scores(study: Study, plans: Mapping[str, SkipPlan], tasks: Sequence[Measure]) -> None:
    """Add a table of what part of the needles are found, and of the questions answered, under each plan."""
    rows = []
    for name, plan in plans.items():
        adaskip_compile.compile(study.model, plan, inner="eager")
        rows.append((name, *(Scores(task.run(study.model)) for task in tasks)))
    study.table(("part right", *(task.name for task in tasks)), rows)


def tuned(study: Study, profile: Profile, order: str, skip: int, texts: Sequence[Any]) -> SkipPlan:
    """Return the plan of the first ``skip`` sublayers in ``order``, one of :data:`ORDERS`, with low-rank maps tuned together."""
    kept = _kept(study, f"_{order.replace(' ', '_')}_{skip}")
    if kept is not None and kept.exists():
        return SkipPlan.load(kept)
    how = study.arguments
    start = compensated(ORDERS[order](profile, skip), profile, MAPS)
    found = _timed(
        study,
        f"tune {skip}, {order}",
        lambda: adaskip_compile.tune(study.model, start, texts, steps=how.steps, max_samples=len(texts)),
    )
    if kept is not None:
        found.save(kept)
    return found


def _joint(profile: Profile, skip: int) -> SkipPlan:
    scales = {found.path: found.mean_scale() for found in profile.sublayers}
    chosen = {step.path for step in profile.joint_order[:skip]}
    if len(chosen) < skip:
        raise OptionError(f"the joint order has {len(chosen)} sublayers, {skip} were asked for")
    return SkipPlan.from_scales({path: scale for path, scale in scales.items() if path in chosen})


def _most_similar(profile: Profile, skip: int) -> SkipPlan:
    return adaskip_compile.plan(profile, skip=skip)


SIMILAR, JOINT = "most similar", "joint order"
ORDERS = {SIMILAR: _most_similar, JOINT: _joint}
MAPS = "low_rank"
PAPER = f"{SIMILAR}, scale (paper)"


def _kept(study: Study, suffix: str) -> Path | None:
    """Return where a profile or a tuned plan is kept from one run to the next; None where ``--plans`` is not given."""
    folder = study.arguments.plans
    return None if folder is None else folder / f"compensation_{study.shown.replace('/', '-')}{suffix}.json"


def _timed(study: Study, what: str, work: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = work()
    study.say(f"{what}: {time.perf_counter() - started:.0f} s", "")
    return result


def _losses(study: Study, scores: Mapping[str, Mapping[str, Scores]], full: Mapping[str, Scores]) -> None:
    """Add a table of losses by domain, and of their shares of the first row's."""
    losses = {
        name: [*(found[domain].mean - full[domain].mean for domain in full), _mean_loss(found, full)]
        for name, found in scores.items()
    }
    paper = next(iter(losses.values()))
    rows = [
        (name, *(f"{loss:+.3f} ({loss / base:.2f})" for loss, base in zip(found, paper, strict=True)))
        for name, found in losses.items()
    ]
    study.table(("NLL lost (share of the paper's)", *full, "mean"), rows)


def _mean_loss(found: Mapping[str, Scores], full: Mapping[str, Scores]) -> float:
    return mean_over_domains(found) - mean_over_domains(full)


def _row(name: str, scores: Mapping[str, Scores]) -> tuple[str, ...]:
    return (name, *map(str, scores.values()), f"{mean_over_domains(scores):.3f}")


if __name__ == "__main__":
    raise SystemExit(main())
