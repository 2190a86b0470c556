#!/usr/bin/env bash
# DPO with LoRA on Qwen3-30B-A3B, 1 node of 8 H100:  sbatch slurm/dpo_30b.sh [key=value ...]
#SBATCH --job-name=dpo_30b
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
train examples/dpo_30b.yaml "$@"
