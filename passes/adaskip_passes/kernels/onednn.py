"""Products by oneDNN, and whether they pay on this machine.

``linear`` of 32-bit floats goes to one matrix library on a CPU (MKL, where PyTorch is built with it), and that one does
not take the widest vector instructions of every CPU. oneDNN, which comes with PyTorch too, does: on an AMD CPU
with AVX-512 it is twice as fast. Both sum in 32 bits; they differ in the order of the sums.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from adaskip_passes.ir.plain_tensors import is_plain

log = logging.getLogger(__name__)

# Timings of equal ways differ by less.
_CLEARLY = 1.1
_TRIALS = 5


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return what ``linear`` returns, ``f32[..., out]`` of ``f32[..., in]`` and ``f32[out, in]``, on the CPU.

    The operator is the one that Inductor puts in the place of ``linear`` where weights are constants. It takes weights
    of any layout, but has fast kernels for contiguous ones alone.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight.contiguous(), bias, "none", [], "")


def serves(*values: torch.Tensor | None) -> bool:
    """Return whether operands and result are all 32-bit floats on the CPU; under autocast the result is of other numbers."""
    return all(
        one is not None and is_plain(one) and one.device.type == "cpu" and one.dtype == torch.float32 for one in values
    )


def operand(*shape: int) -> torch.Tensor:
    """Return an operand to try with, whatever the defaults are, and without drawing any: users seed the generator."""
    return torch.ones(shape, dtype=torch.float32, device="cpu")


def enabled() -> bool:
    """Return whether PyTorch has oneDNN, and the user has not turned it off (``torch.backends.mkldnn``)."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def pays(name: str, plain: Callable[..., Any], onednn: Callable[..., Any], *inputs: Any) -> bool:
    """Return whether ``onednn(*inputs)`` is clearly faster here than ``plain(*inputs)``.

    Both are run by turns: what else the machine does meanwhile slows both.
    """
    taken = [(_seconds(plain, inputs), _seconds(onednn, inputs)) for _ in range(_TRIALS)]
    slower, faster = map(min, zip(*taken, strict=True))
    log.info("%s: oneDNN takes %.3g s for what PyTorch's choice takes %.3g s", name, faster, slower)
    return slower > _CLEARLY * faster


def _seconds(compute: Callable[..., Any], inputs: tuple[Any, ...]) -> float:
    started = time.perf_counter()
    compute(*inputs)
    return time.perf_counter() - started
