"""The studies of quality in bench/: what they compute, on tiny models and made-up text."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.evaluation.likelihood import decoded_nlls
from adaskip_compile.evaluation.timing import Generation
from adaskip_compile.kv_cache.cache_argument import cache_argument
from adaskip_passes.errors import ForeignFileError
from bench import baselines, compensation, equal_speed, error_growth, quantized_cache, studies
from bench.decode_statistics import decode_statistics
from bench.hit_rates import hit_rate
from tests.made_up_texts import made_up_domain
from tests.models import tiny, tokens
from tests.reference import hook_statistics
from tests.tiny_checkpoints import save_tiny

pytestmark = pytest.mark.shares_captures


def test_a_hit_is_among_the_top_of_both():
    assert hit_rate([3, 2, 1, 0], [3, 2, 1, 0], 2) == 1
    assert hit_rate([3, 2, 1, 0], [3, 1, 2, 0], 2) == 0.5
    assert hit_rate([3, 2, 1, 0], [0, 1, 2, 3], 2) == 0


def test_error_growth_compares_the_losses_together_with_their_sum(made_up_texts: None, tmp_path: Path):
    pytest.importorskip("matplotlib")
    model = save_tiny(tmp_path / "model")
    sizes = "--samples 2 --length 48 --windows 1 --skips 1 3 --threads 1".split()
    assert error_growth.main(["--model", str(model), *sizes, "--out", str(tmp_path)]) == 0
    page = tmp_path / "error_growth_model.md"
    rows = page_rows(page)
    one, three = ([float(name), *map(float, row[:2])] for name in ("1", "3") for row in rows[name])
    alone = [float(row[0]) for name, found in rows.items() if name.startswith("`") for row in found]
    assert one[1] == pytest.approx(one[2], abs=2e-3)  # one sublayer together is that one alone
    assert three[2] == pytest.approx(sum(alone), abs=2e-3)
    assert abs(three[1] - three[2]) > 1e-3
    assert (tmp_path / "error_growth_model.png").exists()
    assert str(tmp_path) not in page.read_text()


def test_decode_statistics_are_those_that_hooks_see():
    model, prompt = tiny("llama"), tokens(length=9)[0]
    paths, found = decode_statistics(model, [prompt], 3)
    assert found.shape == (1, 3, 4, 3)
    with hook_statistics(model) as calls:
        model.generate(prompt[None], attention_mask=torch.ones(1, 9), max_new_tokens=4, do_sample=False)
    _prefill, *steps = calls
    expected = [[step[path].similarity for path in paths] for step in steps]
    assert found[0, :, :, 0] == pytest.approx(torch.tensor(expected).double(), rel=1e-4)


def test_a_cache_quantised_after_prefill_is_what_transformers_quantised_cache_gives():
    bits = 4
    pytest.importorskip("optimum.quanto")
    from transformers import QuantizedCache

    model, ids = tiny("llama", hidden_size=256, num_hidden_layers=3), tokens(length=90)[0]
    past = QuantizedCache(backend="quanto", config=model.config, nbits=bits, residual_length=128, q_group_size=64)
    with torch.no_grad():
        model(input_ids=ids[None, :79], use_cache=True, **cache_argument(model, past))
        steps = [
            model(input_ids=ids[None, at : at + 1], **cache_argument(model, past)).logits[0, -1] for at in range(79, 89)
        ]
    expected = float(functional.cross_entropy(torch.stack(steps), ids[-10:]))
    adaskip_compile.compile(model, SkipPlan.none(), inner="eager")
    held: list[int] = []
    assert decoded_nlls(model, [ids], decoded=10, after_prefill=quantized_cache.quantiser(bits, held)) == pytest.approx(
        [expected]
    )
    elements = 3 * 2 * 2 * 79 * 64  # layers, keys and values, heads, tokens, width
    assert elements * bits / 8 < held[0] < elements * (bits + 1.5) / 8
    [full] = decoded_nlls(model, [ids], decoded=10)
    assert full != pytest.approx(expected, rel=1e-6)


@pytest.fixture
def made_up_texts(monkeypatch: pytest.MonkeyPatch):
    domains = (made_up_domain("sea"), made_up_domain("city"))
    monkeypatch.setattr("adaskip_compile.evaluation.domains.built_in_domains", lambda: domains)


SIZES = "--samples 4 --length 48 --windows 1 --judged 2 --steps 2 --skips 2 --threads 1".split()


def page_rows(page: Path) -> dict[str, list[list[str]]]:
    """Return the rows of all tables of a page by their first cell."""
    rows: dict[str, list[list[str]]] = {}
    for line in page.read_text().splitlines():
        if line.startswith("| "):
            name, *cells = (cell.strip() for cell in line.split("|")[1:-1])
            rows.setdefault(name, []).append(cells)
    return rows


def test_compensation_gives_losses_and_what_is_left_of_tasks(made_up_texts: None, tmp_path: Path):
    model = save_tiny(tmp_path / "model")
    sizes = [*SIZES, *"--forms low_rank --needles 2 --questions 2 --contexts 288".split()]
    assert compensation.main(["--model", str(model), *sizes, "--out", str(tmp_path)]) == 0
    rows = page_rows(tmp_path / "compensation_model.md")
    paper, tasks = rows["most similar, scale (paper)"]
    assert all(cell.endswith("(1.00)") for cell in paper)
    assert len(tasks) == 2
    assert len(rows["most similar, none"]) == 1  # losses alone
    assert {f"{order}, low_rank, tuned" for order in compensation.ORDERS} < rows.keys()


def test_equal_speed_times_code_once_and_compares_within_rounds(
    made_up_texts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = save_tiny(tmp_path / "model")
    calls: list[SkipPlan] = []

    def generated(_model: object, _ids: object, plan: SkipPlan, _how: object) -> Generation:
        calls.append(plan)
        seconds = 1.0 - 0.1 * len(plan.paths) + 0.15 * bool(plan.maps)
        return Generation((0, 0, 0), seconds, (seconds, seconds), 0)

    monkeypatch.setattr("bench.equal_speed.generate_under", generated)
    plans = tmp_path / "plans"
    plans.mkdir()
    sizes = [*SIZES, "--orders", "most similar", *"--extra 0 2 --rounds 2 --context 48".split(), "--plans", str(plans)]
    assert equal_speed.main(["--model", str(model), *sizes, "--out", str(tmp_path)]) == 0
    page = tmp_path / "equal_speed_model.md"
    rows = page_rows(page)
    assert len(calls) == 3 * 4  # one round untimed and two timed, of full, paper, and maps at 2 and at 4
    assert [row[0][:5] for row in (*rows["paper, 2"], *rows["most similar, 4, tuned"])] == ["1.250", "1.333"]
    assert [row[2] for row in (*rows["most similar, 2"], *rows["most similar, 4"])] == ["0.842", "1.067"]
    [verdict] = [line for line in page.read_text().splitlines() if line.startswith("As fast")]
    assert "most similar, 4, with" in verdict
    assert "most similar, 4, tuned, with" in verdict
    assert "most similar, 2" not in verdict


def test_baselines_keeps_scores_for_a_run_that_adds_times(
    made_up_texts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("rouge_score")
    pytest.importorskip("matplotlib")
    model = save_tiny(tmp_path / "model")
    kept = tmp_path / "kept"
    sizes = (
        "--samples 2 --length 48 --decoded 4 --needles 2 --questions 2 --prompts 2 --prompt-tokens 16 --new-tokens 4"
    )
    how = [*sizes.split(), *"--contexts 288 --timed-context 32 --rounds 2 --skips 1 2 --threads 1".split()]
    arguments = ["--model", str(model), *how, "--policies", "adaskip", "early_exit", "--kept", str(kept)]
    arguments += ["--out", str(tmp_path)]
    assert baselines.main(arguments) == 0
    page = tmp_path / "baselines_model.md"
    scored = page_rows(page)
    assert [len(rows) for rows in (scored["adaskip"], scored["full"])] == [6, 6]  # three phases, two counts
    assert "Times" not in page.read_text()
    loss, *domains = map(float, scored["early_exit"][0][:3])
    assert loss == pytest.approx(sum(domains) / 2 - sum(map(float, scored["full"][0][1:3])) / 2, abs=2e-3)
    written = (kept / "baselines_model.scores.json").stat().st_mtime_ns

    compiled: list[SkipPlan] = []
    compile_ = adaskip_compile.compile
    monkeypatch.setattr(adaskip_compile, "compile", lambda *a, **k: compiled.append(a[1]) or compile_(*a, **k))

    def generated(*_: object) -> Generation:
        left = 1.0 - 0.2 * len(compiled[-1].paths)
        return Generation((0,) * 4, left, (left,) * 3, 0)

    monkeypatch.setattr("bench.baselines.generate", generated)
    assert baselines.main([*arguments, "--inner", "eager"]) == 0
    timed = page_rows(page)
    assert (kept / "baselines_model.scores.json").stat().st_mtime_ns == written  # nothing was measured again
    assert [row[2:] for row in timed["adaskip"]] == scored["adaskip"]
    assert [row[0][:5] for row in timed["early_exit"]] == ["1.67x", "1.00x", "1.67x"]  # whole layers: not of one
    assert page.read_text().count("- early_exit, 1: ") == 3
    assert (tmp_path / "baselines_model_both.png").exists()

    monkeypatch.setattr(studies.Study, "machine", "another machine")
    with pytest.raises(ForeignFileError, match="lacks some"):  # times are of one machine
        baselines.main([*arguments, "--inner", "eager", "--policies", "shortgpt", "--phases", "prefill"])
    assert baselines.main([*arguments, "--inner", "eager"]) == 0
    told = page.read_text()
    assert "Scores made on: float32, cpu" in told
    assert "; another machine." in told  # those of shortgpt
    assert baselines.main([*arguments, "--measure", "--policies", "unified", "shortgpt", "--phases", "prefill"]) == 0
    shown = page_rows(page)
    assert set(shown["unified"][0]) == {"-"}
    assert "-" not in shown["shortgpt"][0]
    with pytest.raises(ForeignFileError, match="--windows"):
        baselines.main([*arguments, "--windows", "2"])


@pytest.mark.parametrize("study", ["domain_shift", "quantized_cache", "baselines"])
def test_a_study_measures_the_compensation_that_it_names(
    study: str, made_up_texts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = save_tiny(tmp_path / "model")
    sizes = "--samples 2 --length 48 --windows 1 --skips 3 --threads 1".split()
    own = {
        "domain_shift": ["--compensations", "low_rank"],
        "quantized_cache": "--compensation low_rank --decoded 4 --bits 4".split(),
        "baselines": "--compensations low_rank --decoded 4 --policies adaskip --phases decode".split(),
    }
    compiled: list[SkipPlan] = []
    compile_ = adaskip_compile.compile
    monkeypatch.setattr(adaskip_compile, "compile", lambda *a, **k: compiled.append(a[1]) or compile_(*a, **k))
    monkeypatch.setattr(quantized_cache, "quantiser", lambda _, held: quantized_cache._as_it_is(held))
    main = importlib.import_module(f"bench.{study}").main
    assert main(["--model", str(model), *sizes, *own[study], "--out", str(tmp_path)]) == 0
    skipping = [plan for plan in compiled if plan.all_paths]
    assert skipping
    for plan in skipping:
        assert {path: one.form for path, one in plan.maps.items()} == dict.fromkeys(plan.all_paths, "low_rank")
