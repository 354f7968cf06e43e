"""The models whose shapes are measured: sizes as in their published configurations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only model."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    def widths(self, entries: str) -> list[int]:
        """Of the hidden states that a head reads: of "all" layers, of "4" of them, or the "logits"."""
        if entries == "logits":
            return [self.vocabulary]
        return [self.hidden] * (self.layers + 1 if entries == "all" else int(entries))

    def cut(self, layers: int | None) -> Shape:
        if layers is None or layers == self.layers:
            return self
        return replace(self, name=f"{self.name}, {layers} of {self.layers} layers", layers=layers)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128256),
        Shape("Llama-3.2-3B", 28, 3072, 8192, 24, 8, 128256),
        Shape("Ministral-8B and Qwen3-8B", 36, 4096, 12288, 32, 8, 131072),  # alike but for the vocabulary
        Shape("Gemma-3-27B", 62, 5376, 21504, 32, 16, 262208),
        Shape("Llama-3.3-70B", 80, 8192, 28672, 64, 8, 128256),
    )
}
LLAMA_8B = SHAPES["Llama-3.1-8B"]
TINY = Shape("tiny", 3, 64, 128, 4, 2, 512)
"""For runs that only try a benchmark out."""


def llama(shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16, labels: int | None = None) -> Any:
    """A Llama of this shape with random weights; with `labels`, one that classifies sequences."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config: Any = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        pad_token_id=0,
        eos_token_id=None,
    )
    if labels is not None:
        config.num_labels = labels
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return (LlamaForCausalLM if labels is None else LlamaForSequenceClassification)(config).eval()
    finally:
        torch.set_default_dtype(before)
