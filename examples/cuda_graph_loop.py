"""A decoding loop captured into a CUDA graph: one replay a token, scoring included.

What has to happen at every step works on buffers that stay where they are: the token ids, the mask and the cache, and
the slots that scoring reads. Without a GPU the same step runs eagerly.
"""

import torch
from transformers import StaticCache

from swift_kernels import SwiftHead, attach
from swift_kernels.integrations.models import load_model

model, tokenizer = load_model("smollm2")
head = SwiftHead.from_pretrained("smollm2-135m-sums", model=model)
device = model.device

rows, max_new_tokens = 8, 16
prompt = "Question: What is 12 + 5?\nAnswer: 12 + 5 = 17\n\nQuestion: What is 38 + 27?\nAnswer:"
ends = torch.tensor([tokenizer("\n")["input_ids"][-1], tokenizer.eos_token_id], device=device)
prompt_ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device).repeat(rows, 1)
prompt_length = prompt_ids.shape[1]
length = prompt_length + max_new_tokens

cache = StaticCache(config=model.config, max_cache_len=length)
token = torch.zeros(rows, 1, dtype=torch.int64, device=device)
position = torch.zeros(1, 1, dtype=torch.int64, device=device)
places = torch.arange(length, device=device)[None, None, None]
slots = torch.full((rows,), -1, device=device)  # row i is scored into slot i, a negative slot skips it
torch.manual_seed(0)


def sample(logits: torch.Tensor) -> torch.Tensor:
    """Sampling that does not wait for the GPU: the largest of the probabilities over exponential noise."""
    probabilities = logits.float().softmax(-1)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1, keepdim=True)


def step() -> None:
    output = model(
        input_ids=token,
        position_ids=position,
        attention_mask=(places <= position).expand(rows, 1, 1, length),
        past_key_values=cache,
    )
    token.copy_(sample(output.logits[:, -1]))
    slots.masked_fill_((token == ends).any(1), -1)
    position.add_(1)


def prefill() -> None:
    cache.reset()
    causal = (places <= torch.arange(prompt_length, device=device)[None, None, :, None]).expand(rows, 1, -1, -1)
    output = model(input_ids=prompt_ids, attention_mask=causal, past_key_values=cache, logits_to_keep=1)
    token.copy_(sample(output.logits[:, -1]))
    position.fill_(prompt_length)
    slots.copy_(torch.arange(rows, device=device).masked_fill((token == ends).any(1), -1))


with torch.no_grad(), attach(model, head) as scorer:
    scorer.warmup(rows)
    prefill()  # not scored: only forwards of one position after begin() are
    scorer.begin(slots)
    run = step
    if device.type == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
        prefill()
        scorer.begin(slots)  # starts afresh, in the buffers that the graph knows
    tokens = [token.clone()]
    for _ in range(max_new_tokens - 1):
        run()
        tokens.append(token.clone())
    scores = scorer.scores()

for row in scores.nan_to_num(-torch.inf).argsort(descending=True).tolist():
    text = tokenizer.decode(torch.cat(tokens, dim=1)[row]).split("\n")[0]
    print(f"{scores[row]:7.3f}  {text.strip()}")
