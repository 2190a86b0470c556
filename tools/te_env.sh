#!/usr/bin/env bash
# Transformer Engine on a machine without a GPU: tools/te_env.sh PYTHON DIR makes the environment DIR, which looks into PYTHON's for
# whatever it does not hold itself. `make te-cpu` calls it.
#
# The extension is compiled here; a C++ compiler is all that it takes, since CUDA's headers come from wheels. What takes time is torch's
# headers, 25 CPU seconds for each of 33 files: so they become two, and without optimisation, since no kernel runs here anyway.
# The wheel stays in build/te, where the next call finds it.
set -euo pipefail
base=$1 dir=$2 wheels=$PWD/build/te pins=$PWD/constraints-te.txt
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
site=$("$base" -c "$purelib")
"$base" -m venv --clear "$dir"
dir=$(realpath "$dir")
own=$("$dir/bin/python" -c "$purelib")
pip() { "$dir/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

echo "$site" >"$own/moetrain_base.pth"
extension=$(grep '^transformer-engine-torch==' "$pins")
grep -v "^$extension$" "$pins" >"$dir/requirements.txt"
pip install --no-deps -r "$dir/requirements.txt"

wheel=$(ls "$wheels/transformer_engine_torch-${extension#*==}"-*.whl 2>/dev/null || true)
if [ -z "$wheel" ]; then
  echo "Compiling $extension: about a minute on 2 cores."
  source=$(mktemp -d)
  trap 'rm -rf "$source"' EXIT
  pip download --no-deps --no-build-isolation --no-binary :all: -d "$source" "$extension"
  tar xzf "$source"/*.tar.gz -C "$source" --strip-components 1
  sed -i 's/"-O3"/"-O0"/' "$source/build_tools/pytorch.py"
  number=0
  (cd "$source/csrc" && find . -name '*.cpp' | sort) | while read -r file; do
    mv "$source/csrc/$file" "$source/csrc/${file%.cpp}.inl"
    number=$((1 - number))
    echo "#include \"${file%.cpp}.inl\"" >>"$source/csrc/part$number.cpp"
  done
  CPATH=$(printf '%s:' "$site"/nvidia/*/include "$own"/nvidia/*/include "$own/include") PATH="$dir/bin:$PATH" MAX_JOBS=$(nproc) \
    NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_FRAMEWORK=pytorch NVTE_WITH_NCCL_EP=0 pip wheel --no-build-isolation --no-deps -w "$wheels" "$source"
  wheel=$(ls "$wheels/transformer_engine_torch-${extension#*==}"-*.whl)
fi
pip install --no-deps "$wheel"

# Where Transformer Engine looks for CUDA's libraries: beside itself. The files that there are in PYTHON's, as links.
cp -rsn "$site/nvidia/." "$own/nvidia/"
# And a driver, which answers every call with "no device" (100).
nm -D --undefined-only "$own"/transformer_engine/wheel_lib/*.so |
  awk '$2 ~ /^cu[A-Z]/ {sub(/@.*/, "", $2); print "int " $2 "(void) { return 100; }"}' | sort -u >"$dir/libcuda.c"
gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$dir/lib/libcuda.so.1" "$dir/libcuda.c"
echo 'import ctypes, sys; ctypes.CDLL(sys.prefix + "/lib/libcuda.so.1", mode=ctypes.RTLD_GLOBAL)' >"$own/moetrain_libcuda.pth"
"$dir/bin/python" -W ignore -c 'import torch, transformer_engine.pytorch'
