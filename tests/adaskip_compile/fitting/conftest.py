"""A tiny model, and what was measured of it."""

from __future__ import annotations

import pytest
import torch

import adaskip_compile
from tests.adaskip_compile.fitting.samples import SAMPLES
from tests.models import tiny


@pytest.fixture(scope="module")
def llama():
    yield tiny("llama", num_hidden_layers=4)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def profile(llama):
    return adaskip_compile.profile(llama, SAMPLES, progress=False)
