"""LongBench (arXiv 2308.14508) for those who have its files: one JSONL file a task, read as the benchmark does.

A prompt that is too long loses its middle; only what is not a few-shot or code task goes through the tokenizer's chat
template; generation is greedy. Rouge-L is that of the library rouge-score, which splits words otherwise than the
benchmark's own, so scores of the summaries compare between plans and not with published ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaskip_compile.evaluation.generation import continue_greedily
from adaskip_compile.evaluation.longbench_tasks import CHINESE, TASKS, Task
from adaskip_passes.errors import DamagedFileError, MissingFileError, OptionError

_FIELDS = ("input", "context", "answers", "all_classes")


@dataclass(frozen=True)
class LongBenchItem:
    """One question: the prompt's token ids ``(tokens,)``, the right answers, and the classes to choose from, if any."""

    ids: torch.Tensor
    answers: tuple[str, ...]
    classes: tuple[str, ...]


def find_task(name: str) -> Task:
    """Return the task of this name.

    Raises:
        OptionError: There is none, or it is in Chinese.
    """
    if name in CHINESE:
        raise OptionError(
            f"--tasks {name}: is in Chinese, which needs a word splitter that is not built in; use the English tasks"
        )
    if name not in TASKS:
        raise OptionError(f"--tasks {name}: there is no such task; known are {', '.join(TASKS)}")
    return TASKS[name]


def read_items(
    folder: str | Path, task: str, tokenizer: Any, *, max_tokens: int, count: int | None = None
) -> list[LongBenchItem]:
    """Return the first ``count`` items (default: all) of a task, from ``TASK.jsonl`` in ``folder``.

    A prompt of more than ``max_tokens`` tokens keeps the first and the last half of as many.

    Raises:
        MissingFileError: There is no such file.
        DamagedFileError: A line is not an item of LongBench.
        OptionError: The task is unknown.
    """
    known = find_task(task)
    file = Path(folder).expanduser() / f"{task}.jsonl"
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError as error:
        raise MissingFileError(f"--longbench {folder}: {file.name} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{file}: is not in UTF-8") from error
    entries = [_parse(file, number, line) for number, line in enumerate(lines, 1) if line.strip()][:count]
    if not entries:
        raise DamagedFileError(f"{file}: holds no items")
    return [
        LongBenchItem(
            _prompt(tokenizer, known, entry, max_tokens), tuple(entry["answers"]), tuple(entry["all_classes"] or ())
        )
        for entry in entries
    ]


def longbench_scores(model: Any, tokenizer: Any, task: str, items: Iterable[LongBenchItem]) -> tuple[float, ...]:
    """Return the score of each item, 0 to 1."""
    known = find_task(task)
    found = []
    for item in items:
        how = _ending_with_a_line(model, tokenizer) if known.stop_at_line else {}
        new = continue_greedily(model, item.ids, known.max_new_tokens, **how)
        answer = tokenizer.decode(new, skip_special_tokens=True)
        if known.first_line:
            answer = answer.lstrip("\n").partition("\n")[0]
        found.append(max((known.metric(answer, right, item.classes) for right in item.answers), default=0.0))
    return tuple(found)


def _ending_with_a_line(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return what has ``generate`` stop at a line's end too, though not before the first token."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return {"eos_token_id": [*ends, tokenizer("\n", add_special_tokens=False).input_ids[-1]], "min_new_tokens": 1}


def _prompt(tokenizer: Any, task: Task, entry: dict[str, Any], max_tokens: int) -> torch.Tensor:
    text = task.prompt.format(context=entry["context"], input=entry["input"])
    ids = tokenizer(text, verbose=False).input_ids
    if len(ids) > max_tokens:
        half = max_tokens // 2
        text = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
        ids = tokenizer(text, verbose=False).input_ids
    if task.chat and tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    return torch.tensor(ids)


def _parse(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        lacking = [name for name in _FIELDS if name not in entry]
    except (ValueError, TypeError) as error:
        raise DamagedFileError(f"{file}, line {number}: is not JSON") from error
    if not isinstance(entry, dict) or lacking:
        raise DamagedFileError(f"{file}, line {number}: is no item of LongBench, it lacks {', '.join(lacking)}")
    texts = [entry["input"], entry["context"], *_list(entry["answers"]), *_list(entry["all_classes"] or [])]
    if not _list(entry["answers"]) or not all(isinstance(text, str) for text in texts):
        raise DamagedFileError(
            f"{file}, line {number}: input and context are text, answers and all_classes lists of it"
        )
    return entry


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [None]
