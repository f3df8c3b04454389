"""How well do other texts, and the first tokens of a request, predict which sublayers are most similar?

A hit is a sublayer among the k most similar both in what is predicted from and in what is predicted; the rate is
hits / k. The paper's Table 1 predicts one task from another, its Table 2 the rest of a request from its first tokens.

    python -m bench.hit_rates --model smollm2 [--texts NAME=DIR ...]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adaskip_compile.evaluation.domains import mixed_windows
from adaskip_compile.evaluation.scores import Scores
from adaskip_compile.profiling.profiles import Profile
from bench.decode_statistics import decode_statistics
from bench.studies import Study, study_parser

TOPS = (4, 6, 10)
WINDOWS = (5, 20, 40)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the page."""
    parser = study_parser(str(__doc__), samples=10, length=1024, prompts=8, prompt_tokens=512, steps=100)
    arguments = parser.parse_args(argv)
    study = Study("hit_rates", "How well are the most similar sublayers predicted?", arguments)
    profiles = {domain.name: study.profile([domain]) for domain in study.domains}
    held_out = {domain.name: _evaluation_profile(study, domain.name) for domain in study.domains}
    _across_domains(study, profiles, held_out)
    prompts = mixed_windows(study.domains, study.tokenizer, "evaluation", arguments.prompts, arguments.prompt_tokens)
    paths, decoded = decode_statistics(study.model, prompts, arguments.steps)
    kinds = {each.path: each.kind for profile in profiles.values() for each in profile.sublayers}
    ffns = [place for place, path in enumerate(paths) if kinds[path] == "ffn"]
    _within_requests(study, decoded[..., 0], "all sublayers")
    _within_requests(study, decoded[..., ffns, 0], "FFNs alone, which are all that may be added online")
    study.write()
    return 0


def _evaluation_profile(study: Study, name: str) -> Profile:
    import adaskip_compile

    how = study.arguments
    [domain] = [each for each in study.domains if each.name == name]
    windows = domain.windows(study.tokenizer, "evaluation", how.samples, how.length)
    return adaskip_compile.profile(study.model, windows, max_samples=how.samples, progress=False)


def hit_rate(predicted: Sequence[float], real: Sequence[float], top: int) -> float:
    """Return which share of the ``top`` greatest of ``real`` is among the ``top`` greatest of ``predicted``."""
    chosen = [set(sorted(range(len(values)), key=lambda at, of=values: -of[at])[:top]) for values in (predicted, real)]
    return len(chosen[0] & chosen[1]) / top


def _across_domains(study: Study, profiles: dict[str, Profile], held_out: dict[str, Profile]) -> None:
    study.say("## From the texts of one domain to other texts", "")
    study.say("Profiled on one domain, held against other documents of the same domain or of another one.", "")
    rows = []
    for source, profile in profiles.items():
        for target, real in held_out.items():
            ours, theirs = ([each.mean_similarity for each in one.sublayers] for one in (profile, real))
            rows.append((f"{source} to {target}", *(f"{hit_rate(ours, theirs, top):.2f}" for top in TOPS)))
    count = len(next(iter(profiles.values())).sublayers)
    rows.append((f"by chance, of {count}", *(f"{top / count:.2f}" for top in TOPS)))
    study.table(("from, to", *(f"top {top}" for top in TOPS)), rows)


def _within_requests(study: Study, similarity: torch.Tensor, what: str) -> None:
    """Add the table of one set of sublayers; ``similarity`` is ``(requests, steps, sublayers)``."""
    study.say(f"## From the first decoded tokens to the rest of the request: {what}", "")
    rows = []
    for window in WINDOWS:
        first, rest = similarity[:, :window].mean(1).tolist(), similarity[:, window:].mean(1).tolist()
        scores = [Scores(tuple(hit_rate(*pair, top) for pair in zip(first, rest, strict=True))) for top in TOPS]
        rows.append((f"first {window} tokens", *(f"{each.mean:.2f} ± {each.error:.2f}" for each in scores)))
    count = similarity.shape[-1]
    rows.append((f"by chance, of {count}", *(f"{top / count:.2f}" for top in TOPS)))
    study.table(("window", *(f"top {top}" for top in TOPS)), rows)


if __name__ == "__main__":
    raise SystemExit(main())
