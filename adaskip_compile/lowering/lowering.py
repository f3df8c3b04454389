"""Turn a specialised graph into something that runs: the one place that knows the inner compilers."""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import sympy
import torch
from torch import fx
from torch.compiler import config as compiler_config
from torch.fx.experimental import _config as symbol_config

from adaskip_compile.capture.dynamo import capturing, example_inputs
from adaskip_compile.lowering.executor import Executor
from adaskip_compile.lowering.shape_checks import AssumptionCheck
from adaskip_compile.tested_versions import internals_of
from adaskip_passes.analysis.regions import Region, regions_of
from adaskip_passes.errors import PassError
from adaskip_passes.ir.graph import fake_mode
from adaskip_passes.pipeline.derived_graph import DerivedGraph, is_refusal
from adaskip_passes.pipeline.pipeline import run_pipeline
from adaskip_passes.pipelines import CUT, LOWER, USE_KERNELS
from adaskip_passes.stream.stream import NO_STREAM

log = logging.getLogger(__name__)
Runnable = Callable[..., Any]

# As every kernel of Inductor begins, with vector instructions; what it computes does not matter.
_KERNEL = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(float* numbers) { at::vec::Vectorized<float>::loadu(numbers, 1).store(numbers, 1); }
"""


@cache  # once a process
def start_cpu_compiler() -> None:
    """Have a thread make the C++ compiler ready for Inductor's kernels, while the first model is traced.

    Before its first kernel of a process Inductor finds out which vector instructions it can use, which with empty
    caches compiles small programs for six seconds, and preprocesses and precompiles its headers.
    """
    # Imported here and not on the thread: two threads that import modules of one package may see them half made.
    with internals_of("torch", 'inner="inductor" on a CPU'):
        from torch._inductor.codecache import CppPythonBindingsCodeCache

    def compile_kernel() -> None:
        try:
            CppPythonBindingsCodeCache.load_pybinding(["float*"], _KERNEL)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # met again where a kernel is needed
            log.info("the C++ compiler was not made ready ahead of time: %s", error)

    threading.Thread(target=compile_kernel, name="adaskip-cpu-compiler", daemon=True).start()


def interpreted(gm: fx.GraphModule, _: Sequence[Any]) -> Runnable:
    """Return what runs ``gm`` operation by operation, our faster ones in place of PyTorch's: an ``inner`` that compiles nothing."""
    try:
        return run_pipeline(gm, NO_STREAM, USE_KERNELS).gm.forward
    except PassError as error:
        log.info("operations of PyTorch alone: %s", error)
        return gm.forward


