"""Find what a model can skip, within a stated loss or by a profile.

Of a MODEL: what its prompts can skip, keys and values kept, so that the text after a prompt loses at most --max-loss
(0.02 is 2 % of perplexity) and at most 5 % of the facts in a prompt are no longer found. Sets of ever deeper layers are
fitted and measured, on built-in texts or on documents of yours; what was tried is printed with the plan. Decoding runs
in full. This takes minutes on a small model.

Of a PROFILE: the paper's way. All sublayers, attention and FFN, are ranked together by similarity, and the most similar
are skipped in prefill and decode; after the first tokens of a request, FFNs that prove as similar are skipped too. Other
policies are there to compare with. With --context, sublayers are chosen so that both prefill and decode get --speedup
times as fast at that many tokens, by predicted times, at the least damage; --times has them measured on this machine.

With --from PLAN, a plan that was made of a profile is written again with another --window.

examples:
  adaskip plan smollm2 --max-loss 0.02 --out plan.json
  adaskip plan ./my-model --max-loss 0.05 --context 8192 --dtype bfloat16 --device cuda --out plan.json
  adaskip plan ./my-model --max-loss 0.02 --texts tickets/*.txt --out plan.json --plot frontier.svg
  adaskip plan profile.json --skip 8 --out plan.json
  adaskip plan profile.json --speedup 1.33 --window 20 --out plan.json
  adaskip plan profile.json --skip 8 --policy loss_greedy --compensation low_rank --out plan.json
  adaskip plan --from plan.json --window 10 --out plan10.json
  adaskip plan profile.json --speedup 1.25 --context 4096 --times this-machine.json --out plan.json
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaskip_compile.cli import arguments as common
from adaskip_compile.cli.output import Output
from adaskip_compile.planning.policy_names import COMPENSATIONS, POLICIES
from adaskip_passes.errors import OptionError

if TYPE_CHECKING:
    from adaskip_compile.planning.skip_plan import SkipPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command takes."""
    parser.add_argument(
        "source",
        nargs="?",
        metavar="MODEL|PROFILE",
        help="a model (a folder, a .gguf file, a hub id, or a short name), or a .json file that 'adaskip profile' wrote",
    )
    parser.add_argument("--from", dest="given", metavar="PLAN", help="change the --window of this plan")
    parser.add_argument("--out", required=True, metavar="PATH", help="where to write the plan")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--skip", type=int, metavar="N", help="sublayers to skip (default: 8)")
    amount.add_argument(
        "--speedup",
        type=float,
        metavar="A",
        help="skip 2(M - M/A) sublayers of M layers, the paper's target acceleration; with --context, get A times as fast",
    )
    amount.add_argument(
        "--max-loss",
        type=float,
        metavar="NATS",
        help="of a model, what the text after a prompt may lose a token (default: 0.02, 2 %% of perplexity); of a profile, "
        "what its joint order says a set loses, with no keys and values kept",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="of a model, tokens of the prompts that the plan is for (default: 1024); of a profile, where --speedup is reached",
    )
    parser.add_argument(
        "--texts",
        nargs="+",
        metavar="FILE",
        help="of a model, text files like those to be served, in place of built-in text: half to fit on, half to measure",
    )
    parser.add_argument(
        "--plot", metavar="PATH", help="of a model, draw what was tried, loss over speed-up: .png, .svg or .pdf"
    )
    parser.add_argument(
        "--times",
        metavar="PATH",
        help="times for --context, that 'adaskip inspect --calibrate --calibration PATH' measured",
    )
    parser.add_argument(
        "--phase", choices=("both", "prefill", "decode"), default="both", help="where to skip (default: %(default)s)"
    )
    add_policy_arguments(parser)
    parser.set_defaults(window=None)  # so that --from can tell whether it was asked for
    common.add_loading_arguments(parser)


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a plan depends on beside the number of sublayers."""
    parser.add_argument(
        "--policy",
        choices=tuple(POLICIES),
        default="adaskip",
        help="what to skip (default: %(default)s). " + "; ".join(f"{name}: {what}" for name, what in POLICIES.items()),
    )
    parser.add_argument("--seed", type=int, default=0, help="what 'random' draws with (default: %(default)s)")
    parser.add_argument(
        "--window", type=int, default=20, metavar="P", help="decoded tokens to watch FFNs for (default: 20)"
    )
    parser.add_argument(
        "--scale",
        choices=("token", "frobenius"),
        default="token",
        help="how a scale is measured (default: %(default)s)",
    )
    parser.add_argument(
        "--compensation",
        choices=tuple(COMPENSATIONS),
        default="scale",
        help="what stands in the place of a skipped sublayer (default: %(default)s). "
        + "; ".join(f"{name}: {what}" for name, what in COMPENSATIONS.items()),
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Carry the command out and return its exit code."""
    from adaskip_compile.display.plots import check_plot
    from adaskip_compile.profiling.profiles import Profile

    if (arguments.source is None) == (arguments.given is None):
        raise OptionError("takes a model or a profile, or a plan with --from: one of them")
    if arguments.given is not None:
        return _written(_with_window(arguments), arguments, output)
    of_profile = Path(arguments.source).suffix == ".json" or any(
        getattr(arguments, name) is not None for name in _OF_PROFILES
    )
    if of_profile and arguments.texts:
        raise OptionError("--texts goes with a model alone; a profile is made of texts by 'adaskip profile --texts'")
    if of_profile and arguments.plot:
        raise OptionError("--plot goes with a model alone; 'adaskip profile --plot' draws a profile")
    if arguments.plot:
        check_plot(arguments.plot)
    if of_profile:
        made = make_plan(Profile.load(arguments.source), arguments)
    else:
        made = _within_loss(arguments, output)
    return _written(made, arguments, output)


