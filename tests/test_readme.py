"""The README's Python runs, with a tiny model in place of the pretrained one; its commands exist."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

import adaskip_compile
from adaskip_compile import checkpoints, cli
from tests.models import tiny
from tests.tiny_checkpoints import byte_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def tiny_checkpoint(_: str):
    tokenizer = byte_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 6, "hidden_size": 32, "intermediate_size": 32}
    sizes["max_position_embeddings"] = 4096
    return tiny("llama", **sizes), tokenizer


def test_the_python_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(checkpoints, "load_checkpoint", tiny_checkpoint)
    monkeypatch.setattr(adaskip_compile, "compile", functools.partial(adaskip_compile.compile, inner="eager"))
    [example] = blocks("python")
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102 - our own page
    report = adaskip_compile.report(names["model"])
    assert report.requests[-1].skipped == {}
    assert str(report) in capsys.readouterr().out


def test_two_commands_are_enough_to_try_it():
    assert "make demo\nmake test\n" in blocks("sh")


def test_the_page_is_read_in_two_minutes():
    assert len(README.splitlines()) <= 120


def test_every_command_is_listed_and_no_other():
    listed = re.findall(r"^\| `adaskip (\w+)", README, re.MULTILINE)
    assert listed == [module.__name__.rpartition(".")[2] for module in cli.COMMANDS]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "bench/README.md"])
def test_links_lead_somewhere(page: str):
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text())
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()] == []
