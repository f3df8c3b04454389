"""What stands in the folder of an export: programs, their graphs as text, the compiled package, the manifest."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaskip_compile.checkpoints.model_config import end_tokens
from adaskip_compile.exporting.capture import CapturedPhase, StaticSteps
from adaskip_compile.files.atomic_write import native_file
from adaskip_compile.files.model_identity import ModelIdentity
from adaskip_compile.files.versioned_json import producer
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.tested_versions import internals_of
from adaskip_passes.errors import CaptureError, FileError
from adaskip_passes.ir.printer import print_graph
from adaskip_passes.pipeline.pipeline import PipelineResult

PACKAGE = "aot.pt2"


@dataclass(frozen=True)
class SpecialisedPhase:
    """One step of a model under a plan: its program, and what the passes did for it."""

    phase: CapturedPhase
    plan: SkipPlan
    result: PipelineResult
    program: torch.export.ExportedProgram
    notes: tuple[str, ...] = ()

    @property
    def cache_names(self) -> tuple[str, ...]:
        """The names of the parts of the cache that the program holds."""
        return tuple(name for name, _ in self.program.named_buffers() if "_cache_" in name and "." not in name)


def write_program(folder: Path, name: str, specialised: SpecialisedPhase) -> None:
    """Write ``NAME.pt2`` and the text of its graph, ``NAME.txt``.

    Raises:
        FileError: The program cannot be written.
    """
    try:
        with native_file(folder / f"{name}.pt2") as file:
            torch.export.save(specialised.program, file)
    except RuntimeError as error:
        raise FileError(f"{folder / name}.pt2 was not written: {_first_line(error)}") from error
    (folder / f"{name}.txt").write_text(print_graph(specialised.program.graph_module) + "\n", "utf-8")


def write_package(folder: Path, phases: Mapping[str, SpecialisedPhase]) -> None:
    """Compile the programs with AOTInductor and write them as one package, code without weights.

    Raises:
        CaptureError: AOTInductor cannot compile one of them.
    """
    with internals_of("torch", "export with aot=True"):
        from torch._inductor import aot_compile
        from torch._inductor.package import package_aoti

    options = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False}
    compiled: dict[str, Any] = {}
    for name, specialised in phases.items():
        program = specialised.program
        assert program.example_inputs is not None
        try:
            compiled[name] = aot_compile(program.module(), program.example_inputs[0], options=options)
        except Exception as error:
            raise CaptureError(
                f"AOTInductor cannot compile {name} ({type(error).__name__}: {_first_line(error)}); "
                "export without the package, or see TORCH_LOGS=inductor"
            ) from error
    with native_file(folder / PACKAGE) as file:
        package_aoti(file, compiled)


def describe(
    folder: Path,
    model: nn.Module,
    identity: ModelIdentity,
    steps: StaticSteps,
    phases: Mapping[str, SpecialisedPhase],
    max_length: int,
) -> dict[str, Any]:
    """Return what the manifest says; sizes are bytes, and ``full`` ones those of the model without skips."""
    kept = phases["decode"].cache_names
    owners = _cache_owners(steps.decode, steps.cache, phases["decode"].result)
    cache = [{"name": name, "sublayer": owners.get(name), **_tensor(steps.cache[name])} for name in kept]
    package = folder / PACKAGE
    return {
        "model": asdict(identity),
        "versions": {
            "adaskip-compile": producer(),
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
            "python": platform.python_version(),
        },
        "device": str(steps.decode.input_ids.device),
        "batch": steps.decode.input_ids.shape[0],
        "max_length": max_length,
        "vocabulary": _vocabulary(model),
        "end_tokens": end_tokens(model),
        "programs": {name: _program(folder, name, one) for name, one in phases.items()},
        "aot": {"file": PACKAGE, "bytes": package.stat().st_size} if package.exists() else None,
        "cache": cache,
        "cache_bytes": sum(steps.cache[name].nbytes for name in kept),
        "full_cache_bytes": sum(tensor.nbytes for tensor in steps.cache.values()),
        "full_weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
    }


def _vocabulary(model: Any) -> int:
    """Return how many tokens a model of ``transformers`` has embeddings for."""
    return model.get_input_embeddings().num_embeddings


def _program(folder: Path, name: str, specialised: SpecialisedPhase) -> dict[str, Any]:
    program = specialised.program
    plan = {
        key: value for key, value in specialised.plan.to_dict().items() if key != "model"
    }  # the manifest says it once
    ids, logits = specialised.phase.input_ids, _outputs(program)
    fewest, most = specialised.phase.tokens
    length = "tokens" if name == "prefill" else 1
    return {
        "file": f"{name}.pt2",
        "bytes": (folder / f"{name}.pt2").stat().st_size,
        "graph": f"{name}.txt",
        "inputs": [
            {"name": "input_ids", "dtype": "int64", "shape": [ids.shape[0], length]},
            {"name": "cache_position", "dtype": "int64", "shape": [length]},
        ],
        "outputs": [{"name": "logits", "dtype": _dtype(value), "shape": list(value.shape)} for value in logits],
        "tokens": {"from": fewest, "to": most},
        "skipped": {path: specialised.plan.scales[path] for path in specialised.result.stream.skipped},
        "body_skipped": list(specialised.result.stream.body_skipped),
        "notes": list(specialised.notes),
        "weight_bytes": sum(parameter.nbytes for _, parameter in program.named_parameters()),
        "passes": str(specialised.result).splitlines(),
        "plan": plan,
    }


def _outputs(program: torch.export.ExportedProgram) -> Iterator[torch.Tensor]:
    [values] = program.graph.output_node().args
    return (value.meta["val"] for value in values)  # type: ignore[union-attr]


def _cache_owners(phase: CapturedPhase, cache: Mapping[str, torch.Tensor], result: PipelineResult) -> dict[str, str]:
    """Return which sublayer each part of the cache belongs to."""
    names = {id(tensor): name for name, tensor in cache.items()}
    inputs = result.gm.graph.find_nodes(op="placeholder")
    held = {node: names.get(id(value)) for node, value in zip(inputs, phase.values, strict=False)}
    return {
        name: sublayer.path
        for sublayer in result.stream.sublayers
        for node in sublayer.cache_inputs
        if (name := held.get(node)) is not None
    }


def _tensor(value: torch.Tensor) -> dict[str, Any]:
    return {"dtype": _dtype(value), "shape": list(value.shape), "bytes": value.nbytes}


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
