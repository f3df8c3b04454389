"""Whether oneDNN is taken: by what a machine's clock says, and not where PyTorch lacks it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from adaskip_passes import onednn


@pytest.fixture
def takes(monkeypatch):
    """Make a function whose calls take the given numbers of seconds, one after the other and again from the first."""
    now = [0.0]
    monkeypatch.setattr(onednn, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def make(*seconds):
        turns = itertools.cycle(seconds)

        def function():
            now[0] += next(turns)

        return function

    return make


@pytest.mark.parametrize(("plain", "other", "paid"), [(1.0, 0.4, True), (1.0, 0.95, False), (0.5, 1.0, False)])
def test_it_pays_where_it_is_clearly_faster(plain, other, paid, takes):
    assert onednn.pays("products", takes(plain), takes(other)) is paid


def test_one_slow_trial_decides_nothing(takes):
    assert not onednn.pays("products", takes(9.0, 1.0), takes(0.95))
    assert onednn.pays("products", takes(1.0), takes(0.4, 9.0))


def test_without_onednn_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not onednn.pays("products", pytest.fail, pytest.fail)


def test_it_is_told(caplog):
    caplog.set_level("INFO")
    square = torch.ones(4, 4)
    onednn.pays("products with 3 threads", torch.nn.functional.linear, onednn.multiply, square, square)
    assert "products with 3 threads: oneDNN takes" in caplog.text
