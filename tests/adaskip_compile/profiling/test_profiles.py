"""Profiles: means by the paper's equations, merges that lose nothing, files that are this model's or refused."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.profiling.profiles import PROFILE_FORMAT, Profile, SublayerProfile
from adaskip_passes.errors import (
    DamagedFileError,
    FileError,
    ForeignFileError,
    MissingFileError,
    NewerFileError,
    OptionError,
    ProfileError,
)
from tests.adaskip_compile.profiling.profiling_data import FINE_TUNED, OTHER, TINY, decoder, measured, profiles

SHAPE = [("layers.0.self_attn", "attention"), ("layers.0.mlp", "ffn")]


class TestEquations:
    def test_similarity_is_the_mean_over_samples(self) -> None:
        """Eq. 2 by hand: samples of 0.5, 0.75 and 1.0 have mean 0.75, whatever their lengths."""
        sublayer = replace(measured("mlp", [0.5, 0.75, 1.0]), tokens=(1, 10, 1000))
        assert sublayer.mean_similarity == 0.75
        assert sublayer.samples == 3

    def test_scales_of_both_kinds(self) -> None:
        """Eq. 3 by hand: token means of 1.0 and 1.5 have mean 1.25; the authors' ratios 2.0 and 4.0 have mean 3.0."""
        sublayer = measured("mlp", [0.9, 0.9], scale_token=[1.0, 1.5], scale_frobenius=[2.0, 4.0])
        assert sublayer.mean_scale() == sublayer.mean_scale("token") == 1.25
        assert sublayer.mean_scale("frobenius") == 3.0

    def test_unknown_scale(self) -> None:
        with pytest.raises(OptionError, match=r"^unknown scale 'median'; known are token, frobenius$"):
            measured("mlp", 0.9).mean_scale("median")

    def test_attention_and_ffn_are_in_one_ranking(self) -> None:
        profile = Profile(
            TINY,
            (
                measured("layers.0.self_attn", [0.5, 0.75]),  # mean 0.625
                measured("layers.0.mlp", [0.0, 0.25]),  # 0.125
                measured("layers.1.self_attn", [1.0, 0.5]),  # 0.75
                measured("layers.1.mlp", [0.75, 1.0]),  # 0.875
            ),
        )
        ranked = [sublayer.path for sublayer in profile.ranking()]
        assert ranked == ["layers.1.mlp", "layers.1.self_attn", "layers.0.self_attn", "layers.0.mlp"]

    def test_equals_stay_in_stream_order(self) -> None:
        profile = Profile(TINY, tuple(measured(f"layers.{index}.mlp", 0.5) for index in (2, 0, 1)))
        assert profile.ranking() == profile.sublayers

    @given(st.lists(st.floats(-1, 1), min_size=1, max_size=50), st.randoms())
    def test_mean_is_exact_and_blind_to_order(self, values: list[float], random: Any) -> None:
        shuffled = random.sample(values, len(values))
        mean = measured("mlp", values).mean_similarity
        assert mean == measured("mlp", shuffled).mean_similarity
        exact = sum(map(Fraction, values)) / len(values)
        assert math.isclose(mean, exact, rel_tol=1e-15, abs_tol=1e-300)


