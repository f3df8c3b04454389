from __future__ import annotations

import pytest

from adaskip_compile.evaluation.classification import classified, make_questions
from adaskip_compile.texts import Domain
from adaskip_passes.errors import OptionError
from tests.adaskip_compile.evaluation.readers import Reader
from tests.made_up_texts import WORDS, made_up_domain
from tests.tiny_checkpoints import byte_tokenizer

DOMAINS = [made_up_domain("sea"), made_up_domain("city")]


def tell(text: str) -> str:
    """Name the kind of the last passage."""
    asked = text.rpartition("Text: ")[2]
    return next(name for name, words in WORDS.items() if any(word in asked for word in words))


def test_who_tells_the_kinds_apart_is_right_and_who_does_not_is_right_by_chance():
    tokenizer = byte_tokenizer()
    questions = make_questions(tokenizer, DOMAINS, count=6, examples=2, passage=20)
    assert [question.answer for question in questions] == [0, 1] * 3
    assert classified(Reader(tokenizer, tell), questions) == (1.0,) * 6
    assert classified(Reader(tokenizer, lambda _: "sea"), questions) == (1.0, 0.0) * 3


def test_examples_and_queries_come_from_other_halves_and_are_labelled_rightly():
    tokenizer = byte_tokenizer()
    for question in make_questions(tokenizer, DOMAINS, count=4, examples=3, passage=30):
        *examples, query = tokenizer.decode(question.ids).split("Text: ")[1:]
        assert len(examples) == 6
        for example in examples:
            passage, _, kind = example.partition("\nKind: ")
            assert passage in {domain.name: domain for domain in DOMAINS}[kind.strip()].profiling.replace("\n", " ")
        passage, _, rest = query.partition("\nKind:")
        assert passage in DOMAINS[question.answer].evaluation.replace("\n", " ")
        assert rest == ""


def test_labels_that_cannot_be_told_apart_are_refused():
    twin = Domain("ship", DOMAINS[1].profiling, DOMAINS[1].evaluation)
    with pytest.raises(OptionError, match="'sea' and 'ship' begin with the same token"):
        make_questions(byte_tokenizer(), [DOMAINS[0], twin], count=1)
    with pytest.raises(OptionError, match="needs two domains or more"):
        make_questions(byte_tokenizer(), DOMAINS[:1], count=1)
