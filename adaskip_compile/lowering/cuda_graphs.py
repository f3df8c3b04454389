"""Decode steps over a cache of fixed size, replayed from CUDA graphs: one launch a step in place of a few hundred.

While decoding, a GPU is done with a kernel before Python has launched the next. A CUDA graph holds the launches of a
whole step, with the addresses that they read and write; so it can be replayed where all inputs lie where they lay, which
those of a cache of fixed size do for a whole request. Small inputs that come from elsewhere in each step (token, position,
mask) are copied to where the graph reads them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from adaskip_compile.lowering.lowering import Runnable
from adaskip_passes.ir.graph import fake_value

# Inputs of more bytes are not copied in each step: where one lies elsewhere, another graph is recorded.
_SMALL = 1 << 20


def recordable(gm: fx.GraphModule) -> bool:
    """Tell whether the calls of ``gm`` can be recorded at all: all its tensors are on one CUDA device."""
    devices = {value.device for node in gm.graph.nodes if isinstance(value := fake_value(node), torch.Tensor)}
    return len(devices) == 1 and next(iter(devices)).type == "cuda"


class RecordedRun:
    """Calls ``run``, and replays it from a CUDA graph once its inputs have settled. Safe under threads.

    They have after a call in which nothing lay elsewhere than in the call before but small inputs known to move. Of
    ``written``, the positions of the inputs that ``run`` writes, none may: a copy would take the writes away. ``note`` is told where recording fails;
    ``replays`` counts the calls that were replayed.
    """

    def __init__(self, run: Runnable, written: frozenset[int], note: Callable[[str], None]) -> None:
        self._run, self._written, self._note = run, written, note
        self._layouts: list[Any] = []
        self._addresses: list[int] = []
        self._moving: set[int] = set()
        self._recording: Recording | None = None
        self._failed = False
        self.replays = 0
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Return what ``run`` returns for ``inputs``."""
        with self._lock:  # from the copies to the replay
            return self._call(inputs)

    def _call(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        if self._recording is None or not self._recording.serves(inputs):
            self._recording = None  # its memory goes before another takes some
            if self._failed or not self._settled(inputs):
                return self._run(*inputs)
            try:
                self._recording = Recording(self._run, inputs, self._moving)
            except RuntimeError as error:
                self._failed = True
                line = str(error).strip().partition("\n")[0]
                self._note(
                    f"a decode step could not be recorded as a CUDA graph, and is launched kernel by kernel: {line}"
                )
                return self._run(*inputs)
        self.replays += 1
        return self._recording.replay(inputs)

    def _settled(self, inputs: Sequence[Any]) -> bool:
        layouts, addresses = _layouts(inputs), [_address(value) for value in inputs]
        before, self._addresses = self._addresses, addresses
        if layouts != self._layouts:
            self._layouts, self._moving = layouts, set()
            return False
        moved = {place for place, pair in enumerate(zip(before, addresses, strict=True)) if pair[0] != pair[1]}
        new = moved - self._moving
        self._moving |= {place for place in new - self._written if inputs[place].nbytes <= _SMALL}
        return not new


class Recording:
    """One CUDA graph of ``run`` on ``inputs``, of which those at the positions ``moving`` are copied in each replay.

    It holds none of the others, so a request's cache is not kept alive by it.

    Raises:
        RuntimeError: Something in ``run`` cannot be recorded, as what waits for the device.
    """

    def __init__(self, run: Runnable, inputs: Sequence[Any], moving: set[int]) -> None:
        with torch.inference_mode(False):  # a later call may be outside of it, and has to write them
            self._buffers = {place: torch.empty_like(inputs[place]).copy_(inputs[place]) for place in sorted(moving)}
        values = [self._buffers.get(place, value) for place, value in enumerate(inputs)]
        self._layouts = _layouts(inputs)
        self._fixed = [(place, _address(value)) for place, value in enumerate(inputs) if place not in moving]
        self._replay, outputs = record(run, values)
        self._outputs = [_output(value, values) for value in outputs]

    def serves(self, inputs: Sequence[Any]) -> bool:
        """Tell whether ``inputs`` are laid out as those recorded, and those that are not copied lie where they lay."""
        lies = all(_address(inputs[place]) == address for place, address in self._fixed)
        return lies and self._layouts == _layouts(inputs)

    def replay(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Run the recorded step on ``inputs``; what it returns is not touched by the next replay."""
        for place, buffer in self._buffers.items():
            buffer.copy_(inputs[place])
        self._replay()
        return tuple(
            inputs[value.place] if isinstance(value, _Input) else value.clone() if _is_tensor(value) else value
            for value in self._outputs
        )


def record(run: Runnable, values: Sequence[Any]) -> tuple[Callable[[], None], Sequence[Any]]:
    """Return what runs the kernels of ``run(*values)`` again on the same memory, and what they leave their results in."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on: what they do is in no graph, and does no harm to this one.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = run(*values)
    return graph.replay, outputs


class _Input:
    """Stands for an output that is the input at ``place``."""

    def __init__(self, place: int) -> None:
        self.place = place


def _output(value: Any, values: Sequence[Any]) -> Any:
    """Return what to keep of an output of the call on ``values``: of one that is an input, its place."""
    if not _is_tensor(value):
        return value
    place = next((place for place, one in enumerate(values) if one is value), None)
    if place is not None:
        return _Input(place)
    if any(_is_tensor(one) and one.untyped_storage()._cdata == value.untyped_storage()._cdata for one in values):
        raise RuntimeError("an output is a view of an input")
    return value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _layouts(inputs: Sequence[Any]) -> list[Any]:
    """Return all that two calls have to agree in but for addresses: on two streams, one would write what the other reads."""
    shown = [(one.shape, one.stride(), one.dtype) if isinstance(one, torch.Tensor) else one for one in inputs]
    return [_stream(), *shown]


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else 0


def _address(value: Any) -> int:
    return value.data_ptr() if isinstance(value, torch.Tensor) else 0
