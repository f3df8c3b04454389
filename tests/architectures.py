"""Tiny random models of every causal language model type that the installed transformers knows.

A configuration starts from the type's own defaults: sizes shrink by name, and of lists with an entry a
layer (kinds of attention, dense or sparse FFN) as many layers stay as show each combination once. What
a type needs beyond that stands in :data:`EXTRAS`; types that are no decoder of text stand in :data:`LEFT_OUT`.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.models import redraw

# name -> size, for every name that a configuration has and does not leave at None.
_SIZES: dict[str, int] = {
    **dict.fromkeys(
        "hidden_size n_embd d_model emb_dim embedding_size word_embed_proj_dim lru_width embedding_dim".split(), 64
    ),
    **dict.fromkeys(
        "intermediate_size ffn_dim n_inner dff dim_ff d_inner decoder_ffn_dim ffn_hidden_size shared_expert_intermediate_size "
        "dense_intermediate_size shared_intermediate_size intermediate_size_mlp shared_experts_intermediate_size "
        "moe_shared_expert_intermediate_size expert_ffn_hidden_size".split(),
        96,
    ),
    **dict.fromkeys("moe_intermediate_size".split(), 48),
    **dict.fromkeys("num_attention_heads n_head n_heads attention_heads num_heads decoder_attention_heads".split(), 4),
    **dict.fromkeys("num_key_value_heads num_kv_heads".split(), 2),
    **dict.fromkeys("head_dim v_head_dim d_head dim_head".split(), 16),
    **dict.fromkeys("qk_rope_head_dim qk_nope_head_dim rotary_dim".split(), 8),
    "qk_head_dim": 16,
    **dict.fromkeys("q_lora_rank kv_lora_rank".split(), 16),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok num_experts_per_token top_k moe_topk moe_k".split(), 2),
    **dict.fromkeys("n_group topk_group num_expert_group".split(), 1),
    **dict.fromkeys("n_shared_experts num_shared_experts moe_num_shared_experts".split(), 1),
    **dict.fromkeys("state_size mamba_d_state ssm_state_size".split(), 8),
    **dict.fromkeys("mamba_n_heads mamba_num_heads n_mamba_heads".split(), 8),
    **dict.fromkeys("mamba_d_head mamba_head_dim mamba_headdim".split(), 16),
    **dict.fromkeys("linear_num_key_heads".split(), 2),
    **dict.fromkeys("linear_num_value_heads linear_num_heads".split(), 4),
    **dict.fromkeys("linear_key_head_dim linear_value_head_dim linear_head_dim".split(), 16),
    **dict.fromkeys("time_step_rank mamba_dt_rank".split(), 4),
    **dict.fromkeys("index_n_heads".split(), 2),
    **dict.fromkeys("index_head_dim".split(), 16),
    **dict.fromkeys("sliding_window attention_window_size local_attention".split(), 16),
    **dict.fromkeys("vocab_size vocab_size_per_layer_input".split(), 128),
    **dict.fromkeys(
        "max_position_embeddings n_positions n_ctx max_seq_len context_length max_sequence_length".split(), 256
    ),
    "first_k_dense_replace": 1,
    "type_vocab_size": 2,
}
_LAYERS = "num_hidden_layers n_layer n_layers num_layers decoder_layers num_blocks".split()
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}

EXTRAS: dict[str, dict[str, Any]] = {
    **{
        family: {"is_decoder": True}
        for family in "bert bert-generation camembert data2vec-text electra ernie megatron-bert rembert roberta "
        "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod".split()
    },
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "bloom": {"n_head": 4},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 0,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
    },
    "gemma3n": {},
    "gemma4_text": {"hidden_size_per_layer_input": 16},
    "gemma4_unified_text": {"hidden_size_per_layer_input": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
    },
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "ple_embed_dim": 64,
        "shared_expert_intermediate_size": 96,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 4, "block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [32, 32],
        "feed_forward_size": 96,
    },
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}

# Types in the mapping that are not decoders of text alone.
LEFT_OUT: dict[str, str] = {
    "gemma4_assistant": "drafts for another model",
    "gemma4_unified_assistant": "drafts for another model",
    "git": "captions images",
    "got_ocr2": "reads images",
    "trocr": "decodes images",
}


def causal_types() -> list[str]:
    """Return the model types of the causal LM mapping that are decoders of text, in its order."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = []
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if family in LEFT_OUT:
            continue
        config = AutoConfig.for_model(family)
        nested = [name for name in getattr(config, "sub_configs", {}) if name not in ("attn_config", "ffn_config")]
        if not nested and not getattr(config, "is_encoder_decoder", False):
            found.append(family)
    return found


def tiny_config(family: str, **overrides: Any) -> Any:
    """Return a configuration of two to four layers, with every kind of layer that the type's defaults have."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(family)
    known = {name for name, value in default.to_dict().items() if value is not None} | set(default.attribute_map)
    changes: dict[str, Any] = {name: size for name, size in _SIZES.items() if name in known}
    if "qk_rope_head_dim" in known:  # latent attention has as many key heads as query heads
        changes.update({name: 4 for name in ("num_key_value_heads",) if name in known})
        changes.pop("head_dim", None)
    depth = getattr(default, "num_hidden_layers", 2)
    lists = {
        name: value
        for name, value in default.to_dict().items()
        if isinstance(value, list) and len(value) == depth and depth > 2 and "token" not in name
    }
    picked = _picked_layers(lists, depth)
    changes.update({name: [value[index] for index in picked] for name, value in lists.items()})
    changes.update({name: len(picked) for name in _LAYERS if getattr(default, name, None) is not None})
    return AutoConfig.for_model(family, **{**changes, **_TOKENS, **EXTRAS.get(family, {}), **overrides})


def _picked_layers(lists: dict[str, list[Any]], depth: int) -> list[int]:
    """Return the first layer of each combination of kinds, at least two and at most four layers."""
    combinations: dict[tuple[Any, ...], int] = {}
    for index in range(depth):
        combinations.setdefault(tuple(str(value[index]) for value in lists.values()), index)
    picked = list(combinations.values())[:4]
    return sorted([*picked, *[index for index in range(depth) if index not in picked][: max(0, 2 - len(picked))]])


def tiny_architecture(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """Return a tiny random model of a type, in eval mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return redraw(AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).eval(), seed)
