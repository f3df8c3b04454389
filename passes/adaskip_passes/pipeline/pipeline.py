"""Run passes in order, verify after each, and keep the history.

A pass is a frozen dataclass: its class-level ``name`` and its fields are all there is to it, and it
prints as ``skip-sublayers{paths=(...)}``. It gets a graph and the residual stream found in it,
changes the graph in place, and returns a :class:`PassResult` whose stream holds for the changed
graph. Analyses never mutate; passes never search.
"""

from __future__ import annotations

import ast
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

from torch import fx

from adaskip_passes.errors import AdaSkipError, PassError
from adaskip_passes.ir.graph import copy_graph
from adaskip_passes.pipeline.verifier import Contract, verify
from adaskip_passes.stream.stream import ResidualStream


@dataclass(frozen=True)
class AddedInput:
    """An input that a pass has appended to a graph: its ``name`` there, and what is to be given.

    ``part`` is a part of what stands for the sublayer at ``path``, or of what all sublayers share, which has no path.
    """

    name: str
    part: str
    path: str = ""


@dataclass(frozen=True)
class PassResult:
    """What a pass did: the stream that now holds, whether the text of the graph changed, and how many places matched.

    ``added`` are the inputs that it has appended, in order: whoever runs the graph gives them after those of the capture.
    """

    stream: ResidualStream
    modified: bool
    matched: int
    added: tuple[AddedInput, ...] = ()


class Pass(Protocol):
    """A graph rewrite. ``apply`` mutates ``gm``; a pass that is told to do something and cannot raises."""

    name: ClassVar[str]

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Rewrite ``gm`` in place."""
        ...


@dataclass(frozen=True)
class PassRecord:
    """One line of a pipeline's history; ``seconds`` covers the pass and its verification."""

    text: str
    modified: bool
    matched: int
    nodes_before: int
    nodes_after: int
    seconds: float


@dataclass(frozen=True)
class PipelineResult:
    """The rewritten copy of a graph, its stream, what each pass did to it, and the inputs that they added, in order.

    ``contract`` is what it has been verified to offer.
    """

    gm: fx.GraphModule
    stream: ResidualStream
    history: tuple[PassRecord, ...]
    added: tuple[AddedInput, ...] = ()
    contract: Contract | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return "\n".join(
            f"{record.text}: {'modified' if record.modified else 'unchanged'}, matched {record.matched}, "
            f"nodes {record.nodes_before} -> {record.nodes_after}"
            for record in self.history
        )


Instrument = Callable[[Pass, fx.GraphModule, PassResult], None]
FailureInstrument = Callable[[Pass, fx.GraphModule, AdaSkipError], None]


def run_pipeline(
    gm: fx.GraphModule,
    stream: ResidualStream,
    passes: Sequence[Pass],
    instruments: Sequence[Instrument] = (),
    *,
    on_failure: FailureInstrument | None = None,
    contract: Contract | None = None,
) -> PipelineResult:
    """Apply ``passes`` in order to a copy of ``gm``; ``gm`` itself stays as it is.

    ``instruments`` are called after each pass has been verified, ``on_failure`` with the graph as a pass
    that failed has left it. With the ``contract`` of an earlier run that ``gm`` comes from, it is not verified again
    before the first pass.

    Raises:
        VerificationError: A pass broke the graph, or it came broken; the message names which.
        PassError: A pass could not do what it was told to do, or failed in a way that its author did not foresee.
    """
    gm, images = copy_graph(gm)
    # A node without an image is none of the graph's: the verifier tells of it.
    stream = stream.mapped(lambda node: images.get(node, node))
    contract = verify(gm, None, stream, after="capture") if contract is None else contract.of_copy(gm)
    history, added = list[PassRecord](), list[AddedInput]()
    for item in passes:
        started, before = time.perf_counter(), len(gm.graph.nodes)
        try:
            result, contract = _apply(item, gm, stream, contract)
        except AdaSkipError as error:
            if on_failure is not None:
                on_failure(item, gm, error)
            raise
        stream = result.stream
        added += result.added
        seconds = time.perf_counter() - started
        history.append(
            PassRecord(pass_text(item), result.modified, result.matched, before, len(gm.graph.nodes), seconds)
        )
        for instrument in instruments:
            instrument(item, gm, result)
    return PipelineResult(gm, stream, tuple(history), tuple(added), contract)


def _apply(item: Pass, gm: fx.GraphModule, stream: ResidualStream, contract: Contract) -> tuple[PassResult, Contract]:
    names = _names(gm)
    try:
        result = item.apply(gm, stream)
    except AdaSkipError:
        raise
    except Exception as error:
        raise PassError(f"{pass_text(item)} failed: {type(error).__name__}: {error}") from error
    unchanged = result.stream is stream and not result.added and names == _names(gm)
    if unchanged and contract.values.unchanged(gm):
        return result, contract  # whatever the pass says
    added = tuple(one.name for one in result.added)
    contract = verify(gm, contract, result.stream, after=pass_text(item), added=added)
    gm.recompile()
    return result, contract


def _names(gm: fx.GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes]


def pass_text(item: Pass) -> str:
    """Return the text of a pass, with the options that are not left at their defaults.

    ``skip-sublayers{paths=('model.layers.0.mlp',)}``
    """
    given = ((option.name, getattr(item, option.name), option.default) for option in fields(item))  # type: ignore[arg-type]
    options = ", ".join(f"{name}={value!r}" for name, value, default in given if value != default)
    return f"{item.name}{{{options}}}"


def parse_pass(text: str, known: Sequence[type[Any]]) -> Pass:
    """Return the pass that :func:`pass_text` printed; ``known`` are the classes to look among.

    :class:`PassError` where none of them has the name, or the options are none that it takes.
    """
    name, _, rest = text.partition("{")
    for kind in known:
        if kind.name == name and rest.endswith("}"):
            try:
                return kind(**_read_options(rest[:-1]))
            except (SyntaxError, TypeError, ValueError) as error:
                raise PassError(f"cannot read the options of {text!r}: {error}") from error
    raise PassError(f"no pass reads {text!r}; there are: {', '.join(kind.name for kind in known)}")


def _read_options(text: str) -> dict[str, Any]:
    """Read ``a=(1, 2), b='x'``; values are literals, and nothing is ever run."""
    call = ast.parse(f"options({text})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
        raise ValueError("options have names: paths=('model.layers.0.mlp',)")
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
