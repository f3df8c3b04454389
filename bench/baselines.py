"""What does each policy lose at equal skip counts, and how much faster is it? Prefill-only, decode-only, end-to-end.

Every policy skips as many sublayers of the same model. Prefill-only is measured where all tokens go through prefill
(NLL of windows, in-context classification); decode-only by the NLL of tokens decoded one by one after a prompt that ran
in full; end-to-end by the same after a prompt that skipped too, by needles, and by Rouge-L of greedy continuations
against the full model's. Speed-ups are those of a request, measured in rounds in turn (--inner inductor for what a user
gets; quality is measured with eager regions, which compute the same).

With --kept DIR all is kept there as it is found, and what is there is not measured again: scores may come from a GPU
(--device cuda --measure scores) and times from the machine in question (--measure times). --measure with nothing after
it writes the page of what is there.

    python -m bench.baselines --model smollm2 --skips 4 8 12 16 --inner inductor --kept DIR [--texts NAME=DIR ...]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import adaskip_compile
from adaskip_compile.evaluation.candidates import FULL
from adaskip_compile.evaluation.scores import Scores
from adaskip_compile.evaluation.suite import Measure, Sizes, kind_of, make_measures
from adaskip_compile.evaluation.sweep_results import SWEEP_FORMAT, SweepResults
from adaskip_compile.evaluation.timing import Generation, Spread, generate, take_turns
from adaskip_compile.files.model_identity import identify
from adaskip_compile.files.versioned_json import digest
from adaskip_compile.planning.policy_names import POLICIES
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.profiling.profiles import PROFILE_FORMAT, Profile
from adaskip_passes.errors import ForeignFileError, OptionError
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

_SIZES = ("windows", "length", "decoded", "needles", "questions", "prompts", "prompt_tokens", "new_tokens")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the page."""
    sizes = {"samples": 20, "length": 1024, "windows": 1, "decoded": 32, "needles": 6, "questions": 16, "prompts": 4}
    parser = study_parser(str(__doc__), **sizes, prompt_tokens=512, new_tokens=48, rounds=3, timed_context=1024)
    parser.add_argument("--skips", type=int, nargs="+", default=[8], metavar="K")
    parser.add_argument("--policies", nargs="+", default=list(QUICK), metavar="NAME")
    parser.add_argument("--compensations", nargs="+", default=["scale"], metavar="NAME")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024], metavar="TOKENS", help="of needles")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=list(PHASES))
    parser.add_argument(
        "--inner", choices=("eager", "inductor", "none"), default="none", help="to time with; none: do not"
    )
    parser.add_argument("--kept", type=Path, metavar="DIR", help="keep profile, scores and times here")
    parser.add_argument(
        "--measure",
        nargs="*",
        default=["scores", "times"],
        choices=("scores", "times"),
        help="what to measure where it is not kept; the page has '-' for what is neither",
    )
    arguments = parser.parse_args(argv)
    study = Study("baselines", "What does each policy lose at equal skip counts?", arguments)
    with ExitStack() as stack:
        folder = arguments.kept or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _Baselines(study, folder).run()
    study.write()
    return 0