class TestMerge:
    def test_concatenates_samples(self) -> None:
        one = Profile(TINY, (measured("mlp", [0.5, 0.25], scale_token=[1.0, 2.0]),))
        two = Profile(TINY, (measured("mlp", [1.0], scale_token=[3.0]),))
        merged = one.merge(two)
        assert merged == Profile(TINY, (measured("mlp", [0.5, 0.25, 1.0], scale_token=[1.0, 2.0, 3.0]),))
        assert merged.samples == 3

    def test_of_nothing_is_itself(self) -> None:
        assert decoder(2).merge() == decoder(2)

    @given(profiles(SHAPE), profiles(SHAPE), profiles(SHAPE))
    def test_is_associative(self, one: Profile, two: Profile, three: Profile) -> None:
        assert one.merge(two).merge(three) == one.merge(two.merge(three)) == one.merge(two, three)

    @given(profiles(SHAPE), profiles(SHAPE), profiles(SHAPE))
    def test_commutes_in_all_that_plans_depend_on(self, one: Profile, two: Profile, three: Profile) -> None:
        def means(profile: Profile) -> list[tuple[float, ...]]:
            return [
                (sublayer.mean_similarity, sublayer.mean_scale("token"), sublayer.mean_scale("frobenius"))
                for sublayer in profile.sublayers
            ]

        assert means(one.merge(two, three)) == means(three.merge(one, two)) == means(two.merge(three, one))

    @given(profiles(SHAPE), profiles(SHAPE))
    def test_is_exact(self, one: Profile, two: Profile) -> None:
        for merged, ours, theirs in zip(one.merge(two).sublayers, one.sublayers, two.sublayers, strict=True):
            together = [*ours.similarity, *theirs.similarity]
            assert merged.mean_similarity == math.fsum(together) / len(together)
            assert sum(merged.tokens) == sum(ours.tokens) + sum(theirs.tokens)

    def test_refuses_another_model(self) -> None:
        with pytest.raises(ProfileError, match=r"different models: .* other names or shapes"):
            decoder(2).merge(decoder(2, model=OTHER))
        with pytest.raises(ProfileError, match=r"different models: .* other weights \(1 of 512 sampled ones differ\)"):
            decoder(2).merge(decoder(2), decoder(2, model=FINE_TUNED))

    def test_refuses_other_sublayers(self) -> None:
        with pytest.raises(ProfileError, match="one has 4 sublayers and another 6"):
            decoder(2).merge(decoder(3))
        one, two = Profile(TINY, (measured("a.mlp", 0.5),)), Profile(TINY, (measured("a.self_attn", 0.5),))
        with pytest.raises(ProfileError, match=r"a\.mlp \(ffn, stateless\) and a\.self_attn \(attention, stateful\)"):
            one.merge(two)

    def test_keeps_the_model_that_is_known(self) -> None:
        unknown = decoder(2, model=None)
        assert unknown.merge(decoder(2)).model == decoder(2).merge(unknown).model == TINY


class TestMeasurements:
    @pytest.mark.parametrize("value", [math.nan, math.inf, True, "0.5", None])
    @pytest.mark.parametrize("name", ["similarity", "scale_token", "scale_frobenius"])
    def test_must_be_finite_numbers(self, name: str, value: Any) -> None:
        change: dict[str, Any] = {name: (value,)}
        with pytest.raises(ProfileError, match=rf"^sublayer mlp: {name} holds {value!r}; it takes finite numbers$"):
            replace(measured("mlp", 0.5), **change)

    @pytest.mark.parametrize("value", [0, -1, 2.0, True])
    def test_tokens_are_counted(self, value: Any) -> None:
        with pytest.raises(ProfileError, match=r"tokens holds .*; it takes positive integers"):
            replace(measured("mlp", 0.5), tokens=(value,))

    def test_must_be_as_many(self) -> None:
        with pytest.raises(ProfileError, match="at least 1, got 2, 1, 2, 2"):
            replace(measured("mlp", [0.5, 0.5]), scale_token=(1.0,))
        with pytest.raises(ProfileError, match="at least 1, got 0, 0, 0, 0"):
            SublayerProfile("mlp", "ffn", False, (), (), (), ())

    def test_sublayer_is_named(self) -> None:
        with pytest.raises(ProfileError, match="path and kind are text"):
            replace(measured("mlp", 0.5), path="")
        with pytest.raises(ProfileError, match="stateful is True or False, not 'no'"):
            replace(measured("mlp", 0.5), stateful="no")  # type: ignore[arg-type]

    def test_profile_has_sublayers_with_equal_samples(self) -> None:
        with pytest.raises(ProfileError, match="at least one sublayer"):
            Profile(TINY, ())
        with pytest.raises(ProfileError, match=r"each sublayer once, and mlp 2 times here"):
            Profile(TINY, (measured("mlp", 0.5), measured("mlp", 0.75)))
        with pytest.raises(ProfileError, match=r"a\.mlp saw 1 and b\.mlp 2"):
            Profile(TINY, (measured("a.mlp", 0.5), measured("b.mlp", [0.5, 0.75])))


