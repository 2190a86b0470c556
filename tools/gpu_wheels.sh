#!/usr/bin/env bash
# What `make gpu` needs on a machine without a network, as wheels in DIR: tools/gpu_wheels.sh PYTHON DIR. `make gpu-wheels` calls it.
# PYTHON is of the version that the other machine has. There, with DIR in a checkout: make gpu FIRST=10min WHEELS=DIR
#
# Transformer Engine's extension is the one that `make te-cpu` compiled, without optimisation: it calls the kernels, which come
# compiled from the index, and takes longer over each call.
set -euo pipefail
python=$1 dir=$2
mkdir -p "$dir"
fetch() { "$python" -m pip --quiet --disable-pip-version-check download --no-deps --only-binary :all: --dest "$dir" --find-links "$dir" "$@"; }

extension=$(grep '^transformer-engine-torch==' constraints-te.txt)
compiled=$(ls build/te/transformer_engine_torch-"${extension#*==}"-*.whl 2>/dev/null) || { echo "build/te has no wheel: make te-cpu first" >&2; exit 2; }
cp "$compiled" "$dir"
cp constraints-te.txt "$dir/te.txt" # installed last: beside what constraints.txt has, nothing else is asked for
fetch --requirement constraints.txt
fetch --requirement "$dir/te.txt"
echo "$dir: $(find "$dir" -name '*.whl' | wc -l) wheels, $(du -sh "$dir" | cut -f 1). In a checkout there: make gpu FIRST=10min WHEELS=$dir"
