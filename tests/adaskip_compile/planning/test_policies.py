"""Each policy against a choice made by hand, and what keeps a model from running at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaskip_compile.options import Options
from adaskip_compile.planning.planner import plan
from adaskip_compile.planning.policies import (
    LAYER_POLICIES,
    SUBLAYER_POLICIES,
    keeps_enough,
    largest_skip,
    least_influence,
)
from adaskip_compile.planning.policy_names import POLICIES
from adaskip_compile.planning.skip_plan import RampStep, SkipPlan
from adaskip_compile.profiling.layers import find_layers
from adaskip_compile.profiling.profiles import JointStep, LayerProfile, Profile
from adaskip_compile.runtime.learning import Learner
from adaskip_passes.errors import OptionError
from tests.adaskip_compile.profiling.profiling_data import TINY, decoder, measured

# Six layers. Attentions: 0.90, 0.95, 0.80, 0.97, 0.93, 0.85; FFNs: 0.10, 0.91, 0.94, 0.70, 0.96, 0.60.
ATTENTION = (0.90, 0.95, 0.80, 0.97, 0.93, 0.85)
FFN = (0.10, 0.91, 0.94, 0.70, 0.96, 0.60)
# Whole layers: not what a sum or a product of the parts would say.
LAYERS = (0.05, 0.70, 0.99, 0.90, 0.60, 0.50)


def profile(names: str = "model.layers.{}.", joint: tuple[JointStep, ...] = ()) -> Profile:
    sublayers = [
        measured(f"{names.format(index)}{part}", similarity)
        for index, pair in enumerate(zip(ATTENTION, FFN, strict=True))
        for part, similarity in zip(("self_attn", "mlp"), pair, strict=True)
    ]
    layers = [
        LayerProfile(tuple(one.path for one in sublayers[2 * index : 2 * index + 2]), (similarity,))
        for index, similarity in enumerate(LAYERS)
    ]
    return Profile(TINY, tuple(sublayers), tuple(layers), joint_order=joint)


JOINT = (
    JointStep("model.layers.3.self_attn", "scale", 0.1),
    JointStep("model.layers.2.mlp", "scale", 0.15),
    JointStep("model.layers.0.self_attn", "scale", 0.4),
)


def layers_of(found: SkipPlan) -> list[int]:
    """Return the numbers of the layers that are skipped whole."""
    numbers = [int(path.split(".")[2]) for path in found.paths]
    assert sorted(numbers) == numbers
    assert all(numbers.count(number) == 2 for number in numbers)
    return sorted(set(numbers))


def test_the_policies_are_the_documented_ones() -> None:
    assert [*POLICIES] == [
        "adaskip",
        "attention_only",
        "loss_greedy",
        "random",
        "early_exit",
        "skip_decode",
        "unified",
        "shortgpt",
    ]
    assert {*POLICIES} == {*SUBLAYER_POLICIES, *LAYER_POLICIES, "random"}


@pytest.mark.parametrize(
    ("policy", "skip", "layers"),
    [
        ("early_exit", 4, [4, 5]),
        ("early_exit", 10, [1, 2, 3, 4, 5]),
        ("skip_decode", 4, [1, 2]),
        ("skip_decode", 10, [1, 2, 3, 4, 5]),
        ("unified", 2, [5]),  # every 6th
        ("unified", 4, [2, 5]),  # every 3rd
        ("unified", 6, [1, 3, 5]),  # every 2nd
        ("shortgpt", 2, [2]),
        ("shortgpt", 6, [1, 2, 3]),
    ],
)
def test_whole_layers_by_hand(policy: str, skip: int, layers: list[int]) -> None:
    found = plan(profile(), skip=skip, policy=policy)
    assert layers_of(found) == layers
    assert (found.policy, found.beta, found.window) == (policy, None, 0)


def test_attention_only_by_hand() -> None:
    found = plan(profile(), skip=3, policy="attention_only")
    assert found.paths == ("model.layers.1.self_attn", "model.layers.3.self_attn", "model.layers.4.self_attn")
    mixed = plan(profile(), skip=3)
    assert mixed.paths == ("model.layers.1.self_attn", "model.layers.3.self_attn", "model.layers.4.mlp")


def test_random_is_seeded_and_keeps_an_attention() -> None:
    draws = {seed: plan(profile(), skip=11, policy="random", seed=seed).paths for seed in range(20)}
    assert draws[3] == plan(profile(), skip=11, policy="random", seed=3).paths
    assert len({*draws.values()}) > 3
    every = {one.path for one in profile().sublayers}
    assert all(next(iter(every - {*paths})).endswith("self_attn") for paths in draws.values())
    seen = {path for seed in range(20) for path in plan(profile(), skip=2, policy="random", seed=seed).paths}
    assert len(seen) > 8


def test_loss_greedy_takes_the_joint_order_from_its_beginning() -> None:
    found = plan(profile(joint=JOINT), skip=2, policy="loss_greedy")
    assert found.paths == ("model.layers.2.mlp", "model.layers.3.self_attn")
    with pytest.raises(OptionError, match=r"^skip=4 is too many for policy 'loss_greedy': at most 3 of "):
        plan(profile(joint=JOINT), skip=4, policy="loss_greedy")
    with pytest.raises(OptionError, match=r"^this profile holds no joint order of sublayers"):
        plan(profile(), skip=2, policy="loss_greedy")


def test_max_loss_is_the_longest_beginning_within_it() -> None:
    chosen = [plan(profile(joint=JOINT), max_loss=loss) for loss in (0.05, 0.1, 0.2, 9.0)]
    assert [len(found.skipped) for found in chosen] == [0, 1, 2, 3]
    assert {found.policy for found in chosen} == {"loss_greedy"}
    with pytest.raises(OptionError, match="holds no joint order"):
        plan(profile(), max_loss=0.1)


def test_max_loss_is_not_promised_for_another_compensation_than_was_measured() -> None:
    with pytest.raises(OptionError, match=r"measured with compensation='scale' and not with 'none': give comp"):
        plan(profile(joint=JOINT), max_loss=0.2, compensation="none")
    measured = tuple(replace(step, compensation="none") for step in JOINT)
    assert set(plan(profile(joint=measured), max_loss=0.2, compensation="none").scales.values()) == {1.0}
    with pytest.raises(OptionError, match=r"compensation='none' and not with 'scale'"):
        plan(profile(joint=measured), max_loss=0.2)


@pytest.mark.parametrize(("policy", "fitting"), [("early_exit", "2 or 4"), ("shortgpt", "2 or 4")])
def test_half_a_layer_is_refused(policy: str, fitting: str) -> None:
    with pytest.raises(OptionError) as caught:
        plan(profile(), skip=3, policy=policy)
    assert str(caught.value) == (
        f"{policy} skips whole layers, which of this model hold no 3 sublayers together: skip {fitting}"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"skip": 12, "policy": "early_exit"},
            "skip=12 is too many for policy 'early_exit': at most 10 of this model's 12",
        ),
        ({"skip": 8, "policy": "unified"}, "skip=8 is too many for policy 'unified': at most 6 of this model's 12"),
        ({"skip": 6, "policy": "attention_only"}, "skip=6 is too many for policy 'attention_only': at most 5 of"),
        ({"skip": 12, "policy": "random"}, "skip=12 is too many for policy 'random': at most 11 of"),
        ({"speedup": 3.0, "policy": "unified"}, "speedup=3.0 is too many for policy 'unified': at most 6 of"),
    ],
)
def test_too_many(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        plan(profile(), **options)
    assert str(caught.value).startswith(message)


def test_while_learning_the_most_below_is_skipped() -> None:
    """A request is under way: what cannot be had is noted, and never more is skipped than was asked for."""
    notes: list[str] = []
    learner = Learner(Options(policy="early_exit", skip=5, learn=20), None, notes.append)
    assert len(learner.plan(profile()).skipped) == 4
    assert notes == [
        "early_exit skips whole layers, which of this model hold no 5 sublayers together: skip 4 or 6; skips 4"
    ]
    assert len(Learner(Options(skip=40, learn=20), None, notes.append).plan(profile()).skipped) == largest_skip(
        profile()
    )


def test_target_acceleration_counts_layers() -> None:
    """M - M / alpha layers: of 6, 6 - 6 / 1.5 = 2."""
    assert layers_of(plan(profile(), speedup=1.5, policy="early_exit")) == [4, 5]
    assert plan(profile(), speedup=1, policy="unified").skipped == ()


def test_a_layer_of_one_sublayer() -> None:
    """Attention and FFN in parallel, merged into one sublayer: its own similarity is the layer's."""
    merged = Profile(TINY, tuple(measured(f"blocks.{index}", value) for index, value in enumerate(LAYERS)))
    assert plan(merged, skip=2, policy="shortgpt").paths == ("blocks.2", "blocks.3")
    assert plan(merged, skip=1, policy="early_exit").paths == ("blocks.5",)
    assert plan(merged, skip=3, policy="unified").paths == ("blocks.1", "blocks.3", "blocks.5")


