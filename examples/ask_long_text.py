"""Ask about a long text, with a prompt that skips within a stated loss.

    python examples/ask_long_text.py book.txt "Who goes to sea?" --model smollm2 --max-loss 0.05

The first run finds what prompts of this length can skip, and keeps it: later ones begin at once.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import TextStreamer

import adaskip_compile
from adaskip_compile.checkpoints import load_checkpoint


def main(argv: list[str] | None = None) -> None:
    """Answer, streamed, and tell how long the prompt took and what was skipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("question")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--max-loss", type=float, default=0.02, help="nats a token; 0.02 is 2 %% of perplexity")
    parser.add_argument("--context", type=int, default=2048, help="tokens of the prompt at most")
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args(argv)

    model, tokenizer = load_checkpoint(arguments.model)
    adaskip_compile.compile(model, tokenizer=tokenizer, max_loss=arguments.max_loss, context=arguments.context)

    question = tokenizer(f"\n\nQuestion: {arguments.question}\nAnswer:", add_special_tokens=False, return_tensors="pt")
    room = arguments.context - question.input_ids.shape[1]
    text = tokenizer(arguments.text.read_text(), truncation=True, max_length=room, return_tensors="pt")
    ids = torch.cat([text.input_ids, question.input_ids], 1)

    began = time.perf_counter()
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    model.generate(ids, max_new_tokens=arguments.new_tokens, do_sample=False, streamer=streamer)
    print(f"\n{ids.shape[1]} tokens of prompt and the answer in {time.perf_counter() - began:.1f} s")
    print(adaskip_compile.report(model))


if __name__ == "__main__":
    main()
