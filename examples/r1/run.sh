#!/bin/sh
# The ladder of DeepSeek-R1 on two cores: a cold start, reinforcement learning, fine-tuning on its own right answers, and
# reinforcement learning for all scenarios. Run it from the repository; started again, it goes on where it was.
#   examples/r1/run.sh                      # 40 steps of GRPO where 2_grpo.yaml has 400
#   examples/r1/run.sh train.steps=2        # a quick look; words go to every training stage
#   SAMPLING="rollout.group_size=4" examples/r1/run.sh    # words for the stages that sample
ladder=r1
. examples/ladder.sh

score base builtin:qwen3-moe-tiny
train 1_cold_start "$@"
score 1_cold_start
train 2_grpo train.steps=40 rollout.prompts_per_step=16 checkpoint.every=20 $SAMPLING "$@"
score 2_grpo
$moetrain sample $runs/2_grpo $prompts --out $runs/samples.jsonl -k 8 "rewards=[$reward]" rollout.max_tokens=24
$moetrain pairs $runs/samples.jsonl --out $runs/sft.jsonl --sft --per-prompt 2 --balance 0 $CHOICE
train 3_sft "$@"
score 3_sft
train 4_grpo_all $SAMPLING "$@"
score 4_grpo_all
$moetrain report $runs -o $runs/report.html
