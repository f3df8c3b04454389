"""Each command from its arguments to its files, with a tiny model and no compiler inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaskip_compile import Profile, SkipPlan
from adaskip_compile.cli import main
from adaskip_compile.cli.tables import profile_table
from adaskip_compile.fitting import loss_budget
from adaskip_compile.fitting.budget_texts import BudgetSizes
from adaskip_compile.profiling.profiles import SublayerProfile
from tests.tiny_checkpoints import save_tiny

pytestmark = pytest.mark.shares_captures

ATTENTION = "model.layers.{}.self_attn"
FFN = "model.layers.{}.mlp"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def profile(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    assert main(["profile", model, "--out", str(path), "--samples", "3", "--length", "48"]) == 0
    return str(path)


@pytest.fixture(scope="module")
def plan(profile: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    assert main(["plan", profile, "--out", str(path), "--skip", "2", "--window", "3"]) == 0
    return str(path)


def results(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


def test_profile_measures_every_sublayer(profile: str):
    measured = Profile.load(profile)
    assert measured.samples == 3
    assert [sublayer.path for sublayer in measured.sublayers] == [
        name.format(layer) for layer in range(4) for name in (ATTENTION, FFN)
    ]
    assert {tokens for sublayer in measured.sublayers for tokens in sublayer.tokens} == {48}


def test_profile_of_texts_of_ones_own(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "b.txt").write_text("b" * 70)
    out = tmp_path / "profile.json"
    texts = ["--texts", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert main(["profile", model, "--out", str(out), "--length", "32", "--json", "-", *texts]) == 0
    found = results(capsys)
    assert found["samples"] == 3 + 2
    similarities = [sublayer["similarity"] for sublayer in found["sublayers"]]
    assert similarities == sorted(similarities, reverse=True)
    assert out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no such file"), (b"", "holds no text"), (b"\xff\xfe\xff", "not a text file in UTF-8")],
)
def test_profile_names_a_text_that_it_cannot_read(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    assert main(["profile", "smollm2", "--out", str(tmp_path / "p.json"), "--texts", str(text)]) == 2
    assert capsys.readouterr().err.startswith(f"adaskip: error: {text}: {message}")
    assert not (tmp_path / "p.json").exists()


def test_a_device_that_is_not_there_is_refused(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["profile", model, "--out", str(tmp_path / "p.json"), "--device", "cuda:77"]) == 2
    assert "--device cuda:77: PyTorch cannot use it here" in capsys.readouterr().err


def test_plan_skips_the_most_similar(profile: str, plan: str):
    best = [sublayer.path for sublayer in Profile.load(profile).ranking()[:2]]
    made = SkipPlan.load(plan)
    assert set(made.paths) == set(best)
    assert made.window == 3


def test_plan_by_speed_up(profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "plan.json"
    assert main(["plan", profile, "--out", str(out), "--speedup", "1.333", "--json", "-"]) == 0
    assert len(results(capsys)["skipped"]) == 2  # 2 (4 - 4 / 1.333)
    assert len(SkipPlan.load(out).paths) == 2


def test_plan_by_another_policy(profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "plan.json"
    command = ["plan", profile, "--out", str(out), "--skip", "2", "--json", "-"]
    assert main([*command, "--policy", "early_exit"]) == 0
    assert list(results(capsys)["skipped"]) == [ATTENTION.format(3), FFN.format(3)]
    assert main([*command, "--policy", "random", "--seed", "7", "--phase", "decode"]) == 0
    [step] = results(capsys)["ramp"]
    assert (step["after"], len(step["skipped"])) == (0, 2)
    assert SkipPlan.load(out).policy == "random"
    assert main(["plan", profile, "--out", str(out), "--skip", "3", "--policy", "early_exit"]) == 2
    assert "early_exit skips whole layers" in capsys.readouterr().err


def test_a_plan_is_written_again_with_another_window(plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "plan10.json"
    assert main(["plan", "--from", plan, "--window", "10", "--out", str(out)]) == 0
    before, after = SkipPlan.load(plan), SkipPlan.load(out)
    assert (before.window, after.window) == (3, 10)
    assert (after.paths, after.beta, after.model) == (before.paths, before.beta, before.model)
    SkipPlan.from_scales({FFN.format(1): 1.0}).save(tmp_path / "explicit.json")
    mistakes: tuple[tuple[list[str], str], ...] = (
        (["--from", plan], "give --window too"),
        (["--from", plan, "--window", "5", "--skip", "3"], "--skip does not go with --from"),
        (["--from", plan, "model", "--window", "5"], "one of them"),
        ([], "one of them"),
        (["--from", str(tmp_path / "explicit.json"), "--window", "5"], "skips nothing more after a window"),
    )
    for arguments, said in mistakes:
        capsys.readouterr()
        assert main(["plan", *arguments, "--out", str(out)]) == 2
        assert said in capsys.readouterr().err


def test_plan_for_a_goal(profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "plan.json"
    assert main(["plan", profile, "--out", str(out), "--speedup", "1.2", "--context", "64"]) == 0
    assert SkipPlan.load(out).all_paths
    assert main(["plan", profile, "--out", str(out), "--speedup", "9", "--context", "64"]) == 2
    assert "speedup=9 at context=64 is out of reach" in capsys.readouterr().err
    assert main(["plan", profile, "--out", str(out), "--max-loss", "0.1"]) == 2
    assert "holds no joint order" in capsys.readouterr().err


def test_plan_refuses_what_the_model_does_not_allow(profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "plan.json"
    assert main(["plan", profile, "--out", str(out), "--skip", "100"]) == 2
    assert "skip" in capsys.readouterr().err
    assert not out.exists()


def test_inspect_lists_sublayers_with_what_is_known(
    model: str, profile: str, plan: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["inspect", model, "--profile", profile, "--plan", plan, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    rows = {row["path"]: row for row in found["sublayers"]}
    assert len(rows) == 8
    assert {path for path, row in rows.items() if row["skipped"]} == set(SkipPlan.load(plan).paths)
    attention = rows[ATTENTION.format(0)]
    assert attention["stateful"]
    assert attention["kind"] == "attention"
    assert attention["parameters"] == 64 * 64 * 2 + 64 * 32 * 2 + 64
    assert 0 < attention["similarity"] < 1
    assert {row["phases"]["steady"] for row in rows.values()} == {"kept", "skipped", "open"}
    assert all(path in err for path in rows)
    assert [line for line in found["advice"] if line not in err] == []


def test_inspect_alone_shows_structure_and_cost_only(model: str, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", model, "--context", "512"]) == 0
    text = capsys.readouterr().out
    assert "8 sublayers" in text
    assert "cost of a prefill of 512 tokens" in text
    assert "uncalibrated" in text
    header = next(line for line in text.splitlines() if "parameters" in line and "kind" in line)
    assert "similarity" not in header
    assert "steady" not in header
    assert "adaskip profile MODEL" in text


def test_equal_sublayers_are_one_row(model: str, capsys: pytest.CaptureFixture[str]):
    shares = {}
    for every in (False, True):
        assert main(["inspect", model, *["--all"] * every]) == 0
        rows = [line for line in capsys.readouterr().out.splitlines() if "model.layers." in line and "%" in line]
        shares[len(rows)] = sum(float(row.split()[-1].rstrip("%")) for row in rows)
        if not every:
            assert [row.split()[:3] for row in rows] == [
                ["4", "x", ATTENTION.format("*")],
                ["4", "x", FFN.format("*")],
            ]
    assert sorted(shares) == [2, 8]
    assert shares[2] == pytest.approx(shares[8], abs=0.1)


def test_a_long_profile_shows_its_most_similar_sublayers():
    measured = (
        SublayerProfile(f"layers.{layer}.mlp", "ffn", False, (layer / 40,), (1.0,), (1.0,), (64,))
        for layer in range(30)
    )
    profile = Profile(None, tuple(measured))
    few, every = profile_table(profile), profile_table(profile, every_row=True)
    assert (few.row_count, every.row_count) == (16, 30)
    assert "--all" in str(few.title)
    assert "--all" not in str(every.title)
    assert str(next(iter(few.columns[0].cells))) == "layers.29.mlp"


@pytest.mark.newest("older ones capture how masks are made")
def test_inspect_reads_a_bare_config_and_no_weights(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tmp_path / "config.json"
    config.write_text((Path(model) / "config.json").read_text())
    assert main(["inspect", "--config", str(config), "--json", "-"]) == 0
    bare = results(capsys)
    assert main(["inspect", model, "--json", "-"]) == 0
    named = results(capsys)
    assert bare["sublayers"] == named["sublayers"]


def test_inspect_writes_a_page_and_drawings(model: str, plan: str, tmp_path: Path):
    outputs = {name: tmp_path / f"out.{name}" for name in ("html", "graphml", "dot")}
    flags = [item for name, file in outputs.items() for item in (f"--{name}", str(file))]
    assert main(["inspect", model, "--plan", plan, *flags]) == 0
    assert outputs["html"].read_text().startswith("<!doctype html>")
    assert "<graphml" in outputs["graphml"].read_text()
    assert outputs["dot"].read_text().startswith("digraph")


def test_inspect_measures_this_machine_and_remembers(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = str(tmp_path / "machine.json")
    small = ["--contexts", "16", "64", "--rounds", "1", "--inner", "eager", "--context", "32", "--json", "-"]
    assert main(["inspect", model, "--calibrate", "--calibration", file, *small]) == 0
    out, err = capsys.readouterr()
    measured = json.loads(out)
    assert measured["timer"]["kind"] == "measured"
    assert "256 *" in err
    assert "not among the lengths that were measured" in err
    assert "one round was measured" in err
    assert main(["inspect", model, "--calibration", file, *small]) == 0
    assert results(capsys)["predictions"] == measured["predictions"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name either a MODEL or the --config of one"),
        (["MODEL", "--config", "c.json"], "name either a MODEL or the --config of one"),
        (["--config", "none.json"], "--config none.json: there is no such file"),
        (["MODEL", "--flops", "-1"], "--flops -1: takes a number above 0"),
        (["MODEL", "--node-data", "d.json"], "--node-data and --program go together"),
        (["MODEL", "--calibration", "none.json"], "none.json does not exist"),
        (["MODEL", "--runtime", "none.json"], "none.json: there is no such file"),
    ],
)
def test_inspect_refuses_what_makes_no_sense(
    flags: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["inspect", *(model if flag == "MODEL" else flag for flag in flags)]) == 2
    assert message in capsys.readouterr().err


def test_plan_of_a_model_keeps_a_budget(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(loss_budget, "BudgetSizes", lambda: BudgetSizes(320, 32, 2, 2, 2))
    out = str(tmp_path / "plan.json")
    assert main(["plan", model, "--max-loss", "9", "--context", "320", "--out", out, "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert "attentions  windows  FFNs" in printed.err
    found = json.loads(printed.out)
    plan = SkipPlan.load(out)
    assert plan.prompt is not None
    assert plan.prompt.measured in plan.prompt.frontier
    assert [one["path"] for one in found["prompt"]["skipped"]] == list(plan.prompt.paths) != []


def test_plan_goes_by_documents_of_the_users_own(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    seen: list[Any] = []

    def found(*_: Any, texts: Any, **__: Any) -> SkipPlan:
        seen.append(texts)
        return SkipPlan.none()

    monkeypatch.setattr(loss_budget, "plan_within_loss", found)
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text(f"This is {file.name}.")
    command = ["plan", model, "--out", str(tmp_path / "plan.json"), "--texts", *map(str, files)]
    assert main(command) == 0
    assert seen == [["This is a.txt.", "This is b.txt."]]
    assert main([*command, "--skip", "2"]) == 2
    assert "--texts goes with a model" in capsys.readouterr().err


def test_a_count_of_sublayers_asks_for_a_profile(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = str(tmp_path / "plan.json")
    assert main(["plan", model, "--skip", "2", "--out", out]) == 2
    assert model in capsys.readouterr().err
    assert main(["plan", model, "--phase", "decode", "--out", out]) == 2
    assert "--phase goes with a profile" in capsys.readouterr().err


def test_demo_compares_the_ways(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "demo.json"
    small = {
        "samples": 2,
        "length": 320,
        "held-out": 2,
        "needles": 2,
        "prompt-tokens": 128,
        "new-tokens": 9,
        "rounds": 2,
    }
    small |= {"skip": 2, "window": 3, "max-losses": 9}
    flags = [item for name, value in small.items() for item in (f"--{name}", str(value))]
    assert main(["demo", "--model", model, "--inner", "eager", "--json", str(out), *flags]) == 0
    found = json.loads(out.read_text())
    names = ("eager, full", "adaskip, full", "adaskip, within 900 %", "adaskip, the paper's choice")
    assert tuple(found["ways"]) == names  # in this order
    eager, full, budgeted, paper = found["ways"].values()
    assert eager["tokens"] == full["tokens"]
    assert len(budgeted["tokens"]) == len(paper["tokens"]) == 9
    attention = [path for path in paper["plan"]["skipped"] if path.endswith("self_attn")]
    assert paper["cache_bytes"] * 4 == full["cache_bytes"] * (4 - len(attention))
    assert budgeted["cache_bytes"] == full["cache_bytes"]
    assert budgeted["plan"]["prompt"]["skipped"]
    assert budgeted["quality"]["loss"] != 0 != paper["quality"]["loss"]
    assert full["quality"] is None
    assert found["prompt_tokens"] == 128
    text = capsys.readouterr().out
    for words in ("first token", "against eager", "KV cache", "perplexity", "facts found", *names):
        assert words in text
    assert "In short: compiled in full, with the same text, the first token comes" in text
    assert "Skipping in the prompt, within 900 %, makes the first" in text


def test_demo_must_see_past_the_window(capsys: pytest.CaptureFixture[str]):
    assert main(["demo", "--new-tokens", "10"]) == 2
    assert "--new-tokens must be at least 23" in capsys.readouterr().err
