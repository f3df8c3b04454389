"""Which rows of its operands an operation needs for some rows of its result.

A decoder works row by row, one row a token, except where attention reads keys and values. So where only some rows of a
value are read, most of what computes it need run for those rows alone. Here is what is known of each operation: given
the dimension of its result that counts the rows, which operands count the same rows, and in which of their dimensions.
What is not known here is computed for all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaskip_passes.analysis.effects import written_inputs
from adaskip_passes.ir.graph import (
    ATTENTION_ARGUMENTS,
    fake_tensor,
    fake_value,
    named_arguments,
    op_name,
    size_expression,
)
from adaskip_passes.kernels.banded_attention import BANDED_ATTENTION

_ELEMENTWISE = frozenset(
    "abs add addcmul and_ bfloat16 bool ceil clamp clamp_max clamp_min clip clone contiguous cos detach div double "
    "elu eq erf exp expm1 float floor floordiv ge gelu gt half hardsigmoid hardswish hardtanh int invert le "
    "leaky_relu lerp log log1p logical_and logical_not logical_or logsigmoid long lt masked_fill maximum minimum mish "
    "mul multiply nan_to_num ne neg or_ pow prelu reciprocal relu relu6 round rsqrt rsub selu sigmoid sign silu sin "
    "softplus sqrt square sub subtract tanh to true_divide truediv type type_as where xor".split()
)
# They make one number of a dimension, or of each number what the others of its dimension say.
_OVER_A_DIMENSION = frozenset("amax amin argmax log_softmax logsumexp max mean min prod softmax std sum var".split())
_NORMS = frozenset("layer_norm rms_norm".split())
_PRODUCTS = frozenset("matmul bmm".split())
# They are given the shape of their result.
SHAPED = frozenset("view reshape _unsafe_view expand".split())


@dataclass(frozen=True)
class Rows:
    """The first ``head`` and the last ``tail`` rows of dimension ``dim`` of a value."""

    dim: int
    head: int
    tail: int

    @property
    def count(self) -> int:
        """How many rows they are; of a value with fewer, some count twice."""
        return self.head + self.tail

    def along(self, dim: int) -> Rows:
        """Return the same rows of a value that counts them in ``dim``."""
        return Rows(dim, self.head, self.tail)


Demand = tuple[fx.Node, Rows]


def operand_rows(node: fx.Node, rows: Rows) -> tuple[Demand, ...] | None:
    """Return the rows of which operands ``node`` needs to compute ``rows`` of its result, None where that is unknown.

    Operands that are not named it needs as they are; one of which it needs no row, not at all. One that it would need in
    two ways is unknown too.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    name = functional_name(node)
    rule = _RULES.get(name) or (_elementwise if name in _ELEMENTWISE else None)
    if node.target is BANDED_ATTENTION:
        rule = _attention
    if rule is None:
        return None
    try:
        found = tuple(rule(node, rows))
    except _UnknownError:
        return None
    operands = [one for one, _ in found]
    read = [one for one in _operands(node) if one in operands]
    return found if len(read) == len(set(operands)) == len(operands) else None


def functional_name(node: fx.Node) -> str:
    """Return the name of what ``node`` computes, which for one that writes its first operand is that of its functional form.

    ``div`` for ``x.div_(y)`` and ``truediv`` for ``x /= y``.
    """
    name = op_name(node)
    if name in _RULES or name in _ELEMENTWISE or not any(written_inputs(node)):
        return name
    operation = getattr(node.target, "__module__", None) == "_operator"
    functional = name.removeprefix("i") if operation else name.removesuffix("_")
    # Others, like ``x.squeeze_(0)``, change the shape.
    return functional if functional in _ELEMENTWISE or functional == "scatter" else name


class _UnknownError(Exception):
    """The rule of an operation does not cover this call of it."""


