"""Plans: the offline and online choice by the paper's equations, and files that are this model's or refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adaskip_compile.files.model_identity import ModelIdentity
from adaskip_compile.options import Options, resolve_plan
from adaskip_compile.planning.planner import plan, plan_by_options
from adaskip_compile.planning.policies import largest_skip
from adaskip_compile.planning.skip_plan import PLAN_FORMAT, SkipPlan
from adaskip_compile.planning.skipped_sublayer import SkippedSublayer
from adaskip_compile.profiling.profiles import Profile
from adaskip_compile.runtime.window import extra_sublayers
from adaskip_passes.errors import (
    DamagedFileError,
    FileError,
    ForeignFileError,
    LegalityError,
    MissingFileError,
    NewerFileError,
    OptionError,
    PlanError,
    UnknownSublayerError,
)
from tests.adaskip_compile.profiling.profiling_data import FINE_TUNED, NUMBERS, OTHER, POSITIVE, TINY, decoder, measured

# Two samples a sublayer. Means of similarity: 0.625, 0.125, 0.75, 0.875; of the token scale: 1.25, 3, 2, 1.5;
# of the Frobenius scale: 5, 6, 7, 8.
BY_HAND = Profile(
    TINY,
    (
        measured("layers.0.self_attn", [0.5, 0.75], scale_token=[1.0, 1.5], scale_frobenius=[4.0, 6.0]),
        measured("layers.0.mlp", [0.0, 0.25], scale_token=[3.0, 3.0], scale_frobenius=[6.0, 6.0]),
        measured("layers.1.self_attn", [1.0, 0.5], scale_token=[1.0, 3.0], scale_frobenius=[6.0, 8.0]),
        measured("layers.1.mlp", [0.75, 1.0], scale_token=[1.25, 1.75], scale_frobenius=[8.0, 8.0]),
    ),
)


@st.composite
def plans(draw: st.DrawFn) -> SkipPlan:
    paths = draw(st.lists(st.text(min_size=1, max_size=8), max_size=4, unique=True))
    kinds = st.sampled_from([("attention", True), ("ssm", True), ("ffn", False), ("", None)])
    skipped = [
        SkippedSublayer(path, *draw(kinds), scale=draw(POSITIVE), similarity=draw(st.none() | NUMBERS))
        for path in paths
    ]
    return SkipPlan(
        tuple(skipped),
        beta=draw(st.none() | NUMBERS),
        window=draw(st.integers(0, 1000)),
        policy=draw(st.sampled_from(["adaskip", "explicit", "none"])),
        scale_kind=draw(st.sampled_from(["token", "frobenius"])),
        model=draw(st.sampled_from([None, TINY, OTHER])),
    )


class TestOfflineChoice:
    def test_by_hand(self) -> None:
        """The two most similar are layers.1.mlp (0.875) and layers.1.self_attn (0.75); beta is the smaller."""
        assert plan(BY_HAND, skip=2) == SkipPlan(
            skipped=(
                SkippedSublayer("layers.1.self_attn", "attention", True, scale=2.0, similarity=0.75),
                SkippedSublayer("layers.1.mlp", "ffn", False, scale=1.5, similarity=0.875),
            ),
            beta=0.75,
            window=20,
            policy="adaskip",
            scale_kind="token",
            model=TINY,
        )

    def test_scale_of_the_authors_code(self) -> None:
        found = plan(BY_HAND, skip=2, scale="frobenius", window=5)
        assert found.scales == {"layers.1.self_attn": 7.0, "layers.1.mlp": 8.0}
        assert (found.scale_kind, found.window) == ("frobenius", 5)

    def test_stream_order_and_not_rank_order(self) -> None:
        profile = Profile(TINY, (measured("a.mlp", 0.5), measured("b.mlp", 0.25), measured("c.mlp", 0.75)))
        assert plan(profile, skip=2).paths == ("a.mlp", "c.mlp")

    def test_ties_go_to_the_earlier_sublayer(self) -> None:
        profile = Profile(TINY, tuple(measured(f"layers.{index}.mlp", 0.5) for index in range(4)))
        assert plan(profile, skip=2).paths == ("layers.0.mlp", "layers.1.mlp")

    @pytest.mark.parametrize(
        ("layers", "speedup", "count"),
        [
            (32, 1.14, 8),  # the paper's: 2(32 - 32 / 1.14) = 7.86
            (32, 1.33, 16),  # the paper's: 2(32 - 32 / 1.33) = 15.88
            (30, 1.14, 7),  # 2(30 - 30 / 1.14) = 7.37
            (30, 1.33, 15),  # 2(30 - 30 / 1.33) = 14.89
            (8, 2, None),  # 2(8 - 8 / 2) = 8, all attentions
            (32, 1.0, 0),
            (32, 1, 0),
        ],
    )
    def test_target_acceleration(self, layers: int, speedup: float, count: int | None) -> None:
        """2m sublayers with m = M - M / alpha; `skip` is not asked."""
        if count is None:
            with pytest.raises(OptionError):
                plan(decoder(layers), speedup=speedup)
            return
        assert len(plan(decoder(layers), speedup=speedup, skip=3).skipped) == count

    def test_skipping_nothing_sets_no_threshold(self) -> None:
        found = plan(BY_HAND, skip=0)
        assert (found.skipped, found.beta) == ((), None)

    def test_is_blind_to_the_order_of_merges(self) -> None:
        later = Profile(TINY, tuple(replace(sublayer, similarity=(0.3, 0.1)) for sublayer in BY_HAND.sublayers))
        assert plan(BY_HAND.merge(later), skip=2) == plan(later.merge(BY_HAND), skip=2)


class TestLimits:
    def test_one_attention_stays(self) -> None:
        """All 4 attentions rank first: 3 can go."""
        assert largest_skip(decoder(4)) == 3
        assert [sublayer.kind for sublayer in plan(decoder(4), skip=3).skipped] == ["attention"] * 3
        with pytest.raises(OptionError) as caught:
            plan(decoder(4), skip=4)
        assert str(caught.value) == (
            "skip=4 is too many: at most 3 of this model's 8 sublayers can be skipped, because its most similar 4 hold "
            "every attention and one must stay"
        )

    def test_one_sublayer_stays(self) -> None:
        """The least similar is an attention, or there is none: all but one can go."""
        states = Profile(TINY, tuple(measured(f"layers.{index}.mixer", 0.5) for index in range(4)))
        assert largest_skip(states) == 3
        assert len(plan(states, skip=3).skipped) == 3
        with pytest.raises(OptionError) as caught:
            plan(states, skip=4)
        assert str(caught.value) == "skip=4 is too many: at most 3 of this model's 4 sublayers can be skipped"
        last = Profile(TINY, (measured("a.mlp", 0.75), measured("a.self_attn", 0.5)))
        assert largest_skip(last) == 1

    def test_default_skip_on_a_tiny_model(self) -> None:
        with pytest.raises(OptionError, match="skip=8 is too many: at most 1 of this model's 4 sublayers"):
            plan(decoder(2))

    def test_speedup_out_of_reach(self) -> None:
        with pytest.raises(OptionError) as caught:
            plan(decoder(4), speedup=2.0)
        assert str(caught.value) == (
            "speedup=2.0 skips 4 sublayers, which is too many: at most 3 of this model's 8 sublayers can be skipped, because "
            "its most similar 4 hold every attention and one must stay; the largest speedup is 1.6"
        )
        assert len(plan(decoder(4), speedup=1.6).skipped) == 3

    @pytest.mark.parametrize("layers", [1, 2, 3, 7, 32, 126, 260, 301])
    def test_the_largest_speedup_told_is_allowed(self, layers: int) -> None:
        with pytest.raises(OptionError) as caught:
            plan(decoder(layers), speedup=1000.0)
        largest = float(str(caught.value).rpartition(" ")[2])
        assert len(plan(decoder(layers), speedup=largest).skipped) <= largest_skip(decoder(layers))

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"skip": -1}, "skip=-1: takes a number of sublayers, 0 or more"),
            ({"skip": 2.0}, "skip=2.0: takes a number of sublayers, 0 or more"),
            ({"skip": True}, "skip=True: takes a number of sublayers, 0 or more"),
            ({"speedup": 0.9}, "speedup=0.9: takes a ratio of 1 or more, such as 1.14, or None"),
            ({"speedup": math.nan}, "speedup=nan: takes a ratio of 1 or more, such as 1.14, or None"),
            ({"speedup": "1.14"}, "speedup='1.14': takes a ratio of 1 or more, such as 1.14, or None"),
            ({"window": -1}, "window=-1: takes a number of decoded tokens, 0 or more"),
            ({"window": 2.5}, "window=2.5: takes a number of decoded tokens, 0 or more"),
            (
                {"policy": "best"},
                "policy='best': takes one of adaskip, attention_only, loss_greedy, random, early_exit, skip_decode, unified, shortgpt",
            ),
            ({"scale": "median"}, "scale='median': takes one of token, frobenius"),
            ({"seed": 1.5}, "seed=1.5: takes an integer"),
            ({"phase": "steady"}, "phase='steady': takes one of both, prefill, decode"),
            ({"context": 4096}, "context=4096: is where speedup= is to be reached; give that too, or leave it out"),
            ({"context": 1, "speedup": 1.2}, "context=1: takes a number of tokens, 2 or more, or None"),
            ({"max_loss": -1}, "max_loss=-1: takes nats a token, 0 or more, or None"),
            ({"max_loss": 0.1, "speedup": 1.2}, "max_loss and speedup are two goals: give one of them"),
            (
                {"max_loss": 0.1, "policy": "random"},
                "policy='random' knows no loss: max_loss= goes by that of loss_greedy",
            ),
            (
                {"times": "times.json"},
                "times= tells times at context= tokens: give speedup= and context= too, or leave it out",
            ),
        ],
    )
    def test_senseless_options(self, option: dict[str, Any], message: str) -> None:
        options: dict[str, Any] = {"skip": 2, **option}
        with pytest.raises(OptionError) as caught:
            plan(BY_HAND, **options)
        assert str(caught.value) == message


class TestOnlineChoice:
    PLAN = plan(BY_HAND, skip=2)  # beta 0.75

    def test_by_hand(self) -> None:
        """An FFN is added that reaches beta, with the scale of this window and not the offline one."""
        stats = {"a.mlp": (0.75, 1.125), "b.mlp": (math.nextafter(0.75, 0), 1.25), "c.mlp": (0.875, 0.5)}
        assert extra_sublayers(self.PLAN, stats) == {"a.mlp": 1.125, "c.mlp": 0.5}

    def test_keeps_the_order_of_the_stream(self) -> None:
        assert list(extra_sublayers(self.PLAN, {"c.mlp": (1.0, 1.0), "a.mlp": (1.0, 1.0)})) == ["c.mlp", "a.mlp"]

    def test_what_is_skipped_already_keeps_its_scale(self) -> None:
        assert extra_sublayers(self.PLAN, {"layers.1.mlp": (1.0, 9.0)}) == {}

    @pytest.mark.parametrize("stats", [(math.nan, 1.0), (0.9, math.inf), (0.9, math.nan)])
    def test_what_overflowed_is_kept(self, stats: tuple[float, float]) -> None:
        assert extra_sublayers(self.PLAN, {"a.mlp": stats}) == {}

    def test_without_a_threshold_none_is_added(self) -> None:
        assert extra_sublayers(SkipPlan.none(), {"a.mlp": (1.0, 1.0)}) == {}
        assert extra_sublayers(SkipPlan.from_scales({"b.mlp": 1.0}, window=5), {"a.mlp": (1.0, 1.0)}) == {}

    def test_a_stateful_sublayer_is_never_added(self) -> None:
        stats = {"a.mlp": (1.0, 1.0), "a.self_attn": (1.0, 1.0)}
        with pytest.raises(LegalityError, match=r"^a\.self_attn is stateful: .* its cache would have a hole"):
            extra_sublayers(self.PLAN, stats, stateful={"a.self_attn", "b.self_attn"})
        assert extra_sublayers(self.PLAN, {"a.mlp": (1.0, 1.0)}, stateful={"a.self_attn"}) == {"a.mlp": 1.0}


class TestSkipPlan:
    def test_from_scales(self) -> None:
        found = SkipPlan.from_scales({"b.mlp": 1.5, "a.mlp": 0.5}, window=7)
        assert found.scales == {"b.mlp": 1.5, "a.mlp": 0.5}
        assert found.skipped[0] == SkippedSublayer("b.mlp", "", None, 1.5, None)
        assert (found.window, found.beta, found.policy, found.model) == (7, None, "explicit", None)

    def test_none(self) -> None:
        assert SkipPlan.none() == SkipPlan((), None, 0, "none", "token", None)

    @pytest.mark.parametrize("scale", [0, -1.0, math.nan, math.inf, "1", None, True])
    def test_senseless_scale(self, scale: Any) -> None:
        with pytest.raises(
            PlanError, match=rf"^sublayer a\.mlp: scale is {scale!r}; it takes a finite number above 0$"
        ):
            SkipPlan.from_scales({"a.mlp": scale})

    def test_negative_window(self) -> None:
        with pytest.raises(PlanError, match=r"^window is -1; it takes a number of tokens, 0 or more$"):
            SkipPlan.from_scales({}, window=-1)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"beta": math.nan}, "beta is nan"),
            ({"policy": 3}, "policy is 3"),
            ({"scale_kind": "median"}, "scale_kind is 'median'; it takes one of token, frobenius"),
            ({"skipped": SkipPlan.from_scales({"a.mlp": 1.0}).skipped * 2}, "each sublayer once, and a.mlp 2 times"),
        ],
    )
    def test_senseless_fields(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(PlanError, match=message):
            replace(SkipPlan.none(), **change)

    @pytest.mark.parametrize("change", [{"path": ""}, {"kind": None}, {"stateful": "no"}, {"similarity": math.inf}])
    def test_senseless_sublayer(self, change: dict[str, Any]) -> None:
        with pytest.raises(PlanError, match=r"path and kind are text|stateful is|similarity is"):
            replace(SkippedSublayer("a.mlp", "ffn", False, 1.0, 0.5), **change)

    def test_table(self) -> None:
        online = "after 20 decoded tokens also every FFN of similarity 0.7500 or more"
        assert plan(BY_HAND, skip=2).describe().splitlines() == [
            f"skips 2 sublayers; {online}; scale: token, policy: adaskip",
            "sublayer            kind       similarity   scale",
            "layers.1.self_attn  attention      0.7500  2.0000",
            "layers.1.mlp        ffn            0.8750  1.5000",
        ]
        assert SkipPlan.from_scales({"a.mlp": 1.5}).describe().splitlines() == [
            "skips 1 sublayer; no FFN is added online; scale: token, policy: explicit",
            "sublayer  kind       similarity   scale",
            "a.mlp     -                   -  1.5000",
        ]
        assert SkipPlan.none().describe() == "skips nothing"

    def test_names_a_module_that_the_model_lacks(self) -> None:
        model = nn.Sequential()
        for name in ("attention", "ffn"):
            model.add_module(name, nn.Identity())
        SkipPlan.from_scales({"attention": 1.0, "ffn": 1.0}).check_paths(model)
        with pytest.raises(UnknownSublayerError) as caught:
            SkipPlan.from_scales({"atention": 1.0}).check_paths(model)
        assert str(caught.value) == (
            "the plan skips atention, which Sequential lacks; nearest of its modules: attention, ffn. `adaskip inspect` "
            "lists its sublayers"
        )


class TestFiles:
    @given(given_plan=plans())
    def test_round_trip(self, given_plan: SkipPlan, tmp_path_factory: pytest.TempPathFactory) -> None:
        path = tmp_path_factory.getbasetemp() / "any-plan.json"
        given_plan.save(path)
        assert SkipPlan.load(path) == given_plan

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(MissingFileError, match=r"p\.json does not exist; to get one, plan from a profile"):
            SkipPlan.load(tmp_path / "p.json")

    def test_truncated(self, tmp_path: Path) -> None:
        path = tmp_path / "p.json"
        plan(BY_HAND, skip=2).save(path)
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(DamagedFileError, match=r"p\.json is not a usable adaskip-plan: it is empty, truncated"):
            SkipPlan.load(path)

    def test_edited(self, tmp_path: Path) -> None:
        path = tmp_path / "p.json"
        plan(BY_HAND, skip=2).save(path)
        path.write_text(path.read_text().replace("layers.1.mlp", "layers.0.mlp"))
        with pytest.raises(DamagedFileError, match="does not match its checksum"):
            SkipPlan.load(path)

    def test_newer(self, tmp_path: Path) -> None:
        path = tmp_path / "p.json"
        SkipPlan.none().save(path)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 5, "producer": "adaskip-compile 7.0"}))
        with pytest.raises(NewerFileError, match=r"written by adaskip-compile 7\.0; .*: upgrade with `pip install"):
            SkipPlan.load(path)

    def test_profile_given_as_a_plan(self, tmp_path: Path) -> None:
        BY_HAND.save(tmp_path / "p.json")
        with pytest.raises(FileError, match=r"p\.json is of format adaskip-profile, and adaskip-plan is needed"):
            SkipPlan.load(tmp_path / "p.json")

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"window": -3}, "window is -3"),
            ({"window": None}, "window is None"),
            ({"skipped": [{"path": "a"}]}, "missing"),
            ({"skipped": 3}, "int"),
            ({"model": 3}, "mapping"),
            ({"model": {}}, "missing"),
            ({"model": {"name": 3, "structure": "s", "weights": None}}, "name and structure are text"),
            ({"colour": "red"}, "colour"),
        ],
    )
    def test_whole_but_senseless(self, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
        path = tmp_path / "p.json"
        SkipPlan.none().save(path)
        PLAN_FORMAT.write(path, {**PLAN_FORMAT.read(path), **change})
        with pytest.raises(DamagedFileError, match=rf"p\.json is not a usable adaskip-plan: .*{reason}"):
            SkipPlan.load(path)

    def test_without_a_field(self, tmp_path: Path) -> None:
        PLAN_FORMAT.write(tmp_path / "p.json", {"window": 0})
        with pytest.raises(DamagedFileError, match="it lacks 'skipped'"):
            SkipPlan.load(tmp_path / "p.json")

    def test_of_another_model(self) -> None:
        found = plan(BY_HAND, skip=2)
        found.check(TINY)
        with pytest.raises(ForeignFileError, match=r"^this plan was made for org/tiny, and this model is org/other: "):
            found.check(OTHER)
        with pytest.raises(
            ForeignFileError, match=r"^p\.json was made for another org/tiny: .* other weights \(1 of 512"
        ):
            found.check(FINE_TUNED, source="p.json")
        SkipPlan.from_scales({"a.mlp": 1.0}).check(OTHER)


class TestResolve:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        BY_HAND.save(tmp_path / "profile.json")
        plan(BY_HAND, skip=1).save(tmp_path / "plan.json")
        return tmp_path

    def test_nothing_given(self) -> None:
        assert resolve_plan(Options(), TINY) is None

    def test_plan(self, folder: Path) -> None:
        expected = plan(BY_HAND, skip=1)
        for given_plan in (expected, folder / "plan.json", str(folder / "plan.json")):
            assert resolve_plan(Options(plan=given_plan, skip=5), TINY) == expected

    def test_profile(self, folder: Path) -> None:
        expected = plan(BY_HAND, skip=2, window=3, scale="frobenius")
        for profile in (BY_HAND, folder / "profile.json", str(folder / "profile.json")):
            assert resolve_plan(Options(profile=profile, skip=2, window=3, scale="frobenius"), TINY) == expected

    def test_every_planning_option_counts(self) -> None:
        options = Options(profile=BY_HAND, speedup=1.33, window=7, scale="frobenius", policy="adaskip")
        by_options = plan_by_options(decoder(32), options.planning)
        assert by_options == plan(decoder(32), speedup=1.33, window=7, scale="frobenius", policy="adaskip")
        assert len(by_options.skipped) == 16

    @pytest.mark.parametrize("model", [OTHER, FINE_TUNED])
    def test_of_another_model(self, folder: Path, model: ModelIdentity) -> None:
        for options, source in (
            (Options(plan=folder / "plan.json"), f"{folder / 'plan.json'} was made for"),
            (Options(profile=str(folder / "profile.json")), f"{folder / 'profile.json'} was made for"),
            (Options(plan=plan(BY_HAND, skip=1)), "this plan was made for"),
            (Options(profile=BY_HAND), "this profile was made for"),
        ):
            with pytest.raises(ForeignFileError) as caught:
                resolve_plan(options, model)
            assert str(caught.value).startswith(source)
            assert str(caught.value).endswith("adaskip_compile.profile(model, samples) or `adaskip profile`")

    def test_without_a_model_to_check(self, folder: Path) -> None:
        """A plain function was compiled: there are no weights to tell it by."""
        assert resolve_plan(Options(plan=folder / "plan.json"), None) == plan(BY_HAND, skip=1)
        assert resolve_plan(Options(profile=folder / "profile.json", skip=1), None) == plan(BY_HAND, skip=1)
