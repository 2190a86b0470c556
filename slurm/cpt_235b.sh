#!/usr/bin/env bash
# Continued pretraining of Qwen3-235B-A22B on two corpora, 16 nodes of 8 H100:  sbatch slurm/cpt_235b.sh [key=value ...]
#SBATCH --job-name=cpt_235b
#SBATCH --nodes=16
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
train examples/cpt_235b.yaml "$@"
