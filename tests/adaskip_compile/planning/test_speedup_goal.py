"""Plans for a goal: they reach it by their own times, at the least damage, or say what can be reached."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import sympy
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from adaskip_compile.costs.model_costs import CostedSublayer, Group, ModelCosts
from adaskip_compile.costs.timers import Measured, Roofline
from adaskip_compile.planning.knapsack import Option, cover
from adaskip_compile.planning.planner import plan
from adaskip_compile.planning.policies import keeps_enough
from adaskip_compile.planning.policy_names import POLICIES
from adaskip_compile.planning.predicted_times import predict_times
from adaskip_compile.planning.replacement_costs import replacement_cost
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.planning.speedup_goal import Choice, reach_speedup
from adaskip_compile.profiling.profiles import JointStep, LayerProfile, Profile
from adaskip_passes.analysis.cost import Cost, Q, T
from adaskip_passes.errors import OptionError
from tests.adaskip_compile.profiling.profiling_data import TINY, measured

LAYERS = 8
PATHS = [f"model.layers.{layer}.{part}" for layer in range(LAYERS) for part in ("self_attn", "mlp")]
ATTENTIONS = tuple(path for path in PATHS if path.endswith("self_attn"))
FFNS = tuple(path for path in PATHS if path.endswith("mlp"))


def profile(similarities: list[float]) -> Profile:
    sublayers = tuple(measured(path, value) for path, value in zip(PATHS, similarities, strict=True))
    layers = tuple(
        LayerProfile((a, f), (0.5 + 0.01 * i,)) for i, (a, f) in enumerate(zip(ATTENTIONS, FFNS, strict=True))
    )
    return Profile(TINY, sublayers, layers)


SIMILAR = profile([0.99, 0.2, 0.985, 0.96, 0.98, 0.97, 0.975, 0.955, 0.97, 0.95, 0.965, 0.945, 0.96, 0.94, 0.955, 0.5])


def times(attention: tuple[float, float], ffn: tuple[float, float], rest: tuple[float, float]) -> Measured:
    """Return times in seconds of a prefill of 1000 tokens and of one decoded token after them."""
    columns = [tuple((group[phase] / (1000, 1)[phase],) for group in (attention, ffn, rest)) for phase in (0, 1)]
    return Measured((1000,), {"prefill": columns[0], "decode": columns[1]}, "by hand", (ATTENTIONS, FFNS))


# In prefill an attention takes 3 times as long as in decode, of what an FFN takes.
TIMES = times((0.06, 0.002), (0.04, 0.004), (0.2, 0.012))  # 1 s and 0.06 s in all


def choice_of(found: SkipPlan) -> Choice:
    return Choice(frozenset(found.paths), found.paths_at(math.inf))


def damage(given_profile: Profile, choice: Choice) -> float:
    similarity = {one.path: one.mean_similarity for one in given_profile.sublayers}
    return sum((1 - similarity[path]) / 2 for phase in (choice.prefill, choice.decode) for path in phase)


# Each plan takes some milliseconds, and the first one imports PyTorch.
FEW = settings(max_examples=25, deadline=None)
SECONDS = st.floats(0.001, 0.1)
PAIRS = st.tuples(SECONDS, SECONDS)
SIMILARITIES = st.lists(st.floats(0.0, 0.999), min_size=len(PATHS), max_size=len(PATHS)).map(profile)


@FEW
@given(SIMILARITIES, st.builds(times, PAIRS, PAIRS, PAIRS), st.floats(1.0, 2.0))
def test_the_goal_is_reached_by_its_own_times_or_refused(given_profile: Profile, timer: Measured, goal: float) -> None:
    predicted = predict_times(given_profile, 1000, timer)
    most = {
        phase: max(predicted.speedup(phase, [path for path in PATHS if path != kept]) for kept in ATTENTIONS)
        for phase in ("prefill", "decode")
    }
    try:
        found = plan(given_profile, speedup=goal, context=1000, times=timer)
    except OptionError:
        assert min(most.values()) < goal
        return
    choice = choice_of(found)
    assert predicted.speedup("prefill", choice.prefill) >= goal * (1 - 1e-6)
    assert predicted.speedup("decode", choice.decode) >= goal * (1 - 1e-6)
    assert choice.prefill & {*ATTENTIONS} <= choice.decode
    assert keeps_enough(given_profile, tuple(choice.decode))
    assert (found.beta, found.window) == (None, 0)


@FEW
@given(SIMILARITIES, st.builds(times, PAIRS, PAIRS, PAIRS), st.floats(1.0, 2.0), st.floats(0.0, 0.5))
def test_a_greater_goal_is_never_less_damage(given_profile: Profile, timer: Measured, goal: float, more: float) -> None:
    try:
        less, greater = (reach_speedup(given_profile, speedup, 1000, times=timer) for speedup in (goal, goal + more))
    except OptionError:
        assume(False)
    assert damage(given_profile, less) <= damage(given_profile, greater) + 1e-9


WEIGHTS = st.integers(0, 16).map(lambda number: number / 64)
ITEMS = st.lists(
    st.lists(st.builds(Option, st.floats(0.1, 9.0), st.tuples(WEIGHTS, WEIGHTS)), min_size=1, max_size=3),
    min_size=1,
    max_size=5,
).map(lambda items: [[Option(0.0, (0.0, 0.0)), *item] for item in items])


@settings(deadline=None)
@given(ITEMS, st.tuples(WEIGHTS, WEIGHTS))
def test_the_knapsack_is_the_cheapest_of_all(items: list[list[Option]], need: tuple[float, float]) -> None:
    """Against trying them all; multiples of 1/64 are far apart beside the solver's tolerance."""
    found = cover(items, need)
    covering = [
        sum(option.cost for option in options)
        for options in itertools.product(*items)
        if all(sum(option.weights[side] for option in options) >= need[side] for side in (0, 1))
    ]
    if found is None:
        assert not covering
        return
    taken = [item[number] for item, number in zip(items, found, strict=True)]
    assert all(sum(option.weights[side] for option in taken) >= need[side] for side in (0, 1))
    assert sum(option.cost for option in taken) == pytest.approx(min(covering))


