"""The demo's results, as tables for people and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from adaskip_compile.cli import plan as planning
from adaskip_compile.cli.comparison import EAGER, FULL, PAPER, Comparison
from adaskip_compile.cli.output import Output, add_row, new_table
from adaskip_compile.evaluation.timing import Spread

if TYPE_CHECKING:
    from rich.table import Table

_MILLI = 1e3
_MEBI = 2**-20


def show(output: Output, found: Comparison, words: dict[str, str]) -> None:
    """Print everything that the demo found."""
    for table in (_times(found), _qualities(found), _sublayers(found)):
        output.show(table)
        output.say()
    for way, text in words.items():
        output.say(f"{way}: {' '.join(text.split())}")
    output.say(f"\n{verdict(found)}")


def verdict(found: Comparison) -> str:
    """Return in a sentence or two what is gained for nothing, and what the first budget buys."""
    same = found.generations[FULL][-1].tokens == found.generations[EAGER][-1].tokens
    in_full = _against_eager(found, FULL)
    text = (
        f"In short: compiled in full, with {'the same' if same else 'other'} text, the first token comes "
        f"{in_full['first_token'].median:.2f} times as fast as in eager mode, and each further one {in_full['token'].median:.2f} times."
    )
    budget = next((way for way in found.qualities if way != PAPER), None)
    if budget is None or not found.plans[budget].prompt.named_paths:
        return text
    first = _against_eager(found, budget)["first_token"].median
    return (
        f"{text} Skipping in the prompt, {budget.partition(', ')[2]}, makes the first {first:.2f} times as fast, and was "
        f"measured to change perplexity by {found.qualities[budget].perplexity}."
    )


def as_json(found: Comparison, words: dict[str, str]) -> dict[str, Any]:
    """Return everything that the demo found, as JSON holds it; times are seconds."""
    ways = {
        way: {
            "plan": planning.describe(found.plans[way]) if way in found.plans else None,
            "first_token": asdict(Spread.of(run.first for run in runs)),
            "token": asdict(Spread.of(run.steady(_window(found)) for run in runs)),
            "against_eager": {phase: asdict(spread) for phase, spread in _against_eager(found, way).items()},
            "cache_bytes": runs[-1].cache_bytes,
            "quality": asdict(found.qualities[way]) if way in found.qualities else None,
            "tokens": list(runs[-1].tokens),
            "text": words[way],
        }
        for way, runs in found.generations.items()
    }
    return {"prompt_tokens": found.prompt_tokens, "extra": dict(found.extra), "ways": ways}


def _window(found: Comparison) -> int:
    window: int = found.plans[PAPER].window
    return window


def _times(found: Comparison) -> Table:
    title = "Speed: median (least to greatest); above 1x is faster than eager, each round compared with itself"
    table = new_table(title, "", "first token", "against eager", "each further token", "against eager")
    for way, runs in found.generations.items():
        first = Spread.of(run.first for run in runs).format(1, 2, " s")
        token = Spread.of(run.steady(_window(found)) for run in runs).format(_MILLI, 1, " ms")
        ratios = {phase: spread.format(1, 2, "x") for phase, spread in _against_eager(found, way).items()}
        add_row(table, way, first, ratios["first_token"], token, ratios["token"])
    return table


def _against_eager(found: Comparison, way: str) -> dict[str, Spread]:
    rounds = list(zip(found.generations[EAGER], found.generations[way], strict=True))
    window = _window(found)
    return {
        "first_token": Spread.of(before.first / after.first for before, after in rounds),
        "token": Spread.of(before.steady(window) / after.steady(window) for before, after in rounds),
    }


def _qualities(found: Comparison) -> Table:
    table = new_table("Memory and quality", "", "KV cache", "perplexity", "facts found in a prompt")
    for way, runs in found.generations.items():
        held = f"{runs[-1].cache_bytes * _MEBI:.1f} MiB"
        quality = found.qualities.get(way)
        said = ("as it is", "as it is") if quality is None else (quality.perplexity, quality.retrieval)
        add_row(table, way, held, *said)
    return table


def _sublayers(found: Comparison) -> Table:
    table = new_table("Skipped", "", "attentions", "FFNs", "windows", "where")
    for way, plan in found.plans.items():
        in_prompt = plan.prompt is not None
        skipped = plan.prompt.skipped if in_prompt else plan.skipped
        ffns = sum(sublayer.kind == "ffn" for sublayer in skipped)
        where = "in the prompt; keys and values are kept" if in_prompt else "throughout; no keys and values"
        added = f" + {len(found.extra)}" if way == PAPER and found.extra else ""
        windows = len(plan.prompt.windows) if plan.prompt is not None else 0
        add_row(table, way, len(skipped) - ffns, f"{ffns}{added}", windows, where)
    table.caption = (
        "'adaskip plan' tells which, and what else was tried. With a window an attention sees what lies close by."
    )
    return table
