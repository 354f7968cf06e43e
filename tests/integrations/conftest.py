from __future__ import annotations

import pytest
import torch

from swift_kernels import SwiftHead
from tests.architectures import VOCAB_SIZE, tiny_model


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only wait for each other on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def prompts() -> dict[str, torch.Tensor]:
    """Three prompts of 7, 4 and 6 tokens, padded on the left; none ends an answer."""
    generator = torch.Generator().manual_seed(7)
    input_ids = torch.randint(6, VOCAB_SIZE, (3, 7), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row, padding in ((1, 3), (2, 1)):
        input_ids[row, :padding] = 0
        attention_mask[row, :padding] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def head(model):
    torch.manual_seed(0)
    return SwiftHead.for_model(model)
