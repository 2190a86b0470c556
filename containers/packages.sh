# shellcheck shell=bash
# What each image installs, from the lists in this checkout. Sourced by build.sh and wheelhouse.sh.

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

python_of() { # the image's Python: that of Debian 13, and of NVIDIA's image
  case $1 in
    cpu) echo 3.13 ;;
    *) echo 3.12 ;;
  esac
}

# Requirements, exact, one per line; installed without dependencies, so that nothing else comes in.
packages_of() {
  local tools='^(#|pyright|nodejs|nodeenv|ruff|import-linter|grimp|pre_commit|virtualenv|hypothesis)'
  local nvidia='^(nvidia-|cuda-)'
  case $1 in
    # What a CPU never loads of CUDA stays out (without_cuda.py); torch calls these three at its start.
    cpu)
      grep -vE "$tools|$nvidia" "$checkout/constraints.txt"
      grep -E '^nvidia-(cuda-runtime|cuda-cupti|cufile)==' "$checkout/constraints.txt"
      ;;
    # torch and what belongs to it are NVIDIA's own build, in the base image. What ms-swift asks for in another version than
    # ours (trl, which tests alone import) has that one.
    gpu)
      cat "$checkout/containers/gpu.txt"
      grep -vE "$tools|$nvidia|^(torch|triton)==" "$checkout/constraints.txt" | not_in "$checkout/containers/gpu.txt"
      ;;
    # vLLM's own, and of ours what it does not name. Servers read no data, and datasets wants an older
    # fsspec and huggingface-hub than vLLM has; trl, which tests import, wants datasets.
    rollout)
      cat "$checkout/containers/rollout.txt"
      grep -vE "$tools|$nvidia|^(datasets|trl)==" "$checkout/constraints.txt" | not_in "$checkout/containers/rollout.txt"
      ;;
    *) return 1 ;;
  esac
}

not_in() { # the requirements on stdin whose package FILE does not name; Foo_bar and foo-bar are one
  awk -F == 'function name(text) { gsub(/[-_.]+/, "-", text); return tolower(text) }
    NR == FNR { named[name($1)] = 1; next } !(name($1) in named)' "$1" -
}

# What the index has as source alone. The image builds it, with what it has installed before.
sources_of() {
  case $1 in
    gpu) echo "transformer-engine-torch==2.20.2 oss2==2.19.1 crcmod==1.7 transformers-stream-generator==0.0.5" ;;
  esac
}

# Repositories that an image compiles: URL and commit, as its recipe has them.
repositories_of() {
  case $1 in
    gpu) echo "https://github.com/NVIDIA/apex $(sed -n 's/^ *apex=//p' "$checkout/containers/moetrain.def")" ;;
  esac
}

def_of() { # the recipe's file
  case $1 in
    cpu) echo moetrain-cpu.def ;;
    gpu) echo moetrain.def ;;
    rollout) echo rollout.def ;;
    *) return 1 ;;
  esac
}