def test_a_profile_without_layers_says_so() -> None:
    with pytest.raises(OptionError, match=r"^this profile holds no similarity of whole layers, which shortgpt needs"):
        plan(replace(profile(), layers=()), skip=2, policy="shortgpt")
    assert least_influence(profile(), find_layers([one.path for one in profile().sublayers]), 0) == ()


@pytest.mark.parametrize(
    ("paths", "sizes"),
    [
        (["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp"], [2, 2]),
        (["h.0.ln", "h.0.mlp.0", "h.1.attn", "h.1.mlp.0"], [2, 2]),  # a Sequential FFN
        (["parts.0.h.0.attn", "parts.0.h.0.mlp", "parts.0.h.1.attn", "parts.0.h.1.mlp"], [2, 2]),
        (["block.0.layer.0.attn", "block.0.layer.1.mlp", "block.1.layer.0.attn", "block.1.layer.1.mlp"], [2, 2]),
        (["group.0.attn#0", "group.0.mlp#1", "group.0.attn#2", "group.0.mlp#3"], [2, 2]),  # one module, twice
        (["h.0", "h.1", "h.2"], [1, 1, 1]),
        (["first.attn", "first.mlp", "second.attn", "second.mlp"], [2, 2]),
        (["h.0.mixer", "h.1.attn", "h.1.mlp", "h.2.mixer"], [1, 2, 1]),
    ],
)
def test_layers_by_paths(paths: list[str], sizes: list[int]) -> None:
    found = find_layers(paths)
    assert [len(layer) for layer in found] == sizes
    assert [path for layer in found for path in layer] == paths


