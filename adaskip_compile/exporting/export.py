"""Export a model with its plan built in: programs that PyTorch alone runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from adaskip_compile.display.progress import show_stages
from adaskip_compile.exporting import runner
from adaskip_compile.exporting.capture import (
    LEAST_TOKENS,
    CapturedPhase,
    StaticSteps,
    capture_steps,
    check_max_length,
)
from adaskip_compile.exporting.files import SpecialisedPhase, describe, write_package, write_program
from adaskip_compile.exporting.folders import EXPORT_FORMAT, MANIFEST, check_folder, whole_folder
from adaskip_compile.exporting.programs import make_program
from adaskip_compile.files.model_identity import ModelIdentity, identify
from adaskip_compile.planning.prompt_skips import PromptSkips, computed_all_the_same
from adaskip_compile.planning.replacement_values import replacement_values
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_passes.errors import CaptureError, LegalityError, OptionError, PlanError
from adaskip_passes.pipeline.pipeline import Pass, run_pipeline
from adaskip_passes.pipelines import canonicalised, row_passes
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.fold_scales import FoldScales
from adaskip_passes.specialise.skip_body_rows import SkipBodyRows
from adaskip_passes.specialise.skip_sublayers import SkipSublayers
from adaskip_passes.stream.stream import ResidualStream

RUNNER = "generate.py"

Plan = SkipPlan | str | os.PathLike[str] | None


@dataclass(frozen=True)
class ExportedGraphs:
    """What :func:`export` wrote: the folder, its files, and the manifest that stands in it."""

    directory: Path
    files: tuple[Path, ...]
    manifest: dict[str, Any]

    def __str__(self) -> str:
        found = self.manifest
        lines: list[str] = []
        for name, program in found["programs"].items():
            share = program["weight_bytes"] / found["full_weight_bytes"]
            body = f" and {len(program['body_skipped'])} for the body of a prompt" if program["body_skipped"] else ""
            lines.append(
                f"{name:<8} {program['bytes'] / 1e6:9.1f} MB  skips {len(program['skipped'])} sublayers{body}; "
                f"weights {program['weight_bytes'] / 1e6:.1f} MB, {share:.0%} of the model's"
            )
            lines += [f"{'':<8} {note}" for note in program["notes"]]
        if found["aot"] is not None:
            lines.append(f"{'package':<8} {found['aot']['bytes'] / 1e6:9.1f} MB  compiled by AOTInductor")
        share = found["cache_bytes"] / found["full_cache_bytes"]
        room = f"room for {found['batch']} x {found['max_length']} tokens"
        lines.append(f"{'cache':<8} {found['cache_bytes'] / 1e6:9.1f} MB  {room}, {share:.0%} of the model's")
        return "\n".join(lines)


def export(
    model: nn.Module,
    plan: Plan,
    directory: str | os.PathLike[str],
    *,
    decode_plan: Plan = None,
    batch: int = 1,
    max_length: int | None = None,
    aot: bool = False,
    progress: bool = True,
) -> ExportedGraphs:
    """Write programs of ``model`` that skip what ``plan`` says, and that run in a process with PyTorch alone.

    ``directory`` gets ``prefill.pt2`` and ``decode.pt2``, which ``torch.export.load`` reads; their graphs
    as text; ``generate.py``, which generates from them; and ``manifest.json``. What is skipped is not in
    them: neither its weights, nor the keys and values of a skipped attention. Where a plan skips for the body of a prompt
    alone, ``prefill.pt2`` does, and takes prompts that have a body; decode goes through shorter ones token by token, and skips
    for them what it skips. An earlier export there is replaced, anything else is not; on failure everything stays as it was.

    Args:
        model: A causal language model of ``transformers``, with its weights.
        plan: What to skip (AdaSkip Eq. 4), a plan or the file of one; None skips nothing. Programs do not
            change while they run, so the plan's window adds no FFNs.
        directory: The folder to write; missing parents are made.
        decode_plan: What to skip in decode, where those are other FFNs than in prefill. It skips the same
            attentions as ``plan``, since the programs share one cache.
        batch: Rows; they are texts of equal length.
        max_length: Tokens that the cache has room for, prompt and continuation together; by default 2048, or
            as many as the model has positions for.
        aot: Whether to compile both programs with AOTInductor too, into ``aot.pt2``. That takes minutes for
            a real model. The package holds code, and reads its weights from the programs.
        progress: Whether to show on a terminal what is being done.

    Raises:
        OptionError: ``batch`` or ``max_length`` cannot be what it is.
        PlanError: A plan names a sublayer that the model lacks, or the two plans do not go together.
        FileError: A plan cannot be read or is of another model, or the folder cannot be written.
        CaptureError: The model is none of ``transformers``, or cannot be captured as one graph a step.
    """
    if type(batch) is not int or batch < 1:
        raise OptionError(f"batch={batch!r}: takes a number of rows, 1 or more")
    target = check_folder(directory)
    identity = identify(model)
    plans = {"prefill": _resolve(plan, model, identity)}
    plans["decode"] = plans["prefill"] if decode_plan is None else _resolve(decode_plan, model, identity)
    if decode_plan is not None and _prompt_skips(plans["decode"]).named_paths:
        raise PlanError(
            "decode_plan skips for the body of a prompt, which decode never has: give a plan of what decode skips, or none"
        )
    prompt = _prompt_skips(plans["prefill"])
    least = max(LEAST_TOKENS, prompt.least_rows) if prompt.skipped else LEAST_TOKENS
    max_length = check_max_length(model, max_length, least)
    with show_stages("exporting", progress) as report:
        steps = capture_steps(model, batch=batch, max_length=max_length, least=least, report=report)
        phases: dict[str, SpecialisedPhase] = {}
        for phase in (steps.prefill, steps.decode):
            report(f"exporting {phase.name}")
            phases[phase.name] = _specialise(model, phase, plans[phase.name], steps)
        _require_one_cache(phases)
        with whole_folder(target) as folder:
            for name, specialised in phases.items():
                report(f"writing {name}.pt2")
                write_program(folder, name, specialised)
            if aot:
                report("compiling with AOTInductor")
                write_package(folder, phases)
            shutil.copyfile(runner.__file__, folder / RUNNER)
            manifest = describe(folder, model, identity, steps, phases, max_length)
            EXPORT_FORMAT.write(folder / MANIFEST, manifest)
    return ExportedGraphs(target, tuple(sorted(target.iterdir())), EXPORT_FORMAT.read(target / MANIFEST))


def _resolve(plan: Plan, model: nn.Module, identity: ModelIdentity) -> SkipPlan:
    if plan is None:
        return SkipPlan.none()
    found = plan if isinstance(plan, SkipPlan) else SkipPlan.load(plan)
    found.check(identity, source="this plan" if found is plan else str(plan))
    found.check_paths(model)
    if found.ramp:
        raise PlanError(
            "this plan has a ramp, and programs do not change while they run: make a plan that skips the same in prefill "
            "and decode, or give other FFNs to skip in decode as decode_plan="
        )
    return found


def _prompt_skips(plan: SkipPlan) -> PromptSkips:
    return PromptSkips(()) if plan.prompt is None else plan.prompt


def _specialise(model: nn.Module, phase: CapturedPhase, plan: SkipPlan, steps: StaticSteps) -> SpecialisedPhase:
    straight = canonicalised(phase.gm)
    stream = straight.stream
    prompt = _prompt_skips(plan) if phase.name == "prefill" else PromptSkips(())
    windows = len(prompt.windows)
    # A program runs with PyTorch alone, which has no attention within a window but by a mask of all queries by all keys.
    prompt = replace(prompt, windows={})
    body = prompt.as_pass(stream.paths) if prompt.skipped else None
    scales, maps = {**plan.scales, **prompt.scales}, {**plan.maps, **prompt.maps}
    result = run_pipeline(straight.gm, stream, _passes(phase, plan, body, scales, stream))
    tensors = {path: one.tensors for path, one in maps.items()}
    values = replacement_values(result.added, stream, scales, tensors)
    added = dict(zip((one.name for one in result.added), values, strict=True))
    program = make_program(phase, result.gm, model, steps.cache, added=added)
    notes = () if body is None else tuple(computed_all_the_same(result.gm, result.stream, body))
    if windows:
        notes = (*notes, f"windows of attention are left out ({windows} in the plan): the whole prompt is seen here")
    return SpecialisedPhase(phase, plan, result, program, notes)


def _passes(
    phase: CapturedPhase,
    plan: SkipPlan,
    body: SkipBodyRows | None,
    scales: Mapping[str, float],
    stream: ResidualStream,
) -> tuple[Pass, ...]:
    """Return the pipeline that builds ``plan`` into a graph."""
    if stream.problems:
        if not (plan.named_paths if phase.name == "prefill" else plan.paths):
            return ()
        raise CaptureError(
            f"nothing can be skipped: {'; '.join(stream.problems)}. Export with a plan that skips nothing"
        )
    for path in plan.named_paths:
        stream.by_path(path)
    paths = tuple(path for path in stream.paths if path in plan.scales)
    # Of a prompt the last token's logits are all that is read.
    rows = row_passes(body) if phase.name == "prefill" else ()
    return (
        *rows,
        SkipSublayers(paths, plan.map_forms(paths)),
        FoldScales(tuple(scales.items())),  # the skips put in what it reads
        EliminateDeadCode(),  # last: what the skips have cut off
    )


def _require_one_cache(phases: Mapping[str, SpecialisedPhase]) -> None:
    """Refuse two plans whose skips leave different caches: one program would read what the other never wrote."""
    skipped = {
        name: {item.path for item in one.result.stream.sublayers if item.stateful} & set(one.plan.paths)
        for name, one in phases.items()
    }
    differing = sorted(skipped["prefill"] ^ skipped["decode"])
    if differing:
        raise LegalityError(
            f"{', '.join(differing)}: skipped by one of plan and decode_plan and not by the other. They keep a cache, "
            "so both plans skip them, or neither"
        )