class _Baselines:
    """The study: its profile, what was found so far, and the measures."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.study, self.folder = study, folder
        how = study.arguments
        self.profile = self._profile()
        about = {
            "model": f"{study.shown} {identify(study.model).key}",
            "profile": digest(repr(PROFILE_FORMAT.read(self._file("profile")))),
        }
        texts = {domain.name: domain.digest for domain in study.domains}
        sizes = {f"--{name.replace('_', '-')}": getattr(how, name) for name in (*_SIZES, "contexts")}
        self.scores = self._results("scores", {**about, "texts": texts, **sizes})
        timing = ("inner", "threads", "new_tokens", "timed_context")
        timed = {f"--{name.replace('_', '-')}": getattr(how, name) for name in timing}
        self.times = None if how.inner == "none" else self._results("times", {**about, **timed})
        adaskip_compile.compile(study.model, SkipPlan.none(), inner="eager")
        self.measures = self._measures()

    def run(self) -> None:
        how, study = self.study.arguments, self.study
        for name, results in (("Scores", self.scores), ("Times", self.times)):
            if results is not None and results.about["made on"] != study.machine:
                study.say(f"{name} made on: {results.about['made on']}.", "")
        for phase in how.phases:
            study.say(f"## {TITLES[phase]}", "")
            measures = [measure for measure in self.measures if kind_of(measure.name) in PHASES[phase]]
            found: dict[str, list[tuple[str, float | None]]] = {}
            for skip in how.skips:
                plans = self._plans(skip, phase)
                for results in filter(None, (self.scores, self.times)):
                    results.measure_by(plans)
                scores = {name: self._scores(name, plan, measures) for name, plan in plans.items()}
                if self.times is not None and "times" in how.measure:
                    self._time(self.times, plans)
                study.say(f"### {skip} sublayers skipped", "")
                self._table(scores)
                for name, each in scores.items():
                    found.setdefault(_shown(name), []).append((name, _loss(each, scores[FULL])))
            if self.times is not None:
                self._plot(phase, found)

    def _profile(self) -> Profile:
        """Return the profile that is kept, which all plans of this study are made from, or measure it."""
        how, file = self.study.arguments, self._file("profile")
        if file.exists():
            kept = Profile.load(file)
            kept.check(identify(self.study.model), source=str(file))
            return kept
        found = self.study.profile(policies=how.policies, compensations=how.compensations, most=max(how.skips))
        found.save(file)
        return found

    def _file(self, what: str) -> Path:
        return self.folder / f"{self.study.stem}.{what}.json"

    def _results(self, what: str, about: dict[str, Any]) -> SweepResults:
        """Return what is kept of ``what``, which may have been made on another machine."""
        file = self._file(what)
        made = SWEEP_FORMAT.read(file)["about"].get("made on") if file.exists() else self.study.machine
        return SweepResults.open(file, {**about, "made on": made})

    def _measures(self) -> list[Measure]:
        how, study = self.study.arguments, self.study
        sizes = Sizes(**{name: getattr(how, name) for name in _SIZES}, contexts=tuple(how.contexts))
        wanted = dict.fromkeys(kind for phase in how.phases for kind in PHASES[phase])
        return make_measures(list(wanted), study.model, study.tokenizer, study.domains, sizes)

    def _plans(self, skip: int, phase: str) -> dict[str, SkipPlan]:
        """Return the full model and the plans that there are, by name, and say which policies have none."""
        found = {FULL: SkipPlan.none()}
        for policy in self.study.arguments.policies:
            for compensation in self.study.arguments.compensations:
                name = policy if compensation == "scale" else f"{policy}, {compensation}"
                options = {"skip": skip, "policy": policy, "compensation": compensation, "phase": phase}
                try:
                    found[f"{phase}/{skip}/{name}"] = adaskip_compile.plan(self.profile, **options)
                except OptionError as error:
                    self.study.say(f"- {name}, {skip}: {error}", "")
        return found

    def _scores(self, name: str, plan: SkipPlan, measures: Sequence[Measure]) -> dict[str, Scores | None]:
        known = self.scores.quality.get(name, {})
        wanted = measures if "scores" in self.study.arguments.measure else ()
        lacking = [measure for measure in wanted if measure.name not in known]
        if lacking:
            adaskip_compile.compile(self.study.model, plan, inner="eager")
            made = self.scores.about["made on"].split("; ")
            # Machines differ in the last bits of a score alone, so one may go on where another stopped.
            self.scores.about["made on"] = "; ".join(dict.fromkeys((*made, self.study.machine)))
        for measure in lacking:
            self.scores.add_quality(name, measure.name, measure.run(self.study.model))
        found = self.scores.quality.get(name, {})
        return {one.name: Scores(tuple(found[one.name])) if one.name in found else None for one in measures}

    def _time(self, times: SweepResults, plans: Mapping[str, SkipPlan]) -> None:
        """Time each plan in turn with the full model, but for those that were timed often enough already."""
        how = self.study.arguments
        lacking = {name: plan for name, plan in plans.items() if name != FULL and times.timed(name) < how.rounds}
        if not lacking:
            return
        if times.about["made on"] != self.study.machine:
            raise ForeignFileError(
                f"{times.path} lacks some of what is asked for, and was made on {times.about['made on']}, which this is "
                "not: add to it there, or keep the times of this machine in another folder"
            )
        [prompt] = self.study.domains[0].windows(self.study.tokenizer, "evaluation", 1, how.timed_context)
        ids = prompt[None].to(self.study.model.device)

        def timed(plan: SkipPlan) -> Generation:
            adaskip_compile.compile(self.study.model, plan, inner=how.inner)
            return generate(self.study.model, ids, how.new_tokens)

        ways = {name: partial(timed, plan) for name, plan in {FULL: plans[FULL], **lacking}.items()}
        take_turns(ways, 1)  # captures and compiles; not timed
        for _ in range(how.rounds):
            found = {name: runs[0] for name, runs in take_turns(ways, 1).items()}
            times.add_round({name: (run.first, sum(run.later), run.steady(20)) for name, run in found.items()})

    def _speedup(self, name: str, *parts: str) -> Spread | None:
        """Return how many times as fast as the full model it was, by these :data:`TIMES` together, within rounds."""
        ratios = self.times.speedups(name, *parts) if self.times is not None else None
        return Spread.of(ratios) if ratios else None

    def _table(self, scores: Mapping[str, dict[str, Scores | None]]) -> None:
        measures = list(scores[FULL])
        rows = []
        for name, found in scores.items():
            speeds = [self._speedup(name, part) for part in (() if self.times is None else ("first", "step"))]
            loss = _loss(found, scores[FULL])
            cells = [
                *(None if speed is None else speed.format(1, 2, "x") for speed in speeds),
                None if loss is None else f"{loss:+.3f}",
            ]
            rows.append((_shown(name), *(cell or "-" for cell in (*cells, *found.values()))))
        columns = () if self.times is None else ("prefill speed-up", "decode speed-up")
        self.study.table(("policy", *columns, "loss (NLL)", *measures), rows)

    def _plot(self, phase: str, found: Mapping[str, Iterable[tuple[str, float | None]]]) -> None:
        """Draw the loss over the speed-up of a request, a line a policy; losses below a hundredth are drawn there."""

        def draw(axes: Any) -> None:
            axes.set_yscale("log")
            for shown, points in found.items():
                pairs = [(self._speedup(name, "first", "later"), loss) for name, loss in points if shown != FULL]
                known = [(speed.median, max(loss, 0.01)) for speed, loss in pairs if speed and loss is not None]
                if known:
                    axes.plot(*zip(*known, strict=True), marker="o", label=shown)
            axes.legend(fontsize="small")

        how = self.study.arguments
        title = f"{self.study.shown}: {TITLES[phase].lower()}, {', '.join(map(str, how.skips))} sublayers skipped"
        speed = f"speed-up of a request of {how.timed_context} + {how.new_tokens} tokens"
        self.study.plot(title, speed, "NLL above the full model's, nats a token", draw, suffix=f"_{phase}")


def _shown(name: str) -> str:
    """Return the policy, and its compensation, in the name under which scores and times are kept."""
    return name.rpartition("/")[2]


def _loss(found: Mapping[str, Scores | None], full: Mapping[str, Scores | None]) -> float | None:
    """Return the NLL above the full model's, the mean over the domains; None where one of them was not measured."""
    pairs = [(found[name], full[name]) for name in found if kind_of(name) in ("nll", "decode")]
    losses = [ours.mean - base.mean for ours, base in pairs if ours is not None and base is not None]
    return sum(losses) / len(losses) if len(losses) == len(pairs) else None


if __name__ == "__main__":
    raise SystemExit(main())
