"""Scores answers that exist already: one forward a batch, no hidden state kept."""

from swift_kernels import SwiftHead, score_texts
from swift_kernels.evaluation.tasks import get_task
from swift_kernels.integrations.models import load_model

model, tokenizer = load_model("smollm2")
head = SwiftHead.from_pretrained("smollm2-135m-sums", model=model)

prompt = get_task("sums").prompt("What is 38 + 27?")  # as in the answers that the head was trained on
answers = [" 38 + 27 = 65\n", " 38 + 27 = 63\n", " 38 + 27 = 55\n", " 38 + 27 = 38\n"]
scores = score_texts(model, tokenizer, head, [prompt] * len(answers), answers)

for score, answer in sorted(zip(scores.tolist(), answers, strict=True), reverse=True):
    print(f"{score:7.3f}  {answer.strip()}")
