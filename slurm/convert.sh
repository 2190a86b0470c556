#!/usr/bin/env bash
# A conversion of weights, on one node:  sbatch slurm/convert.sh mcore2hf runs/x/checkpoints/step_00000100 models/x
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --output=%x-%j.out
source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
alone convert "$@"
