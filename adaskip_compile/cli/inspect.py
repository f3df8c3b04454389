"""Show what the compiler finds in a model, what each sublayer costs, and what skipping is worth.

No weight is read and nothing is run, except with --calibrate, which measures this machine. With a profile,
each sublayer's similarity and scale are shown; with a plan, which are skipped in which phase.

examples:
  adaskip inspect smollm2
  adaskip inspect --config my-model/config.json --context 32768
  adaskip inspect smollm2 --profile profile.json --plan plan.json --html page.html
  adaskip inspect smollm2 --calibrate --calibration this-machine.json
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from adaskip_compile.cli import arguments as common
from adaskip_compile.cli.output import Output
from adaskip_compile.display.progress import progress_bar, show_stages
from adaskip_compile.files.atomic_write import write_text
from adaskip_passes.errors import OptionError

if TYPE_CHECKING:
    from adaskip_compile.costs.timers import Measured, Timer
    from adaskip_compile.inspection.inspection import Inspection

_CALIBRATION_CONTEXTS = (512, 2048, 4096)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command takes."""
    common.add_model_arguments(parser, optional=True)
    parser.add_argument("--config", metavar="FILE", help="the config.json of a model, in place of MODEL")
    parser.add_argument("--profile", metavar="PATH", help="a file that 'adaskip profile' wrote for this model")
    parser.add_argument("--plan", metavar="PATH", help="a file that 'adaskip plan' wrote for this model")
    parser.add_argument("--all", action="store_true", help="list each sublayer, also those that are equal")
    _add_outputs(parser.add_argument_group("what to write"))
    parser.add_argument(
        "--context", type=common.positive, default=2048, metavar="N", help="tokens to cost at (default: %(default)s)"
    )
    timing = parser.add_argument_group("how times are told")
    timing.add_argument("--flops", type=float, metavar="N", help="peak operations a second of the roofline")
    timing.add_argument("--bandwidth", type=float, metavar="N", help="bytes a second of the roofline")
    timing.add_argument("--calibrate", action="store_true", help="measure this machine with the real model (minutes)")
    timing.add_argument("--calibration", metavar="PATH", help="where to keep what --calibrate measures, or to read it")
    timing.add_argument(
        "--contexts", type=common.positive, nargs="+", metavar="N", help="context lengths to measure at"
    )
    timing.add_argument("--rounds", type=common.positive, default=3, metavar="N", help="(default: %(default)s)")
    timing.add_argument("--inner", choices=("inductor", "eager"), default="inductor", help="(default: %(default)s)")


