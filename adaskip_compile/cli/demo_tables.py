"""The demo's results, as tables for people and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from adaskip_compile.cli import plan as planning
from adaskip_compile.cli.comparison import EAGER, FULL, SKIPPING, Comparison
from adaskip_compile.cli.measure import Spread
from adaskip_compile.cli.output import Output, add_row, new_table

if TYPE_CHECKING:
    from rich.table import Table

_MILLI = 1e3
_MEBI = 2**-20


def show(output: Output, found: Comparison, words: dict[str, str]) -> None:
    """Print everything that the demo found."""
    for table in (_times(found), _ratios(found), _costs(found), _sublayers(found)):
        output.show(table)
        output.say()
    for way, text in words.items():
        output.say(f"{way}: {' '.join(text.split())}")


def as_json(found: Comparison, words: dict[str, str]) -> dict[str, Any]:
    """Return everything that the demo found, as JSON holds it; times are seconds."""
    window = found.plan.window
    ways = {
        way: {
            "first_token": asdict(Spread.of(run.first for run in runs)),
            "token": asdict(Spread.of(run.steady(window) for run in runs)),
            "cache_bytes": runs[-1].cache_bytes,
            "nll": found.nll.get(way),
            "tokens": list(runs[-1].tokens),
            "text": words[way],
        }
        for way, runs in found.generations.items()
    }
    ratios = {
        name: {"first_token": asdict(prefill), "token": asdict(token)}
        for name, (prefill, token) in _speedups(found).items()
    }
    extra = dict(found.extra)
    return {
        "prompt_tokens": found.prompt_tokens,
        "plan": planning.describe(found.plan),
        "extra": extra,
        "ways": ways,
        "ratios": ratios,
    }


def _times(found: Comparison) -> Table:
    table = new_table("Time: median (least to greatest)", "", "first token", "each token after the window")
    for way, runs in found.generations.items():
        first = Spread.of(run.first for run in runs).format(1, 2, " s")
        token = Spread.of(run.steady(found.plan.window) for run in runs).format(_MILLI, 1, " ms")
        add_row(table, way, first, token)
    return table


def _ratios(found: Comparison) -> Table:
    table = new_table("Speed-up: above 1 is faster, each round compared with itself", "", "prefill", "decode")
    for name, spreads in _speedups(found).items():
        add_row(table, name, *(spread.format(1, 2, "x") for spread in spreads))
    return table


def _speedups(found: Comparison) -> dict[str, tuple[Spread, Spread]]:
    pairs = {
        "skipping against full": (FULL, SKIPPING),
        "skipping against eager": (EAGER, SKIPPING),
        "full against eager": (EAGER, FULL),
    }
    window = found.plan.window
    speedups = {}
    for name, (slow, fast) in pairs.items():
        rounds = list(zip(found.generations[slow], found.generations[fast], strict=True))
        prefill = Spread.of(before.first / after.first for before, after in rounds)
        decode = Spread.of(before.steady(window) / after.steady(window) for before, after in rounds)
        speedups[name] = (prefill, decode)
    return speedups


def _costs(found: Comparison) -> Table:
    table = new_table("Memory and quality", "", "KV cache", "mean NLL on held-out text (nats a token)")
    for way in (FULL, SKIPPING):
        held = found.generations[way][-1].cache_bytes
        add_row(table, way, f"{held * _MEBI:.1f} MiB", f"{found.nll[way]:.3f}")
    return table


def _sublayers(found: Comparison) -> Table:
    table = new_table("Skipped sublayers", "sublayer", "kind", "scale", "similarity", "since")
    for sublayer in found.plan.skipped:
        similarity = "-" if sublayer.similarity is None else f"{sublayer.similarity:.4f}"
        add_row(table, sublayer.path, sublayer.kind, f"{sublayer.scale:.4f}", similarity, "prefill")
    for path, scale in found.extra.items():
        add_row(table, path, "ffn", f"{scale:.4f}", "-", "window")
    if not found.extra:
        beta = found.plan.beta
        table.caption = "No FFN reached beta in the window" + ("." if beta is None else f" ({beta:.4f}).")
    return table
