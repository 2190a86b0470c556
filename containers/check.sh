#!/usr/bin/env bash
# What can be known of an image without building it: that the shell of its recipe is sound, that
# every package it installs is in the index, at that version and for its Python, and that what
# these ask of each other is met.
#
#   containers/check.sh cpu|gpu|rollout
#
# Needs shellcheck and a package index. PYTHON names the interpreter whose pip asks it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=containers/packages.sh
. "$here/packages.sh"
die() { echo "check.sh: error: $*" >&2; exit 2; }
name=${1:-}
def=$(def_of "$name") || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0" >&2; exit 2; }
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The lines of %post, with what build.sh fills in; sourced files are checked by themselves.
sed -n '/^%post/,/^%[^p]/{/^%/d;s/{{[^}]*}}/filled/g;p;}' "$checkout/containers/$def" >"$work/post.sh"
shellcheck --shell sh --exclude SC1091,SC2046 "$work/post.sh" "$checkout/containers/post.sh" || die "$def: see above"

packages_of "$name" >"$work/requirements.txt"
"$python" -m pip install --quiet --dry-run --no-deps --ignore-installed --only-binary :all: --target "$work/none" \
  --python-version "$(python_of "$name")" --report "$work/report.json" --requirement "$work/requirements.txt" ||
  die "$name: the index lacks something, see above"
# shellcheck disable=SC2046
"$python" "$checkout/containers/requirements.py" "$work/report.json" "$(python_of "$name")" \
  $(sources_of "$name")
