"""The sweep from its arguments to its files, with a tiny model and no compiler inside."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import adaskip_compile
from adaskip_compile import Profile, SkipPlan
from adaskip_compile.checkpoints import load_checkpoint
from adaskip_compile.cli import main, sweep
from adaskip_compile.evaluation import suite
from adaskip_compile.evaluation.likelihood import decoded_nlls, window_nlls
from adaskip_compile.evaluation.sweep_results import SWEEP_FORMAT
from adaskip_compile.fitting.sequence import SequenceFitter
from tests.made_up_texts import made_up_domain, made_up_folder
from tests.tiny_checkpoints import save_tiny

pytestmark = pytest.mark.shares_captures

SMALL = "--inner eager --windows 1 --length 48 --context 40 --new-tokens 7 --window 3 --samples 2 --rounds 2".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture
def sweeps(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that sweeps the model with results in ``tmp_path``, on made-up text of two domains."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "adaskip_compile.evaluation.domains.built_in_domains", lambda: (made_up_domain("sea"), made_up_domain("city"))
    )
    return lambda *arguments: main(["sweep", model, *SMALL, *arguments])


def test_a_sweep_ends_in_a_curve_a_plan_and_a_page(sweeps: Callable[..., int], model: str, tmp_path: Path):
    pytest.importorskip("matplotlib")
    goal = [
        "--speedup",
        "0.01",
        "--out",
        "plan.json",
        "--csv",
        "curve.csv",
        "--plot",
        "curve.svg",
        "--json",
        "all.json",
    ]
    assert sweeps("--skips", "0", "2", "3", *goal) == 0
    lines = list(csv.DictReader((tmp_path / "curve.csv").open()))
    assert [line["skipped"] for line in lines] == ["0", "2", "3"]
    assert float(lines[0]["nll_loss"]) == 0 != float(lines[1]["nll_loss"])
    found = json.loads((tmp_path / "all.json").read_text())
    least = min(found["rows"][1:], key=lambda row: row["nll_loss"])
    assert found["recommended"]["name"] == least["name"]
    assert list(SkipPlan.load(tmp_path / "plan.json").paths) == least["skipped"]
    assert set(least["measures"]) == {"nll/sea", "nll/city"}
    assert (tmp_path / "curve.svg").read_text().count("<svg") == 1

    shown = ["--plan", "plan.json", "--sweep", "all.json", "--html", "page.html", "--json", "inspected.json"]
    assert main(["inspect", model, *shown]) == 0
    swept = json.loads((tmp_path / "inspected.json").read_text())["sweep"]
    assert [row["loss"] for row in swept] == [row["nll_loss"] for row in found["rows"]]
    assert [row["name"] for row in swept if row["is_plan"]] == [least["name"]]


def test_an_interrupted_sweep_goes_on_where_it_stopped(
    sweeps: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measured: list[str] = []
    real = suite.window_nlls

    def count(model, windows):
        if len(measured) == 3 and stopping:
            raise KeyboardInterrupt
        measured.append("windows")
        return real(model, windows)

    monkeypatch.setattr(suite, "window_nlls", count)
    stopping = True
    assert sweeps("--skips", "2", "3") == 130
    kept = json.loads((tmp_path / "sweep.json").read_text())["payload"]["quality"]
    assert [len(found) for found in kept.values()] == [2, 1]
    stopping = False
    assert sweeps("--skips", "2", "3") == 0
    assert len(measured) == 3 * 2
    whole = json.loads((tmp_path / "sweep.json").read_text())["payload"]
    assert len(whole["rounds"]) == 2
    assert {name: whole["quality"][name] for name in ["full"]} == {"full": kept["full"]}
    # Another skip count is added; what is known is not measured again.
    assert sweeps("--skips", "2", "4", "--csv", "curve.csv") == 0
    assert len(measured) == 4 * 2
    assert [set(found) for found in json.loads((tmp_path / "sweep.json").read_text())["payload"]["rounds"][2:]] == [
        {"full", "adaskip/4/scale"}
    ] * 2
    assert [line["skipped"] for line in csv.DictReader((tmp_path / "curve.csv").open())] == ["0", "2", "4"]


def test_what_a_sweep_labels_is_what_it_measures_and_saves(sweeps: Callable[..., int], model: str, tmp_path: Path):
    names = ["none", "scale", "low_rank"]
    goal = ["--speedup", "0.01", "--out", "plan.json", "--json", "all.json"]
    assert sweeps("--skips", "3", "--compensations", *names, *goal) == 0
    quality = json.loads((tmp_path / "sweep.json").read_text())["payload"]["quality"]
    profile, (loaded, tokenizer) = Profile.load(tmp_path / "sweep.profile.json"), load_checkpoint(model)
    windows = made_up_domain("sea").windows(tokenizer, "evaluation", 1, 48)
    for name in names:
        plan = adaskip_compile.plan(profile, skip=3, compensation=name, window=3)
        wanted = window_nlls(adaskip_compile.compile(loaded, plan, inner="eager"), windows)
        assert quality[f"adaskip/3/{name}"]["nll/sea"] == pytest.approx(wanted)
    assert len({tuple(found["nll/sea"]) for found in quality.values()}) == 4
    recommended = json.loads((tmp_path / "all.json").read_text())["recommended"]["name"].rpartition("/")[2]
    saved, wanted = (
        SkipPlan.load(tmp_path / "plan.json"),
        adaskip_compile.plan(profile, skip=3, compensation=recommended),
    )
    assert (saved.scales, saved.map_forms(saved.paths)) == (wanted.scales, wanted.map_forms(wanted.paths))


LONGER = ["--length", "192", "--context", "164"]


def test_plans_for_the_prompt_alone_are_compared_by_what_follows_it(
    sweeps: Callable[..., int], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ["--skips", "0", "2", "--depths", "1,1", "0,1", *LONGER, "--json", "all.json"]
    assert sweeps(*arguments, "--speedup", "0.01", "--out", "plan.json", "--csv", "curve.csv") == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "all.json").read_text())["rows"]}
    assert list(rows) == ["full", "adaskip/2/scale", "prompt/0+1/low_rank", "prompt/1+1/low_rank"]
    row = rows["prompt/1+1/low_rank"]
    assert (row["skip"], row["skipped"], set(row["measures"])) == (2, [], {"decode/sea", "decode/city"})
    loaded, tokenizer = load_checkpoint(model)
    [kept] = tmp_path.glob("sweep.prompt-1+1-*.json")
    plan = SkipPlan.load(kept)
    assert plan.prompt is not None
    assert list(plan.prompt.paths) == row["prompt_skipped"]
    windows = made_up_domain("sea").windows(tokenizer, "evaluation", 1, 192)
    wanted, full = (
        decoded_nlls(adaskip_compile.compile(loaded, one, inner="eager"), windows, decoded=32)
        for one in (plan, SkipPlan.none())
    )
    assert row["measures"]["decode/sea"] == pytest.approx(wanted)
    assert rows["full"]["measures"]["decode/sea"] == pytest.approx(full)
    assert wanted != pytest.approx(full, rel=1e-4)
    # What was fitted is not fitted again, and what was measured of it is not measured again.
    monkeypatch.setattr(SequenceFitter, "fit", None)
    monkeypatch.setattr(suite, "decoded_nlls", lambda *_, **__: pytest.fail("measured"))
    assert sweeps(*arguments) == 0
    (tmp_path / "sweep.json").unlink()
    assert sweeps(*arguments, "--length", "184") == 1, "maps of other texts are fitted anew"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", "1,1"], "--context 40: with --depths it takes 132 tokens or more"),
        (["--depths", "1,1", "--context", "164"], "--length 48: with --depths it takes 165 tokens or more"),
        (["--depths", "1,1", *LONGER, "--measures", "nll"], "--measures nll reads what the model says"),
        (["--depths", "9,1", *LONGER], "depths=9+1: this model has "),
    ],
)
def test_depths_that_make_no_sense_are_refused(
    arguments: list[str], message: str, sweeps: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    assert sweeps("--skips", "0", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_was_measured_of_another_plan_under_this_name_is_measured_again(
    sweeps: Callable[..., int], tmp_path: Path
):
    names = ["--skips", "3", "--compensations", "scale", "low_rank"]
    assert sweeps(*names) == 0
    results = tmp_path / "sweep.json"
    whole = SWEEP_FORMAT.read(results)
    wrong = {name: {measure: [99.0] for measure in found} for name, found in whole["quality"].items()}
    # A file of an earlier version says of no name what plan was measured, and that was the one with scales.
    SWEEP_FORMAT.write(results, {**{key: whole[key] for key in whole if key != "plans"}, "quality": wrong})
    assert sweeps(*names) == 0
    again = SWEEP_FORMAT.read(results)
    assert again["quality"] == wrong | {"adaskip/3/low_rank": whole["quality"]["adaskip/3/low_rank"]}
    assert again["plans"] == whole["plans"]
    assert len([found for found in again["rounds"] if "adaskip/3/low_rank" in found]) == 2
    SWEEP_FORMAT.write(results, {**again, "plans": {**again["plans"], "adaskip/3/scale": "another"}})
    assert sweeps(*names) == 0
    assert SWEEP_FORMAT.read(results)["quality"]["adaskip/3/scale"] == whole["quality"]["adaskip/3/scale"]


def test_results_of_another_sweep_are_refused(
    sweeps: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sweep, "_time", lambda *_: None)
    monkeypatch.setattr("adaskip_compile.evaluation.tradeoff.make_rows", lambda *_: [])
    monkeypatch.setattr("adaskip_compile.cli.sweep_tables.show", lambda *_: None)
    assert sweeps("--skips", "2") == 0
    before = (tmp_path / "sweep.json").read_text()
    folder = made_up_folder(tmp_path / "texts", "city")
    other = save_tiny(tmp_path / "other", num_hidden_layers=3)
    for arguments, name in (
        (["--context", "44"], "its --context is 40, and here it is 44"),
        (["--texts", f"more={folder}"], "its texts is"),
    ):
        assert sweeps("--skips", "2", *arguments) == 2
        assert name in capsys.readouterr().err
    assert main(["sweep", str(other), *SMALL, "--skips", "2"]) == 2
    assert "sweep.json is of another sweep: its model is 'model" in capsys.readouterr().err
    assert (tmp_path / "sweep.json").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "plan.json"], "Give --max-loss or --speedup too"),
        (["--longbench", "folder"], "--longbench and --tasks go together"),
        (["--new-tokens", "4"], "--new-tokens must be at least 6"),
        (["--plot", "curve.gif"], "--plot curve.gif: takes a file that ends in .png, .svg, .pdf"),
        (["--texts", "folder"], "--texts folder: takes NAME=DIR"),
        (["--policies", "best"], "policy='best': takes one of adaskip"),
        (["--compensations", "best"], "compensation='best': takes"),
        (["--skips", "100"], "at most 7 of this model's 8 sublayers"),
        (["--measures", "nnl"], "'nnl' is none; known are nll"),
        (["--longbench", "none", "--tasks", "treck"], "--tasks treck: there is no such task"),
        (["--longbench", "none", "--tasks", "trec"], "--longbench none: trec.jsonl cannot be read"),
    ],
)
def test_what_makes_no_sense_is_refused_before_it_is_measured(
    arguments: list[str],
    message: str,
    sweeps: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(suite, "window_nlls", lambda *_, **__: pytest.fail("measured"))
    assert sweeps("--skips", "2", *arguments) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1
