"""How does the loss grow with the number of skipped sublayers, against the sum of what each loses alone?

The most similar sublayers are skipped one by one, then the first k of them together. If errors added up, a plan could
be chosen by single effects.

    python -m bench.error_growth --model smollm2 [--texts NAME=DIR ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import adaskip_compile
from adaskip_compile.planning.skip_plan import SkipPlan
from bench.studies import Study, mean_over_domains, study_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the page."""
    parser = study_parser(str(__doc__), samples=20, length=1024, windows=1)
    parser.add_argument("--skips", type=int, nargs="+", default=[2, 4, 6, 8, 10, 12, 14, 16], metavar="K")
    arguments = parser.parse_args(argv)
    study = Study("error_growth", "Do the losses of single sublayers add up?", arguments)
    windows, profile = study.windows(), study.profile()
    most = adaskip_compile.plan(profile, skip=max(arguments.skips))
    order = [each.path for each in profile.ranking() if each.path in most.scales]
    full = mean_over_domains(study.nlls(SkipPlan.none(), windows))
    alone = {path: mean_over_domains(study.nlls(_only(most, [path]), windows)) - full for path in order}
    together = {
        skip: mean_over_domains(study.nlls(_only(most, order[:skip]), windows)) - full for skip in arguments.skips
    }
    sums = {skip: sum(alone[path] for path in order[:skip]) for skip in together}
    study.say(f"Mean NLL of the full model over the domains: {full:.3f} nats a token.", "")
    study.table(
        ("most similar sublayers skipped", "loss together", "sum of single losses", "ratio"),
        [
            (skip, f"{loss:.3f}", f"{sums[skip]:.3f}", f"{loss / sums[skip]:.2f}" if sums[skip] > 0 else "-")
            for skip, loss in together.items()
        ],
    )
    _plot(study, together, sums)
    study.say("## Skipped alone, most similar first", "")
    study.table(("sublayer", "loss"), [(f"`{path}`", f"{loss:+.4f}") for path, loss in alone.items()])
    study.write()
    return 0


def _only(plan: SkipPlan, paths: Sequence[str]) -> SkipPlan:
    return replace(plan, skipped=tuple(each for each in plan.skipped if each.path in paths))


def _plot(study: Study, together: dict[int, float], sums: dict[int, float]) -> None:
    def draw(axes: Any) -> None:
        axes.plot(list(together), list(together.values()), "o-", label="skipped together")
        axes.plot(list(sums), list(sums.values()), "x--", label="sum of single losses")
        axes.legend()

    study.plot(f"Growth of the loss: {study.shown}", "sublayers skipped", "NLL above the full model's", draw)


if __name__ == "__main__":
    raise SystemExit(main())
