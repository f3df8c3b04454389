"""Module paths: which module of the user's model a graph node came from, in the user's own words.

Dynamo writes the module of a node into ``meta["nn_module_stack"]`` (``L['self'].model.layers.0``)
and where an input came from into the placeholder's source
(``L['self']._modules['model']._modules['layers']._modules['0']``). Both become
``model.layers.0``, the name by which ``model.get_submodule`` finds it. Paths are for display and for
plans, never for deciding what a sublayer is.
"""

from __future__ import annotations

import functools
import re

import torch
from torch import fx

from adaskip_passes.graph import fake_value

__all__ = ["held_by_module", "module_path", "normalise_source", "source_name"]

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
    source = _source(node)
    if not source:
        return ""
    root, path = normalise_source(source)
    if root in ("", *_ARGUMENTS) or _names_module_state(source):
        return path or root
    return f"{root}.{path}" if path else root


def module_path(node: fx.Node) -> str:
    """Return the path of the innermost module that ``node`` came from, or ``""`` where none is known.

    For a placeholder this is the module that holds the parameter, buffer or attribute; for an input
    of the caller it is ``""``. Nodes of Python operators carry no module and give ``""``.
    """
    if node.op == "placeholder":
        return normalise_source(_source(node))[1].rpartition(".")[0] if held_by_module(node) else ""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return normalise_source(list(stack.values())[-1][0])[1]


def held_by_module(node: fx.Node) -> bool:
    """Tell whether ``node`` is a placeholder for what the compiled module holds, not for what its caller passes."""
    return node.op == "placeholder" and (
        isinstance(fake_value(node), torch.nn.Parameter) or _names_module_state(_source(node))
    )


def _source(node: fx.Node) -> str:
    return getattr(getattr(node, "_dynamo_source", None), "name", "")


def _names_module_state(source: str) -> bool:
    return source.startswith("L['self']") or any(f".{holder}[" in source for holder in _HOLDERS)
