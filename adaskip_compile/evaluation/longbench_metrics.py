"""How LongBench scores an answer (arXiv 2308.14508), 0 to 1 each; an item's score is its best over the right answers."""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from adaskip_compile.evaluation.continuations import rouge_l

Metric = Callable[[str, str, Sequence[str]], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def f1(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Return the F1 of the words in common, whatever their case, punctuation and articles.

    >>> f1("The red house.", "red house")
    1.0
    """
    said, wanted = _words(answer), _words(right)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def rouge(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Return the Rouge-L F1; 0 for an empty answer."""
    return rouge_l([answer], [right])[0]


def classification(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Return 1 / n where the right class is one of the n classes that the answer names, else 0.

    A class whose name is part of the right one's does not count.

    >>> classification("Either a city or a state", "city", ["city", "state", "river"])
    0.5
    """
    named = [name for name in classes if name in answer and (name == right or name not in right)]
    return 1 / len(named) if right in named else 0.0


def count(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Return the share of the numbers in the answer that are the right one."""
    return _share(answer, right.strip())


def retrieval(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Return the share of the numbers in the answer that are the right paragraph's; ``right`` is ``Paragraph N``."""
    number = re.search(r"\d+", right)
    return _share(answer, number.group()) if number else 0.0


def code_similarity(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Return how alike the first line of code in the answer and the right line are, in whole percent."""
    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, code, right).ratio()) / 100


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _share(answer: str, number: str) -> float:
    numbers = re.findall(r"\d+", answer)
    return numbers.count(number) / len(numbers) if numbers else 0.0
