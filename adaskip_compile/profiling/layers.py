"""Layers: which sublayers belong to one decoder layer, told by their module paths."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

Layer = tuple[str, ...]


def find_layers(paths: Sequence[str]) -> tuple[Layer, ...]:
    """Return the sublayers at ``paths``, given in stream order, grouped into the layers that hold them.

    A layer is the first numbered module on a path that not all paths share. Where one module stands for several
    layers, so that its paths come again under numbers of their own (``mlp#1``, ``mlp#3``), each time is a layer.

    >>> find_layers(["model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.self_attn", "model.layers.1.mlp"])
    (('model.layers.0.self_attn', 'model.layers.0.mlp'), ('model.layers.1.self_attn', 'model.layers.1.mlp'))
    >>> find_layers(["blocks.0", "blocks.1"])  # attention and FFN in one: a layer of one sublayer
    (('blocks.0',), ('blocks.1',))
    """
    parts = [tuple(path.partition("#")[0].split(".")) for path in paths]
    shared = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))))
    layers: list[list[str]] = []
    current: tuple[str, ...] = ()
    seen: set[tuple[str, ...]] = set()
    for path, names in zip(paths, parts, strict=True):
        container = _container(names, shared)
        if not layers or container != current or names in seen:
            layers.append([])
            current, seen = container, set()
        layers[-1].append(path)
        seen.add(names)
    return tuple(map(tuple, layers))


def _container(names: tuple[str, ...], shared: int) -> tuple[str, ...]:
    """Return the path of the layer that holds the sublayer ``names``; ``shared`` names are those of all sublayers."""
    numbered = (index for index in range(shared, len(names)) if names[index].isdigit())
    end = next(numbered, len(names) - 2)  # without numbers, the module around it
    return names[: end + 1]
