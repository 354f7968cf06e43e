"""A model and a tokenizer small enough to make in a test: characters in, characters out."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 256


def tokenizer() -> Any:
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *string.printable])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def model(seed: int = 0, layers: int = 2) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        # Far from uniform, as a trained model is: sampling then has likely and unlikely tokens.
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def save(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    model(seed, layers).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
