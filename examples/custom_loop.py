"""A decoding loop of one's own: all of sampling, with finished rows leaving the batch by their slot."""

import torch

from swift_kernels import SwiftHead, attach
from swift_kernels.integrations.models import load_model

model, tokenizer = load_model("smollm2")
head = SwiftHead.from_pretrained("smollm2-135m-sums", model=model)

rows, max_new_tokens = 8, 16
prompt = "Question: What is 12 + 5?\nAnswer: 12 + 5 = 17\n\nQuestion: What is 38 + 27?\nAnswer:"
newline = tokenizer("\n")["input_ids"][-1]
token_ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device).repeat(rows, 1)
torch.manual_seed(0)


def sample(logits: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(logits.float().softmax(-1), num_samples=1)


with torch.no_grad(), attach(model, head) as scorer:
    output = model(input_ids=token_ids, use_cache=True)  # the prefill is not scored
    tokens = [sample(output.logits[:, -1])]
    # Row i is scored into slot i; a negative slot skips the row. The loop changes this tensor in place.
    slots = torch.arange(rows, device=model.device)
    slots.masked_fill_(tokens[-1][:, 0] == newline, -1)
    scorer.begin(slots)
    for _ in range(max_new_tokens - 1):
        output = model(input_ids=tokens[-1], past_key_values=output.past_key_values, use_cache=True)
        tokens.append(sample(output.logits[:, -1]))
        slots.masked_fill_(tokens[-1][:, 0] == newline, -1)
    scores = scorer.scores()

for row in scores.nan_to_num(-torch.inf).argsort(descending=True).tolist():
    text = tokenizer.decode(torch.cat(tokens, dim=1)[row]).split("\n")[0]
    print(f"{scores[row]:7.3f}  {text.strip()}")
