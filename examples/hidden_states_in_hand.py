"""The kernel without an engine: any loop that has a layer's hidden states in hand can score them."""

import torch

from swift_kernels import SwiftHead

widths = [4096] * 33  # one entry a selected layer, as Llama-3.1-8B has them
head = SwiftHead(widths).requires_grad_(False)
state = head.init_state(slots=4)

for token in range(10):
    hidden_states = [torch.randn(3, width).bfloat16() for width in widths]  # three rows
    slots = torch.tensor([0, 2, -1 if token > 5 else 3])  # the third sequence ended after six tokens
    head.step(hidden_states, state, slots)

print(head.scores(state), state.token_count)  # slot 1 was never used: NaN
print(f"{state.nbytes} bytes for {state.slots} sequences, {state.scratch_nbytes} of scratch")
