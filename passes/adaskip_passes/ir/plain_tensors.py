"""Which values are tensors that lie in memory as their sizes and strides say, and so may be taken apart by a pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

_OWN_KINDS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)


def is_plain(value: torch.Tensor | None) -> bool:
    """Return whether ``value`` holds floats that stand in memory by sizes and strides; None is not.

    A subclass (quantised weights, a shard of a matrix) says itself what a product with it is, and has no code for
    operations that it never heard of. Sparse and oneDNN's own layouts have no strides to read by.
    """
    return (
        value is not None
        and type(value) in _OWN_KINDS
        and value.layout == torch.strided
        and value.is_floating_point()
        and not value.is_nested
    )


def other_layout(values: Iterable[Any]) -> torch.layout | None:
    """Return the layout of the first tensor of ``values`` that has no strides, such as oneDNN's own; None where all have.

    Ask it of the real inputs of a graph: a fake tensor says that all are strided.
    """
    layouts = (value.layout for value in values if isinstance(value, torch.Tensor))
    return next((layout for layout in layouts if layout != torch.strided), None)
