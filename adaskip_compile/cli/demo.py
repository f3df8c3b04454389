"""Show what skipping does to a real model: speed, memory, quality and text, side by side.

Profiles SmolLM2-135M on built-in text, plans which sublayers to skip, and generates from the same prompt
in three ways that take turns in one process: eagerly in full, compiled in full, and compiled with the plan.

examples:
  adaskip demo
  adaskip demo --skip 16 --json results.json
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from adaskip_compile.cli import arguments as common
from adaskip_compile.cli import plan as planning
from adaskip_compile.cli.comparison import EAGER, FULL, SKIPPING, Comparison
from adaskip_compile.cli.output import Output
from adaskip_compile.cli.profile import choose_samples
from adaskip_passes.errors import OptionError

if TYPE_CHECKING:
    import torch

    from adaskip_compile.cli.measure import Generation

_QUESTION = "Summarise the following page in a few sentences.\n\n"
_FIRST_WORDS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command takes."""
    parser.add_argument("--model", default="smollm2", help=argparse.SUPPRESS)
    common.add_loading_arguments(parser)
    planning.add_policy_arguments(parser)
    parser.add_argument("--skip", type=int, default=8, metavar="N", help="sublayers to skip (default: %(default)s)")
    parser.add_argument("--inner", choices=("inductor", "eager"), default="inductor", help="(default: %(default)s)")
    common.add_counts(
        parser,
        ("samples", 20, "windows of text to profile on"),
        ("length", 1024, "tokens in each, and in each window that measures quality"),
        ("held-out", 4, "windows of other text to measure quality on"),
        ("prompt-tokens", 2000, "tokens of text in the prompt"),
        ("new-tokens", 64, "tokens to generate"),
        ("rounds", 3, "times that each way is run and timed"),
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Carry the command out and return its exit code."""
    from adaskip_compile.cli import demo_tables

    if arguments.new_tokens < arguments.window + 3:
        raise OptionError(
            f"--new-tokens must be at least {arguments.window + 3}, to see past a window of {arguments.window}"
        )
    output.say(f"1/4 Loading {arguments.model}")
    model, tokenizer = common.load_model(arguments)
    output.say(f"2/4 Profiling on {arguments.samples} samples of {arguments.length} tokens")
    plan = _learn(model, tokenizer, arguments, output.watched)
    ids = _prompt(tokenizer, arguments.prompt_tokens).to(model.device)
    output.say(f"3/4 Generating {arguments.new_tokens} tokens from {ids.shape[1]}, first to compile")
    generations, extra = _race(model, plan, ids, arguments, output)
    output.say("4/4 Measuring quality on held-out text\n")
    nll = _quality(model, tokenizer, plan, arguments)
    found = Comparison(plan, generations, nll, extra, ids.shape[1])
    words = {way: tokenizer.decode(runs[-1].tokens[:_FIRST_WORDS]) for way, runs in generations.items()}
    demo_tables.show(output, found, words)
    output.results(demo_tables.as_json(found, words) | {"model": arguments.model})
    return 0


def _learn(model: Any, tokenizer: Any, arguments: argparse.Namespace, watched: bool) -> Any:
    import adaskip_compile
    from adaskip_compile.evaluation.candidates import complete_profile

    samples = choose_samples(tokenizer, None, arguments.samples, arguments.length)
    profile = adaskip_compile.profile(model, samples, max_samples=arguments.samples, progress=watched)
    needed = {"policies": [arguments.policy], "compensations": [arguments.compensation]}
    profile = complete_profile(model, profile, samples, **needed, most=arguments.skip, progress=watched)
    return planning.make_plan(profile, arguments)


def _race(
    model: Any, plan: Any, ids: torch.Tensor, arguments: argparse.Namespace, output: Output
) -> tuple[dict[str, list[Generation]], dict[str, float]]:
    """Return the timed generations of each way, and the FFNs that skipping ones added with their scales."""
    import torch

    import adaskip_compile
    from adaskip_compile.cli.measure import generate, take_turns
    from adaskip_compile.plans import SkipPlan

    def eager() -> Generation:
        with torch.compiler.set_stance("force_eager"):
            return generate(model, ids, arguments.new_tokens)

    def compiled(chosen: Any) -> Generation:
        adaskip_compile.compile(model, chosen, inner=arguments.inner)
        return generate(model, ids, arguments.new_tokens)

    ways = {EAGER: eager, FULL: lambda: compiled(SkipPlan.none()), SKIPPING: lambda: compiled(plan)}
    began = time.perf_counter()
    take_turns(ways, 1)
    output.say(
        f"    compiled and warm after {time.perf_counter() - began:.0f} s; now {arguments.rounds} times each way"
    )
    generations = take_turns(ways, arguments.rounds)
    return generations, dict(adaskip_compile.report(model).requests[-1].extra)


def _quality(model: Any, tokenizer: Any, plan: Any, arguments: argparse.Namespace) -> dict[str, float]:
    import adaskip_compile
    from adaskip_compile.evaluation.likelihood import mean_nll
    from adaskip_compile.plans import SkipPlan
    from adaskip_compile.texts import held_out_texts, windows

    texts = held_out_texts(arguments.held_out, characters=5 * arguments.length)
    samples = list(windows(tokenizer, (text.text for text in texts), arguments.length, per_text=1))
    nll = {}
    for way, chosen in ((FULL, SkipPlan.none()), (SKIPPING, plan)):
        adaskip_compile.compile(model, chosen, inner=arguments.inner)
        nll[way] = mean_nll(model, samples)
    return nll


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
