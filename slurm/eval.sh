#!/usr/bin/env bash
# A benchmark answered by a model and scored, on one node:  sbatch slurm/eval.sh MODEL examples/evals/gsm8k.yaml --out FILE
#SBATCH --job-name=eval
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --output=%x-%j.out
source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
alone eval "$@"
