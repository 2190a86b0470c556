# What the ladders share; r1/run.sh and instructgpt/run.sh source it after saying which `ladder` they are.
# shellcheck shell=sh disable=SC2034,SC2086,SC2154
set -e
moetrain=${MOETRAIN:-moetrain}
ranks=${RANKS:---nproc 2 parallel.ep=2}
prompts=${PROMPTS:-builtin:checkable-prompts}
reward=${REWARD:-exact} # what says which answers are right
bench=${BENCH:-examples/evals/checkable.yaml}
runs=runs/$ladder

# train RECIPE [WORD...]; score RUN [MODEL], its own by default
train() { recipe=$1; shift; $moetrain train examples/$ladder/$recipe.yaml $ranks "$@"; }
score() { $moetrain eval "${2:-$runs/$1}" $bench --out $runs/$1/evals/checkable.jsonl; }
