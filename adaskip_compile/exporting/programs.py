"""Make a program of a specialised graph: weights and cache become its own, and only PyTorch is left in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from adaskip_compile.exporting.capture import CapturedPhase
from adaskip_passes.errors import CaptureError
from adaskip_passes.ir.graph import fake_value
from adaskip_passes.ir.module_paths import normalise_source

# The operators that every PyTorch has.
_NATIVE = ("aten", "prims", "prim")
# What torch.export calls the module of a node that came from none.
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"


def make_program(
    phase: CapturedPhase,
    gm: fx.GraphModule,
    model: nn.Module,
    cache: Mapping[str, torch.Tensor],
    *,
    added: Mapping[str, torch.Tensor],
) -> torch.export.ExportedProgram:
    """Return the program of ``gm``, the specialised graph of ``phase``.

    ``program(input_ids, cache_position) -> logits``, as ExecuTorch's exports have it: ids ``i64[batch, tokens]``,
    the places of these tokens in their text ``i64[tokens]``, and the logits of the last one
    ``[batch, 1, vocabulary]``. Tokens are as many as ``phase`` takes. The program holds the weights and the parts of ``cache`` (zeroed) that the graph still reads, and no others. ``added`` are the
    values, by name, of the inputs that passes have added; they count as weights.

    Raises:
        CaptureError: ``torch.export`` refuses the graph, or it calls an operator that PyTorch alone does not have.
    """
    module = _bind(phase, gm, model, cache, added)
    dynamic = None
    if phase.name == "prefill":
        fewest, most = phase.tokens
        tokens = torch.export.Dim("tokens", min=fewest, max=most)
        dynamic = ({1: tokens}, {0: tokens})
    program = _export(phase, module, dynamic)
    for part in program.graph_module.modules():
        if isinstance(part, fx.GraphModule):
            _require_native(part)
            _tidy(part)
    return program


def _export(phase: CapturedPhase, module: fx.GraphModule, dynamic: Any) -> torch.export.ExportedProgram:
    arguments = (phase.input_ids, phase.positions[0].clone())
    refused: Exception | None = None
    # Where a condition on the number of tokens cannot be proved for all of them, the program checks it as it runs.
    for deferred in (False, True):
        try:
            with torch.no_grad():
                return torch.export.export(
                    module,
                    arguments,
                    dynamic_shapes=dynamic,
                    strict=False,
                    prefer_deferred_runtime_asserts_over_guards=deferred,
                )
        except Exception as error:  # noqa: BLE001 - whatever torch.export may raise; it is raised again below
            refused = error
    line = str(refused).strip().partition("\n")[0]
    raise CaptureError(f"{phase.name} cannot be exported ({type(refused).__name__}: {line})") from refused


def _bind(
    phase: CapturedPhase,
    gm: fx.GraphModule,
    model: nn.Module,
    cache: Mapping[str, torch.Tensor],
    added: Mapping[str, torch.Tensor],
) -> fx.GraphModule:
    """Return ``gm`` with its inputs bound: all but the ids and positions become attributes of a module."""
    graph, root = fx.Graph(), nn.Module()
    ids, positions = graph.placeholder("input_ids"), graph.placeholder("cache_position")
    given = {id(phase.input_ids): ids}
    given[id(phase.positions)] = graph.call_function(torch.ops.aten.unsqueeze.default, (positions, 0))
    names = _tensor_names(model, cache)
    inputs = gm.graph.find_nodes(op="placeholder")
    images: dict[fx.Node, Any] = {}
    # Inputs that passes have added come last.
    for node in inputs[len(phase.values) :]:
        if node.users:
            value = nn.Parameter(added[node.name], requires_grad=False)
            images[node] = graph.get_attr(_hold(root, f"compensation.{phase.name}.{node.name}", value, cache))
    for node, value in zip(inputs, phase.values, strict=False):
        if not node.users:
            continue
        if not isinstance(value, torch.Tensor):
            _require_tokens(node, value, phase)
            images[node] = graph.call_function(torch.ops.aten.sym_size.int, (ids, 1))
        elif id(value) in given:
            images[node] = given[id(value)]
        else:
            images[node] = graph.get_attr(_hold(root, names.get(id(value), f"constants.{node.name}"), value, cache))
    for node in gm.graph.nodes:
        if node.op == "output":
            graph.output(images[node.args[0][0]])
        elif node.op != "placeholder":
            images[node] = graph.node_copy(node, images.__getitem__)
    bound = fx.GraphModule(root, graph)
    _forget_at_saving(bound, set(model.state_dict()))
    return bound


def _require_tokens(node: fx.Node, value: Any, phase: CapturedPhase) -> None:
    """Refuse an input that is neither a tensor nor the number of tokens."""
    if not isinstance(fake_value(node), torch.SymInt) or value != phase.input_ids.shape[1]:
        raise CaptureError(f"{phase.name} depends on {node.name}, a number that no input of a program has")


def _tensor_names(model: nn.Module, cache: Mapping[str, torch.Tensor]) -> dict[int, str]:
    """Return the name of each tensor by its identity; of tied weights, the first name."""
    named = [*cache.items(), *model.named_parameters(), *model.named_buffers()]
    return {id(tensor): name for name, tensor in reversed(named)}


def _hold(root: nn.Module, name: str, value: torch.Tensor, cache: Mapping[str, torch.Tensor]) -> str:
    """Make ``value`` an attribute of ``root`` by the path ``name``, and return the name."""
    *parents, leaf = name.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    if isinstance(value, nn.Parameter):
        root.register_parameter(leaf, nn.Parameter(value.detach(), requires_grad=False))
    else:
        # The capture has run on the cache, and wrote to it.
        root.register_buffer(leaf, torch.zeros_like(value) if name in cache else value)
    return name


def _forget_at_saving(module: nn.Module, kept: set[str]) -> None:
    """Mark the buffers that are no weights: the cache, and what the model computes when it is made."""
    for name, _ in list(module.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        if name not in kept:
            module.get_submodule(owner)._non_persistent_buffers_set.add(leaf)


def _require_native(gm: fx.GraphModule) -> None:
    foreign = sorted({str(op) for op in _operators(gm) if op.namespace not in _NATIVE})
    if foreign:
        raise CaptureError(
            f"the program would call {', '.join(foreign)}, which a process with PyTorch alone lacks; load the model "
            "with attn_implementation='sdpa' and without custom kernels"
        )


def _operators(gm: fx.GraphModule) -> Iterator[Any]:
    return (node.target for node in gm.graph.nodes if isinstance(node.target, torch._ops.OpOverload))


def _tidy(gm: fx.GraphModule) -> None:
    """Leave of what nodes came from only the module paths: the rest names files of this machine, and object ids."""
    for node in gm.graph.nodes:
        for key in ("stack_trace", "from_node", "source_fn_stack"):
            node.meta.pop(key, None)
        stack = node.meta.pop("nn_module_stack", {})
        paths = {normalise_source(path)[1]: kind for path, kind in stack.values() if path != _NO_MODULE}
        if paths:
            node.meta["nn_module_stack"] = {path: (path, kind) for path, kind in paths.items()}
