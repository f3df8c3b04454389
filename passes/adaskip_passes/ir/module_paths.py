"""Module paths: which module of the user's model a graph node belongs to, in the user's own words.

A graph reads tensors, and those of a model are objects that the model holds: its own ``named_*`` say what they are
called. :func:`name_modules` writes these names into the graph. What the model does not hold as a tensor (an
operation, a number) is named by the way that Dynamo took to it, ``L['args'][0].model.layers.0``, once the tensors
have told where on such ways the model begins: that differs with every decorator and wrapper around a forward.

Graphs that nothing has named are read by Dynamo's words alone. Paths are for display and for plans, never for
deciding what a sublayer is.
"""

from __future__ import annotations

import functools
import operator
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from adaskip_passes.ir.graph import fake_tensor, fake_value

__all__ = [
    "NAMES",
    "held_by_module",
    "held_tensors",
    "module_marks",
    "module_path",
    "name_modules",
    "naming",
    "normalise_source",
    "shared_by_modules",
    "source_name",
    "submodule_paths",
    "tensors_behind",
]

# The key in ``node.meta`` of the names that a node has in the model, a tuple: of an input, the paths of the tensor or
# value that it is; of an operation, the path of its module. Empty for what is not the model's.
NAMES = "adaskip_names"

# The dictionaries inside a module that hold what its attributes show, and the wrappers that stand
# between a module and its user: neither is part of a path.
_HOLDERS = ("_modules", "_parameters", "_buffers")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# The names under which a forward receives its arguments when it takes them as they come.
_ARGUMENTS = ("args", "kwargs")

_HEAD = re.compile(r"^[LG]\['(?P<name>[^']*)'\]")
_PART = re.compile(
    r"\['(?P<key>[^']*)'\]"  # ['layers']
    r"|\[(?P<index>-?\d+)\]"  # [0]
    r"|\.(?P<call>\w+)\(\)"  # .size()
    r"|\.(?P<slice>slice\([^)]*\))"  # .slice(None, 4, None), left by iterating over part of a list
    r"|\.?(?P<name>\w+)"  # .self_attn
)


def name_modules(gm: fx.GraphModule, inputs: Sequence[Any], module: nn.Module | None) -> None:
    """Name the nodes of ``gm`` by what ``module`` calls the tensors that ``gm`` reads.

    ``inputs`` are the values, in order, that the graph is called with: the very tensors, not their fakes. Without a
    module nothing is named.
    """
    if module is None:
        return
    known = held_tensors(module)
    held = {node: known[id(value)] for node, value in _tensors_read(gm, inputs) if id(value) in known}
    ways = _ways_to_module(held)
    paths = submodule_paths(module)
    for node in gm.graph.nodes:
        if node in held:
            node.meta[NAMES] = _likeliest_first(held[node], _translated(_source(node), ways))
        elif node.op == "placeholder":
            node.meta[NAMES] = tuple(filter(None, [_translated(_source(node), ways)]))
        else:
            node.meta[NAMES] = tuple(path for path in [_translated(_stack_top(node), ways)] if path in paths)


