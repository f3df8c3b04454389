from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from adaskip_compile import SkipPlan
from adaskip_compile.evaluation.candidates import FULL, Candidate
from adaskip_compile.evaluation.sweep_results import SweepResults
from adaskip_compile.evaluation.timing import Spread
from adaskip_compile.evaluation.tradeoff import as_csv, as_good, make_rows, recommend
from adaskip_passes.errors import PlanError

CANDIDATES = (
    Candidate("", 0, "", SkipPlan.none()),
    *(Candidate("adaskip", skip, "scale", SkipPlan.from_scales({"layer": 0.9})) for skip in (4, 8)),
)


@pytest.fixture
def results(tmp_path: Path) -> SweepResults:
    """Return results in which 4 skipped lose 0.1 and are 1.25 times as fast, and 8 lose 0.4 and are twice as fast."""
    found = SweepResults(tmp_path / "sweep.json", {"model": "tiny"})
    for name, nlls in ((FULL, (2.0, 4.0)), ("adaskip/4/scale", (2.2, 4.0)), ("adaskip/8/scale", (2.1, 4.7))):
        for domain, nll in zip(("sea", "city"), nlls, strict=True):
            found.add_quality(name, f"nll/{domain}", (nll - 0.5, nll + 0.5))
        found.cache_bytes[name] = 1000
    # The machine slows down from round to round; a ratio is taken within one.
    for factor in (1.0, 2.0, 3.0):
        times = {FULL: (1.0, 9.0, 0.1), "adaskip/4/scale": (0.8, 7.2, 0.08), "adaskip/8/scale": (0.5, 4.5, 0.04)}
        found.add_round({name: (factor * a, factor * b, factor * c) for name, (a, b, c) in times.items()})
    return found


def test_losses_and_speed_ups_are_against_the_full_model(results: SweepResults):
    full, four, eight = make_rows(CANDIDATES, results)
    assert (full.loss, full.request.median) == (0, 1)
    assert four.loss == pytest.approx(0.1)
    assert eight.loss == pytest.approx(0.4)
    assert (four.request.low, four.request.high) == pytest.approx((1.25, 1.25))
    assert (eight.prefill.median, eight.decode.median) == pytest.approx((2, 2.5))
    assert four.measures["nll/sea"].mean == pytest.approx(2.2)
    assert four.measures["nll/sea"].error == pytest.approx(0.5)


def test_a_measure_that_only_some_plans_have_is_left_out(results: SweepResults):
    results.add_quality(FULL, "rouge", (1.0,))  # an earlier run measured more, of fewer plans
    for row in make_rows(CANDIDATES, results):
        assert list(row.measures) == ["nll/sea", "nll/city"]
    assert list(make_rows(CANDIDATES[:1], results)[0].measures)[-1] == "rouge"


def test_the_csv_has_a_line_a_plan(results: SweepResults):
    lines = list(csv.DictReader(io.StringIO(as_csv(make_rows(CANDIDATES, results)))))
    assert [(line["policy"], line["skipped"]) for line in lines] == [("full", "0"), ("adaskip", "4"), ("adaskip", "8")]
    assert float(lines[1]["nll_loss"]) == pytest.approx(0.1)
    assert float(lines[2]["request_speedup_high"]) == pytest.approx(2)
    assert float(lines[2]["nll/city"]) == pytest.approx(4.7)


def test_the_recommended_plan_is_the_best_that_reaches_the_goal(results: SweepResults):
    rows = make_rows(CANDIDATES, results)
    assert recommend(rows, max_loss=0.2).candidate.skip == 4
    assert recommend(rows, max_loss=1.0).candidate.skip == 8
    assert recommend(rows, speedup=1.2).candidate.skip == 4
    assert recommend(rows, speedup=1.3).candidate.skip == 8


def test_plans_that_noise_does_not_tell_apart_are_named(results: SweepResults):
    full, four, eight = make_rows(CANDIDATES, results)
    close = replace(eight, request=Spread(1.28, 1.2, 1.3))
    rows = [full, four, close]
    best = recommend(rows, max_loss=1.0)
    assert best is close
    assert as_good(rows, best, max_loss=1.0) == [four]
    assert as_good(rows, best, max_loss=0.05) == []
    far = replace(eight, request=Spread(2.0, 1.9, 2.1))
    assert as_good([full, four, far], far, max_loss=1.0) == []
    # By loss, each with a standard error of 0.35: 0.4 is not told from 0.1, and 0.5 is.
    assert as_good([full, four, far], four) == [far]
    assert as_good([full, four, replace(far, loss=0.5)], four) == []


def test_what_no_plan_reaches_is_refused_with_what_can_be(results: SweepResults):
    rows = make_rows(CANDIDATES, results)
    with pytest.raises(PlanError, match=r"adaskip/4/scale loses least, 0\.100"):
        recommend(rows, max_loss=0.05)
    with pytest.raises(PlanError, match=r"adaskip/8/scale is fastest, 2\.00x"):
        recommend(rows, speedup=3)
    with pytest.raises(PlanError, match="there is no plan to recommend"):
        recommend(rows[:1], speedup=1)
