#!/usr/bin/env bash
# Fetches every package of an image, for a build without internet.
#
#   containers/wheelhouse.sh cpu|gpu|rollout DIR [pip options ...]
#
# Run it where there is a package index, copy DIR to the cluster, and build there with
#   containers/build.sh cpu|gpu|rollout --wheelhouse DIR
# Wheels are chosen for the Python of the image; PYTHON names the one whose pip fetches them (for gpu
# one that has torch, which Transformer Engine's source asks for). What lies in DIR already is not
# fetched again. For gpu, vLLM's wheels are fetched too, and apex from its repository.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
name=$1 dir=$2
shift 2
# shellcheck source=containers/packages.sh
. "$here/packages.sh"
packages_of "$name" >/dev/null || usage
python=${PYTHON:-python3}
mkdir -p "$dir"
packages_of "$name" >"$dir/requirements.txt"

wheels() { # LIST
  "$python" -m pip download --quiet --no-deps --only-binary :all: --python-version "$(python_of "$name")" \
    --dest "$dir" --find-links "$dir" --requirement "$1" "${@:2}"
}
wheels "$dir/requirements.txt" "$@"
if [ "$name" = gpu ]; then
  packages_of rollout >"$dir/rollout.txt"
  wheels "$dir/rollout.txt" "$@"
fi
for source in $(sources_of "$name"); do
  "$python" -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest "$dir" "$source" "$@"
done
repositories_of "$name" | while read -r url commit; do
  archive=$(realpath "$dir")/$(basename "$url")-$commit.tar.gz
  [ ! -e "$archive" ] || continue
  clone=$(mktemp -d)
  git -C "$clone" init -q
  git -C "$clone" fetch -q --depth 1 "$url" "$commit"
  git -C "$clone" archive --format tar.gz -o "$archive" "$commit"
  rm -rf "$clone"
done
echo "$dir: $(find "$dir" -name '*.whl' | wc -l) wheels, $(du -sh "$dir" | cut -f 1)"