def test_no_more_is_taken_than_reaches_it() -> None:
    """Ten weigh 0.201: an eleventh is not taken for want of the last thousandth, nor a tenth left out."""
    alike = [[Option(0.0, (0.0, 0.0)), Option(1.0 + 0.01 * number, (0.0201, 0.0201))] for number in range(30)]
    assert cover(alike, (0.2009, 0.2009)) == (1,) * 10 + (0,) * 20
    assert cover(alike, (0.2011, 0.2009)) == (1,) * 11 + (0,) * 19


def test_by_hand() -> None:
    """1.25 times as fast: 0.2 s of prefill, 12 ms of decode.

    Prefill: 4 attentions save 0.24 s (the four most similar ones). In decode they save 8 ms, and one FFN or two more
    attentions the other 4: the FFN of 0.97 loses 0.03, attentions 0.03 and 0.035. Skipping that FFN in prefill instead
    of an attention there does not pay: 3 attentions and an FFN save 0.22 s, at 0.015 + 0.01 + 0.02 + 0.03.
    """
    found = plan(SIMILAR, speedup=1.25, context=1000, times=TIMES)
    assert found.paths == ATTENTIONS[:4]
    [step] = found.ramp
    assert (step.after, step.resumed) == (0, ())
    assert [one.path for one in step.skipped] == ["model.layers.2.mlp"]
    assert found.skipped[0].scale == SIMILAR.sublayers[0].mean_scale("token")


def test_one_phase() -> None:
    decode = plan(SIMILAR, speedup=1.25, context=1000, times=TIMES, phase="decode")
    assert decode.paths == ()
    predicted = predict_times(SIMILAR, 1000, TIMES)
    assert predicted.speedup("decode", decode.paths_at(0)) >= 1.25
    prefill = plan(SIMILAR, speedup=1.25, context=1000, times=TIMES, phase="prefill")
    assert predicted.speedup("prefill", prefill.paths) >= 1.25
    assert prefill.paths_at(math.inf) <= {*ATTENTIONS}


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "loss_greedy"])
def test_what_is_out_of_reach_says_what_is_not(policy: str) -> None:
    with pytest.raises(OptionError) as caught:
        plan(SIMILAR, speedup=9.0, context=1000, times=TIMES, policy=policy)
    told = re.fullmatch(
        r"speedup=9 at context=1000 is out of reach: by predicted times, policy '\w+' gets to ([\d.]+) in prefill and "
        r"([\d.]+) in decode at most",
        str(caught.value),
    )
    assert told is not None
    most = min(map(float, told.groups()))
    found = plan(SIMILAR, speedup=most, context=1000, times=TIMES, policy=policy)
    predicted = predict_times(SIMILAR, 1000, TIMES)
    for phase, skipped in (("prefill", {*found.paths}), ("decode", found.paths_at(math.inf))):
        assert predicted.speedup(phase, skipped) >= most - 1e-9


def test_of_the_other_policies_it_is_the_smallest_number() -> None:
    """Two whole layers save 0.2 s of prefill and 12 ms of decode, one saves half."""
    for policy, layers in (("early_exit", (6, 7)), ("skip_decode", (1, 2)), ("unified", (3, 7)), ("shortgpt", (6, 7))):
        found = plan(SIMILAR, speedup=1.25, context=1000, times=TIMES, policy=policy)
        assert found.paths == tuple(path for path in PATHS if int(path.split(".")[2]) in layers)
        assert found.ramp == ()
    assert plan(SIMILAR, speedup=1.25, context=1000, times=TIMES, policy="attention_only").paths == ATTENTIONS[:6]


