#!/bin/sh
# The ladder of DeepSeek-R1 on two cores: a cold start, reinforcement learning, fine-tuning on its own right answers, and
# reinforcement learning for all scenarios. Run it from the repository; started again, it goes on where it was.
#   examples/r1/run.sh                      # 40 steps of GRPO where 2_grpo.yaml has 400
#   examples/r1/run.sh train.steps=2        # a quick look; words go to every training stage
set -e
moetrain=${MOETRAIN:-moetrain}
ranks=${RANKS:---nproc 2 parallel.ep=2}
prompts=${PROMPTS:-builtin:checkable-prompts}
reward=${REWARD:-exact} # what says which answers are right
bench=${BENCH:-examples/evals/checkable.yaml}
runs=runs/r1

train() { recipe=$1; shift; $moetrain train examples/r1/$recipe.yaml $ranks "$@"; }
score() { $moetrain eval "$1" $bench --out $runs/$2/evals/checkable.jsonl; }

score builtin:qwen3-moe-tiny base
train 1_cold_start "$@"
score $runs/1_cold_start 1_cold_start
train 2_grpo train.steps=40 rollout.prompts_per_step=16 checkpoint.every=20 "$@"
score $runs/2_grpo 2_grpo
$moetrain sample $runs/2_grpo $prompts --out $runs/samples.jsonl -k 8 "rewards=[$reward]" rollout.max_tokens=24
$moetrain pairs $runs/samples.jsonl --out $runs/sft.jsonl --sft --per-prompt 2 --balance 0 $CHOICE
train 3_sft "$@"
score $runs/3_sft 3_sft
train 4_grpo_all "$@"
score $runs/4_grpo_all 4_grpo_all
$moetrain report $runs -o $runs/report.html
