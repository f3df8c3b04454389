"""What ``adaskip sweep`` takes."""

from __future__ import annotations

import argparse

from adaskip_compile.cli import arguments as common


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add which plans are compared."""
    plans = parser.add_argument_group("what is compared")
    plans.add_argument(
        "--profile", metavar="PATH", help="a file that 'adaskip profile' wrote (default: measured first)"
    )
    plans.add_argument(
        "--skips",
        type=int,
        nargs="+",
        default=[0, 4, 8, 12, 16],
        metavar="K",
        help="numbers of sublayers to skip (default: 0 4 8 12 16)",
    )
    plans.add_argument(
        "--depths",
        type=_depths,
        nargs="+",
        default=[],
        metavar="A,F",
        help="also skip in the prompt alone, keys and values kept: the attentions of the A deepest layers below the last and "
        "the FFNs of the F deepest, with maps in their place",
    )
    plans.add_argument(
        "--policies", nargs="+", default=["adaskip"], metavar="NAME", help="how to choose them (default: adaskip)"
    )
    plans.add_argument(
        "--compensations", nargs="+", default=["scale"], metavar="NAME", help="what makes up for them (default: scale)"
    )
    plans.add_argument(
        "--window", type=int, default=20, metavar="P", help="decoded tokens to watch FFNs for (default: %(default)s)"
    )
    common.add_counts(plans, ("samples", 20, "windows to profile on"))


def add_measure_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is measured of them, and on what."""
    measures = parser.add_argument_group("what is measured")
    measures.add_argument("--texts", nargs="+", default=[], metavar="NAME=DIR", help="folders of text files")
    measures.add_argument(
        "--measures",
        nargs="+",
        default=[],
        metavar="NAME",
        help="nll, decode, needle, classification, rouge; nll is always measured, with --depths decode instead",
    )
    measures.add_argument("--longbench", metavar="DIR", help="a folder with the JSONL files of LongBench")
    measures.add_argument("--tasks", metavar="A,B", help="which of its English tasks, such as trec,triviaqa")
    measures.add_argument("--items", type=common.positive, metavar="N", help="items of each task (default: all)")
    common.add_counts(
        measures,
        ("windows", 2, "windows of text a domain"),
        ("length", 1024, "tokens in each, and in each that is profiled on"),
    )


def add_timing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is timed."""
    timing = parser.add_argument_group("what is timed")
    timing.add_argument("--inner", choices=("inductor", "eager"), default="inductor", help="(default: %(default)s)")
    common.add_counts(
        timing,
        ("context", 2048, "tokens of the timed prompt"),
        ("new-tokens", 48, "tokens generated after it"),
        ("rounds", 3, "times that each plan is timed"),
    )


def add_result_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where results go, and what plan is to be recommended."""
    results = parser.add_argument_group("results")
    results.add_argument("--results", default="sweep.json", metavar="PATH", help="kept here (default: %(default)s)")
    results.add_argument("--csv", metavar="PATH", help="write the table as CSV")
    results.add_argument("--plot", metavar="PATH", help="draw the curve: .png, .svg or .pdf")
    goal = results.add_mutually_exclusive_group()
    goal.add_argument(
        "--max-loss", type=float, metavar="X", help="recommend the fastest that loses at most X nats a token"
    )
    goal.add_argument("--speedup", type=float, metavar="A", help="recommend the best that is at least A times as fast")
    results.add_argument("--out", metavar="PATH", help="write the recommended plan")


def _depths(text: str) -> tuple[int, int]:
    attentions, _, ffns = text.partition(",")
    if not (attentions.isdigit() and ffns.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}: takes two numbers of layers, such as 8,11")
    return int(attentions), int(ffns)
