"""Debug folders: each graph after every pass, what changed, and a script that does it again.

With ``debug_dir=`` set, each graph that is specialised gets a folder there, such as
``001-MyDecoder-prefill-8-skipped``. In it are the texts ``00-captured.txt``, ``01-simplify-masks.txt``,
``02-straighten-stream.txt`` ... of all passes since the capture and the differences between them, the ``sublayers.txt``,
the ``history.txt`` of the passes, the captured ``graph.json`` (no weights), and ``repro.py``, which runs the passes again on
that and compares. It is a record of what was run: what several graphs share was done once and is shown in each.
Where a pass fails, its broken graph is there too, and the error says where.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import re
import shutil
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import fx

from adaskip_passes.errors import AdaSkipError, FileError
from adaskip_passes.ir.printer import diff_graphs, print_graph
from adaskip_passes.ir.serializer import write_graph
from adaskip_passes.pipeline.pipeline import Pass, PassResult, pass_text
from adaskip_passes.stream.stream import ResidualStream

_REPRO = '''\
"""Run the passes of this folder again on the graph that is saved in it: python repro.py

Prints what each pass changes. Exits with 1 and names the pass if one fails, or if the last graph is not the one here.
"""

from pathlib import Path

from adaskip_passes.pipeline.rerun import rerun
{imports}

# Each pipeline begins with a copy of what the one before it has left.
PIPELINES = [
{pipelines}
]

if __name__ == "__main__":
    raise SystemExit(rerun(Path(__file__).with_name("graph.json"), PIPELINES, ({known})))
'''


@dataclass(frozen=True)
class Step:
    """One pass that was run: the graph after it, and what it did; ``error`` is the trace of one that failed."""

    item: Pass
    text: str
    outcome: str
    error: str = ""


@dataclass(frozen=True)
class GraphLog:
    """What has been done to one captured graph, to be written into folders of ``root`` that are named after ``title``.

    ``before`` are the pipelines that it has been through, and ``steps`` the passes of the one that runs.
    """

    root: Path
    title: str
    text: str
    source: str = field(repr=False)
    before: tuple[tuple[Step, ...], ...] = ()
    steps: list[Step] = field(default_factory=list)

    @classmethod
    def captured(cls, gm: fx.GraphModule, debug_dir: str | os.PathLike[str], title: str) -> GraphLog:
        """Begin with a graph as it was captured."""
        source = json.dumps(write_graph(gm), separators=(",", ":"))
        return cls(Path(debug_dir).expanduser(), title, print_graph(gm), source)

    def opened(self) -> GraphLog:
        """Return a copy, to go on with another pipeline."""
        return replace(self, before=self._pipelines(), steps=[])

    def after(self, item: Pass, gm: fx.GraphModule, result: PassResult) -> None:
        """Note the graph after a pass."""
        outcome = f"{'modified' if result.modified else 'unchanged'}, matched {result.matched}"
        self.steps.append(Step(item, print_graph(gm), outcome))

    def failed(self, item: Pass, gm: fx.GraphModule, error: AdaSkipError) -> None:
        """Note the graph as a pass that failed has left it, and why it failed."""
        trace = "".join(traceback.format_exception(error))
        self.steps.append(Step(item, print_graph(gm), f"FAILED: {error}", trace))

    def write(self, title: str, stream: ResidualStream, rest: Sequence[Pass] = ()) -> Path:
        """Write a folder and return it; ``rest`` are passes of which one failed.

        Raises:
            FileError: It cannot be written.
        """
        try:
            folder = _new_folder(self.root, f"{self.title}-{title}")
            for name, text in self._files(stream):
                (folder / name).write_text(f"{text}\n" if text else "", "utf-8")
            (folder / "repro.py").write_text(_repro(folder, self._passes(rest)), "utf-8")
        except OSError as error:
            raise FileError(f"debug_dir={self.root}: cannot be written ({error.strerror or error})") from error
        return folder

    def _pipelines(self) -> tuple[tuple[Step, ...], ...]:
        return (*self.before, tuple(self.steps)) if self.steps else self.before

    def _passes(self, rest: Sequence[Pass]) -> list[list[Pass]]:
        """Return the passes that were run, by pipeline, and those after one that failed."""
        run = [[step.item for step in pipeline] for pipeline in self.before]
        current = [*(step.item for step in self.steps), *rest[len(self.steps) :]]
        return [*run, current] if current else run

    def _files(self, stream: ResidualStream) -> Iterator[tuple[str, str]]:
        yield "00-captured.txt", self.text
        yield "sublayers.txt", str(stream)
        yield "graph.json", self.source
        before, history = self.text, list[str]()
        for number, step in enumerate(itertools.chain(*self._pipelines()), 1):
            yield f"{number:02d}-{step.item.name}.txt", step.text
            yield f"{number:02d}-{step.item.name}.diff", diff_graphs(before, step.text)
            history.append(f"{number} {pass_text(step.item)}\n    {step.outcome}")
            before = step.text
            if step.error:
                yield "error.txt", step.error
        yield "history.txt", "\n".join(history)


def _new_folder(root: Path, title: str) -> Path:
    """Make a folder of its own for one graph: numbered, since one graph may be specialised many times."""
    root.mkdir(parents=True, exist_ok=True)
    number, name = len(list(root.iterdir())) + 1, re.sub(r"[^A-Za-z0-9_.]+", "-", title)
    while True:
        folder = root / f"{number:03d}-{name}"
        try:
            folder.mkdir()
        except FileExistsError:  # an earlier run's, or another process has just made it
            number += 1
        else:
            return folder


def _repro(folder: Path, pipelines: Sequence[Sequence[Pass]]) -> str:
    kinds = sorted({type(item) for item in itertools.chain(*pipelines)}, key=lambda kind: kind.__name__)
    imports = sorted(f"from {_module_of(kind, folder)} import {kind.__name__}" for kind in kinds)
    return _REPRO.format(
        imports="\n".join(imports),
        pipelines="\n".join(_written(pipeline) for pipeline in pipelines),
        known="".join(f"{kind.__name__}, " for kind in kinds).rstrip(),
    )


def _written(pipeline: Sequence[Pass]) -> str:
    return "\n".join(["    [", *(f"        {pass_text(item)!r}," for item in pipeline), "    ],"])


def _module_of(kind: type[Any], folder: Path) -> str:
    """Return the module to import a pass from: this package's own, or a copy in the folder of a pass of someone else's."""
    source = inspect.getsourcefile(kind)
    if kind.__module__.startswith("adaskip_passes.") or source is None:
        return kind.__module__
    name = f"pass_{Path(source).stem}"
    shutil.copyfile(source, folder / f"{name}.py")
    return name
