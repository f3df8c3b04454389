from __future__ import annotations

import re

import pytest

from adaskip_compile.evaluation.retrieval import retrieved
from adaskip_compile.needles import make_needles
from adaskip_passes.errors import OptionError
from tests.adaskip_compile.evaluation.readers import Reader
from tests.made_up_texts import made_up
from tests.tiny_checkpoints import byte_tokenizer

FILLER = [made_up("sea", 1), made_up("city", 1)]


def look_up(text: str) -> str:
    """Answer the question that ``text`` ends with, as a perfect reader does."""
    name = re.findall(r"What is the code of the ([\w ]+)\?", text)[-1]
    found = re.search(rf"The code of the {name} is (\d+)\.", text)
    return f" {found.group(1)}." if found else " unknown"


def test_prompts_have_the_length_asked_for_and_hold_the_code_at_its_depth():
    tokenizer = byte_tokenizer()
    needles = make_needles(tokenizer, FILLER, context=3000, count=6, depths=(0.1, 0.9))
    assert [needle.depth for needle in needles] == [0.1, 0.9] * 3
    assert len({needle.code for needle in needles}) == 6
    for needle in needles:
        text = tokenizer.decode(needle.ids)
        assert len(needle.ids) == 3000
        assert text.count("The code of the ") == 5  # four facts and the question
        assert text.index(f"is {needle.code}.") / len(text) == pytest.approx(needle.depth, abs=0.1)


def test_no_fact_lies_inside_another():
    tokenizer = byte_tokenizer()
    for needle in make_needles(tokenizer, FILLER, context=700, count=20):
        facts = re.findall(r"\nThe code of the \w+ \w+ is \d{5}\.\n", tokenizer.decode(needle.ids))
        assert len(facts) == 4


def test_the_same_seed_draws_the_same_needles():
    draws = [make_needles(byte_tokenizer(), FILLER, context=600, count=2, seed=seed) for seed in (1, 1, 2)]
    codes = [[needle.code for needle in draw] for draw in draws]
    assert codes[0] == codes[1] != codes[2]
    assert draws[0][0].ids.equal(draws[1][0].ids)


def test_who_reads_finds_every_needle_and_who_guesses_finds_none():
    tokenizer = byte_tokenizer()
    needles = make_needles(tokenizer, FILLER, context=2000, count=6)
    assert retrieved(Reader(tokenizer, look_up), tokenizer, needles) == (1.0,) * 6
    assert retrieved(Reader(tokenizer, lambda _: " 12345."), tokenizer, needles) == (0.0,) * 6


def test_who_sees_only_the_end_finds_what_stands_there():
    tokenizer = byte_tokenizer()
    needles = make_needles(tokenizer, FILLER, context=2000, count=4, depths=(0.1, 0.9), distractors=0)
    reader = Reader(tokenizer, lambda text: look_up(text[-1000:]))
    assert retrieved(reader, tokenizer, needles) == (0.0, 1.0, 0.0, 1.0)


def test_a_number_that_goes_on_is_another_one():
    tokenizer = byte_tokenizer()
    needles = make_needles(tokenizer, FILLER, context=600, count=1)
    longer = Reader(tokenizer, lambda text: look_up(text).replace(".", "7"))
    assert retrieved(longer, tokenizer, needles) == (0.0,)


def test_a_context_without_room_is_refused():
    with pytest.raises(OptionError, match=r"100 tokens are too few for needles; at least \d+"):
        make_needles(byte_tokenizer(), FILLER, context=100, count=1)
