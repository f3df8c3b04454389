"""Profiles made by hand, and hypothesis strategies for arbitrary ones."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from adaskip_compile.files.model_identity import SAMPLED_WEIGHTS, ModelIdentity
from adaskip_compile.profiling.profiles import Profile, SublayerProfile

TINY = ModelIdentity("org/tiny", "0123456789abcdef", "3f80" * SAMPLED_WEIGHTS)
FINE_TUNED = ModelIdentity("org/tiny", "0123456789abcdef", "3f80" * (SAMPLED_WEIGHTS - 1) + "4000")
OTHER = ModelIdentity("org/other", "fedcba9876543210", "3f80" * SAMPLED_WEIGHTS)

NUMBERS = st.floats(min_value=-1e6, max_value=1e6)
POSITIVE = st.floats(min_value=1e-6, max_value=1e6)


def measured(
    path: str,
    similarity: float | Sequence[float],
    *,
    scale_token: float | Sequence[float] = 1.0,
    scale_frobenius: float | Sequence[float] = 1.0,
) -> SublayerProfile:
    """Return the profile of an attention (``.self_attn``), state-space (``.mixer``) or FFN sublayer."""
    kind = {"self_attn": "attention", "mixer": "ssm"}.get(path.rpartition(".")[2], "ffn")
    similarities = _samples(similarity, 1)
    count = len(similarities)
    return SublayerProfile(
        path=path,
        kind=kind,
        stateful=kind != "ffn",
        similarity=similarities,
        scale_token=_samples(scale_token, count),
        scale_frobenius=_samples(scale_frobenius, count),
        tokens=(100,) * count,
    )


def decoder(layers: int, *, model: ModelIdentity | None = TINY) -> Profile:
    """Return the profile of a decoder in which every attention is more similar than any FFN, and early ones less."""
    sublayers = []
    for layer in range(layers):
        sublayers.append(measured(f"layers.{layer}.self_attn", 0.9 + layer / 10_000))
        sublayers.append(measured(f"layers.{layer}.mlp", 0.8 + layer / 10_000))
    return Profile(model, tuple(sublayers))


@st.composite
def profiles(draw: st.DrawFn, shape: Sequence[tuple[str, str]] | None = None) -> Profile:
    """Draw a profile of :data:`TINY`, of any sublayers or of those in ``shape`` (paths and kinds)."""
    if shape is None:
        paths = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4, unique=True))
        shape = [(path, draw(st.sampled_from(["attention", "ssm", "ffn"]))) for path in paths]
    count = draw(st.integers(1, 4))
    sublayers = []
    for path, kind in shape:
        columns = [
            tuple(draw(st.lists(each, min_size=count, max_size=count))) for each in (NUMBERS, POSITIVE, POSITIVE)
        ]
        tokens = tuple(draw(st.lists(st.integers(1, 10**6), min_size=count, max_size=count)))
        sublayers.append(SublayerProfile(path, kind, kind != "ffn", columns[0], columns[1], columns[2], tokens))
    return Profile(TINY, tuple(sublayers))


def _samples(values: float | Sequence[float], count: int) -> tuple[float, ...]:
    return (values,) * count if isinstance(values, (int, float)) else tuple(values)
