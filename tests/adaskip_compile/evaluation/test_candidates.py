from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import adaskip_compile
from adaskip_compile.evaluation.candidates import complete_profile, make_candidates
from adaskip_compile.profiling.profiles import Profile
from adaskip_compile.profiling.stream_maps import StreamMap
from adaskip_passes.errors import OptionError
from adaskip_passes.specialise.stream_maps import part_shapes
from tests.adaskip_compile.profiling.profiling_data import decoder
from tests.models import tiny, tokens


def test_candidates_are_the_full_model_and_each_combination_once():
    found = make_candidates(decoder(8), [4, 0, 2, 4], ["adaskip"], ["scale"], window=7)
    assert [one.name for one in found] == ["full", "adaskip/2/scale", "adaskip/4/scale"]
    assert [len(one.plan.paths) for one in found] == [0, 2, 4]
    assert found[1].plan.window == 7


def with_maps(profile: Profile, *forms: str) -> Profile:
    maps = tuple(
        StreamMap(form, {name: torch.zeros(shape) for name, shape in part_shapes(form, 4, 2).items()}, None)
        for form in forms
    )
    return replace(profile, maps={found.path: maps for found in profile.sublayers})


def test_the_plan_of_a_candidate_has_the_compensation_of_its_name():
    profile = with_maps(decoder(8), "channel", "low_rank")
    names = ["none", "scale", "channel", "low_rank"]
    none, scale, channel, low_rank = make_candidates(profile, [3], ["adaskip"], names)[1:]
    assert set(none.plan.scales.values()) == {1.0}
    assert scale.plan == adaskip_compile.plan(profile, skip=3)
    for one in (channel, low_rank):
        assert {path: found.form for path, found in one.plan.maps.items()} == dict.fromkeys(
            one.plan.paths, one.compensation
        )


def test_maps_of_some_sublayers_alone_are_completed():
    model, samples = tiny("llama"), [tokens(1, 17)]
    profile = adaskip_compile.profile(model, samples, progress=False)
    fitted = adaskip_compile.fit(model, profile, samples, forms=["channel"], progress=False)
    assert 0 < len(fitted.maps) < len(profile.sublayers)
    complete = complete_profile(model, fitted, samples, (), ["channel"], most=0, progress=False)
    assert len(complete.maps) == len(profile.sublayers)
    again = complete_profile(model, complete, samples, (), ["channel"], most=0, progress=False)
    assert again is complete


@pytest.mark.parametrize(("what", "name"), [("policies", "best"), ("compensations", "best")])
def test_a_name_that_there_is_not_is_refused(what: str, name: str):
    names = {"policies": ["adaskip"], "compensations": ["scale"], what: [name]}
    singular = {"policies": "policy", "compensations": "compensation"}[what]
    with pytest.raises(OptionError, match=f"{singular}='best': takes one of "):
        make_candidates(decoder(8), [2], **names)
