"""What people see of values: short text, and the same text in a notebook."""

from __future__ import annotations

import html

import adaskip_compile
from adaskip_compile import Profile, SkipPlan
from adaskip_compile.display.notebook_text import ShownAsText
from tests.golden_files import GOLDEN
from tests.models import tiny


def test_text_is_a_summary_and_never_the_weights() -> None:
    profile = Profile.load(GOLDEN / "files" / "profile.json")
    plan = adaskip_compile.plan(profile, skip=1)
    assert profile.model is not None
    assert profile.model.weights is not None
    for one in (profile, plan):
        assert profile.model.weights not in f"{one} {one!r}"
        assert len(str(one)) < 2000
    best = profile.ranking()[0]
    assert best.path in str(profile).splitlines()[2]
    assert f"{best.mean_similarity:.4f}" in str(profile)
    assert str(plan) == plan.describe()
    assert str(SkipPlan.none()) == "skips nothing"


def test_a_notebook_shows_the_text_in_lines() -> None:
    shown = (SkipPlan.none(), Profile.load(GOLDEN / "files" / "profile.json"), adaskip_compile.report(tiny("llama")))
    for one in shown:
        assert isinstance(one, ShownAsText)
        assert one._repr_html_() == f"<pre>{html.escape(str(one))}</pre>"
