#!/usr/bin/env bash
# A sweep, one run an array task; what is done ends at once. The line that `moetrain sweep RECIPE --grid key=a,b --jobs slurm` prints:
#   sbatch --array=1-4 slurm/sweep.sh RECIPE --grid key=a,b [key=value ...]        (more nodes a run: --nodes=4 before the script)
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
run sweep "$(recipe "$1")" "${@:2}" --task "${SLURM_ARRAY_TASK_ID:?submit it with --array}"
