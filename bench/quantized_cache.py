"""What do skipping and a quantised KV cache cost and save, alone and together? (The paper's open question 3.)

What prefill leaves in the cache is quantised and read back by the layers of transformers' ``QuantizedCache`` with
optimum-quanto; decoded tokens stay in full precision, as there for up to ``residual_length`` (128) of them. The
layers cannot be captured as part of the graph, so this happens between prefill and decode. Quality is the NLL of
the tokens decoded after that; cache bytes are those of what would be kept, each storage once.

    python -m bench.quantized_cache --model smollm2 [--texts NAME=DIR ...]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import adaskip_compile
from adaskip_compile.evaluation.candidates import FULL
from adaskip_compile.evaluation.likelihood import decoded_nlls
from adaskip_compile.evaluation.scores import Scores
from adaskip_compile.planning.skip_plan import SkipPlan
from bench.studies import Study, mean_over_domains, study_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the page."""
    parser = study_parser(str(__doc__), samples=20, length=1024, windows=1, decoded=32)
    parser.add_argument("--skips", type=int, nargs="+", default=[8, 16], metavar="K")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2], choices=(2, 4))
    parser.add_argument("--compensation", default="scale", metavar="NAME")
    arguments = parser.parse_args(argv)
    study = Study("quantized_cache", "Skipping and a quantised KV cache, alone and together", arguments)
    profile, windows = study.profile(compensations=[arguments.compensation]), study.windows()
    plans = {FULL: SkipPlan.none()} | {
        f"{skip} skipped": adaskip_compile.plan(profile, skip=skip, compensation=arguments.compensation)
        for skip in arguments.skips
    }
    rows: list[tuple[str, ...]] = []
    first: tuple[float, int] | None = None
    for name, plan in plans.items():
        adaskip_compile.compile(study.model, plan, inner="eager")
        for bits in (None, *arguments.bits):
            scores, held = _measure(study, windows, bits)
            nll = mean_over_domains(scores)
            first = first or (nll, held)
            cells = [f"{nll - first[0]:+.3f}", *(str(each) for each in scores.values())]
            cache = "float32" if bits is None else f"{bits} bits"
            rows.append((f"{name}, {cache}", f"{held / 1e6:.2f}", f"{first[1] / held:.2f}x", *cells))
    study.table(("plan, cache", "cache MB", "smaller", "loss (NLL)", *windows), rows)
    study.write()
    return 0


def _measure(study: Study, windows: dict[str, list[torch.Tensor]], bits: int | None) -> tuple[dict[str, Scores], int]:
    """Return the NLL of the decoded tokens by domain, and the bytes of the cache after a prefill."""
    held: list[int] = []
    after = _as_it_is(held) if bits is None else quantiser(bits, held)
    decoded = study.arguments.decoded
    scores = {
        name: Scores(decoded_nlls(study.model, some, decoded=decoded, after_prefill=after))
        for name, some in windows.items()
    }
    return scores, held[-1]


def _as_it_is(held: list[int]) -> Callable[[Any], None]:
    return lambda cache: held.append(sum(tensor.nbytes for tensor in _kept(cache)))


def _kept(cache: Any) -> Iterator[torch.Tensor]:
    """Yield the keys and values of a cache, but for those of skipped attentions, which share the memory of kept ones.

    A window of the last tokens may lie in the memory of all of them until the next step; what counts is the window.
    """
    seen: set[int] = set()
    for tensor in (tensor for entry in cache.layers for tensor in (entry.keys, entry.values)):
        storage = tensor.untyped_storage().data_ptr()
        if storage not in seen:
            seen.add(storage)
            yield tensor


def quantiser(bits: int, held: list[int]) -> Callable[[Any], None]:
    """Return what quantises the entries of a cache in place, and adds to ``held`` the bytes that they take packed."""
    from transformers.cache_utils import QuantoQuantizedLayer

    layer = QuantoQuantizedLayer(nbits=bits, q_group_size=64)

    def quantise(cache: Any) -> None:
        size = 0
        for tensor in _kept(cache):
            packed = layer._quantize(tensor.contiguous(), axis=0)
            size += _packed_bytes(packed)
            tensor.copy_(layer._dequantize(packed))
        held.append(size)

    return quantise


def _packed_bytes(tensor: Any) -> int:
    """Return the bytes of a tensor, or of those that a packed one is made of."""
    if type(tensor) is torch.Tensor:
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_packed_bytes(getattr(tensor, name)) for name in names)


if __name__ == "__main__":
    raise SystemExit(main())
