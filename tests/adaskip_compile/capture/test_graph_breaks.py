"""An error that needs the forward as one graph quotes the first graph break, with file and line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile.capture.graph_breaks import why_not_captured
from adaskip_compile.inspection.phase_graphs import capture_phases
from adaskip_passes.errors import CaptureError
from tests.models import PlainDecoder, plain, tokens

LINE = 28  # of the break below


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> PlainDecoder:
    model = plain()
    block = type(model.blocks[0])
    forward = block.forward

    def breaking(self: Any, *args: Any) -> Any:
        torch._dynamo.graph_break()
        return forward(self, *args)

    monkeypatch.setattr(block, "forward", breaking)
    return model


WAYS: list[tuple[str, Callable[[Any], Any]]] = [
    ("a forward was captured in several graphs", capture_phases),
    ("the forward was captured in 2 pieces", lambda model: adaskip_compile.analyze(model, ids=tokens())),
    ("the model was captured in 2 pieces", lambda model: adaskip_compile.profile(model, [tokens()[0]])),
]


@pytest.mark.parametrize(("message", "way"), WAYS)
def test_the_first_graph_break_is_quoted(broken: PlainDecoder, message: str, way: Callable[[Any], Any]):
    place = re.escape(f"Call to `torch._dynamo.graph_break()` (test_graph_breaks.py:{LINE})")
    with pytest.raises(CaptureError, match=f"{message}, .*it breaks first at: {place}"):
        way(broken)


def test_what_dynamo_cannot_trace_at_all_is_quoted(broken: PlainDecoder):
    whole = torch.compile(broken, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException) as caught:
        whole(tokens())
    assert why_not_captured(caught.value) == f"Call to `torch._dynamo.graph_break()` (test_graph_breaks.py:{LINE})"
