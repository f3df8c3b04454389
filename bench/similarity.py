"""How similar is the residual stream before and after every sublayer, in prefill and in decode?

The paper's first finding is that attention changes the stream less than FFNs do. Prefill: windows of text.
Decode: tokens generated greedily after prompts of the same texts, nothing skipped.

    python -m bench.similarity --model smollm2 [--texts NAME=DIR ...]
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from adaskip_compile.evaluation.domains import mixed_windows
from bench.decode_statistics import decode_statistics
from bench.studies import Study, study_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the page."""
    arguments = study_parser(str(__doc__), samples=20, length=1024, prompts=8, prompt_tokens=512, steps=40).parse_args(
        argv
    )
    study = Study("similarity", "How similar is the stream before and after every sublayer?", arguments)
    sublayers = study.profile().sublayers
    prompts = mixed_windows(study.domains, study.tokenizer, "profiling", arguments.prompts, arguments.prompt_tokens)
    paths, decoded = decode_statistics(study.model, prompts, arguments.steps)
    in_decode = dict(zip(paths, decoded[..., 0].mean((0, 1)).tolist(), strict=True))
    rows = [(each.path, each.kind, each.mean_similarity, in_decode[each.path]) for each in sublayers]
    _summary(study, rows)
    _plot(study, rows)
    study.table(
        ("sublayer", "prefill", "decode", "scale in prefill"),
        [
            (f"`{path}`", f"{prefill:.4f}", f"{decode:.4f}", f"{each.mean_scale():.3f}")
            for (path, _, prefill, decode), each in zip(rows, sublayers, strict=True)
        ],
    )
    study.write()
    return 0


def _summary(study: Study, rows: Sequence[tuple[str, str, float, float]]) -> None:
    lines = []
    for place, phase in ((2, "prefill"), (3, "decode")):
        for kind in sorted({row[1] for row in rows}):
            values: list[Any] = [row[place] for row in rows if row[1] == kind]
            middle = statistics.median(values)
            lines.append((f"{kind}, {phase}", f"{middle:.4f}", f"{min(values):.4f}", f"{max(values):.4f}"))
        ranking = sorted(rows, key=lambda row, at=place: -float(row[at]))
        attentions = sum(row[1] == "attention" for row in ranking[:10])
        lines.append((f"attentions among the 10 most similar, {phase}", str(attentions), "", ""))
    study.table(("similarity", "median", "least", "greatest"), lines)


def _plot(study: Study, rows: Sequence[tuple[str, str, float, float]]) -> None:
    def draw(axes: Any) -> None:
        for place, phase, style in ((2, "prefill", "o-"), (3, "decode", "x--")):
            for kind in sorted({row[1] for row in rows}):
                values = [row[place] for row in rows if row[1] == kind]
                axes.plot(range(len(values)), values, style, markersize=4, label=f"{kind}, {phase}")
        axes.legend()

    study.plot(f"Similarity by depth: {study.shown}", "layer", "cosine of the stream before and after", draw)


if __name__ == "__main__":
    raise SystemExit(main())
