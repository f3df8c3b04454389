from __future__ import annotations

from pathlib import Path

import pytest

from adaskip_compile.costs.timers import Measured, predict
from adaskip_compile.evaluation import calibration
from adaskip_compile.evaluation.calibration import calibrate, steps
from adaskip_compile.evaluation.timing import Generation
from adaskip_compile.inspection.inspection import inspect_model
from tests.models import tiny


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Let time pass as on a machine where an attention takes (3 + t / 100) ms a token, an FFN 2 ms, and the rest 5 ms."""
    plans: list = []
    monkeypatch.setattr(calibration, "compile", lambda model, plan, inner: plans.append(plan))

    def generate(model, ids, new_tokens):
        layers, context = model.config.num_hidden_layers, ids.shape[1]
        attentions = layers - sum(path.endswith("self_attn") for path in plans[-1].paths)
        ffns = layers - sum(path.endswith("mlp") for path in plans[-1].paths)
        token = 1e-3 * (attentions * (3 + context / 100) + ffns * 2 + 5)
        return Generation((), context * token, (token,) * (new_tokens - 1), 0)

    monkeypatch.setattr(calibration, "generate", generate)


@pytest.mark.usefixtures("machine")
def test_the_time_of_each_sublayer_is_found_by_leaving_it_out(tmp_path: Path):
    model = tiny("llama", num_hidden_layers=5)
    found = inspect_model(model)
    done: list[int] = []
    measured = calibrate(model, found, contexts=(10, 40), rounds=2, advance=lambda: done.append(1))
    assert len(done) == steps(found, (10, 40), 2)
    for context in (10, 25, 40, 100):  # between what was measured, and after it
        decode, prefill = (predict(found, measured, phase, context) for phase in ("decode", "prefill"))
        attention = 1e-3 * (3 + context / 100)
        assert (*decode.groups, decode.rest) == pytest.approx((attention, 2e-3, 5e-3))
        assert prefill.full == pytest.approx(context * 5 * (attention + 2e-3) + context * 5e-3)
    measured.save(str(tmp_path / "machine.json"))
    assert Measured.load(str(tmp_path / "machine.json")) == measured


def test_neither_a_lucky_run_nor_a_slower_machine_changes_what_is_measured(monkeypatch: pytest.MonkeyPatch):
    plans: list = []
    monkeypatch.setattr(calibration, "compile", lambda model, plan, inner: plans.append(plan))
    full = iter((1.0, 0.5, 1.0, 1.0, 1.0))  # the first is not timed, the second is lucky

    def generate(model, ids, new_tokens):
        turn = (len(plans) - 1) // 3
        load = (1, 1, 3, 1.5, 1)[turn]  # what else runs meets a whole round
        seconds = load * (0.8 if plans[-1].paths else next(full))
        return Generation((), seconds, (seconds,), 0)

    monkeypatch.setattr(calibration, "generate", generate)
    model = tiny("llama", num_hidden_layers=4)
    found = inspect_model(model)
    measured = calibrate(model, found, contexts=(10,), rounds=4)
    decode = predict(found, measured, "decode", 10)
    assert [seconds / decode.full for seconds in decode.groups] == pytest.approx([0.1, 0.1])


@pytest.mark.usefixtures("machine")
def test_rounds_that_agree_leave_no_doubt():
    model = tiny("llama", num_hidden_layers=4)
    found = inspect_model(model)
    assert calibrate(model, found, contexts=(10,), rounds=2).doubts == ()
    [doubt] = calibrate(model, found, contexts=(10,), rounds=1).doubts
    assert "one round" in doubt


def test_rounds_that_do_not_agree_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    plans: list = []
    monkeypatch.setattr(calibration, "compile", lambda model, plan, inner: plans.append(plan))

    def generate(model, ids, new_tokens):
        turn = (len(plans) - 1) // 3
        attention = any(path.endswith("self_attn") for path in plans[-1].paths)
        seconds = (1.4 if turn == 2 else 0.7) if attention else 1.0 - 0.1 * len(plans[-1].paths)
        return Generation((), seconds, (seconds,), 0)

    monkeypatch.setattr(calibration, "generate", generate)
    model = tiny("llama", num_hidden_layers=4)
    measured = calibrate(model, inspect_model(model), contexts=(1000,), rounds=3)
    assert list(measured.doubts) == [
        f"attention in {phase} at 1,000 tokens: leaving half of them out saved -40% to 30% of the time, by round"
        for phase in ("prefill", "decode")
    ]
    measured.save(str(tmp_path / "machine.json"))
    assert Measured.load(str(tmp_path / "machine.json")) == measured


def test_a_real_model_is_measured():
    model = tiny("llama", num_hidden_layers=4)
    found = inspect_model(model)
    measured = calibrate(model, found, contexts=(16, 64), rounds=2, new_tokens=4, inner="eager")
    for phase in found.phases:
        assert predict(found, measured, phase, 32).full > 0
        assert all(value >= 0 for row in measured.tables[phase] for value in row)


def test_parts_that_seem_more_than_the_whole_are_brought_down_to_it(monkeypatch: pytest.MonkeyPatch):
    """Noise may have each half of the model save 80 % of the time."""
    plans: list = []
    monkeypatch.setattr(calibration, "compile", lambda model, plan, inner: plans.append(plan))
    monkeypatch.setattr(
        calibration,
        "generate",
        lambda model, ids, steps: Generation((), *((0.2, (0.2,)) if plans[-1].paths else (1.0, (1.0,))), 0),
    )
    model = tiny("llama", num_hidden_layers=4)
    found = inspect_model(model)
    measured = calibrate(model, found, contexts=(10,), rounds=1)
    decode = predict(found, measured, "decode", 10)
    assert (decode.full, decode.rest) == pytest.approx((1.0, 0.0))
    assert decode.groups == pytest.approx((0.125, 0.125))
