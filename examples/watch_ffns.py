"""A pass of one's own: record how large what each FFN adds is against the stream, on real prompts, in the compiled model.

python examples/watch_ffns.py --model smollm2 --prompt "The capital of France is"
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

import adaskip_compile
from adaskip_compile.checkpoints import load_checkpoint
from adaskip_passes.ir.graph import call
from adaskip_passes.pipeline.pipeline import PassResult
from adaskip_passes.stream.find_stream import find_residual_stream
from adaskip_passes.stream.stream import ResidualStream

SEEN: dict[str, list[float]] = {}


# An operation of its own: what looks at numbers is nothing that a compiler could look into.
@torch.library.custom_op("examples::watched", mutates_args=())
def watched(branch: torch.Tensor, stream: torch.Tensor, path: str) -> torch.Tensor:
    """Return a copy of ``branch``, and note its size against that of ``stream``."""
    SEEN.setdefault(path, []).append(float(branch.float().norm() / stream.float().norm()))
    return branch.clone()


@watched.register_fake
def _(branch: torch.Tensor, stream: torch.Tensor, path: str) -> torch.Tensor:
    return torch.empty_like(branch)


@dataclass(frozen=True)
class WatchFfns:
    """Have every FFN's branch pass through :func:`watched`."""

    name: ClassVar[str] = "watch-ffns"

    def apply(self, gm: fx.GraphModule, stream: ResidualStream) -> PassResult:
        """Rewrite ``gm`` in place."""
        ffns = [one for one in stream.sublayers if one.kind == "ffn"]
        for one in ffns:
            with gm.graph.inserting_after(one.branch):
                seen = call(gm.graph, torch.ops.examples.watched.default, one.branch, one.stream_in, one.path)
            one.stream_out.replace_input_with(one.branch, seen)
        return PassResult(find_residual_stream(gm), modified=bool(ffns), matched=len(ffns))


def main(argv: list[str] | None = None) -> None:
    """Generate with the pass in, and print what it saw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompt", default="The capital of France is")
    arguments = parser.parse_args(argv)
    model, tokenizer = load_checkpoint(arguments.model)
    adaskip_compile.compile(model, passes=[WatchFfns()])
    inputs: Any = tokenizer(arguments.prompt, return_tensors="pt")
    model.generate(**inputs, max_new_tokens=8, do_sample=False)
    for path, sizes in SEEN.items():
        print(f"{path:<28} prompt {sizes[0]:.3f}, decoded {min(sizes[1:]):.3f} to {max(sizes[1:]):.3f}")


if __name__ == "__main__":
    main()
