"""The pytest plugin of :mod:`bench.foreign_tests`: tells how each test ended, and brings us in where it is told to.

    pytest -p bench.foreign_plugin --outcomes FILE [--with-us models|process] [--test-seconds N]

``models``: every generative model is compiled by us, with a plan that skips nothing, so that results must be what they are
without us. ``process``: one tiny model is compiled and run, and then the tests go on unchanged in
the process that we have been in.
"""

from __future__ import annotations

import functools
import json
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WAYS = ("models", "process")
_SEVERITY = ("skipped", "passed", "failed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take what the bench says."""
    parser.addoption("--outcomes", required=True, metavar="FILE", help="where to write how each test ended")
    parser.addoption("--with-us", choices=WAYS, help="how to bring us in; not at all by default")
    parser.addoption("--test-seconds", type=int, default=300, metavar="N", help="a test that takes longer has failed")


def pytest_configure(config: pytest.Config) -> None:
    """Bring us in before any test is imported."""
    models: list[Any] = []
    if config.getoption("--with-us") == "models":
        compile_models(models)
    elif config.getoption("--with-us") == "process":
        enter_process()
    outcomes = Path(config.getoption("--outcomes"))
    config.pluginmanager.register(Recorder(outcomes, models, config.getoption("--test-seconds")))


class Recorder:
    """Writes a line of JSON when a test starts and when it has ended, so that what kills the process is known too."""

    def __init__(self, path: Path, models: list[Any], seconds: int) -> None:
        self._path, self._models, self._seconds = path, models, seconds
        self._outcome, self._reason = "skipped", ""

    def _write(self, **line: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Count what cannot be imported as a failed test."""
        if report.failed:
            self._write(test=report.nodeid, outcome="failed", reason=_last_line(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note which test runs."""
        self._outcome, self._reason = "skipped", ""
        self._write(start=nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        """End a test that hangs."""
        signal.signal(signal.SIGALRM, self._out_of_time)
        signal.alarm(self._seconds)
        try:
            return (yield)
        finally:
            signal.alarm(0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the worst of a test's phases and subtests; setting up and tearing down pass for nothing."""
        outcome = report.outcome if report.when == "call" or report.failed else "skipped"
        if _SEVERITY.index(outcome) > _SEVERITY.index(self._outcome):
            self._outcome = outcome
        if report.failed:
            self._reason = _last_line(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Write how the test ended, and in how many graphs of ours its models ran."""
        sessions = [session for model in self._models for session in _sessions(model)]
        graphs = sum(len(session.graphs) for session in sessions)
        unskipped = sorted({reason for session in sessions for reason in session.unskipped_graphs})
        self._models.clear()
        self._write(test=nodeid, outcome=self._outcome, reason=self._reason, graphs=graphs, unskipped=unskipped)

    def pytest_sessionfinish(self) -> None:
        """Note that the process came to its end."""
        self._write(end=True)

    def _out_of_time(self, *_: Any) -> None:
        raise TimeoutError(f"took more than {self._seconds} s")


def compile_models(models: list[Any]) -> None:
    """Bring us in wherever a generative model of transformers is used, and put it on ``models``.

    It is compiled in place before ``generate`` and after ``eval``. Where a test compiles a model by itself, it is our
    backend that compiles it, in place of the one that the test names.
    """
    import torch
    from transformers import GenerationMixin, PreTrainedModel

    import adaskip_compile
    from adaskip_compile.backend import adaskip

    plan = adaskip_compile.SkipPlan.none()
    theirs: weakref.WeakSet[Any] = weakref.WeakSet()
    compile = torch.compile

    def bring_in(model: Any) -> None:
        if model not in theirs and model._compiled_call_impl is None and model.can_generate():
            adaskip_compile.compile(model, plan, inner="eager")
            models.append(model)

    def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
        bring_in(model)
        return generate_before(model, *args, **kwargs)

    def evaluate(model: Any) -> Any:
        bring_in(model)
        return evaluate_before(model)

    def compile_with_us(target: Any = None, **how: Any) -> Any:
        model = getattr(target, "__self__", target)
        if not isinstance(model, PreTrainedModel) or not model.can_generate():
            return compile(target, **how)
        theirs.add(model)
        models.append(model)
        model._compiled_call_impl = None
        how.pop("mode", None)
        return compile(target, **how | {"backend": adaskip, "options": {"plan": plan, "inner": "eager"}})

    generate_before, evaluate_before = GenerationMixin.generate, PreTrainedModel.eval
    GenerationMixin.generate = functools.wraps(generate_before)(generate)  # type: ignore[method-assign]
    PreTrainedModel.eval = functools.wraps(evaluate_before)(evaluate)  # type: ignore[method-assign]
    torch.compile = compile_with_us  # type: ignore[assignment]


def enter_process() -> None:
    """Do once in this process what a user does: compile a model with our backend, and generate."""
    import torch
    from torch._dynamo.backends.registry import list_backends
    from transformers import LlamaConfig, LlamaForCausalLM

    import adaskip_compile

    list_backends()  # reads the entry points
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    plan = adaskip_compile.SkipPlan.from_scales({"model.layers.2.mlp": 1.0})
    ids = torch.arange(1, 9)[None]
    lengths = {"max_new_tokens": 3, "min_new_tokens": 3}
    adaskip_compile.compile(model, plan)
    model.generate(ids, attention_mask=torch.ones_like(ids), **lengths)
    assert _sessions(model)[0].graphs, "the tiny model did not run in a graph of ours"


def _sessions(model: Any) -> tuple[Any, ...]:
    import adaskip_compile

    return adaskip_compile.report(model).sessions


def _last_line(report: Any) -> str:
    errors = [line for line in report.longreprtext.splitlines() if line.startswith("E  ")]
    return (errors or report.longreprtext.splitlines() or [""])[0].removeprefix("E").strip()[:300]
