"""Measure how much each sublayer of a model changes the residual stream.

Without --texts, built-in text is used: technical English and code, in turn. The profile that is written
is what 'adaskip plan' decides from; profiles of one model can be merged.

With --compensation, maps are fitted that can stand in the place of sublayers; with --joint, it is tried out which
sublayers the model's predictions miss least when they are skipped together. Both are kept with the profile.

examples:
  adaskip profile smollm2 --out profile.json
  adaskip profile smollm2 --out profile.json --compensation low_rank --joint 24
  adaskip profile ./my-model --out profile.json --texts chapter1.txt chapter2.txt --length 4096
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from adaskip_compile.cli import arguments as common
from adaskip_compile.cli.output import Output

if TYPE_CHECKING:
    import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command takes."""
    common.add_model_arguments(parser)
    parser.add_argument("--out", required=True, metavar="PATH", help="where to write the profile")
    parser.add_argument("--plot", metavar="PATH", help="draw similarity by depth: .png, .svg or .pdf")
    parser.add_argument("--all", action="store_true", help="list every sublayer, not only the most similar")
    parser.add_argument("--texts", nargs="+", metavar="FILE", help="text files to profile on instead of built-in text")
    parser.add_argument("--samples", type=common.positive, default=20, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--length", type=common.positive, default=2048, metavar="N", help="tokens a sample (default: %(default)s)"
    )
    parser.add_argument(
        "--compensation",
        nargs="+",
        default=[],
        choices=("channel", "low_rank", "affine"),
        metavar="FORM",
        help="fit maps of these forms too: channel, low_rank, affine",
    )
    parser.add_argument(
        "--rank", type=common.positive, metavar="R", help="of low_rank (default: an eighth of the stream's width)"
    )
    parser.add_argument(
        "--joint", type=common.positive, metavar="N", help="put N sublayers in the order to skip them by joint loss"
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Carry the command out and return its exit code."""
    import adaskip_compile
    from adaskip_compile.cli.tables import profile_table
    from adaskip_compile.display.plots import check_plot, write_plot
    from adaskip_compile.texts import choose_samples

    if arguments.plot:
        check_plot(arguments.plot)
    texts = common.read_texts(arguments.texts) if arguments.texts else None
    model, tokenizer = common.load_model(arguments)
    samples = choose_samples(tokenizer, texts, arguments.samples, arguments.length)
    profile = adaskip_compile.profile(model, samples, max_samples=arguments.samples, progress=output.watched)
    profile = _learn_more(model, profile, samples, arguments, output)
    profile.save(arguments.out)
    output.show(profile_table(profile, every_row=arguments.all))
    for step in profile.joint_order:
        output.say(f"skipping {step.path} too loses {step.loss:.3f} nats a token in all")
    output.say(f"\n{profile.samples} samples, written to {arguments.out}")
    if arguments.plot:
        write_plot(arguments.plot, profile.plot)
        output.say(f"drawn in {arguments.plot}")
    output.say(f"next: adaskip plan {arguments.out} --out plan.json")
    output.results(
        {"profile": arguments.out, "samples": profile.samples, "sublayers": describe(profile), **more(profile)}
    )
    return 0


def _learn_more(
    model: Any, profile: Any, samples: list[torch.Tensor], arguments: argparse.Namespace, output: Output
) -> Any:
    """Return ``profile`` with the maps and the joint order that the arguments ask for."""
    import adaskip_compile

    if arguments.compensation:
        profile = adaskip_compile.fit(
            model,
            profile,
            samples,
            forms=arguments.compensation,
            rank=arguments.rank,
            max_samples=arguments.samples,
            progress=output.watched,
        )
    if arguments.joint:
        tried_with = arguments.compensation[-1] if arguments.compensation else "scale"
        profile = adaskip_compile.order_by_loss(
            model, profile, samples, compensation=tried_with, most=arguments.joint, progress=output.watched
        )
    return profile


def describe(profile: Any) -> list[dict[str, Any]]:
    """Return the means of a profile, one dict a sublayer, most similar first."""
    return [
        {
            "path": sublayer.path,
            "kind": sublayer.kind,
            "stateful": sublayer.stateful,
            "similarity": sublayer.mean_similarity,
            "scale_token": sublayer.mean_scale("token"),
            "scale_frobenius": sublayer.mean_scale("frobenius"),
        }
        for sublayer in profile.ranking()
    ]


def more(profile: Any) -> dict[str, Any]:
    """Return what a profile holds beside measurements: the errors of its maps, and its joint order."""
    return {
        "maps": {path: {one.form: one.error for one in ones} for path, ones in profile.maps.items()},
        "joint_order": [{"path": step.path, "loss": step.loss} for step in profile.joint_order],
    }
