"""Policies: which sublayers to skip, chosen offline from a profile."""

from __future__ import annotations

from adaskip_compile.profiles import Profile

POLICIES = ("adaskip",)


def most_similar(profile: Profile, count: int) -> frozenset[str]:
    """Return the ``count`` sublayers, of all kinds in one ranking, that change the stream least (AdaSkip section 3.2)."""
    return frozenset(sublayer.path for sublayer in profile.ranking()[:count])


def largest_skip(profile: Profile) -> int:
    """Return how many sublayers of a model can be skipped at most: neither all of them nor its last attention."""
    # The sequence length and the positions are read off an attention's cache, and some sublayer must be left to run.
    ranking = profile.ranking()
    attentions = [place for place, sublayer in enumerate(ranking) if sublayer.kind == "attention"]
    return min(attentions[-1] if attentions else len(ranking), len(ranking) - 1)
