"""Tiny random models of many architectures: real code of transformers, a few thousand parameters each."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers

VOCAB_SIZE = 96
EOS_TOKEN_IDS = [1, 2, 3, 4]
"""Four of 96 tokens end an answer, so that answers sampled from random weights end early and at different lengths."""

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 5,
    "eos_token_id": 1,
}
_GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_ctx": 128}
_GPT2 |= {"pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 1}
_WINDOW = {"sliding_window": 8}

NAMED = {
    "llama": {},
    "mistral": _WINDOW,
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, **_WINDOW},
    "gemma3_text": {"head_dim": 8, **_WINDOW},
    "phi": {"num_key_value_heads": 4},
    "phi3": {"original_max_position_embeddings": 128},
    "gpt2": _GPT2,
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "olmo2": {},
    "cohere": {},
}
"""The architectures that `attach` promises by name, with what their configs need beside the common sizes."""

OTHERS = {
    "cohere2": _WINDOW,
    "olmo": {},
    "granite": {},
    "starcoder2": {},
    "stablelm": {},
    "glm": {"head_dim": 8},
    "smollm3": {},
    "exaone4": {"head_dim": 8, "sliding_window": None, "layer_types": ["full_attention"] * 3},
    "qwen2_moe": {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4},
    "qwen3_moe": {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "bloom": {"n_layer": 3, "n_head": 4},
    "gptj": {**_GPT2, "rotary_dim": 4},
    "codegen": {**_GPT2, "rotary_dim": 4},
    "gpt_bigcode": _GPT2,
    "mpt": {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128, "vocab_size": VOCAB_SIZE},
    "apertus": {},
    "seed_oss": {"head_dim": 8},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4},
    "lfm2": {},
    "glm4": {},
    "nemotron": {},
}
"""Others that work with the same code."""


@functools.cache
def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model in evaluation mode; the same object for the same arguments, so leave it as you found it."""
    specific = {**NAMED, **OTHERS}[name]
    sizes = specific if "n_embd" in specific or "d_model" in specific else {**_COMMON, **specific}
    config = transformers.AutoConfig.for_model(name, **sizes)
    return randomised(config, dtype)


def randomised(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        # Larger than the usual 0.02, so that hidden states and scores differ visibly from token to token.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = EOS_TOKEN_IDS
    model.generation_config.pad_token_id = 0
    return model.eval().to(dtype)


def fresh_model(seed: int = 0) -> Any:
    """A tiny Llama of its own, which a test may leave in any state."""
    config = tiny_model("llama").config
    return randomised(type(config)(**config.to_dict()), seed=seed)
