"""`model.generate` as it is, plus a score for every answer."""

import torch

from swift_kernels import SwiftHead, attach
from swift_kernels.integrations.models import load_model

model, tokenizer = load_model("smollm2")
head = SwiftHead.from_pretrained("smollm2-135m-sums", model=model)

prompt = "Question: What is 12 + 5?\nAnswer: 12 + 5 = 17\n\nQuestion: What is 38 + 27?\nAnswer:"
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
torch.manual_seed(0)
with attach(model, head) as scorer:
    answers = model.generate(
        **inputs,
        do_sample=True,
        top_p=0.9,
        num_return_sequences=8,
        max_new_tokens=16,
        stop_strings=["\n"],
        tokenizer=tokenizer,
    )

print(scorer.describe())
scores = scorer.scores()
for row in scores.argsort(descending=True).tolist():
    text = tokenizer.decode(answers[row, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{scores[row]:7.3f}  {text.strip()}")
