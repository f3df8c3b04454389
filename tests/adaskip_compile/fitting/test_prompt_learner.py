"""Learning from prompts within a loss: everything runs in full until enough are seen, then follows what was found with them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.fitting import loss_budget, prompt_learner
from adaskip_compile.fitting.budget_texts import BudgetSizes
from adaskip_passes.errors import CaptureError, OptionError
from tests.made_up_texts import made_up
from tests.models import tiny, tokens
from tests.tiny_checkpoints import byte_tokenizer

LENGTH = 180
PLAN = SkipPlan.from_prompt_scales({"model.layers.1.self_attn": 1.1, "model.layers.1.mlp": 0.9})


def model_of(**how: Any) -> Any:
    return tiny("llama", num_hidden_layers=3, vocab_size=260, max_position_embeddings=1024, **how)


def prompt(seed: int, length: int = LENGTH) -> torch.Tensor:
    return torch.tensor([byte_tokenizer()(made_up("sea", seed)[:length]).input_ids])


def compiled(model: Any, **options: Any) -> Any:
    how: dict[str, Any] = {"tokenizer": byte_tokenizer(), "inner": "eager", "progress": False, "learn": 3, **options}
    return adaskip_compile.compile(model, **how)


def last_body(model: Any) -> int:
    """Return how many tokens of the last request's prompt were skipped for."""
    return int(adaskip_compile.report(model).requests[-1].body_tokens)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[list[str]]]:
    """Return what makes a search return a plan or fail, and gives a list of the texts of each."""

    def install(result: Any) -> list[list[str]]:
        seen: list[list[str]] = []

        def find(_: Any, __: Any, ___: Any, texts: list[str], **____: Any) -> SkipPlan:
            seen.append(list(texts))
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(prompt_learner, "find_plan", find)
        return seen

    return install


def ask(model: Any, ids: torch.Tensor, **how: Any) -> None:
    model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, **how)


def test_the_prompt_after_the_last_learned_one_follows_the_plan(searches: Any, cache_dir: Path) -> None:
    seen = searches(PLAN)
    model = compiled(model_of(), max_loss=0.05)
    for seed in range(3):
        ask(model, prompt(seed))
        assert last_body(model) == 0
    assert not seen
    ask(model, prompt(3))
    assert seen == [[made_up("sea", seed)[:LENGTH] for seed in range(3)]]
    assert last_body(model) == LENGTH - 33
    ask(model, prompt(4))
    assert len(seen) == 1
    [session] = adaskip_compile.report(model).sessions
    assert "everything runs in full until 3 prompts are seen" in str(session.notes)
    assert "within 5 %" in str(session.notes)
    assert "found with 3 prompts: the bodies of new ones skip something in 2 sublayers" in session.notes

    # The next process starts with it, and a budget of another kind does not.
    again = compiled(model_of(), max_loss=0.05)
    ask(again, prompt(5))
    assert last_body(again) == LENGTH - 33
    for other in ({"learn": 4, "max_loss": 0.05}, {"max_loss": 0.04}):
        ask(compiled(again, **other), prompt(5))
        assert last_body(again) == 0


def test_rows_of_a_batch_are_prompts_without_their_padding(searches: Any, cache_dir: Path) -> None:
    seen = searches(PLAN)
    model = compiled(model_of(), learn=2)
    ids = torch.cat([prompt(0), prompt(1)])
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    ask(model, ids, attention_mask=mask)
    ask(model, prompt(2, 60))  # no prompt
    assert not seen
    ask(model, prompt(3))
    assert seen == [[made_up("sea", 0)[10:LENGTH], made_up("sea", 1)[:LENGTH]]]


def test_too_little_text_is_learned_from_for_longer(cache_dir: Path) -> None:
    model = compiled(model_of(), learn=2)
    for seed in range(3):
        ask(model, prompt(seed))
    notes = adaskip_compile.report(model).sessions[0].notes
    assert any("goes on until 4 prompts are seen" in note for note in notes), notes
    assert last_body(model) == 0


@pytest.mark.parametrize("error", [CaptureError("it breaks"), LookupError("a mistake of ours")])
def test_what_goes_wrong_is_no_error_of_the_request(error: Exception, searches: Any, cache_dir: Path) -> None:
    seen = searches(error)
    model = compiled(model_of(), learn=1)
    ask(model, prompt(0))
    ask(model, prompt(1))
    ask(model, prompt(2))
    assert len(seen) == 1
    assert last_body(model) == 0
    assert any(
        f"prompts skip nothing: {type(error).__name__}" in note
        for note in adaskip_compile.report(model).sessions[0].notes
    )


def test_other_threads_do_not_wait(searches: Any, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searches(PLAN)
    model = compiled(model_of(), learn=1)
    ask(model, prompt(0))
    begun, go_on = threading.Event(), threading.Event()

    def find(*_: Any, **__: Any) -> SkipPlan:
        begun.set()
        assert go_on.wait(60)
        return PLAN

    monkeypatch.setattr(prompt_learner, "find_plan", find)
    waiting = threading.Thread(target=ask, args=(model, prompt(1)))
    waiting.start()
    assert begun.wait(60)
    ask(model, prompt(2))
    assert last_body(model) == 0
    go_on.set()
    waiting.join()
    assert last_body(model) == LENGTH - 33


def test_texts_and_prompts_to_learn_from_are_not_both_given() -> None:
    with pytest.raises(OptionError, match="learn= finds it with what the model is given"):
        compiled(model_of(), texts=["text"])
    with pytest.raises(OptionError, match="learn=0: takes a number of requests"):
        compiled(model_of(), learn=0)


def test_embeddings_are_not_learned_from(searches: Any, cache_dir: Path) -> None:
    model = compiled(model_of(), learn=1)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(prompt(0)))
    assert "a prompt that comes as embeddings is not learned from" in adaskip_compile.report(model).sessions[0].notes


def test_a_search_with_the_prompts_of_a_model(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under generate and inference mode: what is found runs as any plan does."""
    sizes = BudgetSizes(prompt=300, continued=32, fitted=9, measured=2, needles=2)
    monkeypatch.setattr(loss_budget, "BudgetSizes", lambda: sizes)
    model = compiled(model_of(), learn=16, max_loss=99, context=300)
    with torch.inference_mode():
        for seed in range(17):
            ask(model, prompt(seed, 700))
    assert last_body(model) == 700 - 33
    [request] = adaskip_compile.report(model).requests[-1:]
    assert request.prompt_skipped
    ask(model, tokens(1, 140))
    assert last_body(model) == 140 - 33
