"""Attention within a window for the body of a prompt: which attentions take one, and what is left of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import fx

from adaskip_passes.analysis.flops import count_flops, hidden_flops
from adaskip_passes.errors import UnknownSublayerError
from adaskip_passes.ir.graph import fake_tensor, fake_value, op_name
from adaskip_passes.kernels.banded_attention import BANDED_ATTENTION, Band, band_of
from adaskip_passes.pipeline.pipeline import PipelineResult, run_pipeline
from adaskip_passes.pipelines import CANONICALISE, USE_KERNELS, canonicalised
from adaskip_passes.specialise.eliminate_dead_code import EliminateDeadCode
from adaskip_passes.specialise.narrow_rows import NarrowRows
from adaskip_passes.specialise.skip_body_rows import SkipBodyRows
from adaskip_passes.stream.stream import ResidualStream
from tests.captures import first_graph, run
from tests.models import Captured, capture, tiny

HEAD, TAIL, WINDOW, LENGTH = 1, 2, 5, 20


@pytest.fixture(autouse=True)
def constant_floats() -> Iterator[None]:
    with torch._dynamo.config.patch(specialize_float=True):
        yield


def prompt_graph(family: str = "llama") -> tuple[Captured, PipelineResult]:
    captured, _ = capture(tiny(family), length=LENGTH)
    return captured, canonicalised(captured.gm, CANONICALISE)


def attention_of(result: PipelineResult, path: str) -> fx.Node:
    names = ("scaled_dot_product_attention", "banded_attention")
    [found] = (node for node in result.stream.by_path(path).nodes if op_name(node) in names)
    return found


def windowed(found: PipelineResult, path: str) -> PipelineResult:
    return run_pipeline(found.gm, found.stream, (SkipBodyRows(head=HEAD, tail=TAIL, windows=((path, WINDOW),)),))


def test_the_body_sees_a_window_and_the_edges_see_all() -> None:
    captured, found = prompt_graph()
    path = found.stream.paths[0]
    result = windowed(found, path)
    [record] = result.history
    assert (record.matched, result.stream.windowed, result.stream.body_skipped) == (1, (path,), ())
    node = attention_of(result, path)
    assert node.target is BANDED_ATTENTION
    band = band_of(node)
    assert (band.first, band.window, band.sinks, band.tail) == (0, WINDOW, HEAD, TAIL)
    # By hand: the same graph with a mask of all queries by all keys.
    by_hand = run_pipeline(found.gm, found.stream, ())
    node = attention_of(by_hand, path)
    at = torch.arange(LENGTH)
    near = (at[:, None] - at < WINDOW) | (at < HEAD) | (at >= LENGTH - TAIL)[:, None]
    by_hand.gm.register_buffer("mask", (at <= at[:, None]) & near)
    with by_hand.gm.graph.inserting_before(node):
        mask = by_hand.gm.graph.get_attr("mask")
    node.kwargs = {**node.kwargs, "attn_mask": mask, "is_causal": False}
    by_hand.gm.recompile()
    got, wanted, full = (run(one.gm.forward, captured).outputs for one in (result, by_hand, found))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert max((one - other).abs().max() for one, other in zip(got, full, strict=True)) > 1e-3


def test_a_kernel_of_ours_takes_it_too_and_twice_is_once() -> None:
    captured, found = prompt_graph()
    path = found.stream.paths[0]
    with_kernels = run_pipeline(found.gm, found.stream, USE_KERNELS)
    assert attention_of(with_kernels, path).target is BANDED_ATTENTION
    result = windowed(with_kernels, path)
    torch.testing.assert_close(
        run(result.gm.forward, captured).outputs, run(windowed(found, path).gm.forward, captured).outputs
    )
    [again] = windowed(result, path).history
    assert again.matched == 0


@pytest.mark.parametrize(("cut", "computed"), [(slice(-1, None), 1), (slice(-TAIL, None), TAIL), (slice(None, 4), 4)])
def test_rows_that_see_all_are_computed_alone(cut: slice, computed: int) -> None:
    assert queries_left(cut) == computed


@pytest.mark.parametrize("cut", [slice(-TAIL - 1, None), slice(None, WINDOW + 1)])
def test_rows_of_which_one_has_a_window_are_not(cut: slice) -> None:
    assert queries_left(cut) == LENGTH


def queries_left(cut: slice) -> int:
    """Return how many queries are left of an attention of which some rows are read, which are what they were."""
    x = torch.randn(1, 2, LENGTH, 8, generator=torch.Generator().manual_seed(0))

    def attend(x: torch.Tensor) -> torch.Tensor:
        return BANDED_ATTENTION(3 * x, 2 * x, x, 0, WINDOW, None, HEAD, TAIL)[:, :, cut]

    torch._dynamo.mark_dynamic(x, 2)
    gm = first_graph(attend, x)
    result = run_pipeline(gm, ResidualStream(()), (NarrowRows(WINDOW + 1), EliminateDeadCode()))
    inputs = [
        x if isinstance(fake_value(node), torch.Tensor) else LENGTH for node in gm.graph.find_nodes(op="placeholder")
    ]
    torch.testing.assert_close(result.gm(*inputs)[0], attend(x))
    [node] = (one for one in result.gm.graph.nodes if "attention" in op_name(one))
    value = fake_tensor(node.args[0])
    assert value is not None
    rows = value.shape[-2]
    return rows if isinstance(rows, int) else LENGTH


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_what_is_not_known_to_be_causal_stays(family: str) -> None:
    _, found = prompt_graph(family)
    path = found.stream.paths[0]
    result = windowed(found, path)
    [record] = result.history
    assert (record.modified, record.matched, result.stream.windowed) == (False, 0, ())


def test_a_window_of_a_sublayer_that_is_not_there() -> None:
    _, found = prompt_graph()
    with pytest.raises(UnknownSublayerError, match="no sublayer 'elsewhere'"):
        windowed(found, "elsewhere")


def test_products_are_counted() -> None:
    """Of LENGTH queries the body meets the window and the first keys, the tail all keys; causality hides a triangle."""
    _, found = prompt_graph()
    path = found.stream.paths[0]
    causal, banded = attention_of(found, path), attention_of(windowed(found, path), path)
    sizes = dict.fromkeys(count_flops(causal).free_symbols, LENGTH)
    pairs = 2 * 4 * 2 * 16  # operations a product, heads, both products, width of a head
    assert count_flops(causal).subs(sizes) == pairs * LENGTH * LENGTH
    assert hidden_flops(causal).subs(sizes) == pairs * LENGTH * (LENGTH - 1) // 2
    assert count_flops(banded).subs(sizes) == pairs * ((LENGTH - TAIL) * (WINDOW + HEAD) + TAIL * LENGTH)
    assert hidden_flops(banded).subs(sizes) == pairs * WINDOW * (WINDOW - 1) // 2


def test_a_band_says_what_it_is_given() -> None:
    graph = fx.Graph()
    query, key, value = (graph.placeholder(name) for name in ("query", "key", "value"))
    node = graph.call_function(BANDED_ATTENTION, (query, key, value, 0, 7, None))
    assert band_of(node) == Band(query, key, value, 0, 7, None)
