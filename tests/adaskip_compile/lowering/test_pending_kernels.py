"""The C++ compiler works on kernels while lowering goes on; a call waits for those that it needs."""

from __future__ import annotations

import torch

from adaskip_compile.lowering.lowering import Lowering
from adaskip_passes.pipeline.derived_graph import DerivedGraph
from tests.captures import first_graph


def test_kernels_are_waited_for_when_they_are_called():
    def compute(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x.sin() * 1.25, -1)

    x = torch.randn(5, 23)
    with torch._inductor.config.patch(compile_threads=2, force_disable_caches=True):
        gm = first_graph(compute, x)
        lowering = Lowering("inductor", "whole")
        run = lowering.lower(DerivedGraph(gm))
        assert lowering.waited == 0
        results = [run(x)[0] for _ in range(2)]
        waited = lowering.waited
        assert waited > 0
        run(x)
        assert lowering.waited == waited
        for result in results:
            torch.testing.assert_close(result, compute(x))
