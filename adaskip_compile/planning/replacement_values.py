"""The values of the inputs that skips add to a graph: scales, and the tensors of maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from adaskip_passes.ir.graph import tensor_of
from adaskip_passes.pipeline.pipeline import AddedInput
from adaskip_passes.specialise.replacements import SCALES
from adaskip_passes.stream.stream import ResidualStream


def replacement_values(
    added: Iterable[AddedInput],
    stream: ResidualStream,
    scales: Mapping[str, float],
    maps: Mapping[str, Mapping[str, torch.Tensor]],
) -> Iterator[torch.Tensor]:
    """Yield the value of each input that skips have ``added`` to a graph with that ``stream``, in order.

    Args:
        added: The inputs, as the passes tell of them.
        stream: The residual stream of the graph as captured.
        scales: The scale of each skipped sublayer, by path; others get 1.
        maps: The tensors of each map, by the path of its sublayer and their names in the map's form.
    """
    for one in added:
        if one.part == SCALES:
            values = [scales.get(path, 1.0) for path in stream.paths]
            device = tensor_of(stream.sublayers[0].stream_in).device
            yield torch.tensor(values, dtype=torch.float32, device=device)
        else:
            like = tensor_of(stream.by_path(one.path).stream_in)
            # Contiguous, as the layout that graphs take them in.
            yield maps[one.path][one.part].to(like.device, like.dtype).contiguous()
