"""What a model calls its cache, whatever version of transformers it is of, and that we use no name that warns."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from adaskip_compile.evaluation.likelihood import decoded_nlls
from adaskip_compile.kv_cache.cache_argument import cache_argument, cache_of
from tests.models import tiny, tokens


class Takes(nn.Module):
    def forward(self, hidden: Any, past_key_values: Any = None) -> Any:
        return hidden


class Renamed(nn.Module):
    def forward(self, hidden: Any, cache: Any = None) -> Any:
        return hidden


class Recurrent(nn.Module):
    def forward(self, hidden: Any, cache_params: Any = None) -> Any:
        return hidden


class HandsOn(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "name"), [(Takes, "past_key_values"), (Renamed, "cache"), (Recurrent, "cache_params")]
)
def test_the_name_is_that_of_the_forward_or_of_the_one_inside(kind: type[nn.Module], name: str):
    kept = object()
    assert cache_argument(kind(), kept) == {name: kept}
    assert cache_argument(HandsOn(HandsOn(kind())), kept) == {name: kept}


def test_a_cache_is_read_under_either_name():
    assert cache_of({"logits": 1, "cache": 2}) == 2
    assert cache_of({"logits": 1, "past_key_values": 3}) == 3
    assert cache_of({"logits": 1}) is None


def test_no_name_that_warns_is_used(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    from transformers.utils import logging as transformers_logging

    model = tiny("llama")
    logger = transformers_logging.get_logger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(type(logger), "warning_once", logging.Logger.warning)
    with caplog.at_level(logging.WARNING):
        decoded_nlls(model, [tokens(length=12)[0]], decoded=3)
        result = model(tokens(), use_cache=True)
        with torch.no_grad():
            model(tokens(length=1), **cache_argument(model, cache_of(result)))
    ours = [record.message for record in caplog.records if record.name.startswith("transformers")]
    assert not any("deprecated" in message for message in ours)
