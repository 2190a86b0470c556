# shellcheck shell=bash
# What the scripts beside this one share; each sources it. A script says `train RECIPE [key=value ...]`, and the job then starts
# one launcher a node, hears Slurm's signals, and queues itself again when its time is over or something broke.
set -euo pipefail

die() { echo "moetrain: error: $*" >&2; exit 2; }

[[ -n ${SLURM_JOB_ID:-} ]] || die "this is a batch script: submit it with sbatch slurm/NAME.sh"
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# 1. The site. The environment of sbatch comes before the file.
site=${MOETRAIN_SITE:-$repo/slurm/site.env}
[[ -r $site ]] || die "$site: not readable. Restore slurm/site.env, or set MOETRAIN_SITE to your own."
# shellcheck source=slurm/site.env
source "$site"
[[ -n ${MOETRAIN_WORK:-} ]] || die "$site: MOETRAIN_WORK is empty. Give the folder that holds models/, data/ and runs/."
[[ -d $MOETRAIN_WORK ]] || die "$site: MOETRAIN_WORK=$MOETRAIN_WORK is no folder on $(hostname). Give one that all nodes see."

# 2. What runs: in the image when there is one, bare otherwise.
if [[ -n ${MOETRAIN_IMAGE:-} ]]; then
  [[ -e $MOETRAIN_IMAGE ]] || die "$site: MOETRAIN_IMAGE=$MOETRAIN_IMAGE does not exist. Build it with containers/build.sh, or leave it empty."
  command -v apptainer >/dev/null || die "MOETRAIN_IMAGE is set and there is no apptainer on $(hostname). Load its module."
  inside=(apptainer exec --bind "$repo,$MOETRAIN_WORK${MOETRAIN_BIND:+,$MOETRAIN_BIND}" --pwd "$MOETRAIN_WORK")
  [[ -e /dev/nvidiactl ]] && inside+=(--nv)
  moetrain=("${inside[@]}" "$MOETRAIN_IMAGE" moetrain)
else
  moetrain=("${MOETRAIN_BIN:-$repo/.venv/bin/moetrain}")
  command -v "${moetrain[0]}" >/dev/null || die "$site: no moetrain at ${moetrain[0]}. Set MOETRAIN_IMAGE or MOETRAIN_BIN."
fi
cd "$MOETRAIN_WORK"

# 3. Who this job is to Slurm: `job`. The task of an array that started last has the array's own number, which is every task to
# scontrol, and a heterogeneous job's number is that of both parts: so the line of exactly this number is read. A job that another
# one has submitted has inherited that one's array, parts and restarts.
own() { scontrol show job -o "$SLURM_JOB_ID" | grep "^JobId=$SLURM_JOB_ID "; }
line=$(own) || line=
if [[ -n $line && $line != *" ArrayTaskId="* ]]; then unset "${!SLURM_ARRAY_@}"; fi
# shellcheck disable=SC2046 # names
if [[ -n $line && $line != *" HetJobId="* ]]; then unset SLURM_HET_SIZE $(compgen -e | grep '^SLURM_.*_HET_GROUP_'); fi
if [[ $line =~ \ Restarts=([0-9]+)\  ]]; then export SLURM_RESTART_COUNT=${BASH_REMATCH[1]}; fi
job=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID:-}_$SLURM_ARRAY_TASK_ID} job=${job:-$SLURM_JOB_ID} restarts=${SLURM_RESTART_COUNT:-0}

