"""What the modules of a model compute beside their weights: their forwards and their hooks, and whether those change.

A captured graph is right for the code that was traced. Dynamo does not guard the forward of a class, nor hooks that
are registered later: a capture would go on computing what the model no longer does. So each call looks whether they
are still the same objects, and a digest that means the same in any process says of a capture what it was made of.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from adaskip_compile.capture.fingerprints import CallableDescriber, functions_of
from adaskip_passes.errors import CaptureError

_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_pre_hooks", "_backward_hooks"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)
_GLOBAL_HOOKS = (
    *("_global_forward_pre_hooks", "_global_forward_hooks", "_global_forward_hooks_always_called"),
    *("_global_forward_hooks_with_kwargs", "_global_backward_pre_hooks", "_global_backward_hooks"),
)
# They make modules, which is over, and Dynamo puts its own in their place while it runs.
_MAKERS = {"__init__", "__new__", "__setstate__"}
_numbers = itertools.count()


@dataclass(frozen=True)
class CodeState:
    """The code of a model at one time. Two states that are equal compute the same of the same weights.

    Args:
        digest: What tells it from others.
        why_passing: Why ``digest`` means nothing to other processes; empty where it does.
    """

    digest: str
    why_passing: str = ""


class ModelCode:
    """The code of one model: :meth:`state` is cheap enough to be asked at each call (30 layers: 50 microseconds)."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: list[Any] = []
        self._enumerate()
        self._state = self.state()

    def state(self) -> CodeState:
        """Return the state of the code now."""
        seen = self._look()
        if len(seen) != len(self._seen) or not all(map(operator.is_, seen, self._seen)):
            self._enumerate()
            self._state = self._described()
            # Objects are held, so that none that comes later has the identity of one that went.
            self._seen = self._look()
        return self._state

    def _enumerate(self) -> None:
        self._modules = dict(self._model.named_modules(remove_duplicate=False))
        kinds = dict.fromkeys(kind for module in self._modules.values() for kind in _with_forward(type(module)))
        self._own = [vars(module) for module in self._modules.values()]
        # Not all have these in their own namespace: scripted modules answer for them.
        self._children = [module._modules for module in self._modules.values() if module._modules]
        self._hooks = [getattr(module, name) for module in self._modules.values() for name in _HOOKS]
        self._hooks += [getattr(torch_module, name) for name in _GLOBAL_HOOKS]
        self._namespaces = [vars(kind) for kind in kinds]

    def _look(self) -> list[Any]:
        """Return the objects that make the state what it is."""
        seen: list[Any] = [own.get("forward") for own in self._own]
        for children in self._children:
            seen += children.values()
        for namespace in self._namespaces:
            forward = namespace.get("forward")
            seen += [forward, getattr(forward, "__code__", None)]
        for hooks in filter(None, self._hooks):
            seen += [hooks, *hooks.values()]
        return seen

    def _described(self) -> CodeState:
        try:
            text = repr([*self._descriptions()])
        except CaptureError as error:
            return CodeState(f"of this process: {next(_numbers)}", str(error))
        return CodeState(hashlib.sha256(text.encode()).hexdigest())

    def _descriptions(self) -> Iterator[Any]:
        paths = {id(module): path for path, module in self._modules.items()}
        describe = CallableDescriber(lambda value: paths.get(id(value)))
        for path, module in self._modules.items():
            yield (path, type(module).__module__, type(module).__qualname__)
        for namespace in self._namespaces:
            for name in sorted(namespace.keys() - _MAKERS):
                yield from ((name, describe(function)) for function in functions_of(namespace[name]))
        for path, own in zip(self._modules, self._own, strict=True):
            if "forward" in own:
                yield (path, describe(own["forward"]))
        for place, hooks in enumerate(self._hooks):
            # Keys are numbers that each process gives anew.
            yield from ((place, describe(hook)) for hook in hooks.values())


def _with_forward(kind: type) -> Iterator[type]:
    """Yield the classes among ``kind`` and its bases that say what a module computes."""
    return (base for base in kind.__mro__ if "forward" in vars(base))
