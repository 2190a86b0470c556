#!/usr/bin/env bash
# DFT of every weight of Qwen3-235B-A22B, 16 nodes of 8 H100:  sbatch slurm/dft_235b.sh [key=value ...]
#SBATCH --job-name=dft_235b
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
train examples/dft_235b.yaml "$@"
