from __future__ import annotations

from dataclasses import replace

import pytest

from adaskip_compile.evaluation.suite import MEASURES, Sizes, kind_of, make_measures
from adaskip_passes.errors import OptionError
from tests.made_up_texts import made_up_domain
from tests.models import tiny
from tests.tiny_checkpoints import byte_tokenizer

SMALL = Sizes(
    windows=1, length=40, decoded=4, contexts=(320,), needles=2, questions=2, prompts=2, prompt_tokens=16, new_tokens=3
)
DOMAINS = [made_up_domain("sea"), made_up_domain("city")]


def test_every_measure_gives_one_value_an_item():
    pytest.importorskip("rouge_score")
    tokenizer = byte_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)
    measures = make_measures(MEASURES, model, tokenizer, DOMAINS, SMALL)
    names = ["nll/sea", "nll/city", "decode/sea", "decode/city", "needle/320", "classification", "rouge"]
    assert [measure.name for measure in measures] == names
    assert list(dict.fromkeys(kind_of(name) for name in names)) == list(MEASURES)
    values = {measure.name: measure.run(model) for measure in measures}
    assert [len(found) for found in values.values()] == [1, 1, 1, 1, 2, 2, 2]
    assert values["rouge"] == (1.0, 1.0)  # a model against itself


def test_what_cannot_be_measured_is_refused():
    tokenizer = byte_tokenizer()
    with pytest.raises(OptionError, match="'nnl' is none; known are nll, decode, needle"):
        make_measures(["nnl"], None, tokenizer, DOMAINS)
    with pytest.raises(OptionError, match="40 tokens do not fit a window of 40"):
        make_measures(["decode"], None, tokenizer, DOMAINS, replace(SMALL, decoded=40))
