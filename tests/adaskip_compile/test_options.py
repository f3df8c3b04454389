"""Options: one list, each documented, unknown ones refused with the nearest that there is."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from adaskip_compile.options import Options, _field_docstrings
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_passes.errors import OptionError
from tests.adaskip_compile.profiling.profiling_data import decoder


def test_defaults() -> None:
    options = Options()
    assert options == Options.from_mapping({}) == Options.from_mapping(None)
    assert {field.name: getattr(options, field.name) for field in fields(options)} == {
        "plan": None,
        "profile": None,
        "skip": 8,
        "speedup": None,
        "policy": "adaskip",
        "seed": 0,
        "phase": "both",
        "context": None,
        "times": None,
        "max_loss": None,
        "window": 20,
        "scale": "token",
        "compensation": "scale",
        "learn": None,
        "cache_dir": None,
        "keep_captures": True,
        "inner": "inductor",
        "passes": (),
        "regions": "shared",
        "cuda_graphs": True,
        "debug_dir": None,
    }


def test_from_mapping() -> None:
    given = {"skip": 16, "learn": 4, "inner": "eager"}
    assert Options.from_mapping(given) == Options(skip=16, learn=4, inner="eager")


@pytest.mark.parametrize(
    ("name", "nearest"), [("polcy", "policy"), ("skips", "skip"), ("speed_up", "speedup"), ("cachedir", "cache_dir")]
)
def test_unknown_option_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(OptionError) as caught:
        Options.from_mapping({name: 1})
    assert str(caught.value) == (
        f"unknown option {name!r}: did you mean {nearest!r}? Options are plan, profile, skip, speedup, policy, seed, "
        "phase, context, times, max_loss, window, scale, compensation, learn, cache_dir, "
        "keep_captures, inner, passes, regions, cuda_graphs, debug_dir"
    )


@pytest.mark.parametrize("name", ["xyzzy", 3])
def test_unknown_option_like_no_other(name: Any) -> None:
    with pytest.raises(OptionError, match=rf"^unknown option {name!r}\. Options are plan, profile, skip, "):
        Options.from_mapping({name: 1})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"skip": -1}, "skip=-1: takes a number of sublayers, 0 or more"),
        ({"skip": "8"}, "skip='8': takes a number of sublayers, 0 or more"),
        ({"speedup": 0.5}, "speedup=0.5: takes a ratio of 1 or more, such as 1.14, or None"),
        (
            {"policy": "best"},
            "policy='best': takes one of adaskip, attention_only, loss_greedy, random, early_exit, skip_decode, unified, shortgpt",
        ),
        ({"seed": "1"}, "seed='1': takes an integer"),
        ({"phase": "window"}, "phase='window': takes one of both, prefill, decode"),
        ({"times": 3}, "times=3: takes a Measured or a Roofline or the path of a file, or None"),
        (
            {"speedup": 1.2, "context": 4096},
            "context=4096 needs a profile: what is learned from requests does not tell enough",
        ),
        (
            {"policy": "shortgpt"},
            "policy='shortgpt' needs a profile: what is learned from requests does not tell enough",
        ),
        ({"window": -1}, "window=-1: takes a number of decoded tokens, 0 or more"),
        ({"scale": "median"}, "scale='median': takes one of token, frobenius"),
        ({"learn": 0}, "learn=0: takes a number of requests, 1 or more, or None"),
        ({"learn": True}, "learn=True: takes a number of requests, 1 or more, or None"),
        (
            {"skip": 4},
            "skip=4 says what to skip of a model of which nothing is known: give profile= too, or learn=20 to learn from the first 20 requests",
        ),
        (
            {"policy": "random"},
            "policy='random' says what to skip of a model of which nothing is known: give profile= too, or learn=20 to learn from the first 20 requests",
        ),
        ({"inner": "tensorrt"}, "inner='tensorrt': takes one of inductor, eager, or a backend's function"),
        ({"regions": "none"}, "regions='none': takes one of shared, whole"),
        ({"plan": 8}, "plan=8: takes a SkipPlan or the path of a file, or None"),
        ({"plan": ""}, "plan='': takes a SkipPlan or the path of a file, or None"),
        ({"profile": SkipPlan.none()}, f"profile={SkipPlan.none()!r}: takes a Profile or the path of a file, or None"),
        ({"keep_captures": "yes"}, "keep_captures='yes': takes True or False"),
        ({"cuda_graphs": 1}, "cuda_graphs=1: takes True or False"),
        ({"cache_dir": 3}, "cache_dir=3: takes a folder, or None"),
    ],
)
def test_senseless_value(option: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Options.from_mapping(option)
    assert str(caught.value) == message


def test_plan_and_profile_exclude_each_other() -> None:
    with pytest.raises(OptionError, match=r"plan and profile are both given: .* give one of them"):
        Options(plan="plan.json", profile=decoder(2))


def test_files_are_not_read_here() -> None:
    assert Options(plan="nowhere.json").plan == "nowhere.json"
    assert Options(profile=Path("nowhere.json")).profile == Path("nowhere.json")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ADASKIP_CACHE_DIR", raising=False)
    assert Options().cache_folder == Path("~/.cache/adaskip").expanduser()
    monkeypatch.setenv("ADASKIP_CACHE_DIR", "~/elsewhere")
    assert Options().cache_folder == tmp_path / "elsewhere"
    assert Options(cache_dir=tmp_path / "here").cache_folder == tmp_path / "here"
    assert Options(cache_dir="~/there").cache_folder == tmp_path / "there"
    monkeypatch.setenv("ADASKIP_CACHE_DIR", "")
    assert Options().cache_folder == tmp_path / ".cache" / "adaskip"


def test_equal_options_are_one_key() -> None:
    assert len({Options(learn=2), Options(learn=2), Options(learn=3)}) == 2


def test_every_option_is_documented() -> None:
    assert list(_field_docstrings(Options)) == [field.name for field in fields(Options)]
    assert all(meaning.endswith(".") for meaning in _field_docstrings(Options).values())


def test_table_for_the_readme() -> None:
    lines = Options.describe().splitlines()
    assert lines[:2] == ["| option | default | meaning |", "| --- | --- | --- |"]
    assert "| `skip` | `8` | How many sublayers to skip, where no plan is given. |" in lines
    assert len(lines) == 2 + len(fields(Options))
    assert all(line.count(" | ") == 2 for line in lines)
