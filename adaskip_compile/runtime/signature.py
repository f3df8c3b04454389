"""The signature of a captured graph: where in its inputs and outputs a cache, token counts and tokens stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaskip_passes.ir.graph import fake_tensor, tensor_of
from adaskip_passes.stream.find_stream import find_counters
from adaskip_passes.stream.stream import ResidualStream


@dataclass(frozen=True)
class GraphSignature:
    """Where things stand in the inputs and outputs of a graph.

    Args:
        cache_inputs: By the path of a sublayer, the inputs that hold its cache.
        cache_outputs: The outputs that hold a cache, those of all sublayers in the order of the stream.
        written: Of ``cache_inputs`` those of sublayers that write into them.
        counters: The inputs in which a preallocated cache counts its tokens.
        tokens: The input whose first two sizes are the batch and the tokens a row; None where there is none.
    """

    cache_inputs: dict[str, tuple[int, ...]]
    cache_outputs: tuple[int, ...]
    written: dict[str, tuple[int, ...]]
    counters: tuple[int, ...]
    tokens: int | None

    @classmethod
    def of(cls, gm: fx.GraphModule, stream: ResidualStream) -> GraphSignature:
        """Read it off a graph and its stream."""
        inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        positions = {node: index for index, node in enumerate(inputs)}
        cache_inputs = {
            sublayer.path: tuple(positions[node] for node in sublayer.cache_inputs)
            for sublayer in stream.sublayers
            if sublayer.cache_inputs
        }
        writers = (sublayer.path for sublayer in stream.sublayers if sublayer.writes and sublayer.cache_inputs)
        return cls(
            cache_inputs=cache_inputs,
            cache_outputs=tuple(position for sublayer in stream.sublayers for position in sublayer.cache_outputs),
            written={path: cache_inputs[path] for path in writers},
            counters=tuple(positions[node] for node in find_counters(gm, stream)),
            tokens=_token_input(inputs, stream),
        )

    def cache(self, inputs: Sequence[Any]) -> list[torch.Tensor]:
        """Return the tensors of ``inputs`` that hold a cache."""
        return [inputs[index] for places in self.cache_inputs.values() for index in places]

    def cache_after(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> list[torch.Tensor]:
        """Return the tensors that hold the cache once the graph has run: outputs, and inputs that it has written into."""
        made = [outputs[position] for position in self.cache_outputs]
        return [*made, *(inputs[index] for places in self.written.values() for index in places)]

    def starts_over(self, inputs: Sequence[Any]) -> bool:
        """Tell whether a preallocated cache is empty: its token counter stands at zero."""
        return bool(self.counters) and all(int(inputs[index]) == 0 for index in self.counters)

    def rows_and_tokens(self, inputs: Sequence[Any]) -> tuple[int, int]:
        """Return the batch size of a call and its tokens a row; (1, 0) where no input tells."""
        if self.tokens is None:
            return 1, 0
        shape = inputs[self.tokens].shape
        return int(shape[0]), int(shape[1])


def _token_input(inputs: Sequence[fx.Node], stream: ResidualStream) -> int | None:
    """Return the position of the first input that has the batch and sequence dimensions of the stream."""
    wanted = tensor_of(stream.sublayers[0].stream_in)
    for index, node in enumerate(inputs):
        value = fake_tensor(node)
        if (
            value is not None
            and value.dim() >= 2
            and list(map(str, value.shape[:2])) == list(map(str, wanted.shape[:2]))
        ):
            return index
    return None
