from dataclasses import replace

import pytest
import torch
from torch.fx.experimental import _config as config

from adaskip_compile.shape_checks import ShapeCheck
from adaskip_passes.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.errors import LegalityError
from adaskip_passes.pipeline import run_pipeline
from adaskip_passes.residual_stream import find_residual_stream
from adaskip_passes.skip_sublayers import SkipSublayers
from tests.captures import run, scales_input, shared_captures, stream_of
from tests.models import capture_all, plain


def skipped(captured, paths):
    stream = find_residual_stream(captured.gm)
    result = run_pipeline(captured.gm, stream, (SkipSublayers(paths), EliminateDeadCode()))
    outputs = run(result.gm, captured, scales_input(stream, dict.fromkeys(paths, 0.9))).outputs
    return ShapeCheck(captured.gm, result.gm), outputs


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_what_a_skipped_graph_returns_has_the_shapes_of_the_full_one(name):
    for captured in shared_captures(name):
        for path in stream_of(captured.gm).paths[::2]:
            check, outputs = skipped(captured, (path,))
            check.check(captured.inputs, outputs)


def test_caches_that_part_ways_are_noticed_at_run_time():
    with config.patch(use_duck_shape=False):  # type: ignore[attr-defined]  # a symbol a layer
        decode = capture_all(plain(layers=2, cached=True))[-1]
    hole, kept = (find_residual_stream(decode.gm).by_path(f"blocks.{i}.attention") for i in (0, 1))
    check, outputs = skipped(decode, (hole.path,))
    check.check(decode.inputs, outputs)
    places = decode.gm.graph.find_nodes(op="placeholder")
    inputs = list(decode.inputs)
    for node in kept.cache_inputs:
        inputs[places.index(node)] = inputs[places.index(node)][:, :, 1:]
    shorter = replace(decode, inputs=tuple(inputs))
    check, outputs = skipped(shorter, (hole.path,))
    with pytest.raises(
        LegalityError, match=r"should have the shape \(1, 4, \d+, 16\).*keep one sublayer of each cache"
    ):
        check.check(shorter.inputs, outputs)


def test_a_graph_that_skips_nothing_has_nothing_to_check():
    captured = shared_captures("llama")[0]
    ShapeCheck(captured.gm, captured.gm).check((), (torch.ones(1),))
