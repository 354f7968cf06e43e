#!/bin/sh
# Trains a reward head for a small model on sums, and measures it on sums it has not seen.
# With these numbers it takes some minutes on a laptop's CPU; more problems make a better head.
set -eu

folder=${1:-sums-head}
model=smollm2

swift-kernels rollout --model $model --task sums --split train --problems 120 --n 8 --output "$folder/train.jsonl"
swift-kernels rollout --model $model --task sums --split test --problems 40 --n 16 --output "$folder/test.jsonl"
swift-kernels train "$folder/train.jsonl" --test "$folder/test.jsonl" --model $model --output "$folder/head"
swift-kernels best-of --model $model --head "$folder/head" --task sums --prompt "What is 23 + 18?" --n 16
