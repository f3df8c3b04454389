"""Name sublayers by the module path that their user knows them by.

A sublayer is called by the deepest module that holds all of its weighted ops: ``model.layers.3.mlp``.
Where that module holds another sublayer too (a block that calls ``fc1`` and ``fc2`` itself), the
module of the sublayer's first weighted op stands for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import fx

from adaskip_passes.dependence import Dependence
from adaskip_passes.effects import Effects
from adaskip_passes.graph import fake_tensor
from adaskip_passes.module_paths import module_path

if TYPE_CHECKING:
    from adaskip_passes.residual_stream import Sublayer


def name_sublayers(sublayers: Sequence[Sublayer], effects: Effects, dependence: Dependence) -> tuple[Sublayer, ...]:
    """Return the sublayers with unique paths, and with the paths that read their values beside the stream."""
    weighted = [_weighted_paths(sublayer, effects) for sublayer in sublayers]
    paths = [_common(found) or f"sublayer.{index}" for index, found in enumerate(weighted)]
    for index, path in enumerate(paths):
        if _holds_another(path, index, paths) and weighted[index]:
            paths[index] = weighted[index][0]
    taken = Counter(paths)
    unique = [path if taken[path] == 1 else f"{path}#{index}" for index, path in enumerate(paths)]
    named = [replace(sublayer, path=path) for sublayer, path in zip(sublayers, unique, strict=True)]
    return tuple(replace(sublayer, shared_with=_readers(sublayer, named, dependence)) for sublayer in named)


def _weighted_paths(sublayer: Sublayer, effects: Effects) -> list[str]:
    """Return the module paths of the ops that read a matrix of weights; of all ops where none does."""
    pathed = [(node, path) for node in sublayer.nodes if (path := module_path(node))]
    weighted = [
        path for node, path in pathed if any(_is_matrix(effects.roots[source]) for source in node.all_input_nodes)
    ]
    return weighted or [path for _, path in pathed]


def _is_matrix(root: fx.Node) -> bool:
    value = fake_tensor(root)
    return root.op in ("placeholder", "get_attr") and value is not None and value.dim() >= 2 and bool(module_path(root))


def _common(paths: list[str]) -> str:
    """Return the longest module path that is a prefix of all of ``paths``."""
    shared: list[str] = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _holds_another(path: str, index: int, paths: list[str]) -> bool:
    return any(other == path or other.startswith(path + ".") for i, other in enumerate(paths) if i != index)


def _readers(sublayer: Sublayer, sublayers: Sequence[Sublayer], dependence: Dependence) -> tuple[str, ...]:
    """Return the paths of later sublayers that read values of this region other than the stream."""
    own = set(sublayer.nodes)
    users = {
        user
        for node in sublayer.nodes[:-1]
        for user in node.users
        if user not in own and user.op != "output" and dependence.depends(user, node)
    }
    if not users:
        return ()
    owners = tuple(other.path for other in sublayers if not users.isdisjoint(other.nodes))
    return owners or ("the rest of the graph",)
