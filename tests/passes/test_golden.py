"""What each pass makes of six families, to be read in review.

``golden/FAMILY.txt`` holds the captured decode graph and a diff a pass, ``golden/FAMILY_prompt.txt`` the prefill graph of
three. ``EXPECTTEST_ACCEPT=1`` writes the files anew.
"""

import os
from pathlib import Path

import pytest
import torch
import transformers

from adaskip_passes.canonicalise.straighten_stream import StraightenStream
from adaskip_passes.ir.printer import diff_graphs, print_graph
from adaskip_passes.pipeline.pipeline import pass_text, run_pipeline
from adaskip_passes.pipelines import CANONICALISE, row_passes
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.insert_probes import InsertProbes
from adaskip_passes.specialise.skip_body_rows import SkipBodyRows
from adaskip_passes.specialise.skip_sublayers import SkipSublayers
from adaskip_passes.stream.stream import NO_STREAM
from tests.architectures import tiny_architecture
from tests.models import capture

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("llama", "gpt2", "gptj", "gemma3_text", "mixtral", "mamba")
PROMPTS = ("llama", "gemma3_text", "mixtral")
VERSIONS = f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"


class Story:
    """A captured graph, and what passes change in it one after the other."""

    def __init__(self, family, phase, length=8):
        with torch._dynamo.config.patch(specialize_float=True):
            graphs = dict(zip(("prefill", "decode"), capture(tiny_architecture(family), length=length), strict=True))
        self.gm, self.stream = graphs[phase].gm, NO_STREAM
        self.parts = [f"{family}: {VERSIONS}", print_graph(self.gm)]

    def run(self, *passes):
        for item in passes:
            text = print_graph(self.gm)
            result = run_pipeline(self.gm, self.stream, (item,))
            self.gm, self.stream = result.gm, result.stream
            self.parts.append(f"{pass_text(item)}\n" + diff_graphs(text, print_graph(self.gm), context=1))

    def __str__(self):
        return "\n\n".join(part.strip("\n") for part in self.parts) + "\n"


def of_decode(family):
    """Return the decode graph of a family before, and what each pass changes: skip the first stateful, probe the last."""
    story = Story(family, "decode")
    story.run(StraightenStream())
    story.parts.append(str(story.stream))
    skipped = next(item.path for item in story.stream.sublayers if item.stateful)
    story.run(InsertProbes(story.stream.paths[-1:]), SkipSublayers((skipped,)), EliminateDeadCode())
    return str(story)


def of_prompt(family):
    """Return the prefill graph of a family before, and what each pass changes: skip the first layer for the body of a prompt."""
    story = Story(family, "prefill", length=24)
    story.run(*CANONICALISE)
    first, second, *_ = story.stream.paths
    story.run(*row_passes(SkipBodyRows((first, second), ((first, "low_rank", 2),), head=1, tail=16)))
    return str(story)


def check(name, found):
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.write_text(found)
    wanted = path.read_text()
    if VERSIONS not in wanted.splitlines()[0]:
        pytest.skip(f"the golden text is of other versions: {wanted.splitlines()[0]}")
    assert found == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_graphs_before_and_after_each_pass(family):
    check(family, of_decode(family))


@pytest.mark.parametrize("family", PROMPTS)
def test_prompts_before_and_after_each_pass(family):
    check(f"{family}_prompt", of_prompt(family))
