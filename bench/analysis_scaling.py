"""Does analysis stay linear in depth? Times analysis and rewriting of Llama-405B's shape on the meta device.

python -m bench.analysis_scaling [LAYERS ...]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import fx

from adaskip_passes.pipeline.pipeline import run_pipeline
from adaskip_passes.pipelines import STRAIGHTEN, skip_passes
from adaskip_passes.stream.stream import NO_STREAM

RESULTS = Path(__file__).parent / "results"
SIZES = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def captured(layers: int) -> fx.GraphModule:
    """Return the prefill graph of a model of that shape, without a cache (an empty one cannot grow on the meta device)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []

    def record(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    with torch.device("meta"):
        config = AutoConfig.for_model("llama", num_hidden_layers=layers, **SIZES)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        ids = torch.ones(1, 8, dtype=torch.long)
    with torch.no_grad():
        torch.compile(model._call_impl, backend=record, dynamic=True)(input_ids=ids, use_cache=False)
    (gm,) = graphs
    return gm


def measure(layers: int) -> dict[str, float]:
    """Return the seconds that each step took, for one depth."""
    started = time.perf_counter()
    gm = captured(layers)
    row = {"layers": layers, "nodes": len(gm.graph.nodes), "capture_s": time.perf_counter() - started}
    started = time.perf_counter()
    straight = run_pipeline(gm, NO_STREAM, STRAIGHTEN)
    gm, stream = straight.gm, straight.stream
    row["analysis_s"] = time.perf_counter() - started
    assert len(stream.sublayers) == 2 * layers, stream.problems
    started = time.perf_counter()
    skipped = stream.paths[1::8]
    probed = tuple(item.path for item in stream.sublayers if item.kind == "ffn" and item.path not in skipped)
    run_pipeline(gm, stream, skip_passes(skipped, probed))
    row["rewriting_s"] = time.perf_counter() - started
    return row


def main() -> None:
    """Time the depths given, or 8, 32 and 126, and write the figures."""
    rows = []
    for layers in sys.argv[1:] or (8, 32, 126):
        row = measure(int(layers))
        rows.append(row)
        total = row["analysis_s"] + row["rewriting_s"]
        shown = {key: round(value, 2) for key, value in row.items()}
        print({**shown, "ms_a_layer": round(1e3 * total / row["layers"], 1)}, flush=True)
    RESULTS.mkdir(exist_ok=True)
    page = {"torch": torch.__version__, "shape": SIZES, "rows": rows}
    (RESULTS / "analysis_scaling.json").write_text(json.dumps(page, indent=2) + "\n")


if __name__ == "__main__":
    main()
