"""Files that an earlier version has written mean today what they meant then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaskip_compile import Profile, SkipPlan

KEPT = Path(__file__).parents[2] / "golden" / "files"
PLANS = ("plan", "plan_with_maps", "plan_of_a_prompt", "plan_of_windows")


def content(path: Path) -> dict[str, Any]:
    """Return what a file says, but for what later versions added to it and was not there."""
    document = json.loads(path.read_text())
    prompt = document["payload"].get("prompt")
    if prompt is not None and prompt.get("windows") == {}:
        del prompt["windows"]
    return {name: document[name] for name in ("format", "payload")}


@pytest.mark.parametrize("name", [*PLANS, "profile"])
def test_what_was_read_is_written_again(name: str, tmp_path: Path):
    kind = Profile if name == "profile" else SkipPlan
    found = kind.load(KEPT / f"{name}.json")
    found.save(tmp_path / f"{name}.json")
    assert content(tmp_path / f"{name}.json") == content(KEPT / f"{name}.json")
    maps = sorted(KEPT.glob(f"{name}-*.safetensors"))
    assert [path.name for path in sorted(tmp_path.glob("*.safetensors"))] == [path.name for path in maps]
    assert all((tmp_path / path.name).read_bytes() == path.read_bytes() for path in maps)
    assert kind.load(tmp_path / f"{name}.json") == found


def test_what_the_plans_say():
    plan, with_maps, of_a_prompt, of_windows = (SkipPlan.load(KEPT / f"{name}.json") for name in PLANS)
    assert plan.paths == ("model.layers.3.self_attn", "model.layers.3.mlp")
    assert (plan.window, plan.policy) == (20, "adaskip")
    assert {path: one.rank for path, one in with_maps.maps.items()} == dict.fromkeys(with_maps.paths, 2)
    assert of_a_prompt.prompt is not None
    assert of_a_prompt.prompt.paths == ("model.layers.2.self_attn", "model.layers.2.mlp")
    assert of_a_prompt.paths == ()
    assert of_windows.prompt is not None
    assert of_windows.prompt.windows == {"model.layers.1.self_attn": 128}
