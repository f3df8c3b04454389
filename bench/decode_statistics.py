"""Similarity and scale of every sublayer in each decode step of real requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from adaskip_compile.kv_cache.cache_argument import cache_argument, cache_of
from adaskip_passes.ir.module_paths import naming
from adaskip_passes.pipeline.pipeline import run_pipeline
from adaskip_passes.pipelines import STRAIGHTEN
from adaskip_passes.specialise.insert_probes import InsertProbes
from adaskip_passes.stream.stream import NO_STREAM


@torch.no_grad()
def decode_statistics(model: Any, prompts: Iterable[torch.Tensor], steps: int) -> tuple[tuple[str, ...], torch.Tensor]:
    """Return the paths of the sublayers, and what probes on all of them see while ``steps`` tokens are decoded greedily.

    The statistics are ``f64[requests, steps, sublayers, 3]``: similarity, scale by tokens, scale by norms.
    Nothing is skipped, and ``prompts`` are token ids ``(tokens,)``.
    """
    paths: list[tuple[str, ...]] = []
    rows: list[torch.Tensor] = []

    def probe(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        straight = run_pipeline(gm, NO_STREAM, STRAIGHTEN)
        stream = straight.stream
        paths.append(stream.paths)
        probed = run_pipeline(straight.gm, stream, (InsertProbes(stream.paths),)).gm

        def run(*values: Any) -> Any:
            *outputs, found = probed.forward(*values)
            rows.append(found)
            return tuple(outputs)

        return run

    compiled = torch.compile(model._call_impl, backend=naming(model, probe), dynamic=True)
    requests = []
    for prompt in prompts:
        result = compiled(input_ids=prompt[None].to(model.device), use_cache=True, logits_to_keep=1)
        rows.clear()  # what prefill saw
        for _ in range(steps):
            chosen = result.logits[:, -1:].argmax(-1)
            result = compiled(input_ids=chosen, use_cache=True, **cache_argument(model, cache_of(result)))
        requests.append(torch.stack(rows).double())
    return paths[0], torch.stack(requests)