class TestFiles:
    @given(profile=profiles())
    def test_round_trip(self, profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> None:
        path = tmp_path_factory.getbasetemp() / "any-profile.json"
        profile.save(path)
        assert Profile.load(path) == profile

    def test_of_a_model_that_cannot_be_told(self, tmp_path: Path) -> None:
        profile = decoder(1, model=None)
        profile.save(tmp_path / "p.json")
        assert Profile.load(tmp_path / "p.json") == profile
        profile.check(OTHER)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(MissingFileError, match=r"p\.json does not exist; to get one, measure the model"):
            Profile.load(tmp_path / "p.json")

    def test_truncated(self, tmp_path: Path) -> None:
        path = tmp_path / "p.json"
        decoder(4).save(path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DamagedFileError, match=r"p\.json is not a usable adaskip-profile: it is empty, truncated"):
            Profile.load(path)

    def test_edited(self, tmp_path: Path) -> None:
        path = tmp_path / "p.json"
        decoder(4).save(path)
        path.write_text(path.read_text().replace("0.9001", "0.9999"))
        with pytest.raises(DamagedFileError, match="does not match its checksum"):
            Profile.load(path)

    def test_newer(self, tmp_path: Path) -> None:
        path = tmp_path / "p.json"
        decoder(4).save(path)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 3, "producer": "adaskip-compile 7.0"}))
        with pytest.raises(
            NewerFileError,
            match=r"version 3 of the format adaskip-profile, written by adaskip-compile 7\.0; .*: upgrade with `pip",
        ):
            Profile.load(path)

    def test_the_first_version_loads(self, tmp_path: Path) -> None:
        """It had neither whole layers nor costs."""
        payload = {name: value for name, value in asdict(decoder(4)).items() if name not in ("layers", "costs")}
        replace(PROFILE_FORMAT, version=1).write(tmp_path / "p.json", payload)
        assert Profile.load(tmp_path / "p.json") == decoder(4)

    @pytest.mark.parametrize(
        ("flops", "message"),
        [
            ("__import__('os').getcwd()", "is no expression in b, q, t"),
            ("9**9**9**9", "is no expression in b, q, t"),
            ("2*z", "names the symbol 'z', of which nothing is known"),
            ("exec(q)", "calls 'exec', which is no function of shapes"),
        ],
    )
    def test_a_cost_that_is_no_expression_is_refused(self, flops: str, message: str, tmp_path: Path) -> None:
        cost = {"prefill": {"flops": flops, "weight_bytes": "0", "activation_bytes": "0", "cache_bytes": "0"}}
        sublayers = {one.path: 0 for one in decoder(1).sublayers}
        costs = {"sublayers": sublayers, "groups": [{"kind": "ffn", "count": 2, "cost": cost}], "rest": cost}
        costs |= {"shared_with": dict[str, list[str]](), "width": 64, "element_bytes": 4, "device": "cpu"}
        PROFILE_FORMAT.write(tmp_path / "p.json", {**asdict(decoder(1)), "costs": costs})
        with pytest.raises(DamagedFileError, match=re.escape(message)):
            Profile.load(tmp_path / "p.json")

    def test_plan_given_as_a_profile(self, tmp_path: Path) -> None:
        SkipPlan.none().save(tmp_path / "p.json")
        with pytest.raises(FileError, match=r"p\.json is of format adaskip-plan, and adaskip-profile is needed"):
            Profile.load(tmp_path / "p.json")

    @pytest.mark.parametrize(
        ("payload", "reason"),
        [
            ({"model": None}, "it lacks 'sublayers'"),
            ({"model": None, "sublayers": []}, "at least one sublayer"),
            ({"model": None, "sublayers": [[]]}, "list"),
            ({"model": None, "sublayers": 3}, "int"),
            ({"model": None, "sublayers": [{"path": "mlp"}]}, "missing"),
            ({"model": {"name": "m"}, "sublayers": []}, "missing"),
            ({"model": {"name": "m", "structure": "s", "weights": "no"}, "sublayers": []}, "hexadecimal"),
        ],
    )
    def test_whole_but_senseless(self, tmp_path: Path, payload: dict[str, Any], reason: str) -> None:
        path = tmp_path / "p.json"
        PROFILE_FORMAT.write(path, payload)
        with pytest.raises(DamagedFileError, match=rf"p\.json is not a usable adaskip-profile: .*{reason}"):
            Profile.load(path)

    def test_of_another_model(self) -> None:
        profile = decoder(2)
        profile.check(TINY)
        with pytest.raises(
            ForeignFileError, match=r"^this profile was made for org/tiny, and this model is org/other: "
        ):
            profile.check(OTHER)
        with pytest.raises(
            ForeignFileError, match=r"^p\.json was made for another org/tiny: .* other weights \(1 of 512"
        ):
            profile.check(FINE_TUNED, source="p.json")
