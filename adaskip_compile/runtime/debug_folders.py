"""Debug folders: each graph before and after every pass, what changed, and a script that does it again.

With ``debug_dir=`` set, each graph that is specialised gets a folder there, such as
``001-MyDecoder-prefill-8-skipped``. In it are the texts ``0-captured.txt``, ``1-append-in-place.txt``,
``2-insert-probes.txt`` ... and the differences between them, the ``sublayers.txt``, the ``history.txt`` of the
passes, the captured ``graph.json`` (no weights), and ``repro.py``, which runs the passes again on that.
Where a pass fails, its broken graph is there too, and the error says where.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import shutil
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import fx

from adaskip_passes.errors import AdaSkipError, FileError
from adaskip_passes.ir.printer import diff_graphs, print_graph
from adaskip_passes.ir.serializer import write_graph
from adaskip_passes.pipeline.pipeline import Pass, PassResult, PipelineResult, pass_text, run_pipeline
from adaskip_passes.stream.stream import ResidualStream

log = logging.getLogger(__name__)

_REPRO = '''\
"""Run the passes of this folder again on the graph that is saved in it: python repro.py

Prints what each pass changes. Exits with 1 and names the pass if one fails.
"""

from pathlib import Path

from adaskip_passes.pipeline.rerun import rerun
{imports}

PASSES = [
{passes}
]

if __name__ == "__main__":
    raise SystemExit(rerun(Path(__file__).with_name("graph.json"), PASSES, ({known})))
'''


def run_passes(
    gm: fx.GraphModule,
    stream: ResidualStream,
    passes: Sequence[Pass],
    *,
    debug_dir: str | os.PathLike[str] | None = None,
    title: str = "graph",
) -> PipelineResult:
    """Run ``passes`` on a copy of ``gm``; where there is a ``debug_dir``, into a new folder of it named after ``title``.

    Raises:
        PassError: A pass failed; the message names the folder to see it in.
        FileError: The folder cannot be written.
    """
    if debug_dir is None:
        return run_pipeline(gm, stream, passes)
    try:
        folder = _new_folder(Path(debug_dir).expanduser(), title)
        result = _run_recorded(gm, stream, passes, folder)
    except OSError as error:
        raise FileError(f"debug_dir={os.fspath(debug_dir)}: cannot be written ({error.strerror or error})") from error
    log.info("graph before and after each pass: %s", folder)
    return result


def _run_recorded(gm: fx.GraphModule, stream: ResidualStream, passes: Sequence[Pass], folder: Path) -> PipelineResult:
    recorder = _Recorder(folder, gm, stream, passes)
    try:
        return run_pipeline(gm, stream, passes, [recorder.after], on_failure=recorder.failed)
    except AdaSkipError as error:
        raise type(error)(f"{error}; to see it alone: python {folder / 'repro.py'}") from error


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


class _Recorder:
    """Writes what one run of a pipeline does, as it goes: a pass that never ends leaves all before it."""

    def __init__(self, folder: Path, gm: fx.GraphModule, stream: ResidualStream, passes: Sequence[Pass]) -> None:
        self._folder, self._step, self._text = folder, 0, print_graph(gm)
        self._write("0-captured.txt", self._text)
        self._write("sublayers.txt", str(stream))
        self._write("graph.json", json.dumps(write_graph(gm), separators=(",", ":")))
        self._write("repro.py", _repro(folder, passes))
        self._history: list[str] = []

    def after(self, item: Pass, gm: fx.GraphModule, result: PassResult) -> None:
        """Write the graph after a pass, and what is different from before it."""
        self._write_step(item, gm)
        self._note(item, f"{'modified' if result.modified else 'unchanged'}, matched {result.matched}")

    def failed(self, item: Pass, gm: fx.GraphModule, error: AdaSkipError) -> None:
        """Write the graph as a pass that failed has left it, and why it failed."""
        self._write_step(item, gm)
        self._note(item, f"FAILED: {error}")
        self._write("error.txt", "".join(traceback.format_exception(error)))

    def _write_step(self, item: Pass, gm: fx.GraphModule) -> None:
        self._step += 1
        before, self._text = self._text, print_graph(gm)
        self._write(f"{self._step}-{item.name}.txt", self._text)
        self._write(f"{self._step}-{item.name}.diff", diff_graphs(before, self._text))

    def _note(self, item: Pass, outcome: str) -> None:
        self._history.append(f"{self._step} {pass_text(item)}\n    {outcome}")
        self._write("history.txt", "\n".join(self._history))

    def _write(self, name: str, text: str) -> None:
        (self._folder / name).write_text(f"{text}\n" if text else "", "utf-8")


def _repro(folder: Path, passes: Sequence[Pass]) -> str:
    kinds = sorted({type(item) for item in passes}, key=lambda kind: kind.__name__)
    imports = sorted(f"from {_module_of(kind, folder)} import {kind.__name__}" for kind in kinds)
    return _REPRO.format(
        imports="\n".join(imports),
        passes="\n".join(f"    {pass_text(item)!r}," for item in passes),
        known="".join(f"{kind.__name__}, " for kind in kinds).rstrip(),
    )


def _module_of(kind: type[Any], folder: Path) -> str:
    """Return the module to import a pass from: this package's own, or a copy in the folder of a pass of someone else's."""
    source = inspect.getsourcefile(kind)
    if kind.__module__.startswith("adaskip_passes.") or source is None:
        return kind.__module__
    name = f"pass_{Path(source).stem}"
    shutil.copyfile(source, folder / f"{name}.py")
    return name
