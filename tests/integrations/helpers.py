"""Generating twice, once scored, and checking both levels of parity."""

from __future__ import annotations

import copy
from typing import Any

import torch

from swift_kernels import SwiftHead, attach, score_texts
from swift_kernels.integrations.compatibility import eos_token_ids
from tests.oracle import assert_scores, captured_tokens, oracle


def generate(model: Any, inputs: dict[str, torch.Tensor], seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    settings = {"do_sample": True, "max_new_tokens": 16, **options}
    return model.generate(**inputs, **settings)


def responses_of(scorer: Any, sequences: torch.Tensor, prompt_length: int) -> list[list[int]]:
    lengths = scorer.response_lengths().tolist()
    return [row[prompt_length : prompt_length + n] for row, n in zip(sequences.tolist(), lengths, strict=True)]


def unpadded(inputs: dict[str, torch.Tensor], copies: int) -> list[list[int]]:
    prompts = [
        row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    return [prompt for prompt in prompts for _ in range(copies)]


def check_parity(
    model: Any, head: SwiftHead, inputs: dict[str, torch.Tensor], copies: int = 3, fuse: str = "gather", **options: Any
) -> Any:
    """Scores while generating; checks tokens, level (a) against the states of that very run, and level (b)."""
    options = {"num_return_sequences": copies, **options}
    plain = generate(model, inputs, **options)
    with attach(model, head, fuse=fuse) as scorer:
        scored = generate(model, inputs, **options)
        if fuse == "gather":
            assert torch.equal(plain, scored), "generate's tokens changed"
        scores = scorer.scores()
        output = generate(
            model,
            inputs,
            **options,
            return_dict_in_generate=True,
            output_hidden_states=True,
            output_logits=True,
        )
        responses = responses_of(scorer, output.sequences, inputs["input_ids"].shape[1])
        tokens = captured_tokens(output, head, responses, eos_token_ids(model))
        tokens = [[entry.cpu() for entry in entries] for entries in tokens]
        expected, bound = oracle(tokens, copy.deepcopy(head).cpu())
        assert_scores(scorer.scores(), expected, bound)
        assert scorer.token_counts().tolist() == [entries[0].shape[0] for entries in tokens]
    if torch.equal(output.sequences, scored):
        # Level (b): the same answers through one teacher-forced forward, within 1e-4 of the same scale.
        scale = bound / (torch.finfo(torch.float32).eps * 8)
        forced = score_texts(model, None, head, unpadded(inputs, copies), responses)
        assert_scores(forced, scores.cpu().double(), 1e-4 * scale)
    return scorer
