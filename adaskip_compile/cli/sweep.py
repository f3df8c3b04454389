"""Measure quality against speed over skip counts, policies and compensations, and recommend a plan.

Every plan is measured on text that it was not profiled on, and timed in rounds in which all take turns. Results are
kept in the file --results after every step: run the same command again to go on after an interrupt, or with more
--skips to add to them. Ends in a table, a CSV file, a plot, and the plan that is best for --max-loss or --speedup.

Built-in text is technical English and code; each --texts NAME=DIR adds a folder of text files as a domain of its own.
Half of the files of each are for profiling, the others for measuring.

examples:
  adaskip sweep smollm2 --skips 0 4 8 12 16 --max-loss 0.3 --out plan.json
  adaskip sweep smollm2 --inner eager --windows 1 --length 512 --context 512 --rounds 1
  adaskip sweep ./my-model --texts news=./articles --measures nll needle --speedup 1.2 --out plan.json --plot curve.svg
  adaskip sweep ./my-model --skips 8 --depths 6,6 8,11 --measures needle --max-loss 0.02 --out plan.json
  adaskip sweep ./my-model --longbench ./LongBench --tasks trec,triviaqa --items 50
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adaskip_compile.cli import arguments as common
from adaskip_compile.cli import sweep_arguments
from adaskip_compile.cli.output import Output
from adaskip_compile.display.progress import progress_bar, show_stages
from adaskip_passes.errors import OptionError

if TYPE_CHECKING:
    from adaskip_compile.evaluation.candidates import Candidate
    from adaskip_compile.evaluation.sweep_results import SweepResults
    from adaskip_compile.evaluation.tradeoff import Row
    from adaskip_compile.profiling.profiles import Profile
    from adaskip_compile.texts import Domain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command takes."""
    common.add_model_arguments(parser)
    sweep_arguments.add_plan_arguments(parser)
    sweep_arguments.add_measure_arguments(parser)
    sweep_arguments.add_timing_arguments(parser)
    sweep_arguments.add_result_arguments(parser)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Carry the command out and return its exit code."""
    _check(arguments)
    from adaskip_compile.cli import sweep_tables
    from adaskip_compile.evaluation.candidates import make_candidates
    from adaskip_compile.evaluation.domains import mixed_windows, read_domains
    from adaskip_compile.evaluation.sweep_results import SweepResults
    from adaskip_compile.evaluation.tradeoff import as_good, make_rows, recommend

    domains = read_domains(arguments.texts)
    model, tokenizer = common.load_model(arguments)
    results = SweepResults.open(arguments.results, _about(model, domains, arguments))
    samples = mixed_windows(domains, tokenizer, "profiling", arguments.samples, arguments.length)
    with show_stages("profiling"):
        profile = _profile(model, samples, results, arguments)
    candidates = make_candidates(
        profile, arguments.skips, arguments.policies, arguments.compensations, window=arguments.window
    )
    candidates += _prompt_candidates(model, samples, results, arguments, output)
    results.measure_by({one.name: one.plan for one in candidates})
    _measure(model, tokenizer, domains, candidates, results, arguments, output)
    _time(model, domains, tokenizer, candidates, results, arguments, output)
    rows = make_rows(candidates, results)
    sweep_tables.show(output, rows)
    _write(rows, arguments, output)
    found: dict[str, Any] = {"results": arguments.results, "rows": sweep_tables.as_json(rows)}
    if arguments.max_loss is not None or arguments.speedup is not None:
        best = recommend(rows, max_loss=arguments.max_loss, speedup=arguments.speedup)
        found["recommended"] = _recommend(best, as_good(rows, best, max_loss=arguments.max_loss), arguments, output)
    output.results(found)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise for what would only come to light after hours of measuring."""
    from adaskip_compile.evaluation.candidates import check_names
    from adaskip_compile.evaluation.longbench import find_task
    from adaskip_compile.evaluation.suite import check_kinds

    check_names(arguments.policies, arguments.compensations)
    check_kinds(arguments.measures)
    if arguments.depths:
        _check_depths(arguments)
    for task in _tasks(arguments):
        find_task(task)
    if arguments.out and arguments.max_loss is None and arguments.speedup is None:
        raise OptionError("--out: what is the plan to reach? Give --max-loss or --speedup too")
    if bool(arguments.longbench) != bool(arguments.tasks):
        raise OptionError("--longbench and --tasks go together: the folder, and which of its tasks")
    if arguments.new_tokens < arguments.window + 3:
        raise OptionError(
            f"--new-tokens must be at least {arguments.window + 3}, to see past a window of {arguments.window}"
        )
    if arguments.plot:
        from adaskip_compile.display.plots import check_plot

        check_plot(arguments.plot)


