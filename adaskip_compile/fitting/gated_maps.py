"""Imitate a gated FFN by a few of its own units: those that add most to the branch, with weights fitted anew.

A unit is a row of the gate's and of the up projection's matrix. What is known of the FFN is read off its graph and off what
it computes of a few samples, so that no name is asked: the norm before it is folded into the rows, channel by channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaskip_compile.profiling.stream_maps import normalised, units_of
from adaskip_passes.stream.gated_units import computed_before, find_gated_units
from adaskip_passes.stream.stream import ResidualStream, Sublayer

# silu(1.702 x) / 1.702 is all but gelu(x) (Hendrycks and Gimpel, arXiv 1606.08415).
_SHARPNESSES = (1.0, 1.702)


@dataclass(frozen=True)
class Units:
    """Units of a gated map, ``(units, d)`` each: what one gives is ``silu(gate @ x) * (value @ x)``, x of unit mean square."""

    gate: torch.Tensor
    value: torch.Tensor

    def __call__(self, a: torch.Tensor) -> torch.Tensor:
        """Return what they give, ``(tokens, units)``, of the stream ``a``, ``(tokens, d)``."""
        return units_of(normalised(a), self.gate, self.value)


class UnitFinder:
    """Finds units in a captured graph, ``values`` of whose inputs are known."""

    def __init__(self, gm: fx.GraphModule, stream: ResidualStream, values: Sequence[Any]) -> None:
        self._gm, self._stream = gm, stream
        self._values = dict(zip(gm.graph.find_nodes(op="placeholder"), values, strict=True))

    @torch.no_grad()
    def units(self, path: str, samples: Sequence[torch.Tensor], share: float) -> Units | None:
        """Return those units of the sublayer ``path`` that add most to ``samples``; None where it is no gated FFN.

        Args:
            path: The sublayer.
            samples: Values of the stream before it, ``(1, tokens, d)`` each.
            share: How many of all its units, above 0 and up to 1; one at least.
        """
        sublayer = self._stream.by_path(path)
        found = find_gated_units(sublayer)
        if found is None:
            return None
        gate, up, down = (self._values[node].detach().float() for node in (found.gate, found.up, found.down))
        seen = [self._computed(sublayer, (found.normed, found.hidden), a) for a in samples]
        if any(one is None for one in seen):
            return None
        a = torch.cat([one.reshape(-1, one.shape[-1]) for one in samples]).float()
        normed, hidden = (
            torch.cat([one[place].reshape(-1, one[place].shape[-1]).float() for one in seen if one is not None])
            for place in range(2)
        )
        added = hidden.square().mean(0) * down.square().sum(0)
        best = added.topk(max(1, round(share * len(added)))).indices
        x = normalised(a)
        folded = (normed * x).sum(0) / x.square().sum(0).clamp_min(1e-12)
        tried = [Units(gate[best] * folded * sharpness, up[best] * folded) for sharpness in _SHARPNESSES]
        wanted = hidden[:, best]
        missed = [float((units(a) / by - wanted).square().sum()) for units, by in zip(tried, _SHARPNESSES, strict=True)]
        return tried[missed.index(min(missed))]

    def _computed(
        self, sublayer: Sublayer, wanted: Sequence[fx.Node], a: torch.Tensor
    ) -> tuple[torch.Tensor, ...] | None:
        """Return the values of ``wanted`` for the stream ``a``; None where they depend on more than that and the inputs."""
        nodes = computed_before(sublayer, wanted[-1])
        if nodes is None:
            return None
        interpreter = fx.Interpreter(self._gm, garbage_collect_values=False)
        interpreter.env = {**self._values, sublayer.stream_in: a}
        for node in nodes:
            interpreter.env[node] = interpreter.run_node(node)
        return tuple(interpreter.env[node] for node in wanted)
