#!/bin/sh
# What objectives and optimizers make of one task, side by side: each learns questions with one right answer from the same cold
# start, with GRPO and AdamW as the baseline. Run it from the repository (about 15 minutes on 2 cores); started again, it goes on.
#   examples/reach.sh                      # then open runs/reach/report.html
#   examples/reach.sh train.steps=2        # a quick look
set -e
moetrain=${MOETRAIN:-moetrain}
sweep="$moetrain sweep examples/reach.yaml --out runs/reach"
$moetrain train examples/r1/1_cold_start.yaml run_dir=runs/reach_start train.steps=110
$sweep --grid "method=grpo,cispo,{name: grpo, num_iterations: 2},{name: grpo, entropy_coef: 0.003}" "$@"
$sweep --grid optim.name=muon "$@"
$sweep --grid method=sapo,rloo,reinforce_pp "$@"
$moetrain report runs/reach