def _check_depths(arguments: argparse.Namespace) -> None:
    """Raise where a plan that skips for the body of a prompt would meet none."""
    from adaskip_compile.evaluation.suite import Sizes
    from adaskip_compile.planning.prompt_skips import PromptSkips

    least, decoded = PromptSkips(()).least_rows, Sizes.decoded
    if "nll" in arguments.measures:
        raise OptionError(
            "--measures nll reads what the model says after every token of a prompt, and --depths skips for those; what follows a "
            "prompt is measured (decode)"
        )
    for option, tokens, needed in (
        ("--context", arguments.context, least),
        ("--length", arguments.length, least + decoded + 1),
    ):
        if tokens < needed:
            raise OptionError(
                f"{option} {tokens}: with --depths it takes {needed} tokens or more, for shorter prompts run in full"
            )


def _prompt_candidates(
    model: Any, samples: Sequence[Any], results: SweepResults, arguments: argparse.Namespace, output: Output
) -> tuple[Candidate, ...]:
    """Return the plans of --depths: kept by an earlier run of this very sweep, or fitted."""
    from adaskip_compile.evaluation.candidates import make_prompt_candidates
    from adaskip_compile.files.versioned_json import digest

    about = digest(json.dumps(results.about, sort_keys=True))[:8]  # maps of other texts are other maps
    with progress_bar("fitting maps", len({*arguments.depths} - {(0, 0)})) as advance:
        return make_prompt_candidates(
            model,
            samples,
            arguments.depths,
            lambda name: results.path.with_name(f"{results.path.stem}.prompt-{name}-{about}.json"),
            progress=advance,
        )


def _tasks(arguments: argparse.Namespace) -> list[str]:
    return arguments.tasks.split(",") if arguments.tasks else []


def _profile(model: Any, samples: Sequence[Any], results: Any, arguments: argparse.Namespace) -> Profile:
    """Return the profile that an earlier run of this sweep kept, or the one that was named, or measure it."""
    from pathlib import Path

    import adaskip_compile
    from adaskip_compile.evaluation.candidates import complete_profile
    from adaskip_compile.files.model_identity import identify
    from adaskip_compile.profiling.profiles import Profile

    kept = Path(arguments.results).with_suffix(".profile.json")
    named = kept if results.path.exists() and kept.exists() else arguments.profile
    if named is not None:
        profile = Profile.load(named)
        profile.check(identify(model), source=str(named))
    else:
        profile = adaskip_compile.profile(model, samples, max_samples=arguments.samples, progress=False)
    names = (arguments.policies, arguments.compensations)
    complete = complete_profile(model, profile, samples, *names, most=max(arguments.skips), progress=False)
    if named is None or complete is not profile:
        complete.save(kept)
        results.save()  # from here on it belongs to this sweep
    return complete


