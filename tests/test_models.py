import pytest
import torch

from tests.models import capture, capture_all, plain, tiny


@pytest.mark.parametrize(
    ("family", "cache"), [("llama", "dynamic"), ("llama", "static"), ("gpt2", "dynamic"), ("qwen3_moe", "static")]
)
def test_captured_graphs_reproduce_what_the_model_computed(family, cache):
    for captured in capture_all(tiny(family), cache=cache, requests=2):
        inputs = [value.clone() if isinstance(value, torch.Tensor) else value for value in captured.inputs]
        outputs = captured.gm.forward(*inputs)
        torch.testing.assert_close(tuple(outputs), captured.outputs, rtol=0, atol=0)


def test_a_plain_decoder_is_captured_in_both_phases():
    prefill, decode = capture(plain(cached=True))
    assert (prefill.phase, decode.phase) == ("prefill", "decode")
    assert len(decode.inputs) > len(prefill.inputs)


def test_a_model_is_left_as_it_was():
    model = tiny("llama")
    capture(model)
    assert model._compiled_call_impl is None
