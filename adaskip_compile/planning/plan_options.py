"""What can be asked of a plan, as one value that checks itself."""

from __future__ import annotations

import os
from dataclasses import dataclass

from adaskip_compile.costs.timers import Timer
from adaskip_compile.planning.policy_names import COMPENSATIONS, POLICIES
from adaskip_compile.profiling.profiles import SCALE_KINDS, is_finite_number
from adaskip_passes.errors import OptionError

PHASES = ("both", "prefill", "decode")


@dataclass(frozen=True)
class PlanOptions:
    """What :func:`adaskip_compile.plan` takes beside a profile; it tells what each means.

    Raises:
        OptionError: A value that no model could be planned with, or goals that make no sense together.
    """

    skip: int = 8
    speedup: float | None = None
    policy: str = "adaskip"
    context: int | None = None
    window: int = 20
    scale: str = "token"
    seed: int = 0
    phase: str = "both"
    max_loss: float | None = None
    times: Timer | str | os.PathLike[str] | None = None
    compensation: str = "scale"

    def __post_init__(self) -> None:
        self._check_values()
        self._check_goal()

    def _check_values(self) -> None:
        if type(self.skip) is not int or self.skip < 0:
            raise OptionError(f"skip={self.skip!r}: takes a number of sublayers, 0 or more")
        if self.speedup is not None and (not is_finite_number(self.speedup) or self.speedup < 1):
            raise OptionError(f"speedup={self.speedup!r}: takes a ratio of 1 or more, such as 1.14, or None")
        for name, value, known in (
            ("policy", self.policy, POLICIES),
            ("scale", self.scale, SCALE_KINDS),
            ("phase", self.phase, PHASES),
            ("compensation", self.compensation, COMPENSATIONS),
        ):
            if value not in known:
                raise OptionError(f"{name}={value!r}: takes one of {', '.join(known)}")
        if type(self.window) is not int or self.window < 0:
            raise OptionError(f"window={self.window!r}: takes a number of decoded tokens, 0 or more")
        if type(self.seed) is not int:
            raise OptionError(f"seed={self.seed!r}: takes an integer")

    def _check_goal(self) -> None:
        if self.context is not None and (type(self.context) is not int or self.context < 2):
            raise OptionError(f"context={self.context!r}: takes a number of tokens, 2 or more, or None")
        if self.max_loss is not None and (not is_finite_number(self.max_loss) or self.max_loss < 0):
            raise OptionError(f"max_loss={self.max_loss!r}: takes nats a token, 0 or more, or None")
        if self.context is not None and self.speedup is None:
            raise OptionError(
                f"context={self.context}: is where speedup= is to be reached; give that too, or leave it out"
            )
        if self.times is not None and self.context is None:
            raise OptionError("times= tells times at context= tokens: give speedup= and context= too, or leave it out")
        if self.max_loss is not None and self.speedup is not None:
            raise OptionError("max_loss and speedup are two goals: give one of them")
        if self.max_loss is not None and self.policy not in ("adaskip", "loss_greedy"):
            raise OptionError(f"policy={self.policy!r} knows no loss: max_loss= goes by that of loss_greedy")
