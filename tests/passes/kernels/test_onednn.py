"""Whether oneDNN is taken: by what a machine's clock says, and not where PyTorch lacks it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from adaskip_passes.kernels import banded_attention, many_row_linear, onednn
from adaskip_passes.kernels.banded_attention import BANDED_ATTENTION
from adaskip_passes.kernels.many_row_linear import MANY_ROW_LINEAR


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


def test_it_is_not_taken_where_it_is_missing_or_turned_off(monkeypatch):
    for module in (many_row_linear, banded_attention):
        monkeypatch.setattr(module, "onednn_pays", pytest.fail)
    monkeypatch.setattr(many_row_linear, "onednn_pays_for_batch", pytest.fail)
    x = torch.randn(1, 1, 2048, 8)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(MANY_ROW_LINEAR(x, x[0, 0], None), torch.nn.functional.linear(x, x[0, 0]))
        BANDED_ATTENTION(x, x, x, 0, 8, None)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    MANY_ROW_LINEAR(x, x[0, 0], None)
    MANY_ROW_LINEAR(x[..., :2, :], x[0, 0], None)
    BANDED_ATTENTION(x, x, x, 0, 8, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trial_leaves_random_numbers_alone_and_needs_no_defaults(dtype, monkeypatch):
    monkeypatch.setattr(many_row_linear, "_TRIAL", 8)
    monkeypatch.setattr(many_row_linear, "_BATCH_TRIAL", (8, 8))
    monkeypatch.setattr(banded_attention, "_MANY", 64)
    state = torch.get_rng_state()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            many_row_linear.onednn_pays.__wrapped__(1)
            many_row_linear.onednn_pays_for_batch.__wrapped__(1, 2)
            banded_attention.onednn_pays.__wrapped__(1, 4, 2, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_told(caplog):
    caplog.set_level("INFO")
    square = torch.ones(4, 4)
    onednn.pays("products with 3 threads", torch.nn.functional.linear, onednn.multiply, square, square)
    assert "products with 3 threads: oneDNN takes" in caplog.text
