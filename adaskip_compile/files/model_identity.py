"""Telling models apart: a profile measured on one checkpoint says nothing about another.

A model is known by its *structure*, a digest of its parameters' names and shapes, and by its *weights*, a few
hundred of them read at fixed places. Neither depends on the dtype or the device: a checkpoint keeps its identity
through ``model.to(torch.bfloat16)``. That is why weights are compared as numbers and not by a digest of them:
whatever a digest rounds to, some weight lies so near the edge that a cast carries it over, and with hundreds of
weights that is the rule. (A weight rounded to bfloat16 by way of float16 differs from one rounded at once in about
one case of 16.)
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaskip_passes.errors import ForeignFileError, ProfileError

# 512 weights over all matrices notice a fine-tune of any few of them, in about 5 ms and 2 KB of text.
SAMPLED_WEIGHTS = 512

# The places of the samples: multiples of the golden ratio modulo 1 spread evenly over any interval.
_GOLDEN_RATIO = 0x9E3779B97F4A7C15

# The attribute by which an adapter holds the layer that it is put around, as peft documents it.
_BASE = "base_layer"

# A cast to bfloat16 or float16 moves a weight by less than this: one unit in the last place of bfloat16, and below
# float16's normal range half the distance of its subnormal numbers. A fine-tune moves many weights by more.
_RELATIVE_TOLERANCE = 2.0**-7
_ABSOLUTE_TOLERANCE = 2.0**-24


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a profile or plan belongs to.

    Args:
        name: For people only, never compared: the checkpoint's name, or the model's class.
        structure: Digest of the names and shapes of all parameters.
        weights: Sampled weights as bfloat16, four hexadecimal digits each; None where they cannot be read (a model
            on the meta device, sharded or packed parameters). Such a model is told by its structure alone.
    """

    name: str
    structure: str
    weights: str | None = field(repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.structure, str):
            raise ProfileError(f"a model's name and structure are text, not {self.name!r} and {self.structure!r}")
        if self.weights is not None and not re.fullmatch(rf"([0-9a-f]{{4}}){{{SAMPLED_WEIGHTS}}}", self.weights):
            raise ProfileError(f"a model's sampled weights are {SAMPLED_WEIGHTS} numbers of four hexadecimal digits")

    @classmethod
    def from_payload(cls, payload: Any) -> ModelIdentity | None:
        """Return the identity that a file holds, or None where it holds null."""
        return None if payload is None else cls(**payload)

    @property
    def key(self) -> str:
        """A short digest that names files of this model.

        Equal for equal identities. A model cast to float16 from a wider dtype may have another key and still match.
        """
        return _digest(f"{self.structure} {self.weights}")

    def difference(self, other: ModelIdentity) -> str | None:
        """Return in words how ``other`` is another model than this one, or None where they match."""
        if self.structure != other.structure:
            return "its parameters have other names or shapes"
        if self.weights is None or other.weights is None or self.weights == other.weights:
            return None
        pairs = zip(_numbers(self.weights), _numbers(other.weights), strict=True)
        differing = sum(not _same_weight(ours, theirs) for ours, theirs in pairs)
        if not differing:
            return None
        return f"it has the same structure but other weights ({differing} of {SAMPLED_WEIGHTS} sampled ones differ)"

    def matches(self, other: ModelIdentity) -> bool:
        """Return whether both are one model, whatever their dtypes and devices."""
        return self.difference(other) is None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that generates inside ``model``: what ``torch.compile`` or an adapter library has wrapped.

    A wrapper holds nothing but the module inside, and forwards ``generate`` to it; calls of either reach that module,
    and its sublayers go by the paths that they have in it, as before it was wrapped.
    """
    model = getattr(model, "_orig_mod", model)
    children = list(model.children())
    bare = len(children) == 1 and not model._parameters and not model._buffers
    if bare and hasattr(model, "generate") and hasattr(children[0], "generate"):
        return unwrapped(children[0])
    return model


def identify(model: nn.Module) -> ModelIdentity:
    """Return the identity of ``model``; a wrapper has the identity of what it wraps, and an adapted layer that of its base.

    Reads a few hundred weights, with one transfer a device.
    """
    model = unwrapped(model)
    return identify_parameters(_display_name(model), _base_parameters(model))


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of ``model`` by the names that they had before adapters were put around its layers.

    An adapter (LoRA and its like) is a module that has the layer that it adapts as ``base_layer``; the rest of it is
    no part of the model that a plan was made for.
    """
    adapters = [path for path, module in model.named_modules() if isinstance(getattr(module, _BASE, None), nn.Module)]
    for name, parameter in model.named_parameters():
        around = [path for path in adapters if name.startswith(f"{path}.")]
        if all(name.startswith(f"{path}.{_BASE}.") for path in around):
            yield name.replace(f".{_BASE}.", "."), parameter