def test_damage_by_the_joint_order() -> None:
    """What each sublayer adds to the loss counts, and sublayers beyond the order are never skipped."""
    order = [*FFNS[:4], *ATTENTIONS[:4]]
    steps = tuple(JointStep(path, "scale", 0.1 * place) for place, path in enumerate(order, 1))
    given_profile = replace(SIMILAR, joint_order=steps)
    found = plan(given_profile, speedup=1.25, context=1000, times=TIMES, policy="loss_greedy")
    assert {*found.paths, *found.paths_at(0)} <= {*order}
    assert found.paths != plan(SIMILAR, speedup=1.25, context=1000, times=TIMES).paths


COSTS = ModelCosts(
    tuple(CostedSublayer(path, index % 2) for index, path in enumerate(PATHS)),
    (
        Group(0, "attention", LAYERS, {"prefill": Cost(flops=Q**2), "decode": Cost(flops=9 * T)}),
        Group(1, "ffn", LAYERS, {"prefill": Cost(flops=600 * Q), "decode": Cost(flops=sympy.Integer(9000))}),
    ),
    {"prefill": Cost(flops=100 * Q), "decode": Cost(flops=sympy.Integer(1000))},
    width=64,
    element_bytes=4,
    device="cpu",
)


def test_by_the_costs_in_a_profile() -> None:
    """At 1,000 tokens an attention costs more than an FFN in prefill and as much in decode, at 100 tokens less in both."""
    given_profile = replace(profile([0.9] * len(PATHS)), costs=COSTS)
    timer = Roofline(1e9, 1e9)
    long, short = (plan(given_profile, speedup=1.3, context=context, times=timer) for context in (1000, 100))
    assert {one.kind for one in long.skipped} == {"attention"}
    assert {one.kind for one in short.skipped} == {"ffn"}
    with pytest.raises(OptionError, match=r"needs to know what the sublayers cost, and this profile does not say"):
        plan(SIMILAR, speedup=1.2, context=1000)


def test_what_others_read_the_values_of_stays() -> None:
    shared = CostedSublayer(PATHS[0], 0, ("model.layers.5.self_attn",))
    given_profile = replace(SIMILAR, costs=replace(COSTS, sublayers=(shared, *COSTS.sublayers[1:])))
    found = plan(given_profile, speedup=1.25, context=1000, times=TIMES)
    assert PATHS[0] in plan(SIMILAR, speedup=1.25, context=1000, times=TIMES).paths
    assert PATHS[0] not in found.all_paths


@pytest.mark.parametrize("timer", [Roofline(1e9, 1e9), TIMES])
def test_a_replacement_dearer_than_the_sublayer_is_never_chosen(timer: Roofline | Measured) -> None:
    given_profile = replace(SIMILAR, costs=COSTS)
    without = reach_speedup(given_profile, 1.2, 1000, times=timer)
    scales = {one: replacement_cost("scale", 64) for one in PATHS}
    dear = Cost(flops=10_000 * Q, weight_bytes=sympy.Integer(10**9))
    path = next(iter(sorted(without.prefill)))
    found = reach_speedup(given_profile, 1.2, 1000, times=timer, replacements=scales | {path: dear})
    assert path in without.prefill
    assert path not in found.prefill | found.decode
    free = reach_speedup(given_profile, 1.2, 1000, times=timer, replacements=scales)
    assert free == without


def test_replacements_take_time_off_what_is_saved() -> None:
    given_profile = replace(SIMILAR, costs=COSTS)
    timer = Roofline(1e9, 1e9)
    plain = predict_times(given_profile, 1000, timer).saved["prefill"][PATHS[1]]
    cost = replacement_cost("affine", 8)
    less = predict_times(given_profile, 1000, timer, {PATHS[1]: cost}).saved["prefill"][PATHS[1]]
    assert plain - less == pytest.approx(2 * 64 * 1000 / 1e9)
    with pytest.raises(OptionError, match=r"^compensation='best': takes one of none, scale, channel, low_rank, affine"):
        replacement_cost("best", 8)


def test_times_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="measured on another model"):
        plan(SIMILAR, speedup=1.2, context=1000, times=replace(TIMES, groups=(("a",), ("b",))))
    with pytest.raises(OptionError, match="do not say of which sublayers they are"):
        plan(SIMILAR, speedup=1.2, context=1000, times=replace(TIMES, groups=()))
    TIMES.save(tmp_path / "times.json")
    by_file = plan(SIMILAR, speedup=1.25, context=1000, times=tmp_path / "times.json")
    assert by_file == plan(SIMILAR, speedup=1.25, context=1000, times=TIMES)
