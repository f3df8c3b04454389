from __future__ import annotations

import pytest
import torch

from adaskip_compile import texts
from adaskip_compile.texts import held_out_texts, profiling_texts, windows
from adaskip_passes.errors import OptionError
from tests.tiny_checkpoints import byte_tokenizer


def test_the_domains_take_turns():
    assert [text.domain for text in profiling_texts(5)] == ["english", "code", "english", "code", "english"]


def test_texts_are_the_same_every_time():
    first = profiling_texts(6)
    texts.built_in_text.cache_clear()
    assert profiling_texts(6) == first


def test_texts_have_the_length_asked_for():
    for text in profiling_texts(20, characters=8_000):
        assert 7_500 <= len(text.text) <= 8_000


def test_no_line_of_a_topic_is_profiled_and_measured():
    def telling(half):
        return {part.strip() for part in texts.built_in_text("english", half).split("\n\n") if len(part.strip()) >= 80}

    profiled, measured = telling("profiling"), telling("evaluation")
    assert len(profiled) > 100
    assert len(measured) > 100
    assert not profiled & measured


@pytest.mark.parametrize("domain", texts.DOMAINS)
def test_neither_split_is_starved(domain):
    profiled, measured = len(texts.built_in_text(domain, "profiling")), len(texts.built_in_text(domain, "evaluation"))
    assert min(profiled, measured) > 100_000


def test_profiling_and_held_out_pieces_differ():
    profiled = {text.text for text in profiling_texts(20)}
    assert profiled.isdisjoint(text.text for text in held_out_texts(20))


def test_asking_for_too_much_says_how_much_there_is():
    with pytest.raises(OptionError, match=r"only \d+ profiling \(english\) texts of 10000 characters"):
        profiling_texts(10_000)


def test_a_count_of_none_is_refused():
    with pytest.raises(OptionError, match="must be positive, not 0"):
        profiling_texts(0)


def test_windows_are_consecutive_and_whole():
    tokenizer = byte_tokenizer()
    found = list(windows(tokenizer, ["abcdefgh", "xyz"], 3))
    assert [tokenizer.decode(ids) for ids in found] == ["abc", "def", "xyz"]
    assert all(ids.dtype == torch.int64 and ids.shape == (3,) for ids in found)


def test_a_short_text_gives_one_short_window():
    assert [len(ids) for ids in windows(byte_tokenizer(), ["ab", ""], 16)] == [2]


def test_windows_of_one_text_can_be_limited():
    assert len(list(windows(byte_tokenizer(), ["abcdef", "ghijkl"], 2, per_text=1))) == 2


class Prefixed:
    """A tokenizer that begins every text with token 7."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        from types import SimpleNamespace

        return SimpleNamespace(input_ids=[7] * add_special_tokens + [ord(letter) for letter in text])


def test_each_window_begins_as_the_tokenizer_begins_texts():
    assert [ids.tolist() for ids in windows(Prefixed(), ["abcd"], 3)] == [[7, 97, 98], [7, 99, 100]]


def test_a_window_without_room_for_text_is_refused():
    with pytest.raises(OptionError, match="at least 2 are needed"):
        list(windows(Prefixed(), ["abcd"], 1))
