"""Name sublayers by the module path that their user knows them by.

A sublayer is called by the deepest module that holds all matrices that it reads: ``model.layers.3.mlp``.
Where that module holds another sublayer too (a block that calls ``fc1`` and ``fc2`` itself), the
module of the first of them stands for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import fx

from adaskip_passes.analysis.dependence import Dependence
from adaskip_passes.ir.graph import fake_tensor
from adaskip_passes.ir.module_paths import module_path, shared_by_modules, tensors_behind
from adaskip_passes.stream.stream import Sublayer


def name_sublayers(sublayers: Sequence[Sublayer], dependence: Dependence) -> tuple[Sublayer, ...]:
    """Return the sublayers with unique paths, and with the paths that read their values beside the stream."""
    read = _paths_read(sublayers, dependence)
    paths = [_common(found) or f"sublayer.{index}" for index, found in enumerate(read)]
    for index, path in enumerate(paths):
        if _holds_another(path, index, paths) and read[index]:
            paths[index] = read[index][0]
    taken = Counter(paths)
    unique = [path if taken[path] == 1 else f"{path}#{index}" for index, path in enumerate(paths)]
    named = [replace(sublayer, path=path) for sublayer, path in zip(sublayers, unique, strict=True)]
    return tuple(replace(sublayer, shared_with=_readers(sublayer, named, dependence)) for sublayer in named)


def _paths_read(sublayers: Sequence[Sublayer], dependence: Dependence) -> list[list[str]]:
    """Return for each sublayer the modules of the matrices that it alone reads, in graph order.

    Of all matrices where it has none for itself (layers that share weights), and of its ops where it reads none.
    """
    if not sublayers:
        return []
    behind = tensors_behind(sublayers[0].stream_in.graph)
    reads = [tuple(_matrices_read(sublayer, dependence, behind)) for sublayer in sublayers]
    readers = Counter(matrix for read in reads for matrix in {matrix for _, matrix in read})
    found = []
    for sublayer, read in zip(sublayers, reads, strict=True):
        own = [(node, matrix) for node, matrix in read if readers[matrix] == 1]
        paths = [_path_of(matrix, node) for node, matrix in own or read]
        found.append(list(filter(None, paths)) or [path for node in sublayer.nodes if (path := module_path(node))])
    return found


def _matrices_read(
    sublayer: Sublayer, dependence: Dependence, behind: Mapping[fx.Node, frozenset[fx.Node]]
) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield each op of a sublayer that reads a matrix of the model, and the matrix.

    A matrix may be read as it is held, or be made from what is held: out of packed integers and their scales.
    """
    roots = dependence.effects.roots
    for node in sublayer.nodes:
        for source in node.all_input_nodes:
            held = behind.get(source) or behind.get(roots[source]) or frozenset()
            yield from ((node, one) for one in sorted(held, key=dependence.position.__getitem__) if _is_matrix(one))


def _path_of(matrix: fx.Node, reader: fx.Node) -> str:
    """Return the module that ``matrix`` is read from; of one that lies in several places the reader tells which is meant."""
    return (module_path(reader) if shared_by_modules(matrix) else "") or module_path(matrix)


def _is_matrix(held: fx.Node) -> bool:
    value = fake_tensor(held)
    return value is not None and value.dim() >= 2


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
