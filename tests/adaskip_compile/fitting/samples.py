"""What maps and orders are learned from here: a few short samples of random tokens."""

from __future__ import annotations

from tests.models import tokens

SAMPLES = [tokens(1, 40, seed=seed)[0] for seed in range(4)]
