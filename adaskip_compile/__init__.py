"""adaskip-compile: a ``torch.compile`` backend that skips the sublayers of a decoder that barely matter.

>>> import torch, adaskip_compile                                      # doctest: +SKIP
>>> profile = adaskip_compile.profile(model, texts, tokenizer=tokenizer)   # doctest: +SKIP
>>> plan = adaskip_compile.plan(profile, skip=8)                       # doctest: +SKIP
>>> adaskip_compile.compile(model, plan).generate(**inputs)            # doctest: +SKIP
>>> print(adaskip_compile.report(model))                               # doctest: +SKIP

The method is AdaSkip (arXiv 2501.02336).
"""

from __future__ import annotations

import importlib.metadata
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaskip_compile.backend import compile, restore
    from adaskip_compile.exporting.export import ExportedGraphs, export
    from adaskip_compile.fitting.fit import fit
    from adaskip_compile.fitting.joint_order import order_by_loss
    from adaskip_compile.fitting.loss_budget import plan_within_loss
    from adaskip_compile.fitting.tune import tune
    from adaskip_compile.inspection.analyze import analyze, capture_graph
    from adaskip_compile.options import Options
    from adaskip_compile.planning.planner import plan
    from adaskip_compile.planning.skip_plan import RampStep, SkipPlan
    from adaskip_compile.planning.skipped_sublayer import SkippedSublayer
    from adaskip_compile.profiling.profiles import Profile, SublayerProfile
    from adaskip_compile.profiling.profiling import profile
    from adaskip_compile.runtime.reports import Report, report
    from adaskip_passes.errors import (
        AdaSkipError,
        CaptureError,
        DamagedFileError,
        FileError,
        ForeignFileError,
        LegalityError,
        MissingFileError,
        NewerFileError,
        OptionError,
        PassError,
        PlanError,
        ProfileError,
        UnknownSublayerError,
        VerificationError,
    )

__all__ = [
    "AdaSkipError",
    "CaptureError",
    "DamagedFileError",
    "ExportedGraphs",
    "FileError",
    "ForeignFileError",
    "LegalityError",
    "MissingFileError",
    "NewerFileError",
    "OptionError",
    "Options",
    "PassError",
    "PlanError",
    "Profile",
    "ProfileError",
    "RampStep",
    "Report",
    "SkipPlan",
    "SkippedSublayer",
    "SublayerProfile",
    "UnknownSublayerError",
    "VerificationError",
    "analyze",
    "capture_graph",
    "compile",
    "export",
    "fit",
    "order_by_loss",
    "plan",
    "plan_within_loss",
    "profile",
    "report",
    "restore",
    "tune",
]

# Where each name comes from. They are imported when they are first used: PyTorch takes seconds, and neither
# `adaskip --help` nor the completion of a command line has a use for it.
_HOMES = {
    "ExportedGraphs": "exporting.export",
    "Options": "options",
    "Profile": "profiling.profiles",
    "RampStep": "planning.skip_plan",
    "Report": "runtime.reports",
    "SkipPlan": "planning.skip_plan",
    "SkippedSublayer": "planning.skipped_sublayer",
    "SublayerProfile": "profiling.profiles",
    "analyze": "inspection.analyze",
    "capture_graph": "inspection.analyze",
    "compile": "backend",
    "export": "exporting.export",
    "fit": "fitting.fit",
    "order_by_loss": "fitting.joint_order",
    "plan": "planning.planner",
    "plan_within_loss": "fitting.loss_budget",
    "profile": "profiling.profiling",
    "report": "runtime.reports",
    "restore": "backend",
    "tune": "fitting.tune",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from adaskip_compile.files.versioned_json import DISTRIBUTION

        try:
            return importlib.metadata.version(DISTRIBUTION)
        except importlib.metadata.PackageNotFoundError as error:  # run from a source folder that was never installed
            raise AttributeError(f"{DISTRIBUTION} is not installed, so its version is not known") from error
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = f"{__name__}.{_HOMES[name]}" if name in _HOMES else "adaskip_passes.errors"
    value = globals()[name] = getattr(importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


# Silent unless the program that uses this sets up logging: logging.basicConfig(level="INFO") shows what happens.
logging.getLogger(__name__).addHandler(logging.NullHandler())