def naming(module: nn.Module | None, backend: Callable[..., Any]) -> Callable[..., Any]:
    """Return the Dynamo backend that hands its graphs to ``backend`` with the names that ``module`` has for their nodes."""
    # Dynamo keeps all backends that there ever were: this one must not keep the weights.
    owner = None if module is None else weakref.ref(module)

    @functools.wraps(backend, updated=())
    def named(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        name_modules(gm, inputs, None if owner is None else owner())
        return backend(gm, inputs)

    return named


def held_tensors(module: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return what ``module`` calls each of its tensors, by the identity of the tensor: parameters, buffers and plain attributes."""
    found: dict[int, list[str]] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        for name, value in _own_tensors(owner):
            found.setdefault(id(value), []).append(_without_wrappers(f"{path}.{name}" if path else name))
    return {key: tuple(names) for key, names in found.items()}


def submodule_paths(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules in ``module`` by their paths, without the parts that only say that a module is wrapped."""
    return {_without_wrappers(path): one for path, one in module.named_modules(remove_duplicate=False)}


def _without_wrappers(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _own_tensors(owner: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for held in (owner._parameters, owner._buffers, vars(owner)):
        yield from ((name, value) for name, value in held.items() if isinstance(value, torch.Tensor))


def _tensors_read(gm: fx.GraphModule, inputs: Sequence[Any]) -> Iterator[tuple[fx.Node, Any]]:
    yield from zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=False)
    for node in gm.graph.find_nodes(op="get_attr"):
        yield node, functools.reduce(lambda owner, name: getattr(owner, name, None), str(node.target).split("."), gm)


def _ways_to_module(held: dict[fx.Node, tuple[str, ...]]) -> dict[tuple[str, str], str]:
    """Return where the ways that Dynamo took lead into the model: its words for a module, and the model's own.

    ``('args', '0')`` stands for ``''`` where the model is the first of a wrapper's arguments, and ``('self', '')`` for
    ``'model'`` where the forward of a part of it was captured.
    """
    found: dict[tuple[str, str], str] = {}
    for node, names in held.items():
        root, way = normalise_source(_source(node))
        if not root:
            continue
        taken = way.split(".")
        own = max((name.split(".") for name in names), key=lambda parts: _common_end(parts, taken))
        shared = _common_end(own, taken)
        if shared:
            found.setdefault((root, ".".join(taken[:-shared])), ".".join(own[:-shared]))
    return found


def _common_end(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return count


def _translated(source: str, ways: dict[tuple[str, str], str]) -> str:
    """Return the path in the model of what ``source`` leads to; ``""`` for the model itself, and for what is not in it."""
    root, way = normalise_source(source)
    if not root:
        return ""
    parts = way.split(".") if way else []
    for length in range(len(parts), -1, -1):
        known = ways.get((root, ".".join(parts[:length])))
        if known is not None:
            return ".".join(([known] if known else []) + parts[length:])
    return ""


def _likeliest_first(names: tuple[str, ...], way: str) -> tuple[str, ...]:
    """Return the names of a tensor that has several with the one first by which it was reached."""
    return tuple(sorted(names, key=lambda name: name != way))


@functools.lru_cache(maxsize=1 << 14)  # a graph has a few thousand sources, and each is asked for many times
def normalise_source(source: str) -> tuple[str, str]:
    """Split a Dynamo source or module name into its root and the path below it.

    >>> normalise_source("L['self']._modules['model']._modules['layers']._modules['0']._parameters['weight']")
    ('self', 'model.layers.0.weight')
    >>> normalise_source("L['self']._orig_mod.model.layers.slice(None, 2, None).0.mlp")
    ('self', 'model.layers.0.mlp')
    >>> normalise_source("L['kwargs']['past_key_values'].layers[0].keys.size()[2]")
    ('kwargs', 'past_key_values.layers.0.keys.size.2')
    >>> normalise_source("not a source")
    ('', 'not a source')
    """
    head = _HEAD.match(source)
    if head is None:
        return "", source
    parts: list[str] = []
    position = head.end()
    while position < len(source):
        part = _PART.match(source, position)
        if part is None:
            return head["name"], source[head.end() :]
        position = part.end()
        if part["slice"] is None and part["name"] not in (*_HOLDERS, *_WRAPPERS):
            parts.append(part[part.lastgroup or 0])
    return head["name"], ".".join(parts)


def source_name(node: fx.Node) -> str:
    """Return a short name of where a placeholder's value comes from, or ``""`` where none is known.

    ``model.norm.weight`` for what the compiled module holds, ``input_ids`` or
    ``past_key_values.layers.0.keys`` for what its caller passes.
    """
    if node.meta.get(NAMES):
        return str(node.meta[NAMES][0])
    source = _source(node)
    if not source:
        return ""
    root, path = normalise_source(source)
    if root in ("", *_ARGUMENTS) or held_by_module(node):
        return path or root
    return f"{root}.{path}" if path else root


def module_path(node: fx.Node) -> str:
    """Return the path of the innermost module that ``node`` belongs to, or ``""`` where none is known.

    For a placeholder this is the module that holds the parameter, buffer or attribute; for an input
    of the caller it is ``""``. Nodes of Python operators carry no module and give ``""``.
    """
    names = node.meta.get(NAMES)
    if names is not None:
        path = names[0] if names else ""
        return path.rpartition(".")[0] if node.op in ("placeholder", "get_attr") else path
    if node.op == "placeholder":
        return normalise_source(_source(node))[1].rpartition(".")[0] if held_by_module(node) else ""
    return normalise_source(_stack_top(node))[1]


def module_marks(node: fx.Node) -> dict[str, Any]:
    """Return what ``meta`` of an operation says of the module that it belongs to, for those that take its place."""
    return {key: node.meta[key] for key in (NAMES, "nn_module_stack") if key in node.meta}


def held_by_module(node: fx.Node) -> bool:
    """Tell whether ``node`` is a placeholder for what the compiled module holds, not for what its caller passes."""
    if node.op != "placeholder":
        return False
    if isinstance(fake_value(node), torch.nn.Parameter):
        return True
    return bool(node.meta[NAMES]) if NAMES in node.meta else _names_module_state(_source(node))


def shared_by_modules(node: fx.Node) -> bool:
    """Tell whether the model holds the tensor of ``node`` in several places, so that its name does not tell who reads it."""
    return len(node.meta.get(NAMES, ())) > 1


def tensors_behind(graph: fx.Graph) -> dict[fx.Node, frozenset[fx.Node]]:
    """Map each node that is computed from tensors of the model alone to the inputs that hold these; numbers do not count."""
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        value = fake_tensor(node)
        if value is None:
            continue
        if held_by_module(node):
            found[node] = frozenset([node]) if value.dim() else frozenset()
            continue
        tensors = [source for source in node.all_input_nodes if fake_tensor(source) is not None]
        if tensors and all(source in found for source in tensors):
            found[node] = functools.reduce(operator.or_, (found[source] for source in tensors))
    return found


def _source(node: fx.Node) -> str:
    return getattr(getattr(node, "_dynamo_source", None), "name", "")


def _stack_top(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def _names_module_state(source: str) -> bool:
    return source.startswith("L['self']") or any(f".{holder}[" in source for holder in _HOLDERS)
