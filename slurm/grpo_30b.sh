#!/usr/bin/env bash
# GRPO of every weight of Qwen3-30B-A3B, 2 nodes of 8 H100 that train and 2 that serve:  sbatch slurm/grpo_30b.sh [key=value ...]
#SBATCH --job-name=grpo_30b
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH hetjob
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
train_beside_servers examples/grpo_30b.yaml "$@"
