"""List the sublayers that the compiler finds in a model.

With a profile, each sublayer's similarity and scale are shown; with a plan, which are skipped.

examples:
  adaskip inspect smollm2
  adaskip inspect smollm2 --profile profile.json --plan plan.json --json -
"""

from __future__ import annotations

import argparse
from typing import Any

from adaskip_compile.cli import arguments as common
from adaskip_compile.cli.output import Output

# Any few tokens show the structure; one token would be taken for a decode step.
_EXAMPLE = "The structure of a model does not depend on its input."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command takes."""
    common.add_model_arguments(parser)
    parser.add_argument("--profile", metavar="PATH", help="a file that 'adaskip profile' wrote for this model")
    parser.add_argument("--plan", metavar="PATH", help="a file that 'adaskip plan' wrote for this model")


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Carry the command out and return its exit code: 1 when no residual stream was found."""
    import adaskip_compile
    from adaskip_compile.cli.tables import sublayer_table

    model, tokenizer = common.load_model(arguments)
    measured = _measured(arguments.profile, model)
    skipped = _skipped(arguments.plan, model)
    ids = tokenizer(_EXAMPLE, return_tensors="pt").input_ids.to(model.device)
    stream = adaskip_compile.analyze(model, input_ids=ids)
    rows = [_row(model, sublayer, measured, skipped) for sublayer in stream.sublayers]
    if rows:
        output.show(sublayer_table(rows, profiled=bool(measured), planned=skipped is not None))
    for problem in stream.problems:
        output.say(f"problem: {problem}")
    output.results({"model": arguments.model, "sublayers": rows, "problems": list(stream.problems)})
    return 0 if rows else 1


def _measured(path: str | None, model: Any) -> dict[str, Any]:
    if path is None:
        return {}
    from adaskip_compile.identity import identify
    from adaskip_compile.profiles import Profile

    profile = Profile.load(path)
    profile.check(identify(model))
    return {sublayer.path: sublayer for sublayer in profile.sublayers}


def _skipped(path: str | None, model: Any) -> dict[str, float] | None:
    if path is None:
        return None
    from adaskip_compile.identity import identify
    from adaskip_compile.plans import SkipPlan

    plan = SkipPlan.load(path)
    plan.check(identify(model))
    return plan.scales


def _row(model: Any, sublayer: Any, measured: dict[str, Any], skipped: dict[str, float] | None) -> dict[str, Any]:
    found = measured.get(sublayer.path)
    return {
        "path": sublayer.path,
        "kind": sublayer.kind,
        "stateful": sublayer.stateful,
        "parameters": _parameters(model, sublayer.path),
        "similarity": found and found.mean_similarity,
        "scale": found and found.mean_scale("token"),
        "skipped": None if skipped is None else sublayer.path in skipped,
    }


def _parameters(model: Any, path: str) -> int | None:
    """Return how many parameters the module at ``path`` holds; None where the path names no single module."""
    try:
        return sum(parameter.numel() for parameter in model.get_submodule(path).parameters())
    except AttributeError:
        return None
