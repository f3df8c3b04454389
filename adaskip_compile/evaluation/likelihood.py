"""Mean negative log-likelihood: how well a model predicts text, in prefill and in decode.

In prefill a window is one forward over all its tokens, so every token is predicted with the plan's prefill set
skipped. In decode a window's first part is the prompt and the rest is fed token by token, as if the model had
generated it: that is what measures a skip set that the window of decoded tokens has added to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import functional

from adaskip_compile.kv_cache.cache_argument import cache_argument, cache_of

# Positions whose logits are turned into float32 losses at a time: bounds memory at large vocabularies.
_LOSS_CHUNK = 256


@torch.no_grad()
def window_nlls(model: Any, windows: Iterable[torch.Tensor], *, batch: int = 1) -> tuple[float, ...]:
    """Return the mean negative log-likelihood, nats a token, of each window of token ids ``(tokens,)``.

    Up to ``batch`` windows of one length that follow each other are one forward of so many rows; logits of
    ``batch * tokens * vocabulary`` elements are then held at once.
    """
    found: list[float] = []
    for rows in _batches(windows, batch):
        ids = torch.stack(rows).to(model.device)
        logits = model(input_ids=ids).logits
        found.extend(_mean_loss(row[:-1], targets[1:]) for row, targets in zip(logits, ids, strict=True))
    return tuple(found)


def mean_nll(model: Any, windows: Iterable[torch.Tensor]) -> float:
    """Return the mean negative log-likelihood, nats a token, over all tokens of ``windows``."""
    kept = list(windows)
    weights = [len(window) - 1 for window in kept]
    losses = window_nlls(model, kept)
    return math.fsum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)


@torch.no_grad()
def decoded_nlls(
    model: Any,
    windows: Iterable[torch.Tensor],
    *,
    decoded: int,
    after_prefill: Callable[[Any], None] | None = None,
) -> tuple[float, ...]:
    """Return the mean negative log-likelihood, nats a token, of the last ``decoded`` tokens of each window.

    Each of them is predicted in a decode step, all before them in one prefill: a window is one request.
    ``after_prefill`` is given the cache that a prefill filled, and may change what it holds in place.
    """
    found: list[float] = []
    for window in windows:
        ids = window.to(model.device)[None]
        prompt = ids.shape[1] - decoded - 1
        past = cache_of(model(input_ids=ids[:, :prompt], use_cache=True, logits_to_keep=1))
        if after_prefill is not None:
            after_prefill(past)
        rows = []
        for step in range(prompt, ids.shape[1] - 1):
            result = model(input_ids=ids[:, step : step + 1], use_cache=True, **cache_argument(model, past))
            past = cache_of(result)
            rows.append(result.logits[0, -1])
        found.append(_mean_loss(torch.stack(rows), ids[0, -decoded:]))
    return tuple(found)


def _batches(windows: Iterable[torch.Tensor], batch: int) -> Iterable[list[torch.Tensor]]:
    rows: list[torch.Tensor] = []
    for window in windows:
        if rows and (len(rows) == batch or len(window) != len(rows[0])):
            yield rows
            rows = []
        rows.append(window)
    if rows:
        yield rows


def _mean_loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the mean cross entropy of ``targets``, ``(tokens,)``, under ``logits``, ``(tokens, vocabulary)``."""
    total = 0.0
    for start in range(0, len(logits), _LOSS_CHUNK):
        part, wanted = logits[start : start + _LOSS_CHUNK], targets[start : start + _LOSS_CHUNK]
        total += float(functional.cross_entropy(part.float(), wanted, reduction="sum"))
    return total / len(logits)