# 4. Where the ranks meet, and what NCCL and Megatron need.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 31 + restarts * 7) % 12000))
export MASTER_ADDR MASTER_PORT
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}       # Megatron: communication is queued before computation
export NVTE_FWD_LAYERNORM_SM_MARGIN=${NVTE_FWD_LAYERNORM_SM_MARGIN:-16}    # room on the GPU for NCCL beside Transformer Engine
export NVTE_BWD_LAYERNORM_SM_MARGIN=${NVTE_BWD_LAYERNORM_SM_MARGIN:-16}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1} # a lost peer ends the rank, it does not wait
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
ranks=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_PER_NODE_HET_GROUP_0:-${SLURM_GPUS_ON_NODE:-1}}} # with --exclusive the last is the whole node's
ranks=${ranks##*:} # h100:8 is 8

# 5. Signals. Slurm sends USR1 to this script ahead of the time limit (--signal=B:USR1@300), TERM before it takes the nodes away.
told=
heard=0
step=
hear() {
  told=$1
  heard=$((heard + 1))
  echo "moetrain: $(date -Is) Slurm says $1; the step in hand is finished and saved"
  if [[ -n $step ]]; then kill "-$1" "$step" 2>/dev/null || true; fi
}
trap 'hear USR1' USR1
trap 'hear TERM' TERM

# Run a command of moetrain on every node, one launcher each; returns srun's exit code. Each node's own is left in $ends: srun's
# is the highest, which is that of those whom it has ended itself.
ends=$MOETRAIN_WORK/.ends-$SLURM_JOB_ID-$restarts
on_nodes() {
  local code before
  mkdir -p "$ends"
  # shellcheck disable=SC2016 # for the nodes to expand
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit="$([[ $1 == doctor ]] && echo 0 || echo 1)" \
    bash -c 'trap : USR1 TERM; "${@:2}"; code=$?; echo "$code" >"$1/$SLURM_NODEID"; exit "$code"' - "$ends" \
    "${moetrain[@]}" "$@" --nproc "$ranks" &
  step=$!
  if [[ -n $told ]]; then kill "-$told" "$step"; fi # it came before there was a step
  while :; do
    before=$heard code=0
    wait "$step" || code=$?
    if [[ $heard == "$before" ]]; then break; fi # else a signal has ended the wait, not the step
  done
  step=
  return "$code"
}

# 6. What comes after: done, stop with the reason, or queue the job again.
state() { own | sed 's/.* JobState=\([A-Z]*\) Reason=.*/\1/'; }

again() { # SECONDS: from now until the job may start; a start that is due before Slurm is done with this one waits two minutes
  local pause=$(($1 > 10 ? $1 : 10))
  trap '' TERM USR1 # Slurm now ends this script
  scontrol requeue "$job" || die "this job cannot be queued again; submit it anew, it goes on from its last checkpoint"
  scontrol update JobId="$job" StartTime="now+$pause" || true
  exit 0
}

run() { # a command of moetrain with its words
  local code=0 verdict codes
  echo "moetrain: $(date -Is) job $job, restart $restarts, on $SLURM_JOB_NODELIST"
  if [[ $1 == train && $MOETRAIN_DOCTOR != no ]]; then
    on_nodes doctor "${@:2}" || code=$? # 1 is a warning
    if [[ $code != 0 && $(sort -n "$ends"/* | tail -n 1) != 1 ]]; then die "doctor: see above; MOETRAIN_DOCTOR=no starts all the same"; fi
    code=0
  fi
  on_nodes "$@" || code=$?
  codes=$(cat "$ends"/* 2>/dev/null || true) # none where the launchers were killed
  rm -rf "$ends"
  if [[ $code == 0 ]]; then exit 0; fi
  # Cancelled, preempted or out of time: Slurm has decided already.
  [[ $(state) == RUNNING ]] || exit "$code"
  verdict=$("${moetrain[@]}" requeue --codes "$code ${codes//$'\n'/ }" --told "${told:-nothing}" --retries "$MOETRAIN_RETRIES" \
    --pause "$MOETRAIN_PAUSE" -- "$@" --nproc "$ranks") || exit "$code"
  echo "moetrain: $(date -Is) $verdict"
  if [[ $verdict == "again in "* ]]; then again "$(cut -d ' ' -f 3 <<<"$verdict")"; fi
  exit "$code"
}

# A recipe of this repository, or of MOETRAIN_WORK, or an absolute one; any other word as it is, empty or an option.
recipe() { if [[ $1 != /* && -f $repo/$1 ]]; then printf '%s/%s\n' "$repo" "$1"; else printf '%s\n' "$1"; fi; }

train() { # RECIPE [key=value ...]
  run train "$(recipe "$1")" "${@:2}"
}

# The nodes behind `#SBATCH hetjob` serve, one server a node, and the trainers in front of it are told where.
train_beside_servers() { # RECIPE [key=value ...]
  local path nodes port=$((MASTER_PORT + 1)) addresses i
  path=$(recipe "$1")
  [[ -n ${SLURM_JOB_NODELIST_HET_GROUP_1:-} ]] || die "no nodes for the servers: this script is a job of two parts, see #SBATCH hetjob in it"
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1")
  for i in "${!nodes[@]}"; do addresses+="${addresses:+,}http://${nodes[i]}:$((port + i))"; done
  MOETRAIN_ROLLOUT_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n') # for this start alone; srun hands it on
  export MOETRAIN_ROLLOUT_TOKEN
  # shellcheck disable=SC2016 # for the nodes to expand
  srun --het-group=1 --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 \
    bash -c 'exec "${@:2}" --port "$(($1 + SLURM_NODEID))" rollout.host="$SLURMD_NODENAME"' - "$port" \
    "${moetrain[@]}" serve "$path" "${@:2}" &
  run train "$path" "${@:2}" "rollout.address=[$addresses]"
}

alone() { # a command of moetrain that is one process
  local words=() word
  for word in "$@"; do words+=("$(recipe "$word")"); done
  exec srun --nodes=1 --ntasks=1 "${moetrain[@]}" "${words[@]}"
}
