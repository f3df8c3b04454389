"""Tune the maps of a plan together, so that the model that skips predicts what the full model predicts.

For plans made with --compensation channel, low_rank or affine, and for those of prompts, made within a loss. The maps are adjusted by gradient descent on built-in
text, or on files of yours; the model's own weights stay as they are. On texts that are held out the tuned plan must do
better than the given one, or it is written unchanged, and said so.

examples:
  adaskip tune smollm2 plan.json --out tuned.json
  adaskip tune ./my-model plan.json --out tuned.json --texts chapter1.txt chapter2.txt --steps 500
"""

from __future__ import annotations

import argparse

from adaskip_compile.cli import arguments as common
from adaskip_compile.cli.output import Output
from adaskip_compile.cli.plan import describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command takes."""
    common.add_model_arguments(parser)
    parser.add_argument("plan", metavar="PLAN", help="a file that 'adaskip plan' wrote")
    parser.add_argument("--out", required=True, metavar="PATH", help="where to write the tuned plan")
    parser.add_argument("--texts", nargs="+", metavar="FILE", help="text files to tune on instead of built-in text")
    common.add_counts(
        parser,
        ("samples", 24, "texts, one in four held out"),
        ("length", 1088, "tokens of each"),
        ("steps", 200, "steps to take"),
    )
    parser.add_argument(
        "--tokens",
        type=common.positive,
        metavar="N",
        help="tokens a step (default: 256; of a plan that skips in prompts alone 1088, of samples that are as long)",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Carry the command out and return its exit code."""
    import adaskip_compile
    from adaskip_compile.texts import choose_samples

    plan = adaskip_compile.SkipPlan.load(arguments.plan)
    texts = common.read_texts(arguments.texts) if arguments.texts else None
    model, tokenizer = common.load_model(arguments)
    samples = choose_samples(tokenizer, texts, arguments.samples, arguments.length)
    tuned = adaskip_compile.tune(
        model, plan, samples, steps=arguments.steps, tokens=arguments.tokens, progress=output.watched
    )
    tuned.save(arguments.out)
    better = tuned is not plan
    output.say(tuned.describe() if better else "tuning did no better on the texts held out: the plan stays as it was")
    output.say(f"\nwritten to {arguments.out}")
    output.results({"plan": arguments.out, "better": better, **describe(tuned)})
    return 0