def _written(made: SkipPlan, arguments: argparse.Namespace, output: Output) -> int:
    from adaskip_compile.display.plots import write_plot

    made.save(arguments.out)
    output.say(made.describe())
    output.say(f"\nwritten to {arguments.out}")
    if arguments.plot and made.prompt and made.prompt.frontier:
        write_plot(arguments.plot, made.prompt.plot, title=arguments.source)
        output.say(f"drawn in {arguments.plot}")
    output.results({"plan": arguments.out, **describe(made)})
    return 0


def _with_window(arguments: argparse.Namespace) -> SkipPlan:
    """Return the plan of --from with the window that is asked for."""
    from adaskip_compile.planning.skip_plan import SkipPlan

    for name in _changed(arguments):
        if name not in ("given", "out", "window"):
            raise OptionError(f"--{name.replace('_', '-')} does not go with --from, which changes the --window alone")
    if arguments.window is None:
        raise OptionError("--from changes the window of a plan: give --window too")
    plan = SkipPlan.load(arguments.given)
    if plan.beta is None:
        raise OptionError(
            f"{arguments.given} skips nothing more after a window, however long: it was not made of a profile"
        )
    return replace(plan, window=arguments.window)


def _changed(arguments: argparse.Namespace) -> list[str]:
    """Return the names of the arguments that are not what they are by default."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    unset = vars(parser.parse_args(["--out", ""]))
    return [name for name, default in unset.items() if getattr(arguments, name) != default]


def _within_loss(arguments: argparse.Namespace, output: Output) -> Any:
    from adaskip_compile.fitting.loss_budget import plan_within_loss

    parser = argparse.ArgumentParser()
    add_policy_arguments(parser)
    usual = {"phase": "both", **vars(parser.parse_args([]))}
    for name in _changed(arguments):
        if name in usual and getattr(arguments, name) != usual[name]:
            raise OptionError(
                f"--{name} goes with a profile, and {arguments.source} is taken for a model, whose prompts alone skip; "
                f"'adaskip profile {arguments.source} --out profile.json' makes one"
            )
    model, tokenizer = common.load_model(arguments, arguments.source)
    asked = {name: getattr(arguments, name) for name in ("max_loss", "context")}
    chosen = {name: value for name, value in asked.items() if value is not None}
    texts = common.read_texts(arguments.texts) if arguments.texts else None
    return plan_within_loss(model, tokenizer, texts=texts, progress=output.watched, **chosen)


# What asks for a profile, whatever it is called.
_OF_PROFILES = ("skip", "speedup", "times")


def make_plan(profile: Any, arguments: argparse.Namespace) -> Any:
    """Return the plan that the arguments ask for."""
    import adaskip_compile

    names = (
        "skip",
        "speedup",
        "max_loss",
        "context",
        "times",
        "phase",
        "policy",
        "seed",
        "window",
        "scale",
        "compensation",
    )
    asked = {name: getattr(arguments, name, None) for name in names}
    return adaskip_compile.plan(profile, **{name: value for name, value in asked.items() if value is not None})


def describe(plan: Any) -> dict[str, Any]:
    """Return what a plan says, as JSON holds it."""
    return {
        "skipped": {sublayer.path: sublayer.scale for sublayer in plan.skipped},
        "beta": plan.beta,
        "window": plan.window,
        "policy": plan.policy,
        "scale_kind": plan.scale_kind,
        "maps": plan.to_dict()["maps"],
        "prompt": plan.to_dict()["prompt"],
        "ramp": [
            {
                "after": step.after,
                "skipped": {sublayer.path: sublayer.scale for sublayer in step.skipped},
                "resumed": list(step.resumed),
            }
            for step in plan.ramp
        ],
    }
