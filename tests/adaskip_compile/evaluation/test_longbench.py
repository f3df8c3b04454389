"""LongBench's format, on made-up files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from adaskip_compile.evaluation import longbench_metrics as metrics
from adaskip_compile.evaluation.longbench import longbench_scores, read_items
from adaskip_compile.evaluation.longbench_tasks import CHINESE, TASKS
from adaskip_passes.errors import DamagedFileError, MissingFileError, OptionError
from tests.adaskip_compile.evaluation.readers import Reader
from tests.tiny_checkpoints import byte_tokenizer


def item(**fields: Any) -> dict[str, Any]:
    """Return an item with all of LongBench's fields."""
    return {
        "input": "Question: How far is the moon?\nType:",
        "context": "Question: Who wrote it?\nType: Person\n" * 3,
        "answers": ["Distance"],
        "length": 20,
        "dataset": "trec",
        "language": "en",
        "all_classes": ["Person", "Distance", "Long Distance"],
        "_id": "0",
        **fields,
    }


def write(folder: Path, task: str, *items: dict[str, Any]) -> Path:
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in items))
    return folder


def test_items_are_read_and_put_into_the_task_s_prompt(tmp_path: Path):
    tokenizer = byte_tokenizer()
    folder = write(tmp_path, "trec", item(), item(_id="1", input="Q2 {braces}"), item(_id="2"))
    found = read_items(folder, "trec", tokenizer, max_tokens=5000, count=2)
    assert len(found) == 2
    assert found[0].answers == ("Distance",)
    assert found[0].classes == ("Person", "Distance", "Long Distance")
    text = tokenizer.decode(found[1].ids)
    assert text == TASKS["trec"].prompt.format(context=item()["context"], input="Q2 {braces}")
    assert text.startswith("Please determine the type of the question below.")


def test_a_long_prompt_keeps_its_first_and_last_half(tmp_path: Path):
    tokenizer = byte_tokenizer()
    folder = write(tmp_path, "trec", item(context="x" * 1000))
    [found] = read_items(folder, "trec", tokenizer, max_tokens=200)
    whole = TASKS["trec"].prompt.format(context="x" * 1000, input=item()["input"])
    assert tokenizer.decode(found.ids) == whole[:100] + whole[-100:]


def test_only_tasks_that_are_no_examples_to_continue_are_chats(tmp_path: Path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    texts = {}
    for task in ("trec", "hotpotqa"):
        [found] = read_items(write(tmp_path, task, item()), task, tokenizer, max_tokens=5000)
        texts[task] = tokenizer.decode(found.ids)
    assert texts["hotpotqa"].startswith("[Answer the question based on the given passages.")
    assert texts["hotpotqa"].endswith("Answer:]>")
    assert not texts["trec"].startswith("[")


def test_answers_are_scored_by_the_task_s_metric(tmp_path: Path):
    tokenizer = byte_tokenizer()
    folder = write(tmp_path, "trec", item(), item(answers=["Person", "Distance"]))
    items = read_items(folder, "trec", tokenizer, max_tokens=5000)
    right = Reader(tokenizer, lambda _: "\n Distance\nQuestion: Person or Long Distance?")
    assert longbench_scores(right, tokenizer, "trec", items) == (1.0, 1.0)
    assert right.how[0]["max_new_tokens"] == 64
    assert longbench_scores(Reader(tokenizer, lambda _: "no idea"), tokenizer, "trec", items) == (0.0, 0.0)


def test_a_dialogue_s_summary_ends_with_its_line(tmp_path: Path):
    pytest.importorskip("rouge_score")
    tokenizer = byte_tokenizer()
    items = read_items(write(tmp_path, "samsum", item(answers=["He left."])), "samsum", tokenizer, max_tokens=5000)
    reader = Reader(tokenizer, lambda _: "He left.\nDialogue: more")
    assert longbench_scores(reader, tokenizer, "samsum", items) == (1.0,)
    newline = tokenizer("\n", add_special_tokens=False).input_ids[0]
    assert reader.how[0]["eos_token_id"] == [2, newline]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no items"),
        ("{", "line 1: is not JSON"),
        ("[1]", "line 1: is no item of LongBench"),
        ('{"input": "a"}', "it lacks context, answers, all_classes"),
        (json.dumps(item(answers="text")), "answers and all_classes lists"),
        (json.dumps(item(context=3)), "input and context are text"),
    ],
)
def test_a_damaged_file_is_refused(content: str, message: str, tmp_path: Path):
    (tmp_path / "trec.jsonl").write_text(content)
    with pytest.raises(DamagedFileError, match=message):
        read_items(tmp_path, "trec", byte_tokenizer(), max_tokens=100)


def test_unknown_chinese_and_missing_tasks_are_refused(tmp_path: Path):
    for task in CHINESE:
        with pytest.raises(OptionError, match=f"--tasks {task}: is in Chinese"):
            read_items(tmp_path, task, byte_tokenizer(), max_tokens=100)
    with pytest.raises(OptionError, match="there is no such task; known are narrativeqa"):
        read_items(tmp_path, "treck", byte_tokenizer(), max_tokens=100)
    with pytest.raises(MissingFileError, match=r"qasper\.jsonl cannot be read \(No such file"):
        read_items(tmp_path, "qasper", byte_tokenizer(), max_tokens=100)


def test_every_english_task_has_a_prompt_with_its_context_and_a_length():
    assert len(TASKS) == 16
    for task in TASKS.values():
        assert "{context}" in task.prompt
        assert not re.search(r"{(?!context}|input})", task.prompt)
        assert task.max_new_tokens in (32, 64, 128, 512)


def test_the_metrics():
    assert metrics.f1("The answer is: red, house!", "a red house") == pytest.approx(2 * 2 / (4 + 2))
    assert metrics.f1("", "red") == 0
    assert metrics.classification("Long Distance", "Long Distance", ["Distance", "Long Distance"]) == 1
    assert metrics.classification("Long Distance", "Distance", ["Distance", "Long Distance"]) == 0.5
    assert metrics.count("There are 5 or 7, so 5", "5") == pytest.approx(2 / 3)
    assert metrics.count("none", "5") == 0
    assert metrics.retrieval("Paragraph 12", "Paragraph 12") == 1
    assert metrics.retrieval("Paragraph 1", "Paragraph 12") == 0
    assert metrics.code_similarity("\n# a comment\n```\nreturn x\nmore", "return x") == 1
    assert metrics.code_similarity("return y", "return x") == pytest.approx(0.88)
