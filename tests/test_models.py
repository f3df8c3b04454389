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


def test_fragments_of_a_graph_are_not_taken_for_it():
    # A prompt that meets a full static cache: the length to build a mask of is a tensor.
    model = tiny("opt", num_hidden_layers=1)
    assert len(capture_all(model, cache="static", requests=2)) > 3
    with pytest.raises(RuntimeError, match="several graphs"):
        capture(model, cache="static", requests=2)