def _add_outputs(outputs: argparse._ArgumentGroup) -> None:
    outputs.add_argument("--html", metavar="FILE", help="a page to look at in a browser; it needs no network")
    outputs.add_argument("--runtime", metavar="FILE", help="what 'adaskip run --json FILE' wrote, to show on the page")
    outputs.add_argument(
        "--sweep", metavar="FILE", help="what 'adaskip sweep --json FILE' wrote, to show what plans lose"
    )
    outputs.add_argument("--graphml", metavar="FILE", help="the captured graph, for graph tools")
    outputs.add_argument("--dot", metavar="FILE", help="the residual stream, for Graphviz")
    outputs.add_argument("--node-data", metavar="FILE", help="colours for Model Explorer, for the --program")
    outputs.add_argument("--program", metavar="PT2", help="the exported program of this model that --node-data is for")
    outputs.add_argument(
        "--node-value",
        choices=("share", "similarity"),
        default="share",
        help="what --node-data shows: share of time in percent, or similarity (default: %(default)s)",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Carry the command out and return its exit code: 1 when no residual stream was found."""
    from adaskip_compile.cli import inspection_tables
    from adaskip_compile.inspection.report import inspection_report

    with show_stages("capturing the graphs of the model, without its weights"):
        found = _inspect(arguments)
    timer = _timer(arguments, found, output)
    runtime = common.read_report(arguments.runtime) if arguments.runtime else None
    sweep = common.read_sweep(arguments.sweep) if arguments.sweep else ()
    report = inspection_report(found, timer, arguments.context, runtime=runtime, sweep=sweep)
    _write_outputs(arguments, found, timer, report)
    inspection_tables.show(output, report, every_row=arguments.all)
    output.results(report)
    return 0 if found.sublayers else 1


def _write_outputs(arguments: argparse.Namespace, found: Inspection, timer: Timer, report: dict[str, Any]) -> None:
    if (arguments.node_data is None) != (arguments.program is None):
        raise OptionError("--node-data and --program go together: the colours are for the nodes of that program")
    if arguments.html:
        from adaskip_compile.inspection.pages import inspection_page

        write_text(arguments.html, inspection_page(report), option="--html")
    if not found.sublayers:
        return
    from adaskip_compile.inspection.drawings import dot, graphml, node_data

    if arguments.graphml:
        write_text(arguments.graphml, graphml(found), option="--graphml")
    if arguments.dot:
        write_text(arguments.dot, dot(found), option="--dot")
    if arguments.node_data:
        data = node_data(found, arguments.program, timer, arguments.context, arguments.node_value)
        write_text(arguments.node_data, data, option="--node-data")


def _inspect(arguments: argparse.Namespace) -> Inspection:
    import torch

    from adaskip_compile.checkpoints import load_structure
    from adaskip_compile.files.model_identity import identify
    from adaskip_compile.inspection.inspection import inspect_model
    from adaskip_compile.planning.skip_plan import SkipPlan
    from adaskip_compile.profiling.profiles import Profile

    if (arguments.model is None) == (arguments.config is None):
        raise OptionError("name either a MODEL or the --config of one")
    profile = Profile.load(arguments.profile) if arguments.profile else None
    plan = SkipPlan.load(arguments.plan) if arguments.plan else None
    model = load_structure(arguments.model, config=arguments.config, dtype=getattr(torch, arguments.dtype))
    identity = identify(model)
    for given, source in ((profile, arguments.profile), (plan, arguments.plan)):
        if given is not None:
            given.check(identity, source=source)
    return inspect_model(model, name=arguments.model or arguments.config, profile=profile, plan=plan)


def _timer(arguments: argparse.Namespace, found: Inspection, output: Output) -> Timer:
    """Return how times are told: measured now, read from a file, or a roofline."""
    from dataclasses import replace

    from adaskip_compile.costs.timers import ROOFLINES, Measured

    if arguments.calibrate and found.sublayers:
        return _calibrate(arguments, found, output)
    if arguments.calibration:
        measured = Measured.load(arguments.calibration)
        measured.check(found.model, found.phases, len(found.groups))
        return measured
    kind = "cuda" if str(arguments.device).startswith("cuda") else "cpu"
    peaks = {"flops": arguments.flops, "bandwidth": arguments.bandwidth}
    for name, value in peaks.items():
        if value is not None and not value > 0:
            raise OptionError(f"--{name} {value:g}: takes a number above 0")
    return replace(ROOFLINES[kind], **{name: value for name, value in peaks.items() if value is not None})


def _calibrate(arguments: argparse.Namespace, found: Inspection, output: Output) -> Measured:
    from adaskip_compile.evaluation.calibration import calibrate, steps

    if arguments.model is None:
        raise OptionError("--calibrate runs the real model: name a MODEL, not only its --config")
    model, _ = common.load_model(arguments)
    contexts = _contexts(arguments, found)
    with progress_bar("measuring", steps(found, contexts, arguments.rounds)) as advance:
        measured = calibrate(
            model, found, contexts=contexts, rounds=arguments.rounds, inner=arguments.inner, advance=advance
        )
    if arguments.calibration:
        measured.save(arguments.calibration)
    return measured


def _contexts(arguments: argparse.Namespace, found: Inspection) -> tuple[int, ...]:
    from adaskip_compile.evaluation.calibration import NEW_TOKENS

    asked = arguments.contexts or _CALIBRATION_CONTEXTS
    most = found.longest or max(asked) + NEW_TOKENS
    fitting = tuple(sorted({min(context, most - NEW_TOKENS) for context in asked}))
    if fitting[0] < 2:
        raise OptionError(f"--contexts: this model takes {most} tokens, too few to measure")
    return fitting
