"""What does skipping in the prompt alone lose, keys and values kept? By likelihood, and by facts that are found.

A plan skips the deepest ``A`` attentions and ``F`` FFNs of layers below the last one, and with ``A,F,W`` the attentions of
the deepest ``W`` that it does not skip have a window; ``--sets`` names several. Each is measured with maps fitted in
sequence and, with ``--without-maps``, with nothing in their place (prefill-only pruning as POP does it, arXiv 2602.03295).
``--paper N`` adds the paper's choice of N sublayers, in prefill alone and throughout. All of it on texts that no map and no
profile has seen, prompts of 1,024 tokens and of ``--context``.

    python -m bench.prompt_losses --model smollm2 --sets 5,5 10,10 --paper 8 --json bench/results/prompt_losses_smollm2.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

import adaskip_compile
from adaskip_compile.checkpoints import load_checkpoint
from adaskip_compile.fitting.budget_texts import BudgetSizes, BudgetTexts
from adaskip_compile.fitting.depths import Depths, layers_from_the_end
from adaskip_compile.fitting.loss_budget import confirm
from adaskip_compile.fitting.sequence import SequenceFitter
from adaskip_compile.fitting.tune import AFTER
from adaskip_compile.inspection.phase_graphs import capture_phases
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.texts import built_in_domains
from bench.prompts import depths
from bench.recording import bench_parser, write


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write JSON where asked to."""
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_checkpoint(arguments.model, dtype=getattr(torch, arguments.dtype))
    sizes = BudgetSizes(fitted=arguments.fitted, measured=arguments.measured, needles=arguments.needles)
    plans = dict(_plans(model, tokenizer, sizes, arguments))
    found = confirm(model, tokenizer, [*plans.values()], context=arguments.context, sizes=sizes)
    out = sys.stderr if arguments.json == "-" else sys.stdout
    print(f"{arguments.model}, {arguments.dtype}, prompts of {sizes.prompt} and {arguments.context} tokens", file=out)
    print("| skipped | perplexity | needles found | answers, nats a token |", file=out)
    print("| --- | ---: | ---: | ---: |", file=out)
    for name, quality in zip(plans, found, strict=True):
        print(f"| {name} | {quality.perplexity} | {quality.retrieval} | {quality.answer_loss:+.3f} |", file=out)
    rows = [{"skipped": name, **asdict(quality)} for name, quality in zip(plans, found, strict=True)]
    write({"rows": rows}, arguments)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    sizes = BudgetSizes()
    parser = bench_parser(
        str(__doc__), context=sizes.prompt, fitted=sizes.fitted, measured=sizes.measured, needles=sizes.needles
    )
    parser.add_argument(
        "--sets", type=depths, nargs="+", default=[Depths(10, 10)], metavar="A,F,W", help="how deep to skip"
    )
    parser.add_argument(
        "--unit-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of an FFN's units in gated maps, in place of low-rank ones where they miss less",
    )
    parser.add_argument(
        "--tune", type=int, metavar="STEPS", help="the same sets with their maps tuned in so many steps too"
    )
    parser.add_argument("--without-maps", action="store_true", help="the same sets with nothing in their place too")
    parser.add_argument(
        "--paper", type=int, nargs="+", default=[], metavar="N", help="the paper's choice of N sublayers"
    )
    return parser.parse_args(argv)


def _plans(
    model: Any, tokenizer: Any, sizes: BudgetSizes, arguments: argparse.Namespace
) -> Iterator[tuple[str, SkipPlan]]:
    prefill, _ = capture_phases(model)
    layers = layers_from_the_end(prefill.stream)
    texts = BudgetTexts(tokenizer, arguments.context, sizes, built_in_domains())
    samples = texts.to_fit()
    followed = texts.to_tune(AFTER) if arguments.tune else []
    fitter = SequenceFitter(model, samples, max_samples=sizes.fitted)
    fitter.begin_at([path for one in arguments.sets for path in one.named(layers)])
    for one in arguments.sets:
        began = time.perf_counter()
        skips = fitter.fit(
            one.skipped(layers), unit_share=arguments.unit_share, windows=one.windowed(layers), progress=False
        )
        name = str(one)
        print(f"{name}: fitted in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        plan = replace(SkipPlan.none(), prompt=skips)
        yield name, plan
        if arguments.tune:
            began = time.perf_counter()
            tuned = adaskip_compile.tune(
                model, plan, followed, steps=arguments.tune, tokens=max(map(len, followed)), progress=False
            )
            better = "" if tuned is not plan else ", in vain"
            print(f"{name}: tuned in {time.perf_counter() - began:.0f} s{better}", file=sys.stderr)
            yield f"{name}, tuned", tuned
        if arguments.without_maps:
            yield f"{name}, no maps", SkipPlan.from_prompt_scales(dict.fromkeys(skips.paths, 1.0))
    if arguments.paper:
        short = [ids for ids in samples if len(ids) <= sizes.prompt][:20]
        profile = adaskip_compile.profile(model, short, progress=False)
        for count in arguments.paper:
            yield f"paper's {count}, prefill alone", adaskip_compile.plan(profile, skip=count, phase="prefill")
            yield f"paper's {count}, throughout", adaskip_compile.plan(profile, skip=count)


if __name__ == "__main__":
    sys.exit(main())
