"""The caller's cache objects: where captured code finds them, and the same objects again at each call.

A backend is handed tensors. What its caller holds is an object around them, and that alone stays the same when rows
are reordered, selected, copied or cropped. While a graph is captured, Dynamo says where its cache came from
(``L['kwargs']['past_key_values'].layers[0].keys``), and which objects the code changes; from there the object is
found. At each call it is looked up from the local names of the frame that runs the captured code, which lies a few
frames above the one that runs the graph, whichever way the model was compiled.
"""

from __future__ import annotations

import ast
import functools
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from adaskip_compile.capture.dynamo import captured_frame

# ("item", key) and ("attribute", name) one after the other, from the local and global names of a frame.
Step = tuple[str, Any]
Way = tuple[Step, ...]

# What has attributes and is no cache: a module holds weights beside, and outlives its requests.
_NO_CACHES = (
    *(nn.Module, torch.Tensor, type, types.ModuleType),
    *(types.FunctionType, types.MethodType, functools.partial),
)


@dataclass(frozen=True)
class CachePlace:
    """Where the cache objects of one captured graph are, as data that can be pickled.

    Args:
        code: Name, file and first line of the code that was captured.
        ways: The way to each object from the names of a frame that runs it; none where the cache is plain tensors,
            or is made by the code itself.
    """

    code: tuple[str, str, int]
    ways: tuple[Way, ...]

    def objects(self) -> list[Any]:
        """Return the cache objects of the call that is running now; none where they are not to be found."""
        if not self.ways:
            return []
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and not self._is_of(frame.f_code):
            frame = frame.f_back
        if frame is None:
            return []
        names = {"L": frame.f_locals, "G": frame.f_globals}
        return [found for way in self.ways if (found := _follow(names, way)) is not None]

    def _is_of(self, code: types.CodeType) -> bool:
        name, file, line = self.code
        return code.co_name == name and code.co_firstlineno == line and code.co_filename == file


def find_cache_place(cache_inputs: Iterable[fx.Node]) -> CachePlace | None:
    """Return where the cache objects are of the graph that Dynamo is capturing right now, None outside of a capture.

    They hold the ``cache_inputs``. A graph that has none begins a cache: then they are those arguments that the code
    changes.
    """
    frame = captured_frame()
    if frame is None:
        return None
    names = {"L": frame.f_locals, "G": frame.f_globals}
    sources = [getattr(getattr(node, "_dynamo_source", None), "name", "") for node in cache_inputs]
    if not sources:
        sources = [name for name in _changed(frame.output.side_effects) if name.startswith("L[")]
    ways = dict.fromkeys(way for source in sources if (way := _parse(source)))
    code = frame.f_code
    return CachePlace((code.co_name, code.co_filename, code.co_firstlineno), tuple(_holders(list(ways), names)))


def _changed(effects: Any) -> Iterator[str]:
    """Yield the sources of all that the captured code changes and did not make."""
    for variable in list(effects.id_to_variable.values()):
        if variable.source is None or not effects.is_modified(variable):
            continue
        try:
            yield variable.source.name
        except NotImplementedError:  # of a value that is the bytecode's own
            continue


def _holders(ways: Sequence[Way], names: Mapping[str, Any]) -> Iterator[Way]:
    """Yield the ways to the objects that hold what ``ways`` lead to: as few as hold all of it, the nearest to it."""
    common = _common(ways)
    for length in range(len(common), 1, -1):
        if _is_cache(_follow(names, common[:length])):
            yield common[:length]
            return
    parts: dict[Step, list[Way]] = {}
    for way in ways:
        if len(way) > len(common):
            parts.setdefault(way[len(common)], []).append(way)
    for part in parts.values():
        yield from _holders(part, names)


def _common(ways: Sequence[Way]) -> Way:
    shared: list[Step] = []
    for steps in zip(*ways, strict=False):
        if len(set(steps)) > 1:
            break
        shared.append(steps[0])
    return tuple(shared)


def _is_cache(value: Any) -> bool:
    return isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, _NO_CACHES)


def _follow(names: Mapping[str, Any], way: Way) -> Any:
    """Return what ``way`` leads to, None where it leads nowhere."""
    value: Any = names
    try:
        for kind, key in way:
            value = value[key] if kind == "item" else getattr(value, key)
    except (AttributeError, KeyError, IndexError, TypeError):
        return None
    return value


def _parse(source: str) -> Way:
    """Return the way that a Dynamo source describes, as far as it is one of items and attributes; empty where it is none.

    >>> _parse("L['kwargs']['past_key_values'].layers[0].keys")[:3]
    (('item', 'L'), ('item', 'kwargs'), ('item', 'past_key_values'))
    >>> _parse("list(dict.keys(L['past'].states))[0]")
    (('item', 'L'), ('item', 'past'), ('attribute', 'states'))
    >>> _parse("___from_numpy(3)")
    ()
    """
    try:
        return _way(ast.parse(source, mode="eval").body)[0]
    except SyntaxError:
        return ()


def _way(node: ast.AST) -> tuple[Way, bool]:
    """Return the way to what ``node`` computes, and whether it leads all the way there."""
    if isinstance(node, ast.Name):
        return ((("item", node.id),), True) if node.id in ("L", "G") else ((), False)
    if isinstance(node, ast.Attribute):
        way, whole = _way(node.value)
        return ((*way, ("attribute", node.attr)), True) if whole else (way, False)
    if isinstance(node, ast.Subscript):
        way, whole = _way(node.value)
        if whole and isinstance(node.slice, ast.Constant):
            return (*way, ("item", node.slice.value)), True
        return way, False
    inner = (_way(child)[0] for child in ast.iter_child_nodes(node))
    return next((way for way in inner if way), ()), False
