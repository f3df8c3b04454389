"""What a model's own configuration says of it; any model may have none."""

from __future__ import annotations

from typing import Any

from torch import nn


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the part of ``model`` that decodes text, None where it has none."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def longest_context(model: nn.Module) -> int | None:
    """Return the longest context that ``model`` is made for, None where its configuration does not say."""
    found = getattr(text_config(model), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def end_tokens(model: nn.Module) -> list[int]:
    """Return the ids of the tokens that end a text, as the model's own ``generate`` knows them."""
    for settings in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found = getattr(settings, "eos_token_id", None)
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []
