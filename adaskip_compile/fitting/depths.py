"""How deep the body of a prompt is skipped: the deepest layers first, attentions and FFNs each for themselves.

In the prompt the deepest layers matter through their keys and values alone, and the last one runs for the last row anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

from adaskip_compile.planning.prompt_skips import depths_text
from adaskip_compile.profiling.layers import find_layers
from adaskip_passes.stream.stream import ResidualStream

# How many tokens a token of the body sees where an attention has a window. More hides less, and costs next to nothing up
# to here: kernels take as many queries at once.
WINDOW = 128

# (attentions, FFNs) of each layer but the last, deepest first.
Layers = tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]


@dataclass(frozen=True)
class Depths:
    """Of how many deepest layers, below the last one, what is left out.

    Args:
        attentions: Of how many the attentions are skipped.
        ffns: Of how many the FFNs are.
        windows: Of how many the attentions have a window, where they are not skipped.
    """

    attentions: int = 0
    ffns: int = 0
    windows: int = 0

    @property
    def windows_left(self) -> int:
        """Of how many the attentions have a window, those that are skipped not counted."""
        return max(0, self.windows - self.attentions)

    def skipped(self, layers: Layers) -> tuple[str, ...]:
        """Return the paths of the sublayers that are skipped."""
        attentions = [path for layer in layers[: self.attentions] for path in layer[0]]
        return (*attentions, *(path for layer in layers[: self.ffns] for path in layer[1]))

    def windowed(self, layers: Layers) -> dict[str, int]:
        """Return the window of each attention that has one, by path."""
        return {path: WINDOW for layer in layers[self.attentions : self.windows] for path in layer[0]}

    def named(self, layers: Layers) -> tuple[str, ...]:
        """Return the paths of both."""
        return (*self.skipped(layers), *self.windowed(layers))

    def __str__(self) -> str:
        return depths_text(self.attentions, self.ffns, self.windows_left)


def layers_from_the_end(stream: ResidualStream) -> Layers:
    """Return (attentions, FFNs) of each layer but the last, deepest first; the last runs for the last row alone anyway."""
    kinds = {one.path: one for one in stream.sublayers}
    found = []
    for layer in reversed(find_layers(stream.paths)[:-1]):
        attentions = tuple(path for path in layer if kinds[path].kind == "attention")
        stateless = tuple(path for path in layer if not kinds[path].stateful)
        found.append((attentions, stateless))
    return tuple(found)
