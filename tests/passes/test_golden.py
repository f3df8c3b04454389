"""What each pass makes of six families, to be read in review: ``golden/FAMILY.txt`` holds the captured decode graph and a diff a pass.

``EXPECTTEST_ACCEPT=1`` writes the files anew.
"""

import os
from pathlib import Path

import pytest
import torch
import transformers

from adaskip_passes.canonicalise.straighten_stream import StraightenStream
from adaskip_passes.ir.printer import diff_graphs, print_graph
from adaskip_passes.pipeline.pipeline import pass_text, run_pipeline
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.insert_probes import InsertProbes
from adaskip_passes.specialise.skip_sublayers import SkipSublayers
from adaskip_passes.stream.find_stream import find_residual_stream
from tests.architectures import tiny_architecture
from tests.models import capture
from tests.rewriting import applied

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("llama", "gpt2", "gptj", "gemma3_text", "mixtral", "mamba")
VERSIONS = f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"


def story(family):
    """Return the decode graph of a family before, and what each pass changes: skip the first stateful, probe the last."""
    with torch._dynamo.config.patch(specialize_float=True):
        _, captured = capture(tiny_architecture(family))
    gm = captured.gm
    text = print_graph(gm)
    parts = [f"{family}: {VERSIONS}", text]
    applied(StraightenStream(), gm)
    parts.append("straighten_stream\n" + diff_graphs(text, print_graph(gm), context=1))
    stream = find_residual_stream(gm)
    parts.append(str(stream))
    skipped = next(item.path for item in stream.sublayers if item.stateful)
    for item in (InsertProbes(stream.paths[-1:]), SkipSublayers((skipped,)), EliminateDeadCode()):
        text = print_graph(gm)
        result = run_pipeline(gm, stream, (item,))
        gm, stream = result.gm, result.stream
        parts.append(f"{pass_text(item)}\n" + diff_graphs(text, print_graph(gm), context=1))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_before_and_after_each_pass(family):
    path = GOLDEN / f"{family}.txt"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.write_text(story(family))
    wanted = path.read_text()
    if VERSIONS not in wanted.splitlines()[0]:
        pytest.skip(f"the golden text is of other versions: {wanted.splitlines()[0]}")
    assert story(family) == wanted
