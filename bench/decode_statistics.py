"""Similarity and scale of every sublayer in each decode step of real requests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from adaskip_compile.profiling import Prober


@torch.no_grad()
def decode_statistics(model: Any, prompts: Iterable[torch.Tensor], steps: int) -> tuple[tuple[str, ...], torch.Tensor]:
    """Return the paths of the sublayers, and what probes on all of them see while ``steps`` tokens are decoded greedily.

    The statistics are ``f64[requests, steps, sublayers, 3]``: similarity, scale by tokens, scale by norms.
    Nothing is skipped, and ``prompts`` are token ids ``(tokens,)``.
    """
    prober = Prober()
    compiled = torch.compile(model._call_impl, backend=prober, dynamic=True)
    requests = []
    for prompt in prompts:
        result = compiled(input_ids=prompt[None], use_cache=True, logits_to_keep=1)
        prober.rows.clear()
        for _ in range(steps):
            chosen = result.logits[:, -1:].argmax(-1)
            result = compiled(input_ids=chosen, past_key_values=result.past_key_values, use_cache=True)
        requests.append(torch.stack(prober.rows).double())
        prober.rows.clear()
    return prober.streams[0].paths, torch.stack(requests)
