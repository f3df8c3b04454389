"""Reading FX nodes: the few facts that every analysis and pass asks of a node.

Dynamo-level graphs keep a node's fake value in ``meta["example_value"]``, aten-level graphs in
``meta["val"]``; :func:`fake_value` hides the difference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def fake_value(node: fx.Node) -> Any:
    """Return the fake value of ``node`` (a fake tensor, a symbolic or plain scalar, a tuple), or None."""
    if "example_value" in node.meta:
        return node.meta["example_value"]
    return node.meta.get("val")


def fake_tensor(node: Any) -> torch.Tensor | None:
    """Return the fake tensor of ``node``, or None where it is not a node or not tensor-valued."""
    if not isinstance(node, fx.Node):
        return None
    value = fake_value(node)
    return value if isinstance(value, torch.Tensor) else None
