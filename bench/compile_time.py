"""How long until the first token? Each way in a process of its own: cold, with empty caches, then warm.

``adaskip`` skips 8 attention sublayers, ``inductor`` is ``torch.compile`` with its default backend on the same model
and inputs. The time is that from the start of the process to the second token, so prefill and decode are captured and
compiled; ``backend`` is the part of it that the backend took, without Dynamo's tracing and with what calls waited for
kernels, and ``captures`` how many graphs Dynamo traced. ``--layers`` gives the model other depths, with random weights.

    python -m bench.compile_time --model smollm2 --context 512 --json bench/results/compile_time.json
    python -m bench.compile_time --layers 8 16 30 64 --ways adaskip --states cold --json bench/results/compile_depth.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch

import adaskip_compile
from adaskip_compile.capture.dynamo import capture_count
from adaskip_compile.checkpoints import load_checkpoint
from adaskip_compile.kv_cache.cache_argument import cache_argument, cache_of
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.runtime.session import sessions_of
from bench.recording import write

WAYS = ("eager", "adaskip", "inductor")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write JSON where asked to."""
    arguments = _parse(argv)
    if arguments.way:
        _once(arguments)
        return 0
    rows = []
    for layers, way, _ in product(arguments.layers, arguments.ways, range(arguments.rounds)):
        with tempfile.TemporaryDirectory() as caches:
            for state in arguments.states:
                row = {"way": way, "state": state, **_in_new_process(way, layers, caches, arguments)}
                rows.append({**row, "layers": layers} if layers else row)
                _show(rows[-1], arguments)
    write({"rows": rows}, arguments)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="folder, .gguf file, hub id or short name")
    parser.add_argument("--context", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--states", nargs="+", default=["cold", "warm"], choices=("cold", "warm"), help="in this order")
    parser.add_argument("--layers", type=int, nargs="+", default=[0], metavar="N", help="depths, with random weights")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="processes of each kind")
    parser.add_argument("--way", choices=WAYS, help="measure this one, in this process")
    parser.add_argument("--caches", metavar="DIR", help="the cache directories of that process")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="PATH|-")
    return parser.parse_args(argv)


def _in_new_process(way: str, layers: int, caches: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.compile_time", "--way", way, "--model", arguments.model, "--caches", caches]
    command += ["--context", str(arguments.context), "--threads", str(arguments.threads), "--layers", str(layers)]
    started = time.time()
    done = subprocess.run(
        command, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches}, stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "seconds": round(found["ended"] - started, 2),
        "loading": round(found["loaded"] - started, 2),
        **found["more"],
    }


def _show(row: dict[str, Any], arguments: argparse.Namespace) -> None:
    out = sys.stderr if arguments.json == "-" else sys.stdout
    print("  ".join(f"{name} {value}" for name, value in row.items()), file=out, flush=True)


def _once(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    model, _ = load_checkpoint(arguments.model)
    if arguments.layers[0]:
        model.config.num_hidden_layers = arguments.layers[0]
        model = type(model)(model.config).eval()
    loaded = time.time()
    if arguments.way == "adaskip":
        attentions = [f"{path}" for path, _ in model.named_modules() if path.endswith(("self_attn", ".attn"))][3:11]
        adaskip_compile.compile(model, SkipPlan.from_scales(dict.fromkeys(attentions, 1.0)), cache_dir=arguments.caches)
    elif arguments.way == "inductor":
        model.compile(dynamic=True)
    _two_tokens(model, arguments.context)
    ended = time.time()
    more = {"backend": round(_backend(model, arguments.way), 2), "captures": capture_count()}
    print(json.dumps({"loaded": loaded, "ended": ended, "more": more}))


@torch.no_grad()
def _two_tokens(model: Any, context: int) -> None:
    ids = torch.randint(10, model.config.vocab_size, (1, context), generator=torch.manual_seed(0))
    result = model(ids, use_cache=True, logits_to_keep=1)
    model(result.logits.argmax(-1), use_cache=True, logits_to_keep=1, **cache_argument(model, cache_of(result)))


def _backend(model: Any, way: str) -> float:
    """Return what the backend took: with the graphs that Dynamo handed it, and, in ours, when they were first called."""
    from torch._dynamo.utils import compilation_time_metrics

    taken = sum(compilation_time_metrics.get("OutputGraph.call_user_compiler", ()))
    if way == "adaskip":
        graphs = [graph for session in sessions_of(model) for graph in session.graphs]
        taken += sum(variant.seconds for graph in graphs for variant in graph.variants.values())
        taken += sum(graph.variants.lowering.waited for graph in graphs)
    return taken


if __name__ == "__main__":
    raise SystemExit(main())
