"""Generate text with a model, skipping what a plan or a profile says.

With --plan, that plan is used. With --profile, one is made from it. With --max-loss, a plan for the prompt is found that
loses no more, which takes minutes, once. With none of them everything runs, compiled.

examples:
  adaskip run smollm2 --plan plan.json --prompt 'The capital of France is'
  adaskip run smollm2 --max-loss 0.02 --prompt-file question.txt
  adaskip run smollm2 --profile profile.json --prompt-file question.txt --max-new-tokens 200
"""

from __future__ import annotations

import argparse
from typing import Any

from adaskip_compile.cli import arguments as common
from adaskip_compile.cli.output import Output
from adaskip_compile.planning.policy_names import POLICIES
from adaskip_passes.errors import OptionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command takes."""
    common.add_model_arguments(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a text file to continue")
    guide = parser.add_mutually_exclusive_group()
    guide.add_argument("--plan", metavar="PATH", help="a file that 'adaskip plan' wrote for this model")
    guide.add_argument("--profile", metavar="PATH", help="a file that 'adaskip profile' wrote for this model")
    guide.add_argument(
        "--max-loss", type=float, metavar="NATS", help="what the text may lose a token: 0.02 is 2 %% of perplexity"
    )
    parser.add_argument(
        "--max-new-tokens", type=common.positive, default=64, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--skip", type=int, metavar="N", help="with --profile, sublayers to skip (default: 8)")
    parser.add_argument(
        "--policy", choices=tuple(POLICIES), help="with --profile, how to choose them (default: adaskip)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="what the policy 'random' draws with (default: 0)")
    parser.add_argument("--inner", choices=("inductor", "eager"), help="the backend that compiles each region")


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Carry the command out and return its exit code."""
    import adaskip_compile

    prompt, source = arguments.prompt, "--prompt"
    if arguments.prompt_file is not None:
        [prompt], source = common.read_texts([arguments.prompt_file]), f"--prompt-file {arguments.prompt_file}"
    if not prompt.strip():
        raise OptionError(f"{source} {prompt!r}: takes some text to continue")
    model, tokenizer = common.load_model(arguments)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not inputs.input_ids.numel():
        raise OptionError(f"{source}: the tokenizer of this model makes no token of it; give more text")
    options = _options(arguments)
    if arguments.max_loss is not None:
        options |= {"tokenizer": tokenizer, "max_loss": arguments.max_loss, "progress": output.watched}
    adaskip_compile.compile(model, **options)
    generated = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    text = tokenizer.decode(generated[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    report = adaskip_compile.report(model)
    output.say(text)
    output.say()
    output.say(report)
    output.results({"model": arguments.model, "prompt": prompt, "text": text, "report": report.to_dict()})
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    asked = {name: getattr(arguments, name) for name in ("profile", "skip", "policy", "seed", "inner")}
    options = {name: value for name, value in asked.items() if value is not None}
    if arguments.plan is not None:
        from adaskip_compile.planning.skip_plan import SkipPlan

        options["plan"] = SkipPlan.load(arguments.plan)
    return options
