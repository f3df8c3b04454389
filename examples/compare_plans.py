"""What do the paper's choice and other policies lose, and where does the model change its stream? A table and two plots.

python examples/compare_plans.py --model smollm2 --skip 4 8 12 --out plots
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.checkpoints import load_checkpoint
from adaskip_compile.display.plots import write_plot
from adaskip_compile.evaluation.likelihood import mean_nll
from adaskip_compile.texts import held_out_texts, profiling_texts, windows


def main(argv: list[str] | None = None) -> None:
    """Profile, plan by each policy, and measure the likelihood of texts that no profile has seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--skip", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--policies", nargs="+", default=["adaskip", "early_exit", "random"])
    parser.add_argument("--tokens", type=int, default=512, help="of each text")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("plots"))
    arguments = parser.parse_args(argv)

    model, tokenizer = load_checkpoint(arguments.model)
    seen = [text.text for text in profiling_texts(arguments.texts)]
    unseen = [text.text for text in held_out_texts(arguments.texts)]
    profile = adaskip_compile.profile(model, windows(tokenizer, seen, arguments.tokens, per_text=1))
    measured = list(windows(tokenizer, unseen, arguments.tokens, per_text=1))

    write_plot(arguments.out / "similarity.svg", profile.plot)

    def loss(plan: SkipPlan) -> float:
        adaskip_compile.compile(model, plan, inner="eager")  # what compiles the regions changes no likelihood
        return mean_nll(model, measured)

    full = loss(SkipPlan.none())
    found: dict[str, list[float]] = {}
    print(f"{'policy':<16} {'skipped':>7} {'perplexity':>10}")
    for policy in arguments.policies:
        for count in arguments.skip:
            lost = loss(adaskip_compile.plan(profile, skip=count, policy=policy)) - full
            found.setdefault(policy, []).append(100 * math.expm1(lost))
            print(f"{policy:<16} {count:>7} {found[policy][-1]:>+9.1f}%")

    def draw(axes: Any) -> None:
        for policy, losses in found.items():
            axes.plot(arguments.skip, losses, "o-", label=policy)
        axes.legend()

    labels = {"xlabel": "sublayers skipped throughout", "ylabel": "perplexity above the full model's, %"}
    write_plot(arguments.out / "losses.svg", draw, **labels)
    print(f"drawn in {arguments.out}")


if __name__ == "__main__":
    main()
