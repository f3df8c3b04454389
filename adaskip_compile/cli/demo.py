"""Show what skipping does to a real model: speed, memory, quality and text, side by side.

Finds what SmolLM2-135M can skip, and generates from the same prompt in ways that take turns in one process: eagerly in
full; compiled in full, which gives the same text; compiled to skip in the prompt what loses at most so many per cent of
perplexity; and with the paper's choice, which skips throughout.

examples:
  adaskip demo
  adaskip demo --max-losses 0.01 --skip 16 --json results.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adaskip_compile.cli import arguments as common
from adaskip_compile.cli import plan as planning
from adaskip_compile.cli.comparison import EAGER, FULL, PAPER, Comparison, within
from adaskip_compile.cli.output import Output
from adaskip_passes.errors import OptionError

if TYPE_CHECKING:
    import torch

    from adaskip_compile.evaluation.timing import Generation
    from adaskip_compile.fitting.budget_texts import BudgetSizes

_QUESTION = "Summarise the following page in a few sentences.\n\n"
_FIRST_WORDS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command takes."""
    parser.add_argument("--model", default="smollm2", help=argparse.SUPPRESS)
    common.add_loading_arguments(parser)
    planning.add_policy_arguments(parser)
    parser.add_argument(
        "--max-losses",
        type=float,
        nargs="+",
        default=[0.02, 0.05],
        metavar="NATS",
        help="what the text after a prompt may lose a token (default: 0.02 0.05: 2 %% and 5 %% of perplexity)",
    )
    parser.add_argument(
        "--skip",
        type=int,
        default=8,
        metavar="N",
        help="sublayers that the paper's choice skips (default: %(default)s)",
    )
    parser.add_argument("--inner", choices=("inductor", "eager"), default="inductor", help="(default: %(default)s)")
    common.add_counts(
        parser,
        ("samples", 12, "windows of text to profile and to fit on"),
        ("length", 512, "tokens in each, and in each prompt that measures quality"),
        ("held-out", 4, "prompts of other text to measure quality on"),
        ("needles", 8, "facts to ask for in a prompt"),
        ("prompt-tokens", 2000, "tokens of text in the prompt"),
        ("new-tokens", 64, "tokens to generate"),
        ("rounds", 3, "times that each way is run and timed"),
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Carry the command out and return its exit code."""
    from adaskip_compile.cli import demo_tables
    from adaskip_compile.fitting.loss_budget import confirm, plans_within_losses

    if arguments.new_tokens < arguments.window + 3:
        raise OptionError(
            f"--new-tokens must be at least {arguments.window + 3}, to see past a window of {arguments.window}"
        )
    output.say(f"1/4 Loading {arguments.model}")
    model, tokenizer = common.load_model(arguments)
    sizes = _sizes(arguments)
    output.say(f"2/4 Finding what can be skipped, on {arguments.samples} samples of {arguments.length} tokens")
    paper = _paper(model, tokenizer, arguments, output.watched)
    found = plans_within_losses(
        model, tokenizer, arguments.max_losses, context=arguments.length, sizes=sizes, progress=output.watched
    )
    plans = {**dict(zip(map(within, arguments.max_losses), found, strict=True)), PAPER: paper}
    output.say("3/4 Measuring what that loses, on further text")
    qualities = dict(
        zip(plans, confirm(model, tokenizer, [*plans.values()], context=arguments.length, sizes=sizes), strict=True)
    )
    ids = _prompt(tokenizer, arguments.prompt_tokens).to(model.device)
    output.say(f"4/4 Generating {arguments.new_tokens} tokens from {ids.shape[1]}, first to compile")
    generations, extra = _race(model, plans, ids, arguments, output)
    output.say()
    comparison = Comparison(plans, generations, qualities, extra, ids.shape[1])
    words = {way: tokenizer.decode(runs[-1].tokens[:_FIRST_WORDS]) for way, runs in generations.items()}
    demo_tables.show(output, comparison, words)
    output.results(demo_tables.as_json(comparison, words) | {"model": arguments.model})
    return 0


def _sizes(arguments: argparse.Namespace) -> BudgetSizes:
    from adaskip_compile.fitting.budget_texts import BudgetSizes

    return BudgetSizes(
        prompt=arguments.length,
        fitted=arguments.samples,
        measured=arguments.held_out,
        needles=arguments.needles,
    )


def _paper(model: Any, tokenizer: Any, arguments: argparse.Namespace, watched: bool) -> Any:
    import adaskip_compile
    from adaskip_compile.evaluation.candidates import complete_profile
    from adaskip_compile.texts import choose_samples

    samples = choose_samples(tokenizer, None, arguments.samples, arguments.length)
    profile = adaskip_compile.profile(model, samples, max_samples=arguments.samples, progress=watched)
    needed = {"policies": [arguments.policy], "compensations": [arguments.compensation]}
    profile = complete_profile(model, profile, samples, **needed, most=arguments.skip, progress=watched)
    return planning.make_plan(profile, arguments)


def _race(
    model: Any, plans: dict[str, Any], ids: torch.Tensor, arguments: argparse.Namespace, output: Output
) -> tuple[dict[str, list[Generation]], dict[str, float]]:
    """Return the timed generations of each way, and the FFNs that the last of ``plans`` added with their scales."""
    import torch

    import adaskip_compile
    from adaskip_compile.evaluation.timing import generate, take_turns
    from adaskip_compile.planning.skip_plan import SkipPlan

    def eager() -> Generation:
        with torch.compiler.set_stance("force_eager"):
            return generate(model, ids, arguments.new_tokens)

    def compiled(chosen: Any) -> Callable[[], Generation]:
        def run() -> Generation:
            adaskip_compile.compile(model, chosen, inner=arguments.inner)
            return generate(model, ids, arguments.new_tokens)

        return run

    ways = {EAGER: eager, FULL: compiled(SkipPlan.none()), **{way: compiled(plan) for way, plan in plans.items()}}
    began = time.perf_counter()
    take_turns(ways, 1)
    output.say(
        f"    compiled and warm after {time.perf_counter() - began:.0f} s; now {arguments.rounds} times each way"
    )
    generations = take_turns(ways, arguments.rounds)
    return generations, dict(adaskip_compile.report(model).requests[-1].extra)


def _prompt(tokenizer: Any, length: int) -> torch.Tensor:
    """Return a question about a held-out page of ``length`` tokens, as token ids ``(1, tokens)``."""
    from adaskip_compile.texts import held_out_texts, windows

    [page] = held_out_texts(1, characters=6 * length)
    [window] = windows(tokenizer, [page.text], length, per_text=1)
    if not tokenizer.chat_template:
        return window[None]
    text = _QUESTION + tokenizer.decode(window, skip_special_tokens=True)
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
