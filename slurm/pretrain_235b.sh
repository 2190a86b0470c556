#!/usr/bin/env bash
# Pretraining of Qwen3-235B-A22B's architecture from scratch, 32 nodes of 8 H100:  sbatch slurm/pretrain_235b.sh [key=value ...]
#SBATCH --job-name=pretrain_235b
#SBATCH --nodes=32
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
train examples/pretrain_235b.yaml "$@"