def identify_parameters(name: str, parameters: Iterable[tuple[str, torch.Tensor]]) -> ModelIdentity:
    """Return the identity of a model given by its named parameters, in any order."""
    ordered = sorted(parameters, key=lambda item: item[0])
    structure = _digest("\n".join(f"{path} {tuple(tensor.shape)}" for path, tensor in ordered))
    return ModelIdentity(name, structure, _sampled_weights([tensor for _, tensor in ordered]))


def check_identity(made_for: ModelIdentity, model: ModelIdentity, *, source: str) -> None:
    """Refuse what was made for another model.

    Args:
        made_for: The identity recorded in a profile or plan.
        model: The identity of the model at hand.
        source: What is checked, as the message begins: a file's path, or "this profile".

    Raises:
        ForeignFileError: The two are not one model.
    """
    difference = made_for.difference(model)
    if difference is None:
        return
    names = f"{made_for.name}, and this model is {model.name}"
    if made_for.name == model.name:
        names = f"another {model.name}"
    raise ForeignFileError(
        f"{source} was made for {names}: {difference}. Measure this model itself, with adaskip_compile.profile(model, "
        "samples) or `adaskip profile`"
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _display_name(model: nn.Module) -> str:
    name = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    if Path(name).is_absolute():
        name = Path(name).name  # files are exchanged, and the folders of the one who measured are nobody's business
    return name or type(model).__name__


def _sampled_weights(tensors: list[torch.Tensor]) -> str | None:
    floating = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    # Norms and biases are often left at one and zero, in every checkpoint alike.
    chosen = [tensor for tensor in floating if tensor.dim() > 1] or floating
    if not chosen or not all(map(_is_readable, chosen)):
        return None
    by_device: defaultdict[torch.device, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for slot, element in enumerate(_sampled_elements(chosen)):
        by_device[element.device].append((slot, element))
    bits = [0] * SAMPLED_WEIGHTS
    for items in by_device.values():
        values = torch.stack([element.to(torch.bfloat16) for _, element in items]).cpu()
        for (slot, _), value in zip(items, values.view(torch.int16).tolist(), strict=True):
            bits[slot] = value & 0xFFFF
    return struct.pack(f">{SAMPLED_WEIGHTS}H", *bits).hex()


def _is_readable(tensor: torch.Tensor) -> bool:
    """Return whether single weights can be read: not of meta tensors, nor of sharded, packed or fake ones."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type != "meta"


def _sampled_elements(tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield SAMPLED_WEIGHTS single elements, as 0-d views, spread over all of ``tensors``."""
    for slot in range(SAMPLED_WEIGHTS):
        tensor = tensors[slot * len(tensors) // SAMPLED_WEIGHTS].detach()
        place = (slot * _GOLDEN_RATIO % 2**64) * tensor.numel() >> 64
        index: list[int] = []
        for size in reversed(tensor.shape):
            place, offset = divmod(place, size)
            index.append(offset)
        yield tensor[tuple(reversed(index))]


def _numbers(weights: str) -> list[float]:
    """Return sampled weights as numbers: bfloat16 is the upper half of a float32."""
    bits = bytes.fromhex(weights)
    return [struct.unpack(">f", bits[i : i + 2] + b"\0\0")[0] for i in range(0, len(bits), 2)]


def _same_weight(ours: float, theirs: float) -> bool:
    return math.isclose(ours, theirs, rel_tol=_RELATIVE_TOLERANCE, abs_tol=_ABSOLUTE_TOLERANCE)
