from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adaskip_compile import RampStep, SkippedSublayer, SkipPlan
from adaskip_compile.cli import main
from adaskip_compile.planning.plan_difference import Difference, differences
from adaskip_compile.planning.prompt_skips import PromptSkips
from adaskip_compile.profiling.stream_maps import StreamMap

A, B, C = (f"model.layers.{index}.mlp" for index in range(3))


def skipped(path: str, scale: float = 1.0) -> SkippedSublayer:
    return SkippedSublayer(path, "ffn", False, scale, None)


def in_prompt(*paths: str, maps: dict[str, StreamMap] | None = None, tail: int = 16) -> SkipPlan:
    return replace(SkipPlan.none(), prompt=PromptSkips(tuple(map(skipped, paths)), maps or {}, tail=tail))


def a_map(number: float, rank: int = 2) -> StreamMap:
    tensors = {"down": torch.full((rank, 4), number), "up": torch.ones(4, rank), "shift": torch.zeros(4)}
    return StreamMap("low_rank", tensors, None)


def test_equal_plans_differ_in_nothing() -> None:
    plan = in_prompt(A, B, maps={A: a_map(1.0)})
    assert differences(plan, plan) == []


def test_scales_and_settings_are_told() -> None:
    one = SkipPlan.from_scales({A: 0.9, B: 1.0}, window=5)
    assert differences(one, SkipPlan.from_scales({A: 0.8, C: 1.0}, window=9)) == [
        Difference("window", "5 tokens", "9 tokens"),
        Difference(A, "throughout, scale 0.9000", "throughout, scale 0.8000"),
        Difference(B, "throughout, scale 1.0000", "runs"),
        Difference(C, "runs", "throughout, scale 1.0000"),
    ]


def test_less_than_is_shown_is_a_difference_too() -> None:
    [found] = differences(SkipPlan.from_scales({A: 0.9}), SkipPlan.from_scales({A: 0.900001}))
    assert found.what == "what was measured"


def test_the_two_regimes_are_told_apart() -> None:
    found = differences(SkipPlan.from_scales({A: 1.0}), in_prompt(A, tail=8))
    assert Difference(A, "throughout, scale 1.0000", "prompt, scale 1.0000") in found
    assert Difference("rows in full", "-", "first 1, last 8") in found


def test_a_ramp_is_told_step_by_step() -> None:
    one = replace(SkipPlan.from_scales({A: 1.0}), ramp=(RampStep(4, (skipped(B),), (A,)),))
    [first, second] = differences(one, SkipPlan.from_scales({A: 1.0}))
    assert first.one == "throughout, scale 1.0000; from decoded token 4 on runs again"
    assert second == Difference(B, "from decoded token 4 on, scale 1.0000", "runs")


def test_maps_are_told_by_form_and_by_what_they_hold() -> None:
    one, other = in_prompt(A, maps={A: a_map(1.0)}), in_prompt(A, maps={A: a_map(2.0)})
    [found] = differences(one, other)
    assert found.other == f"{found.one}, fitted otherwise"
    [found] = differences(one, in_prompt(A, maps={A: a_map(1.0, rank=3)}))
    assert ("rank 2" in found.one, "rank 3" in found.other) == (True, True)
    [found] = differences(one, in_prompt(A))
    assert found.other == "prompt, scale 1.0000"


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / name) for name in ("one.json", "other.json")]
    SkipPlan.from_scales({A: 0.9}).save(files[0])
    in_prompt(A).save(files[1])
    assert main(["diff", *files, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert [row["what"] for row in json.loads(out)["differences"]] == ["policy", "rows in full", A]
    assert all(word in err for word in (*files, A, "throughout, scale 0.9000", "prompt, scale 1.0000"))
    assert main(["diff", files[0], files[0]]) == 0
    assert capsys.readouterr().out == "the plans say the same\n"
