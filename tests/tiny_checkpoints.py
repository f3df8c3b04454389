"""A tiny decoder and its tokenizer, as a folder that ``from_pretrained`` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models import tiny


def byte_tokenizer() -> Any:
    """Return a tokenizer of single bytes: 256 ids after ``<pad>``, ``<s>`` and ``</s>``, and no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate(specials + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def save_tiny(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """Save a tiny random model with :func:`byte_tokenizer` and return the folder."""
    tokenizer = byte_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, "num_hidden_layers": 4}
    tiny(family, **{**sizes, **overrides}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