def _operands(node: fx.Node) -> list[fx.Node]:
    """Return every node among the arguments, as often as it is given."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def result(node: fx.Node) -> torch.Tensor:
    """Return the fake tensor of ``node``, of several results the first."""
    value = fake_value(node)
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    if not isinstance(value, torch.Tensor):
        raise _UnknownError
    return value


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _tensor(value: Any) -> torch.Tensor:
    found = fake_tensor(value)
    if found is None:
        raise _UnknownError
    return found


def _same(one: Any, other: Any) -> bool:
    return size_expression(one) == size_expression(other)


def _elementwise(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    out = result(node)
    from_the_end = out.dim() - rows.dim
    for operand in dict.fromkeys(_operands(node)):
        value = fake_value(operand)
        if not isinstance(value, torch.Tensor) or value.dim() < from_the_end:
            continue  # a number, or a tensor that has no such dimension
        dim = value.dim() - from_the_end
        if _same(value.shape[dim], out.shape[rows.dim]):
            yield operand, rows.along(dim)
        elif value.shape[dim] != 1:
            raise _UnknownError


def _dropout(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    given = named_arguments(node, ("input", "p", "training"))
    if given.get("training", given.get("train", True)) and given.get("p", 0.5):
        raise _UnknownError  # random numbers of fewer rows are others
    yield from _elementwise(node, rows)


def _linear(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    x: Any = named_arguments(node, ("input", "weight", "bias")).get("input")
    if rows.dim >= _tensor(x).dim() - 1:
        raise _UnknownError
    yield x, rows


def _addmm(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    given = named_arguments(node, ("input", "mat1", "mat2"))
    if rows.dim != 0 or _tensor(given["input"]).dim() != 1:
        raise _UnknownError
    yield given["mat1"], rows


def _product(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    left, right = (_tensor(one) for one in _arguments(node)[:2])
    matrices = result(node).dim() - 2
    if rows.dim > matrices or left.dim() < 2 or right.dim() < 2:
        raise _UnknownError
    if rows.dim < matrices:  # each row is a product of its own
        yield from _elementwise(node, rows)
        return
    yield _arguments(node)[0], rows.along(left.dim() - 2)


def _added_product(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    given: dict[str, Any] = named_arguments(node, ("input", "batch1", "batch2"))
    added = _tensor(given["input"])
    if rows.dim != result(node).dim() - 2:
        raise _UnknownError
    if added.dim() >= 2 and added.shape[-2] != 1:
        yield given["input"], rows.along(added.dim() - 2)
    yield given["batch1"], rows


def _attention(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    given = named_arguments(node, ATTENTION_ARGUMENTS)
    query = _tensor(given["query"])
    if rows.dim != query.dim() - 2:
        raise _UnknownError
    yield given["query"], rows
    mask = None if node.target is BANDED_ATTENTION else given.get("attn_mask")
    if mask is not None:
        shape = _tensor(mask).shape
        if len(shape) >= 2 and _same(shape[-2], query.shape[-2]):
            yield mask, rows.along(len(shape) - 2)
        elif len(shape) >= 2 and shape[-2] != 1:
            raise _UnknownError


def _over_a_dimension(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    if any(fake_tensor(one) is not None for one in (*_arguments(node)[1:2], node.kwargs.get("other"))):
        # The larger or smaller of two operands, of ``max`` and ``min``.
        yield from _elementwise(node, rows)
        return
    x, out = _tensor(_arguments(node)[0]), result(node)
    given: dict[str, Any] = dict(zip(("dim", "keepdim"), _arguments(node)[1:], strict=False)) | node.kwargs
    named: Any = given.get("dim")
    dims: list[Any] = list(named) if isinstance(named, (tuple, list)) else [named]
    if not dims or not all(isinstance(one, int) for one in dims):
        raise _UnknownError
    over = {one % x.dim() for one in dims}
    if out.dim() == x.dim():
        dim = rows.dim
    else:  # those that are summed up are gone
        dim = [one for one in range(x.dim()) if one not in over][rows.dim]
    if dim in over:
        raise _UnknownError
    yield _arguments(node)[0], rows.along(dim)


def _topk(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    given: dict[str, Any] = named_arguments(node, ("input", "k", "dim"))
    yield from _along_a_dimension(given["input"], rows, given.get("dim", -1))


def _sort(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    given: dict[str, Any] = named_arguments(node, ("input", "dim"))
    yield from _along_a_dimension(given["input"], rows, given.get("dim", -1))


def _along_a_dimension(x: fx.Node, rows: Rows, dim: Any) -> Iterator[Demand]:
    if not isinstance(dim, int) or rows.dim == dim % _tensor(x).dim():
        raise _UnknownError
    yield x, rows


def _gather(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    """Read or write along a dimension at positions that each row has of its own."""
    given: dict[str, Any] = named_arguments(node, ("input", "dim", "index", "src"))
    x, index = _tensor(given["input"]), _tensor(given["index"])
    if rows.dim == given["dim"] % x.dim():
        raise _UnknownError
    for one in _operands(node):
        value = _tensor(one)
        # A row that one of them has not is read or written by nobody.
        if value.dim() and (value.dim() != x.dim() or not _same(value.shape[rows.dim], index.shape[rows.dim])):
            raise _UnknownError
        if value.dim():
            yield one, rows


def _norm(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    shape: Any = named_arguments(node, ("input", "normalized_shape")).get("normalized_shape", ())
    if not isinstance(shape, (tuple, list)) or rows.dim >= _tensor(_arguments(node)[0]).dim() - len(shape):
        raise _UnknownError
    yield _arguments(node)[0], rows


def _transpose(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    x = _tensor(_arguments(node)[0])
    one, other = (dim % x.dim() for dim in _arguments(node)[1:3])
    yield _arguments(node)[0], rows.along({one: other, other: one}.get(rows.dim, rows.dim))


def _permute(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    _, *order = _arguments(node)
    order = list(order[0]) if len(order) == 1 else order
    yield _arguments(node)[0], rows.along(order[rows.dim] % _tensor(_arguments(node)[0]).dim())


def shape_argument(node: fx.Node, rows: Rows) -> tuple[Any, ...] | None:
    """Return the sizes to give to ``view`` and its like for ``rows`` of what they return, None where they are not known.

    A size that is one node is read off its fake value; one that is open then is left for the operation to find.
    """
    _, *shape = _arguments(node)
    given = _nested(shape)
    if isinstance(given, fx.Node):
        found = fake_value(given)
        if not isinstance(found, (tuple, list)):
            return None
        sizes = [size if at != rows.dim else rows.count for at, size in enumerate(found)]
        sizes = [-1 if isinstance(size, torch.SymInt) else size for size in sizes]
        return tuple(sizes) if sizes.count(-1) <= 1 else None
    if len(given) != result(node).dim() or node.kwargs:
        return None
    return tuple(rows.count if at == rows.dim and size != -1 else size for at, size in enumerate(given))


def _nested(shape: list[Any]) -> Any:
    """Return the sizes, or the one node that stands for all of them."""
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        return list(shape[0])
    if len(shape) == 1 and isinstance(shape[0], fx.Node) and not isinstance(fake_value(shape[0]), (int, torch.SymInt)):
        return shape[0]
    return shape


def _shape_is_known(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    """Yield a node that gives the whole shape as one that is not needed; raise where the shape is unknown."""
    if op_name(node) not in SHAPED:
        return
    if shape_argument(node, rows) is None:
        raise _UnknownError
    given = _nested(list(_arguments(node)[1:]))
    if isinstance(given, fx.Node):
        yield given, Rows(rows.dim, 0, 0)


def _view(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    """Find the dimension of the operand that has the same rows: as many, and as many numbers before them."""
    yield from _shape_is_known(node, rows)
    x, out = _tensor(_arguments(node)[0]), result(node)
    wanted = _product_of(out.shape[: rows.dim])
    before: Any = size_expression(1)
    for dim, size in enumerate(x.shape):
        if before == wanted and _same(size, out.shape[rows.dim]):
            yield _arguments(node)[0], rows.along(dim)
            return
        before = before * size_expression(size)
    raise _UnknownError


def _product_of(sizes: Any) -> Any:
    product: Any = size_expression(1)
    for size in sizes:
        product = product * size_expression(size)
    return product


def _unsqueeze(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    at = _arguments(node)[1] % result(node).dim()
    if rows.dim == at:
        raise _UnknownError
    yield _arguments(node)[0], rows.along(rows.dim - (rows.dim > at))


def _expand(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    yield from _shape_is_known(node, rows)
    x, out = _tensor(_arguments(node)[0]), result(node)
    dim = x.dim() - (out.dim() - rows.dim)
    if dim < 0 or not _same(x.shape[dim], out.shape[rows.dim]):
        raise _UnknownError
    yield _arguments(node)[0], rows.along(dim)


def _cat(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    given = named_arguments(node, ("tensors", "dim"))
    parts = given.get("tensors", ())
    if not isinstance(parts, (tuple, list)) or not all(fake_tensor(part) is not None for part in parts):
        raise _UnknownError
    if given.get("dim", 0) % result(node).dim() != rows.dim:
        for part in parts:
            yield part, rows
        return
    # Along the rows: the first and the last part may hold all that is needed.
    first, last = (_tensor(part).shape[rows.dim] for part in (parts[0], parts[-1]))
    if not _at_least(first, rows.head) or not _at_least(last, rows.tail):
        raise _UnknownError
    for place, part in enumerate(parts):
        yield part, Rows(rows.dim, 0 if place else rows.head, rows.tail if place == len(parts) - 1 else 0)


def _at_least(size: Any, count: int) -> bool:
    size = size_expression(size)
    return count == 0 or bool(size.is_Integer and int(size) >= count)


def _stack(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    given = named_arguments(node, ("tensors", "dim"))
    at = given.get("dim", 0) % result(node).dim()
    if rows.dim == at:
        raise _UnknownError
    for part in given["tensors"]:
        yield part, rows.along(rows.dim - (rows.dim > at))


def _split(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    given: dict[str, Any] = dict(zip(("size", "dim"), node.args[1:], strict=False)) | node.kwargs
    if given.get("dim", 0) % _tensor(_arguments(node)[0]).dim() == rows.dim:
        raise _UnknownError
    yield _arguments(node)[0], rows


def _embedding(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    ids: Any = named_arguments(node, ("input", "weight")).get("input")
    if rows.dim >= _tensor(ids).dim():
        raise _UnknownError
    yield ids, rows


def _item(node: fx.Node, rows: Rows) -> Iterator[Demand]:
    source, index = _arguments(node)
    if isinstance(fake_value(source), (tuple, list)):
        yield source, rows
        return
    count = sliced_rows(node)
    if count is not None and count.dim == rows.dim:
        # The last rows of the last rows are the last rows; of any other mixture all that are there are taken.
        last = not count.head and not rows.head
        yield source, Rows(rows.dim, count.head, min(count.tail, rows.tail) if last else count.tail)
        return
    dims = _dims_of(index, _tensor(source).dim())
    dim = dims[rows.dim] if rows.dim < len(dims) else None
    if dim is None:
        raise _UnknownError
    yield source, rows.along(dim)


def _dims_of(index: Any, rank: int) -> list[int | None]:
    """Return for each dimension of ``x[index]`` that of x which it takes whole, None for one that it cuts or makes."""
    index = list(index) if isinstance(index, tuple) else [index]
    if any(not isinstance(one, (slice, int, type(None), type(Ellipsis))) for one in index):
        raise _UnknownError
    taken = sum(isinstance(one, (slice, int)) for one in index)
    rest = [slice(None)] * (rank - taken)
    where = index.index(Ellipsis) if Ellipsis in index else len(index)
    index[where : where + 1] = rest
    dims: list[int | None] = []
    at = 0
    for one in index:
        if one is None:
            dims.append(None)
            continue
        if isinstance(one, slice):
            dims.append(at if one == slice(None) else None)
        at += 1
    return dims


def sliced_rows(node: fx.Node) -> Rows | None:
    """Return which first or last rows of its operand ``node`` takes by ``x[:, :k]`` or ``x[:, -k:]``, None where it does else."""
    source = _arguments(node)[0] if op_name(node) in ("getitem", "__getitem__") and node.args else None
    value = fake_tensor(source)
    index = _arguments(node)[1] if value is not None and len(node.args) == 2 else None
    if value is None or not isinstance(index, tuple) or len(index) > value.dim():
        return None
    if not all(isinstance(one, slice) for one in index):
        return None
    cut = [dim for dim, one in enumerate(index) if one != slice(None)]
    if len(cut) != 1:
        return None
    [dim] = cut
    one = index[dim]
    start, stop = (_number(end) for end in (one.start, one.stop))
    if one.step not in (None, 1):
        return None
    if one.stop is None and start is not None and start < 0:
        return Rows(dim, 0, -start)
    if one.start in (None, 0) and stop is not None and stop > 0:
        return Rows(dim, stop, 0)
    return None


def _number(end: Any) -> int | None:
    """Return the end of a slice as a number: what it is, or what a size has been found to be."""
    value = fake_value(end) if isinstance(end, fx.Node) else end
    if isinstance(value, torch.SymInt):
        value = value.node.expr
        return int(value) if value.is_Integer else None
    return value if isinstance(value, int) else None


_RULES: dict[str, Callable[[fx.Node, Rows], Iterator[Demand]]] = {
    "dropout": _dropout,
    "linear": _linear,
    "addmm": _addmm,
    **dict.fromkeys(_PRODUCTS, _product),
    "baddbmm": _added_product,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(_OVER_A_DIMENSION, _over_a_dimension),
    "topk": _topk,
    **dict.fromkeys(("sort", "argsort"), _sort),
    **dict.fromkeys(("gather", "scatter"), _gather),
    **dict.fromkeys(_NORMS, _norm),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    "permute": _permute,
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "_unsafe_view", "squeeze"), _view),
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    **dict.fromkeys(("cat", "concat"), _cat),
    "stack": _stack,
    **dict.fromkeys(("chunk", "split"), _split),
    "embedding": _embedding,
    **dict.fromkeys(("getitem", "__getitem__"), _item),
}
