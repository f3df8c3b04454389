"""``adaskip run``: prompts from everywhere, through the chat template or not, streamed, sampled, and in conversation."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.checkpoints import load_checkpoint
from adaskip_compile.cli import answers, main
from adaskip_compile.cli.answers import Answering, Conversation, Sampling
from tests.tiny_checkpoints import save_tiny

pytestmark = pytest.mark.shares_captures

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ATTENTION = "model.layers.{}.self_attn"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the same model with a chat template."""
    folder = save_tiny(tmp_path_factory.mktemp("chatty"))
    _, tokenizer = load_checkpoint(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def ask(capfd: pytest.CaptureFixture[str]):
    """Return a function that runs the command with a compiler that compiles nothing, and returns its JSON and its words."""

    def run(model: str, *arguments: str, new_tokens: int = 6) -> tuple[dict[str, Any], str]:
        command = ["run", model, *arguments, "--max-new-tokens", str(new_tokens), "--inner", "eager", "--json", "-"]
        capfd.readouterr()
        assert main(command) == 0
        out, err = capfd.readouterr()
        return json.loads(out), err

    return run


def eagerly(model: str, text: str, new_tokens: int = 6) -> str:
    """Return what the uncompiled model answers to ``text`` as it stands."""
    loaded, tokenizer = load_checkpoint(model)
    inputs = tokenizer(text, return_tensors="pt")
    generated = loaded.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(generated[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_a_plan_is_used_and_told_of(model: str, tmp_path: Path, ask: Any):
    SkipPlan.from_scales({ATTENTION.format(2): 1.0, ATTENTION.format(3): 1.0}).save(tmp_path / "plan.json")
    found, words = ask(model, "--plan", str(tmp_path / "plan.json"), "--prompt", "some words")
    [request] = found["report"]["sessions"][0]["requests"]
    assert set(request["skipped"]) == {ATTENTION.format(2), ATTENTION.format(3)}
    assert "prompt tokens; 6 new: the first after" in words


def test_text_is_that_of_the_uncompiled_model(model: str, ask: Any):
    found, _ = ask(model, "--prompt", "some words")
    [answer] = found["answers"]
    assert answer["text"] == eagerly(model, "some words")
    assert (answer["prompt_tokens"], answer["new_tokens"], answer["cached_tokens"]) == (len("some words"), 6, 0)
    assert answer["first_token_s"] > 0
    assert answer["tokens_per_s"] > 0
    assert answer["cut"]


def test_prompts_come_from_arguments_files_and_standard_input(
    model: str, tmp_path: Path, ask: Any, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "prompt.txt").write_text("some more words")
    monkeypatch.setattr("sys.stdin", io.StringIO("and others"))
    given = ["--prompt", "some words", "--prompt-file", str(tmp_path / "prompt.txt"), "--prompt-file", "-"]
    found, words = ask(model, *given, new_tokens=2)
    assert [answer["prompt"] for answer in found["answers"]] == ["some words", "some more words", "and others"]
    assert [answer["text"] for answer in found["answers"]] == [
        eagerly(model, prompt, 2) for prompt in ("some words", "some more words", "and others")
    ]
    assert "== 2 of 3: some more words" in words


def test_a_chat_template_is_used_unless_raw(chatty: str, ask: Any):
    found, _ = ask(chatty, "--prompt", "why?", "--system", "be brief")
    assert found["answers"][0]["text"] == eagerly(chatty, "system: be brief\nuser: why?\nassistant:")
    found, _ = ask(chatty, "--prompt", "why?")
    assert found["answers"][0]["text"] == eagerly(chatty, "user: why?\nassistant:")
    found, _ = ask(chatty, "--prompt", "why?", "--raw")
    assert found["answers"][0]["text"] == eagerly(chatty, "why?")


def test_samples_are_drawn_again_by_their_seed(model: str, ask: Any):
    def drawn(*arguments: str) -> str:
        return ask(model, "--prompt", "some words", "--temperature", "2", *arguments)[0]["answers"][0]["text"]

    assert drawn("--seed", "1") == drawn("--seed", "1") != drawn("--seed", "2")
    greedy = ask(model, "--prompt", "some words")[0]["answers"][0]["text"]
    assert drawn("--top-p", "1e-6") == greedy != drawn()


def test_a_conversation_reads_its_beginning_once(chatty: str, ask: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("and why?\n\n/new\nand why?\n/exit\nnever asked\n"))
    found, _ = ask(chatty, "--chat", "--prompt", "what is it?")
    first, second, third = found["answers"]
    assert [one["prompt"] for one in found["answers"]] == ["what is it?", "and why?", "and why?"]
    assert second["prompt_tokens"] > third["prompt_tokens"] == len("user: and why?\nassistant:")
    assert first["cached_tokens"] == third["cached_tokens"] == 0
    assert third["text"] == eagerly(chatty, "user: and why?\nassistant:")


class FromList:
    """A tokenizer whose chat template is a list of numbers, so that answers are read back as they were decoded."""

    chat_template = "a list of numbers"

    def __init__(self) -> None:
        self.answers: list[list[int]] = []

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(one)) for one in ids)

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> Any:
        from transformers import BatchEncoding

        ids = [int(one) for message in messages for one in message["content"].split()]
        return BatchEncoding({"input_ids": torch.tensor([ids])})


def conversation_of(model: str, write: Any = lambda _: None) -> Conversation:
    loaded, _ = load_checkpoint(model)
    adaskip_compile.compile(loaded, SkipPlan.from_scales({ATTENTION.format(1): 0.9}), inner="eager")
    return Conversation(Answering(loaded, FromList(), Sampling(), 4, write))


def test_text_is_shown_word_by_word(model: str):
    pieces: list[str] = []
    text = conversation_of(model, pieces.append).ask("5 6 7").text
    assert [piece.strip() for piece in pieces if piece] == text.split()


def test_cached_turns_answer_as_those_that_are_read_anew(model: str):
    cached, anew = conversation_of(model), conversation_of(model)
    for turn, message in enumerate(("5 6 7 8 9", "10 11", "12")):
        anew._cache = anew._cached = None
        expected, got = anew.ask(message), cached.ask(message)
        assert got.text == expected.text
        assert (got.cached > 0, expected.cached) == (turn > 0, 0)
        assert got.cached in (0, got.prompt_tokens - len(message.split()) - 1)


def test_an_answer_that_was_changed_is_read_anew(model: str):
    talk = conversation_of(model)
    talk.ask("5 6 7 8 9")
    talk.messages[-1]["content"] = "20 21 22 23"
    assert talk.ask("10").cached == 0


def test_an_interrupted_answer_is_forgotten(chatty: str, ask: Any, monkeypatch: pytest.MonkeyPatch):
    answer = Answering.generate

    def interrupted(self: Any, ids: torch.Tensor, *others: Any) -> Any:
        if ids.shape[1] == len("user: no, stop\nassistant:"):
            raise KeyboardInterrupt
        return answer(self, ids, *others)

    monkeypatch.setattr(Answering, "generate", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("no, stop\nwhy?\n"))
    found, words = ask(chatty, "--chat")
    [kept] = found["answers"]
    assert kept["text"] == eagerly(chatty, "user: why?\nassistant:")
    assert "interrupted" in words


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one of --prompt, --prompt-file and --chat is needed"),
        (["--chat", "--raw"], "--raw goes without a chat template"),
        (["--prompt", "a", "--system", "b", "--raw"], "--raw goes without a chat template"),
        (["--prompt", "a", "--system", "b"], "no chat template, which --chat and --system need"),
        (["--chat"], "no chat template, which --chat and --system need"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature -1.0: takes 0 or more"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature nan: takes 0 or more"),
        (["--prompt", "a", "--seed", str(2**64)], "takes a number of 64 bits"),
        (["--chat", "--prompt-file", "-"], "give it once, and not with --chat"),
        (["--prompt-file", "-", "--prompt-file", "-"], "give it once, and not with --chat"),
        (["--prompt", "a", "--top-p", "0.9"], "--top-p 0.9: takes a share above 0, up to 1, and a --temperature"),
        (["--prompt", "a", "--temperature", "1", "--top-p", "0"], "--top-p 0.0: takes a share above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(flags: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]):
    assert main(["run", model, *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--chat"], ["--prompt", "a", "--system", "b"]])
def test_what_a_template_refuses_is_told_before_a_plan_is_looked_for(
    flags: list[str],
    chatty: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    loaded, tokenizer = load_checkpoint(chatty)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    for part in (loaded, tokenizer):
        part.save_pretrained(tmp_path)
    monkeypatch.setattr(adaskip_compile, "compile", None)
    assert main(["run", str(tmp_path), *flags, "--max-loss", "0.02"]) == 2
    assert "no such role" in capsys.readouterr().err


class Layer:
    def __init__(self, **states: Any) -> None:
        vars(self).update(states)


class Held:
    def __init__(self, length: int, *layers: Layer) -> None:
        self.layers, self.length = layers, length

    def get_seq_length(self) -> int:
        return self.length


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        (Held(9, Layer(keys=1)), True),
        (Held(8, Layer(keys=1)), False),
        (Held(9, Layer(keys=1), Layer(conv_states={}, recurrent_states={})), False),
        (Held(9), False),
        (None, False),
    ],
)
def test_a_later_turn_goes_on_from_caches_of_attention_alone(cache: Any, expected: bool):
    """A hybrid's recurrent state begins anew with every call of several tokens."""
    assert answers._goes_on(cache, 10) is expected


def test_an_interrupt_between_two_questions_ends_the_talk(chatty: str, ask: Any, monkeypatch: pytest.MonkeyPatch):
    lines = iter(["why?"])

    def read(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("builtins.input", read)
    found, _ = ask(chatty, "--chat")
    assert [one["prompt"] for one in found["answers"]] == ["why?"]
    assert found["report"]["sessions"]


def test_standard_input_without_text_is_refused(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    assert main(["run", model, "--prompt-file", "-"]) == 2
    assert "standard input holds no text" in capsys.readouterr().err
