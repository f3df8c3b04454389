from __future__ import annotations

import sys

import pytest

from adaskip_compile.evaluation.continuations import continuations, rouge_l
from adaskip_passes.errors import OptionError
from tests.models import tiny, tokens
from tests.tiny_checkpoints import byte_tokenizer


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    pytest.importorskip("rouge_score")
    texts = ["the cat sat on the mat", "a dog", "", "same words"]
    references = ["the cat on a mat", "the cat", "", "same words"]
    # "the cat on mat": 4 of 6 and 4 of 5 words
    assert rouge_l(texts, references) == pytest.approx((2 * 4 / (6 + 5), 0.0, 1.0, 1.0))


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(OptionError, match=r"pip install 'adaskip-compile\[evaluation\]'"):
        rouge_l([], [])


def test_continuations_are_greedy_and_of_one_length():
    tokenizer = byte_tokenizer()
    model, prompt = tiny("llama", vocab_size=len(tokenizer)), tokens(length=12)[0]
    ids = prompt.tolist()
    for _ in range(5):
        ids.append(int(model(prompt.new_tensor([ids])).logits[0, -1].argmax()))
    model.generation_config.eos_token_id = None
    assert continuations(model, tokenizer, [prompt], 5) == (tokenizer.decode(ids[12:]),)
