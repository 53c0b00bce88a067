"""Tiny random models of many families, their dropouts on and their weights far from their start."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from reference.tiny_chain import shake

SIZES = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SIZES | {"intermediate_size": 64, "max_position_embeddings": 512}
ROPE = WIDE | {"num_key_value_heads": 2}  # grouped queries
HEAD = ROPE | {"head_dim": 8}
OLD = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
OPT = SIZES | {"ffn_dim": 64, "max_position_embeddings": 512, "word_embed_proj_dim": 32}
MIXED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}  # shorter than the texts below
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": ROPE,
    "mistral": ROPE | {"sliding_window": 6},
    "qwen2": ROPE,
    "qwen3": HEAD,
    "gemma2": HEAD | {"sliding_window": 6, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": HEAD | MIXED | {"query_pre_attn_scalar": 8},
    "phi3": ROPE,  # one matrix for query, key and value
    "gpt2": OLD,  # Conv1D, learned positions
    "gpt_neox": WIDE,  # Pythia
    "gptj": OLD | {"rotary_dim": 4},  # a bias in its language head
    "opt": OPT,
    "olmo2": ROPE,
    "smollm3": ROPE | {"no_rope_layers": [1, 0]},
    "falcon": SIZES | {"max_position_embeddings": 512},  # multi-query; reads its dropouts from the config
    "granite": ROPE | {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "bloom": {"vocab_size": 400, "hidden_size": 32, "n_layer": 2, "n_head": 4},  # ALiBi: no position ids
    "cohere": ROPE | {"logit_scale": 0.25},
    "stablelm": ROPE,
    "gpt_bigcode": OLD,  # StarCoder; its attention dropout goes by another name
    "lfm2": ROPE | {"layer_types": ["conv", "full_attention"]},  # a cache of convolutions
}
VARIANTS = {  # a family whose configuration changes the structure
    "opt_projected": ("opt", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),  # OPT-350M
    "falcon_alibi": ("falcon", SIZES | {"alibi": True}),
}
MORE: dict[str, dict[str, Any]] = {
    "apertus": ROPE,
    "arcee": ROPE,
    "biogpt": WIDE,
    "codegen": OLD | {"rotary_dim": 4},
    "cohere2": HEAD | {"logit_scale": 0.25, "sliding_window": 6},
    "ernie4_5": HEAD,
    "exaone4": ROPE,
    "gemma": HEAD,
    "gemma4_text": HEAD | MIXED | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 400},
    "glm": HEAD,
    "glm4": HEAD,
    "gpt_neo": SIZES | {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    "helium": HEAD,
    "hunyuan_v1_dense": HEAD,
    "ministral": HEAD | MIXED,
    "mpt": {"vocab_size": 400, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
    "nemotron": ROPE,
    "olmo": ROPE,
    "olmo3": ROPE | MIXED,
    "persimmon": ROPE,
    "phi": ROPE,
    "qwen3_5_text": HEAD | LINEAR,
    "seed_oss": HEAD,
    "starcoder2": ROPE | {"sliding_window": 6},
    "xglm": {"vocab_size": 400, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
}
EXPERTS = {  # mixtures of experts, and hybrids with a recurrent state
    "mixtral": ROPE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": HEAD | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "olmoe": ROPE | {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": HEAD | MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": HEAD  # its prefix is none of its attributes
    | {"attention_chunk_size": 8, "num_local_experts": 2, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 48},
    "bamba": ROPE | MAMBA | {"attn_layer_indices": [1]},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bert": (WIDE, "differ from those of a row alone"),  # sees later tokens
    "rwkv": (SIZES | {"context_length": 64}, "differ from those of a row alone"),
    "xlnet": ({"vocab_size": 400, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}, "differ from those of"),
}
BY_GENERATE: dict[str, dict[str, Any]] = {  # a state instead of a key-value cache
    "mamba": SIZES | {"state_size": 4},
    "minimax": HEAD | {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2},
}


def new_model(name: str, dropout: float = 0.3) -> Any:
    family, sizes = VARIANTS.get(name) or (
        name,
        (FAMILIES | MORE | EXPERTS | BY_GENERATE).get(name) or REFUSED[name][0],
    )
    config = CONFIG_MAPPING[family](**sizes | {"pad_token_id": 3, "bos_token_id": None, "eos_token_id": 0})
    for field, value in list(vars(config).items()):
        if "drop" in field and isinstance(value, float):
            setattr(config, field, dropout)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    shake(model, 0, 0.2)
    return model.eval()