class Lowering:
    """Compiles the variants of one captured graph, and keeps what they share.

    ``inner`` is ``"inductor"``, ``"eager"``, or a function of a graph and example inputs. With ``regions="shared"`` the
    graph is cut into regions, passes run on the wiring between them, and each distinct region is compiled once, so that another
    skip set compiles nothing; with ``"whole"`` each variant is compiled as one graph. ``uncut`` says why a
    graph could not be cut: it is then compiled as a whole.

    The C++ compiler works on a region's kernels while the next region is lowered and the next graph is traced;
    ``waited`` is for how many seconds calls have waited for it.

    Variants are made long after Dynamo's capture has ended, so everything needed is read from the fake
    values that the graph carries. Regions are shared among the variants of one capture alone: their
    symbols mean the same there and nowhere else. ``assumed`` is what compiling took for granted of them, and
    ``note`` is told where that does not hold.
    """

    def __init__(
        self, inner: str | Callable[..., Runnable], regions: str, note: Callable[[str], None] = log.warning
    ) -> None:
        self.inner, self.regions, self.note = inner, regions, note
        self.compiled = 0
        self.assumed: list[sympy.Basic] = []
        self.uncut = ""
        self.waited = 0.0
        self._artifacts: dict[str, Runnable] = {}

    def prepare(self, graph: DerivedGraph) -> DerivedGraph:
        """Return what passes shall rewrite of ``graph`` for :meth:`lower`."""
        if self.regions == "whole":
            return graph
        try:
            return graph.run(CUT, recoverable=True)
        except PassError as error:
            if not is_refusal(error):
                raise
            self.regions, self.uncut = "whole", str(error)
            return graph

    def lower(self, graph: DerivedGraph) -> Runnable:
        """Return a callable that computes what ``graph`` computes; call it with the inputs of its graph in order."""
        gm = graph.gm
        if self.regions == "whole":
            return self._checked(gm, self._compile(graph), lambda: gm.forward)
        regions = regions_of(gm)
        compiled = Executor(gm, {region: self._artifact(graph, region) for region in regions})
        return self._checked(gm, compiled, lambda: Executor(gm, {region: region.gm.forward for region in regions}))

    def _checked(self, gm: fx.GraphModule, compiled: Runnable, plain: Callable[[], Runnable]) -> Runnable:
        # What one region assumes is known of the symbols from then on, and taken for granted in the next.
        return AssumptionCheck(gm, self.assumed, compiled, plain(), self.note) if self.assumed else compiled

    def _artifact(self, graph: DerivedGraph, region: Region) -> Runnable:
        if region.key not in self._artifacts:
            self._artifacts[region.key] = self._compile(graph, region)
        return self._artifacts[region.key]

    def _compile(self, graph: DerivedGraph, region: Region | None = None) -> Runnable:
        """Compile ``graph``, or a region of it."""
        gm = graph.gm if region is None else region.gm
        if self.inner == "eager":
            return gm.forward
        self.compiled += 1
        if callable(self.inner):
            return self.inner(gm, example_inputs(gm))
        lowered = (graph if region is None else graph.part(gm, region.__name__)).run(LOWER)
        lowered.show("lowered")
        gm = lowered.gm
        environment = getattr(fake_mode(gm.graph), "shape_env", None)
        known, symbols = (0, set()) if environment is None else (len(environment.guards), {*environment.var_to_range})
        try:
            artifact = self._standalone(gm, any_size=True)
        except Exception as error:  # noqa: BLE001 - whatever Inductor raises: what it cannot do at all, it raises again
            log.info("Inductor has no code for all sizes: %s", str(error).strip().partition("\n")[0])
            artifact = self._standalone(gm, any_size=False)
        guards: list[Any] = [] if environment is None else environment.guards[known:]
        # What is said of symbols that were only made meanwhile is said of constants.
        self.assumed += [guard.expr for guard in guards if symbols & guard.expr.free_symbols]
        return artifact

    def _standalone(self, gm: fx.GraphModule, *, any_size: bool) -> Runnable:
        """Compile ``gm``, where ``any_size`` for sizes of any value, otherwise with what those of the first call suggest.

        Those would decide how sums are made and what broadcasts. Inductor before torch 2.13 cannot always do without:
        it does not see that no size exceeds the greatest integer, where a slice without an end ends.
        """
        from torch._inductor import standalone_compile

        tag = f"{compiler_config.cache_key_tag}adaskip-any-size" if any_size else compiler_config.cache_key_tag
        # The setting is not in the key of what Inductor keeps: code for some sizes must not be taken for it.
        with (
            _kernels_when_called(self._waited),
            symbol_config.patch(backed_size_oblivious=any_size),  # type: ignore[attr-defined]
            compiler_config.patch(cache_key_tag=tag),  # type: ignore[attr-defined]
        ):
            return standalone_compile(gm, example_inputs(gm), dynamic_shapes="from_graph")

    def _waited(self, seconds: float) -> None:
        self.waited += seconds


@contextmanager
def _kernels_when_called(waited: Callable[[float], None]) -> Iterator[None]:
    """Have Inductor not wait for the C++ compiler within this context: a kernel is waited for when it is first called."""
    with internals_of("torch", 'inner="inductor"'):
        from torch._inductor.async_compile import AsyncCompile
        from torch._inductor.codecache import LambdaFuture

    wait = AsyncCompile.wait

    def wait_for_others(compiling: AsyncCompile, scope: dict[str, Any]) -> None:
        for name, kernel in scope.items():
            if name.startswith("cpp_") and isinstance(kernel, LambdaFuture):
                scope[name] = _PendingKernel(name, scope, kernel.result, waited)
        wait(compiling, scope)

    # Inductor's class is changed meanwhile, for one thread at a time. AOTAutograd traces with FX, of which all threads
    # know; that it is part of compiling, as within a capture, tells their calls of compiled code not to mind it.
    compiling = mock.patch.object(torch.compiler, "_is_compiling_flag", True)
    with capturing(), compiling, mock.patch.object(AsyncCompile, "wait", wait_for_others):
        yield


class _PendingKernel:
    """Stands for a kernel in ``scope``, the globals of the code that calls it, until it is called."""

    def __init__(
        self, name: str, scope: dict[str, Any], result: Callable[[], Runnable], waited: Callable[[float], None]
    ) -> None:
        self._name, self._scope, self._result, self._waited = name, scope, result, waited

    def __call__(self, *values: Any) -> Any:
        started = time.perf_counter()
        kernel = self._scope[self._name] = self._result()
        self._waited(time.perf_counter() - started)
        return kernel(*values)