@given(st.integers(2, 9), st.sampled_from([*POLICIES]), st.integers(0, 18), st.integers(0, 5))
def test_whatever_is_chosen_can_run(layers: int, policy: str, skip: int, seed: int) -> None:
    given_profile = decoder(layers)
    paths = [one.path for one in given_profile.sublayers]
    whole = tuple(LayerProfile(layer, (0.5,)) for layer in find_layers(paths))
    joint = tuple(JointStep(path, "scale", 0.1 * place) for place, path in enumerate(paths))
    given_profile = replace(given_profile, layers=whole, joint_order=joint)
    limit = largest_skip(given_profile, policy, seed)
    try:
        found = plan(given_profile, skip=skip, policy=policy, seed=seed)
    except OptionError:
        assert skip > limit or skip % 2
        return
    assert len(found.skipped) == skip <= limit
    assert keeps_enough(given_profile, found.paths)


class TestPhases:
    def test_decode_only(self) -> None:
        found = plan(profile(), skip=3, phase="decode")
        assert found.skipped == ()
        assert found.ramp == (RampStep(0, plan(profile(), skip=3).skipped),)
        assert (found.beta, found.window) == (0.95, 20)

    def test_prefill_only(self) -> None:
        """FFNs run again; attentions have no cache, and stay skipped."""
        found = plan(profile(), skip=3, phase="prefill")
        assert found.skipped == plan(profile(), skip=3).skipped
        assert found.ramp == (RampStep(0, (), ("model.layers.4.mlp",)),)
        assert (found.beta, found.window) == (None, 0)
        assert plan(profile(), skip=2, phase="prefill", policy="attention_only").ramp == ()

    def test_skip_decode_is_ramped_in_decode(self) -> None:
        """Four layers over 20 tokens: one more every 5."""
        found = plan(profile(), skip=8, policy="skip_decode", phase="decode", window=20)
        assert found.skipped == ()
        assert [step.after for step in found.ramp] == [0, 5, 10, 15]
        for number, step in enumerate(found.ramp, 1):
            assert tuple(one.path for one in step.skipped) == (
                f"model.layers.{number}.self_attn",
                f"model.layers.{number}.mlp",
            )
        at_once = plan(profile(), skip=8, policy="skip_decode", phase="decode", window=0)
        assert [(step.after, len(step.skipped)) for step in at_once.ramp] == [(0, 8)]
