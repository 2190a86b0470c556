#!/bin/sh
# The ladder of InstructGPT (arXiv 2203.02155) on two cores: demonstrations, a reward model, PPO against it. Run it from the repository;
# started again, it goes on where it was. Words go to every training stage: examples/instructgpt/run.sh train.steps=2
ladder=instructgpt
. examples/ladder.sh

train 1_sft "$@"
score 1_sft
$moetrain sample $runs/1_sft $prompts --out $runs/samples.jsonl -k 16 "rewards=[$reward]" rollout.max_tokens=24
$moetrain pairs $runs/samples.jsonl --out $runs/pairs.jsonl --held-out 0.1 --per-prompt 4 --balance 0 $CHOICE
train 2_reward "$@"
train 3_ppo $SAMPLING "$@"
score 3_ppo
$moetrain report $runs -o $runs/report.html
