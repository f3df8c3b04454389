"""Measuring generation: time to the first token and for each later one, cache memory.

What is compared is run in turn in one process, so that the machine's moods meet all of it alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adaskip_compile.kv_cache.cache_argument import cache_of


@dataclass(frozen=True)
class Generation:
    """One timed request.

    ``first`` is the time to the first token and ``later`` that of each one after it, in seconds;
    ``cache_bytes`` is what the KV cache really holds at the end.
    """

    tokens: tuple[int, ...]
    first: float
    later: tuple[float, ...]
    cache_bytes: int

    def steady(self, window: int) -> float:
        """Return the median time of the tokens decoded after a window of ``window`` steps, in seconds."""
        return statistics.median(self.later[window + 1 :] or self.later)

    def seconds(self, phase: str) -> float:
        """Return the time of ``phase``: the first token's for prefill, otherwise that of a decode step without a window."""
        return self.first if phase == "prefill" else self.steady(0)


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and the least and greatest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of at least one value."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])

    def format(self, factor: float, digits: int, unit: str) -> str:
        """Return the spread as text, each number times ``factor``."""
        low, mid, high = (f"{value * factor:.{digits}f}" for value in (self.low, self.median, self.high))
        return f"{mid}{unit} ({low} to {high})"


def generate(model: Any, ids: torch.Tensor, new_tokens: int, **how: Any) -> Generation:
    """Generate exactly ``new_tokens`` greedily after ``ids``, shape ``(1, tokens)``, and time each; ``how`` is handed on."""
    clock = _Clock()
    result = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
        return_dict_in_generate=True,
        **how,
    )
    began, first, *rest = clock.ticks
    later = (after - before for before, after in zip([first, *rest], rest, strict=False))
    tokens = result.sequences[0, ids.shape[1] :].tolist()
    return Generation(tuple(tokens), first - began, tuple(later), cache_bytes(cache_of(result)))


def take_turns(ways: Mapping[str, Callable[[], Generation]], rounds: int) -> dict[str, list[Generation]]:
    """Run every way once a round, in turn, and return what each round gave."""
    results: dict[str, list[Generation]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            results[name].append(way())
    return results


def cache_bytes(cache: Any) -> int:
    """Return the bytes of memory that a KV cache holds, room to grow included: storage that layers share counts once."""
    storages: dict[int, int] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class _Clock:
    """A streamer that notes when each token comes; the prompt comes first."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last token has been noted."""