def _about(model: Any, domains: Sequence[Domain], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all that results depend on, beside the plan: they may be added to only where it is the same."""
    import platform

    import torch

    from adaskip_compile.files.model_identity import identify
    from adaskip_compile.files.versioned_json import digest, producer
    from adaskip_compile.profiling.profiles import PROFILE_FORMAT

    names = ("dtype", "inner", "window", "samples", "windows", "length", "context", "new_tokens", "items")
    profile = digest(repr(PROFILE_FORMAT.read(arguments.profile))) if arguments.profile else "measured by the sweep"
    return {
        "model": f"{identify(model).name} {identify(model).key}",
        "made by": f"{producer()}, torch {torch.__version__}",
        "machine": f"{platform.machine()} {model.device.type}, {torch.get_num_threads()} threads",
        "profile": profile,
        "texts": {domain.name: domain.digest for domain in domains},
        **{f"--{name.replace('_', '-')}": getattr(arguments, name) for name in names},
    }


def _measure(
    model: Any,
    tokenizer: Any,
    domains: Sequence[Domain],
    candidates: Sequence[Candidate],
    results: Any,
    arguments: argparse.Namespace,
    output: Output,
) -> None:
    """Measure the quality of every plan, but for what the results hold already."""
    import adaskip_compile
    from adaskip_compile.evaluation.suite import Sizes, longbench_measures, make_measures
    from adaskip_compile.evaluation.tradeoff import loss_measure

    sizes = Sizes(windows=arguments.windows, length=arguments.length, contexts=(arguments.context,))
    adaskip_compile.compile(model, candidates[0].plan, inner=arguments.inner)
    kinds = list(dict.fromkeys([loss_measure(candidates), *arguments.measures]))
    measures = make_measures(kinds, model, tokenizer, domains, sizes)
    if arguments.longbench:
        measures += longbench_measures(arguments.longbench, _tasks(arguments), model, tokenizer, count=arguments.items)
    todo = [
        (candidate, measure)
        for candidate in candidates
        for measure in measures
        if measure.name not in results.quality.get(candidate.name, {})
    ]
    with progress_bar("measuring quality", len(todo)) as advance:
        for candidate, measure in todo:
            adaskip_compile.compile(model, candidate.plan, inner=arguments.inner)
            results.add_quality(candidate.name, measure.name, measure.run(model))
            advance()


def _time(
    model: Any,
    domains: Sequence[Domain],
    tokenizer: Any,
    candidates: Sequence[Candidate],
    results: Any,
    arguments: argparse.Namespace,
    output: Output,
) -> None:
    """Time every plan in turn with the full model, but for those that were timed often enough already."""
    from functools import partial

    import adaskip_compile
    from adaskip_compile.evaluation.timing import Generation, generate, take_turns

    full, *others = candidates
    lacking = [one for one in others if results.timed(one.name) < arguments.rounds]
    if not lacking and results.timed(full.name) >= arguments.rounds:
        return
    [prompt] = domains[0].windows(tokenizer, "evaluation", 1, arguments.context)
    ids = prompt[None].to(model.device)
    with progress_bar("timing", (1 + len(lacking)) * (1 + arguments.rounds)) as advance:

        def timed(plan: Any) -> Generation:
            adaskip_compile.compile(model, plan, inner=arguments.inner)
            generation = generate(model, ids, arguments.new_tokens)
            advance()
            return generation

        ways = {one.name: partial(timed, one.plan) for one in (full, *lacking)}
        take_turns(ways, 1)  # captures and compiles; not timed
        for _ in range(arguments.rounds):
            found = {name: runs[0] for name, runs in take_turns(ways, 1).items()}
            results.cache_bytes |= {name: run.cache_bytes for name, run in found.items()}
            results.add_round(
                {name: (run.first, sum(run.later), run.steady(arguments.window)) for name, run in found.items()}
            )


def _write(rows: Sequence[Row], arguments: argparse.Namespace, output: Output) -> None:
    from adaskip_compile.evaluation.tradeoff import as_csv, draw_curve
    from adaskip_compile.files.atomic_write import write_text

    if arguments.csv:
        write_text(arguments.csv, as_csv(rows), option="--csv")
        output.say(f"written to {arguments.csv}")
    if arguments.plot:
        from adaskip_compile.display.plots import write_plot

        xlabel = f"speed-up of a request of {arguments.context} + {arguments.new_tokens} tokens"
        ylabel = "NLL above the full model's, nats a token"
        labels = {"title": arguments.model, "xlabel": xlabel, "ylabel": ylabel}
        write_plot(arguments.plot, lambda axes: draw_curve(axes, rows), **labels)
        output.say(f"drawn in {arguments.plot}")


def _recommend(best: Row, others: Sequence[Row], arguments: argparse.Namespace, output: Output) -> dict[str, Any]:
    from adaskip_compile.cli.plan import describe

    speed = best.request.format(1, 2, "x")
    output.say(f"\nrecommended: {best.candidate.name}, {speed} as fast, loses {best.loss:.3f} nats a token")
    names = [row.candidate.name for row in others]
    if names:
        output.say(f"what was measured does not tell it from {', '.join(names)}: more --rounds or --windows would")
    if arguments.out:
        best.candidate.plan.save(arguments.out)
        output.say(f"written to {arguments.out}")
    return {"name": best.candidate.name, "as_good": names, "plan": arguments.out, **describe(best.candidate.plan)}
