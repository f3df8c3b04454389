import weakref

import pytest
import torch

from adaskip_compile.lowering.executor import Executor
from adaskip_passes.analysis.regions import Region, regions_of
from adaskip_passes.pipeline.pipeline import run_pipeline
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.insert_probes import InsertProbes
from adaskip_passes.specialise.outline_regions import OutlineRegions
from adaskip_passes.specialise.skip_sublayers import SkipSublayers
from tests.captures import run, scales_input, shared_captures, stream_of


@pytest.mark.parametrize(("name", "cache"), [("llama", "dynamic"), ("gemma3_text", "static"), ("gpt2", "dynamic")])
def test_an_executor_computes_what_generated_code_computes(name, cache):
    for captured in shared_captures(name, cache):
        wiring = run_pipeline(captured.gm, stream_of(captured.gm), (OutlineRegions(),))
        paths = wiring.stream.paths
        for skipped in ((), paths[:2], paths[-3:]):
            probed = tuple(path for path in paths[:-3] if path not in skipped)
            passes = (InsertProbes(probed), SkipSublayers(skipped), EliminateDeadCode())
            result = run_pipeline(wiring.gm, wiring.stream, passes)
            executor = Executor(result.gm, {region: region.gm.forward for region in regions_of(wiring.gm)})
            scales = [scales_input(wiring.stream, dict.fromkeys(skipped, 0.9))] if skipped else []
            got, wanted = run(executor, captured, *scales), run(result.gm.forward, captured, *scales)
            torch.testing.assert_close(got.outputs, wanted.outputs, rtol=0, atol=0)
            torch.testing.assert_close(got.inputs, wanted.inputs, rtol=0, atol=0)


def test_values_are_forgotten_when_no_later_step_reads_them():
    prefill = shared_captures("llama")[0]
    wiring = run_pipeline(prefill.gm, stream_of(prefill.gm), (OutlineRegions(),))
    streams: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    def watched(region: Region):
        def call(*inputs):
            held.append(sum(reference() is not None for reference in streams))
            outputs = region.gm.forward(*inputs)
            streams.extend(weakref.ref(value) for value in outputs[-1:] if isinstance(value, torch.Tensor))
            return outputs

        return call

    executor = Executor(wiring.gm, {region: watched(region) for region in regions_of(wiring.gm)})
    run(executor, prefill)
    assert max(held) <= 2  # the stream before, and what came before all sublayers
