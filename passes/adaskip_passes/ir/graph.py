"""Reading FX nodes: the few facts that every analysis and pass asks of a node.

Dynamo-level graphs keep a node's fake value in ``meta["example_value"]``, aten-level graphs in
``meta["val"]``; :func:`fake_value` hides the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule

from adaskip_passes.errors import PassError


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


def tensor_of(node: Any) -> torch.Tensor:
    """Return the fake tensor of ``node``; :class:`PassError` where it has none."""
    value = fake_tensor(node)
    if value is None:
        raise PassError(f"{node} has no tensor for its value")
    return value


def op_name(node: fx.Node) -> str:
    """Return the bare name of what ``node`` calls: ``add`` for ``operator.add``, ``torch.add``, ``Tensor.add``, ``aten.add.Tensor``."""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    return getattr(target, "__name__", str(target))


def output_values(gm: fx.GraphModule) -> Iterator[fx.Node | None]:
    """Yield the graph's outputs in order, None for each that is a constant."""
    for value in gm.graph.output_node().args[0]:  # type: ignore[union-attr]
        yield value if isinstance(value, fx.Node) else None


def call(
    graph: fx.Graph,
    target: Callable[..., Any] | str,
    *args: Any,
    like: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
    **kwargs: Any,
) -> fx.Node:
    """Append a call to ``graph`` at its insertion point, with the fake value that it yields.

    ``target`` is a function, or the name of a tensor method. Fake tensors run the op under their own
    fake mode, so symbolic sizes propagate as they do in a capture; where ``like`` is given, it is the fake
    value, and the millisecond that running the op takes is saved.
    """
    op = "call_method" if isinstance(target, str) else "call_function"
    node = graph.create_node(op, target, args, kwargs)
    if like is not None:
        node.meta["example_value"] = like
        return node
    node.meta["example_value"] = computed_value(node)
    return node


def computed_value(node: fx.Node) -> Any:
    """Return what ``node`` yields of the fake values of what it reads."""
    # Before 2.12 torch cannot tell the shape of a composite op of unknown sizes without its Python dispatcher.
    with torch.no_grad(), fake_mode(node.graph), enable_python_dispatcher():
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), fake_value)
        function: Any = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
        return function(*args, **kwargs)


# The arguments of functions that several passes read, in order.
LINEAR_ARGUMENTS = ("input", "weight", "bias")
ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def named_arguments(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    """Return the arguments that the call ``node`` gives, by name; ``names`` are those of its function, in order."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def fake_mode(graph: fx.Graph) -> AbstractContextManager[Any]:
    """Return the fake mode that the values of ``graph`` belong to; a null context where there is none."""
    for node in graph.nodes:
        value = fake_value(node)
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return nullcontext()


def add_placeholder(graph: fx.Graph, name: str, example: torch.Tensor) -> fx.Node:
    """Append an input ``name`` after the last placeholder of ``graph``, with the fake value of ``example``."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    mode = fake_mode(graph)
    real = isinstance(mode, FakeTensorMode) and not isinstance(example, FakeTensor)
    node.meta["example_value"] = mode.from_tensor(example, static_shapes=True) if real else example
    return node


def copy_graph(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """Return a copy of ``gm`` that shares its attributes, and the map from its nodes to the copy's."""
    graph = fx.Graph()
    images: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copied = graph.node_copy(node, images.__getitem__)
        copied.name = node.name
        images[node] = copied
        if hasattr(node, "_dynamo_source"):
            copied._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    return graph_module(gm, graph), images


def graph_module(root: nn.Module | dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """Return a graph module of ``graph``, which takes from ``root`` what its nodes name.

    Its Python code is made when it first runs: most graphs that passes make are only read.
    """
    return _LazyGraphModule(root, graph)


def size_expression(size: Any) -> sympy.Expr:
    """Return a plain or symbolic size as an expression in the symbols of its graph."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def known_size(size: Any) -> Any:
    """Return what a plain or symbolic size was when the graph was captured; of one known only at run time, its text."""
    return size_hint(size) if isinstance(size, int) or size.node.has_hint() else str(size)


def size_hint(size: Any) -> int:
    """Return what a plain or symbolic size was when the graph was captured."""
    return size if isinstance(size, int) else int(size.node.hint)
