"""Tiny sequence classifiers with random weights and their tokenizers, one of each way to pad and to read."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests import tiny

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER_CONTEXT = 64
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def encoder_tokenizer(pad: int = 0, types: bool = True) -> Any:
    """Characters, with [CLS] before and [SEP] after each of a pair."""
    special = ["[CLS]", "[SEP]", "[UNK]"]
    special.insert(pad, "[PAD]")
    vocabulary = {token: index for index, token in enumerate([*special, *string.printable])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=characters,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", *(["token_type_ids"] if types else []), "attention_mask"],
    )


def llama(side: str = "right", labels: int = 1, chat: bool = False, **changes: Any) -> tuple[Any, Any]:
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = side
    tokenizer.chat_template = CHAT if chat else None
    given = {
        "vocab_size": len(tokenizer),
        "num_key_value_heads": 1,
        "max_position_embeddings": tiny.CONTEXT,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    config = transformers.LlamaConfig(num_labels=labels, **{**SIZES, **given, **changes})
    return _made(transformers.LlamaForSequenceClassification, config), tokenizer


def gpt2(side: str = "left") -> tuple[Any, Any]:
    """Of absolute positions, which padding on the left would shift."""
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = side
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=tiny.CONTEXT,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        num_labels=1,
    )
    return _made(transformers.GPT2ForSequenceClassification, config), tokenizer


def bert(labels: int = 1, **changes: Any) -> tuple[Any, Any]:
    tokenizer = encoder_tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=ENCODER_CONTEXT,
        initializer_range=0.3,
        pad_token_id=0,
        num_labels=labels,
        **SIZES,
        **changes,
    )
    return _made(transformers.BertForSequenceClassification, config), tokenizer


def roberta() -> tuple[Any, Any]:
    """Counts positions behind the padding's index, and tells padding by it."""
    tokenizer = encoder_tokenizer(pad=1, types=False)
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=ENCODER_CONTEXT + 2,
        initializer_range=0.3,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        num_labels=1,
        type_vocab_size=1,
        **SIZES,
    )
    return _made(transformers.RobertaForSequenceClassification, config), tokenizer


def deberta() -> tuple[Any, Any]:
    tokenizer = encoder_tokenizer()
    config = transformers.DebertaV2Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=ENCODER_CONTEXT,
        initializer_range=0.3,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_biased_input=False,
        type_vocab_size=0,
        pad_token_id=0,
        num_labels=1,
        **SIZES,
    )
    return _made(transformers.DebertaV2ForSequenceClassification, config), tokenizer


def save(folder: Path, made: tuple[Any, Any]) -> Path:
    for part in made:
        part.save_pretrained(folder)
    return folder


def _made(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).eval()
