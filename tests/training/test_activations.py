from __future__ import annotations

import contextlib
import shutil
from collections import namedtuple
from typing import Any

import pytest
import torch

from swift_kernels import SwiftHead
from swift_kernels.training import activations as activations_module
from swift_kernels.training.activations import OnTheFly, collect
from tests.training.data import separable


class TestActivations:
    @pytest.mark.parametrize("layers", ["all", [0, -1], "logits"], ids=str)
    def test_are_the_hidden_states_of_the_scored_tokens(self, model: Any, layers: Any) -> None:
        head = SwiftHead.for_model(model, layers)
        groups = [([5, 6, 7], [[8, 9, 10, 1], [8, 11], [12, 13, 14, 15]]), ([11], [[16]]), ([17, 18], [[19], [20, 21]])]
        sequences = [(prompt, response) for prompt, responses in groups for response in responses]
        done: list[int] = []
        found = collect(model, head.config, groups, batch_size=2, on_progress=done.append)
        # All but the last token, which is the end-of-sequence of the first.
        assert found.lengths == (3, 1, 3, 0, 0, 1)
        assert done == [1, 2, 3]
        for index, (prompt, response) in enumerate(sequences):
            entries, cu_seqlens = found.batch(torch.tensor([index]))
            assert cu_seqlens.tolist() == [0, found.lengths[index]]
            if not found.lengths[index]:
                continue
            with torch.no_grad():
                output = model(torch.tensor([prompt + response]), output_hidden_states=True)
            if layers == "logits":
                whole = [output.logits]
            else:
                whole = [output.hidden_states[layer] for layer in head.config.layers or ()]
            span = slice(len(prompt), len(prompt) + found.lengths[index])
            for entry, expected in zip(entries, whole, strict=True):
                # Padding changes the order of additions in attention.
                torch.testing.assert_close(entry, expected[0, span], rtol=1e-5, atol=1e-5)

    def test_keep_the_dtype_of_the_model(self, model: Any) -> None:
        import copy

        head = SwiftHead.for_model(model, [1])
        half = copy.deepcopy(model).bfloat16()
        assert collect(half, head.config, [([5], [[6, 7]])]).values.dtype == torch.bfloat16

    def test_batches_may_repeat_and_reorder(self) -> None:
        made, _ = separable()
        entries, cu_seqlens = made.batch(torch.tensor([3, 0, 3]))
        assert cu_seqlens.diff().tolist() == [made.lengths[3], made.lengths[0], made.lengths[3]]
        assert [entry.shape[1] for entry in entries] == [3, 2]
        assert torch.equal(entries[0][: made.lengths[3]], entries[0][-made.lengths[3] :])

    def test_refuse_what_the_disk_cannot_hold_and_leave_nothing(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
    ) -> None:
        monkeypatch.setattr(activations_module.tempfile, "tempdir", str(tmp_path))
        made, _ = separable()
        assert made.nbytes > 0
        assert not list(tmp_path.iterdir())
        usage = namedtuple("usage", "total used free")(10, 9, 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(ValueError, match="set TMPDIR to a larger folder"):
            separable()


class TestOnTheFly:
    GROUPS = (([5, 6, 7], [[8, 9, 10, 1], [8, 11], [12, 13, 14, 15]]), ([11], [[16]]), ([17, 18], [[19], [20, 21]]))

    @pytest.mark.parametrize("layers", ["all", [0, -1], "logits", "top_logprobs"], ids=str)
    def test_gives_what_is_kept_without_it(self, model: Any, layers: Any) -> None:
        head = SwiftHead.for_model(model, layers)
        kept = collect(model, head.config, self.GROUPS)
        computed = OnTheFly(model, head.config, self.GROUPS, batch_size=2)
        assert (computed.widths, computed.lengths) == (kept.widths, kept.lengths)
        # Out of order, twice, of several prompts, and without a scored token.
        for indices in ([0], [5, 2, 0, 3], [1, 1], [3]):
            expected, cu_seqlens = kept.batch(torch.tensor(indices))
            found, lengths = computed.batch(torch.tensor(indices))
            assert torch.equal(lengths, cu_seqlens)
            for entry, wanted in zip(found, expected, strict=True):
                assert entry.dtype == wanted.dtype
                # Other answers in a batch change the order of additions in attention.
                torch.testing.assert_close(entry, wanted, rtol=1e-5, atol=1e-5)

    def test_feeds_a_prompt_once_a_batch_and_no_more_than_is_scored(self, model: Any) -> None:
        config = SwiftHead.for_model(model, [1]).config
        fed: list[int] = []
        # No prompt or answer holds the padding token, 0.
        hook = model.register_forward_pre_hook(
            lambda _module, _args, inputs: fed.append(int((inputs["input_ids"] != 0).sum())), with_kwargs=True
        )
        with contextlib.ExitStack() as stack:
            stack.callback(hook.remove)
            computed = OnTheFly(model, config, self.GROUPS)
            assert computed.llm_tokens == 0
            computed.batch(torch.tensor([0, 5, 2]))
            assert computed.llm_tokens == sum(fed) == (3 + 3 + 3) + (2 + 1)
            computed.batch(torch.tensor([2, 3]))
            assert computed.llm_tokens == sum(fed) == 12 + (3 + 3)
            fed.clear()
            kept = collect(model, config, self.GROUPS)
            assert kept.llm_tokens == sum(fed) == (3 + 3 + 1 + 3) + (2 + 1)
