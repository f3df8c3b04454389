"""A graph on its way from the capture to what runs: the passes behind it, and the folder in which people see them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import fx

from adaskip_passes.errors import AdaSkipError, PassError, VerificationError
from adaskip_passes.ir.graph import copy_graph, size_hint, tensor_of
from adaskip_passes.ir.hints import raise_hint
from adaskip_passes.pipeline.debug_folders import GraphLog
from adaskip_passes.pipeline.pipeline import AddedInput, Pass, PassRecord, run_pipeline
from adaskip_passes.pipeline.verifier import Contract
from adaskip_passes.stream.stream import NO_STREAM, ResidualStream

logger = logging.getLogger(__name__)


def is_refusal(error: AdaSkipError) -> bool:
    """Tell whether a pass itself has said that it cannot do what it is told: it neither crashed nor broke the graph."""
    return not isinstance(error, VerificationError) and error.__cause__ is None


@dataclass(frozen=True)
class DerivedGraph:
    """What passes have made of a captured graph so far.

    ``history`` goes back to the capture, and ``added`` are the inputs that it has more than that, in order. ``contract`` is
    what it has been verified to offer, and ``log`` keeps the text after each pass where somebody wants to see it. Others
    can be derived from it: it is never changed.
    """

    gm: fx.GraphModule
    stream: ResidualStream = NO_STREAM
    history: tuple[PassRecord, ...] = ()
    added: tuple[AddedInput, ...] = ()
    log: GraphLog | None = None
    contract: Contract | None = field(default=None, repr=False, compare=False)

    @classmethod
    def captured(cls, gm: fx.GraphModule, debug_dir: Any = None, title: str = "graph") -> DerivedGraph:
        """Return the beginning: ``gm``, to be shown in ``debug_dir``, where there is one, as ``title``."""
        if debug_dir is None:
            return cls(gm)
        try:
            return cls(gm, log=GraphLog.captured(gm, debug_dir, title))
        except (TypeError, ValueError, NotImplementedError) as error:  # a value that no file can hold
            logger.warning("%s has no debug folder: %s", title, error)
            return cls(gm)

    def run(self, passes: Sequence[Pass], *, recoverable: bool = False) -> DerivedGraph:
        """Return what ``passes`` make of it, on a copy.

        ``recoverable`` says that the caller has another way where a pass cannot do what it is told: nothing is written
        of that.

        Raises:
            PassError: A pass failed, or broke the graph. The message names the folder to see it in.
            FileError: The folder cannot be written.
        """
        log = None if self.log is None else self.log.opened()
        instruments = () if log is None else (log.after,)
        try:
            failed = None if log is None else log.failed
            result = run_pipeline(self.gm, self.stream, passes, instruments, on_failure=failed, contract=self.contract)
        except AdaSkipError as error:
            if log is None or (recoverable and is_refusal(error)):
                raise
            script = log.write("failed", self.stream, passes) / "repro.py"
            raise type(error)(f"{error}; to see it alone: python {script}") from error
        history, added = (*self.history, *result.history), (*self.added, *result.added)
        return DerivedGraph(result.gm, result.stream, history, added, log, result.contract)

    def for_rows(self, least: int, fewest: int) -> DerivedGraph:
        """Return it as captured with at least ``least`` rows in its stream; the very same where it was.

        So it is where it cannot be told to have so many, and was captured with ``fewest`` or more.

        Raises:
            PassError: It cannot be told to have so many, and was captured with fewer.
        """
        rows: Any = tensor_of(self.stream.sublayers[0].stream_in).shape[1]
        if isinstance(rows, int) or not rows.node.has_hint() or size_hint(rows) >= least:
            return self
        gm, images = copy_graph(self.gm)
        try:
            if any(isinstance(inner, fx.GraphModule) for inner in gm.children()):
                raise PassError("the graph has graphs inside, whose values cannot be told to have more rows")
            raise_hint(gm.graph, rows, least)
        except PassError:
            if size_hint(rows) < fewest:
                raise
            return self
        return replace(self, gm=gm, stream=self.stream.mapped(images.__getitem__), contract=None)

    def show(self, title: str) -> Path | None:
        """Write its debug folder and return it, where somebody wants to see it."""
        return None if self.log is None else self.log.write(title, self.stream)

    def part(self, gm: fx.GraphModule, name: str) -> DerivedGraph:
        """Return ``gm``, a region of it, as the beginning of a graph of its own."""
        return DerivedGraph(gm) if self.log is None else self.captured(gm, self.log.root, f"{self.log.title}-{name}")

    def called(self, title: str) -> DerivedGraph:
        """Return it with another title for its folders."""
        return self if self.log is None else replace(self, log=replace(self.log, title=title))
