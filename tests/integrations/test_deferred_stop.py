"""What transformers does where it does not wait for the device: one forward more after every row is done.

It decides to on MPS alone, as of transformers 5.24; here it is made to on a CPU. That forward's tokens are taken back,
and nothing of it may be scored.
"""

from __future__ import annotations

import pytest
import torch
from transformers.generation import utils

from swift_kernels import SwiftHead, attach
from tests.architectures import tiny_model
from tests.integrations.helpers import generate

if not hasattr(utils, "DeferredStopCheck"):
    pytest.skip("this transformers waits for the device at every token", allow_module_level=True)


class Event:
    """Of a device that is never behind."""

    def __init__(self, **_: object) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Defers the decision to stop wherever transformers would on MPS; holds how many forwards each `generate` undid."""
    undone: list[int] = []
    check = utils.DeferredStopCheck
    stock_supported, stock_finish = check.is_supported, check.finish

    def is_supported(device: torch.device, *args: object, **kwargs: object) -> bool:
        return stock_supported(torch.device("mps"), *args, **kwargs)

    def finish(self: object) -> int:
        undone.append(stock_finish(self))
        return undone[-1]

    monkeypatch.setattr(check, "is_supported", staticmethod(is_supported))
    monkeypatch.setattr(check, "finish", finish)
    monkeypatch.setattr(torch, "Event", Event)
    return undone


OPTIONS = {
    "tensor": {},
    "dictionary": {"return_dict_in_generate": True, "output_logits": True},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}
HEADS = [
    ("all", "fed", "gather"),
    ("all", "fed", "norm"),
    ("logits", "fed", "gather"),
    ("top_logprobs", "fed", "gather"),
]
FED_LAST = [("all", "all", "gather"), ("all", "all", "norm"), ("logits", "all", "gather")]
"""Features, span and fuse. A static cache has no room for the token more that span="all" needs: that is refused."""


@pytest.mark.parametrize(
    ("heads", "options"),
    [(head, option) for option in OPTIONS for head in HEADS + FED_LAST * (option != "static cache")],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_the_scores_stand(request, prompts, heads, options):
    features, span, fuse = heads
    model = tiny_model("llama")
    torch.manual_seed(0)
    head = SwiftHead.for_model(model, features, span=span)

    def run() -> tuple[torch.Tensor, ...]:
        with attach(model, head, fuse=fuse, trace=True) as scorer:
            # Rows that end at different steps, and all of them before the limit of length, which defers nothing.
            output = generate(model, prompts, num_return_sequences=3, max_new_tokens=200, **OPTIONS[options])
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            found = (sequences, scorer.scores(), scorer.token_counts(), scorer.response_lengths(), scorer.finished())
            return (*found, *scorer.trace())

    expected = run()
    undone = request.getfixturevalue("deferred")
    found = run()
    assert undone == [1], "one forward more ran"
    for name, mine, theirs in zip(
        ("tokens", "scores", "counts", "lengths", "finished", *["trace"] * 9), found, expected, strict=True
    ):
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num()), name
