from __future__ import annotations

import pytest

from adaskip_compile.evaluation.candidates import make_candidates, make_plan
from adaskip_passes.errors import OptionError
from tests.adaskip_compile.profiling_data import decoder


def test_candidates_are_the_full_model_and_each_combination_once():
    found = make_candidates(decoder(8), [4, 0, 2, 4], ["adaskip"], ["scale"], window=7)
    assert [one.name for one in found] == ["full", "adaskip/2/scale", "adaskip/4/scale"]
    assert [len(one.plan.paths) for one in found] == [0, 2, 4]
    assert found[1].plan.window == 7


@pytest.mark.parametrize(("what", "name"), [("policy", "best"), ("compensation", "best")])
def test_a_name_that_there_is_not_is_refused(what: str, name: str):
    with pytest.raises(OptionError, match=f"{what}='best': takes one of "):
        make_plan(decoder(8), skip=2, **{what: name})
