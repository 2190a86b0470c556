#!/bin/sh
# What objectives and optimizers make of one task, side by side: each learns by trying from the same random model, with GRPO and
# AdamW as the baseline. Run it from the repository (twelve runs of about a minute on 2 cores); started again, it goes on.
#   examples/reach.sh                      # then open runs/reach/report.html
#   examples/reach.sh train.steps=2        # a quick look
set -e
moetrain=${MOETRAIN:-moetrain}
sweep="$moetrain sweep examples/grpo_tiny.yaml --out runs/reach rollout.tolerance=0.01" # experts of a random model may tie
$sweep --grid "method=grpo,cispo,{name: grpo, num_iterations: 2},{name: grpo, entropy_coef: 0.001}" "$@"
$sweep --grid optim.lr=2e-3 "$@" # AdamW at the second of Muon's rates; the recipe's is the first
$sweep --grid optim.name=muon --grid optim.lr=1e-3,2e-3 "$@"
$sweep --grid "method={name: dapo, dynamic_sampling: false, soft_length: 0},sapo,rloo,reinforce_pp,reinforce_pp_baseline" "$@"
$moetrain report runs/reach
