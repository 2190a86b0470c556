#!/bin/sh
# The %test of an image: two processes train a step with experts split over them, and what they wrote
# goes to a Megatron checkpoint and back, unchanged. On GPUs and on CPUs.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export MOETRAIN_CACHE="$folder/cache" HOME="$folder" OMP_NUM_THREADS=1
cd "$folder"
moetrain --version
moetrain train /opt/moetrain/examples/sft_tiny.yaml --nproc 2 parallel.ep=2 run_dir="$folder/run" \
    train.steps=1 train.global_batch=2 data.train=builtin:checkable-sft-eval 'data.eval=[]' data.seq_len=128 \
    checkpoint.export_hf=true observe.progress=false observe.tensorboard=false
moetrain convert hf2mcore "$folder/run/hf" "$folder/mcore"
moetrain convert mcore2hf "$folder/mcore" "$folder/hf"
moetrain convert verify "$folder/run/hf" "$folder/hf"
echo "moetrain image: test passed"
