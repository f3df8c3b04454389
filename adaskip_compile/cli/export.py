"""Write programs with a plan built in, which PyTorch alone runs.

The folder gets prefill.pt2 and decode.pt2, their graphs as text, generate.py, which generates from them in a
process that has neither this package nor transformers, and manifest.json. What the plan skips throughout is
not in them. With --aot they are compiled by AOTInductor too, which takes minutes.

examples:
  adaskip export smollm2 --plan plan.json --out exported
  adaskip export smollm2 --plan plan.json --out exported --max-length 4096 --aot
  python exported/generate.py --ids 504 3575 282 4649 314 --new-tokens 64
"""

from __future__ import annotations

import argparse

from adaskip_compile.cli import arguments as common
from adaskip_compile.cli.output import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command takes."""
    common.add_model_arguments(parser)
    parser.add_argument("--plan", required=True, metavar="PATH", help="a file that 'adaskip plan' wrote for this model")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="the folder to write; an earlier export is replaced"
    )
    parser.add_argument(
        "--decode-plan", metavar="PATH", help="what to skip in decode, where other FFNs than in prefill"
    )
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens to make room for, prompt included (default: 2048)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows of equal length (default: %(default)s)")
    parser.add_argument("--aot", action="store_true", help="compile with AOTInductor as well")


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Carry the command out and return its exit code."""
    import adaskip_compile
    from adaskip_compile.exporting.folders import check_folder
    from adaskip_compile.planning.skip_plan import SkipPlan

    check_folder(arguments.out)  # before minutes of loading and capturing
    plan = SkipPlan.load(arguments.plan)
    model, tokenizer = common.load_model(arguments)
    exported = adaskip_compile.export(
        model,
        plan,
        arguments.out,
        decode_plan=arguments.decode_plan,
        batch=arguments.batch,
        max_length=arguments.max_length,
        aot=arguments.aot,
        progress=output.watched,
    )
    output.say(exported)
    if plan.beta is not None and plan.window:
        output.say("note: the plan's window is not built in; programs skip the same sublayers from first token to last")
    ids = " ".join(map(str, tokenizer("The capital of France is")["input_ids"]))
    output.say(f"\nwritten to {exported.directory}")
    output.say(f"next: python {exported.directory / 'generate.py'} --ids {ids}")
    output.results({"directory": str(exported.directory), **exported.manifest})
    return 0
