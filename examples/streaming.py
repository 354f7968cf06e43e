"""Streaming an answer with its score: `generate` in a thread of its own, in the context of the one that attached."""

import contextvars
from threading import Thread

import torch
from transformers import TextIteratorStreamer

from swift_kernels import SwiftHead, attach
from swift_kernels.integrations.models import load_model

model, tokenizer = load_model("smollm2")
head = SwiftHead.from_pretrained("smollm2-135m-sums", model=model)

prompt = "Question: What is 12 + 5?\nAnswer: 12 + 5 = 17\n\nQuestion: What is 38 + 27?\nAnswer:"
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
torch.manual_seed(0)
streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
request = {**inputs, "do_sample": True, "max_new_tokens": 16, "stop_strings": ["\n"], "tokenizer": tokenizer}
with attach(model, head) as scorer:
    # By itself a thread begins in an empty context, and what it generates is nobody's here.
    run = contextvars.copy_context().run
    thread = Thread(target=run, args=(model.generate,), kwargs={**request, "streamer": streamer})
    thread.start()
    for text in streamer:
        print(text, end="", flush=True)
    thread.join()
    print(f"\nscore {scorer.scores().item():.3f}")
