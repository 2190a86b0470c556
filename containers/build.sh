#!/usr/bin/env bash
# Builds an image from the commit that is checked out, tests it, and locks what is in it.
#
#   containers/build.sh cpu|gpu|rollout [options] [-- apptainer's options]
#
#   --out FILE         the image (default: moetrain-NAME-COMMIT.sif); FILE.lock lists what was installed
#   --base BASE        an image of a registry, an image file, or a folder that holds a root file system
#   --wheelhouse DIR   install from here alone (containers/wheelhouse.sh makes it), without internet
#   --no-test          leave %test out; the image is then unproven
#
# Without root: containers/build.sh cpu -- --fakeroot. APPTAINER names another program, APPTAINER_TMPDIR
# a folder with room for the image unpacked (cpu 3 GB, gpu 60 GB).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=containers/packages.sh
. "$here/packages.sh"
die() { echo "build.sh: error: $*" >&2; exit 2; }
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0" >&2; exit 2; }

name=${1:-} out='' base='' wheelhouse='' options=()
def=$(def_of "$name") || usage
shift
while [ $# -gt 0 ]; do
  case $1 in
    --out | --base | --wheelhouse)
      [ $# -ge 2 ] || usage
      declare "${1#--}=$2"
      shift 2
      ;;
    --no-test) options+=(--notest) && shift ;;
    --) shift && options+=("$@") && break ;;
    *) usage ;;
  esac
done
read -r -a apptainer <<<"${APPTAINER:-apptainer}"
command -v "${apptainer[0]}" >/dev/null || die "no ${apptainer[0]} here. Load its module, or set APPTAINER."
commit=$(git -C "$checkout" rev-parse HEAD 2>/dev/null) || die "$checkout is no git checkout, so its commit cannot be named."
dirty=$(git -C "$checkout" status --porcelain | head -n 1)
[ -z "$dirty" ] || die "the checkout has changes (${dirty:3} first): commit them, so that the image has a commit."
out=$(realpath -m "${out:-moetrain-$name-${commit:0:12}.sif}")
[ ! -e "$out" ] || die "$out exists. Give another --out, or remove it."
[ -w "$(dirname "$out")" ] || die "$(dirname "$out") is not there, or not for you to write."
[ -z "$wheelhouse" ] || [ -f "$wheelhouse/requirements.txt" ] ||
  die "$wheelhouse is no wheelhouse. Make one: containers/wheelhouse.sh $name $wheelhouse"

# Exactly the commit goes into the image, beside what it installs. Under the folder of the image:
# wherever that may be written, apptainer sees it too.
stage=$(mktemp -d "$out.stage.XXXXXX")
trap 'rm -rf "$stage" "$out.part"' EXIT
mkdir "$stage/moetrain" "$stage/wheelhouse" # the second is where a wheelhouse is bound
git -C "$checkout" archive HEAD | tar -x -C "$stage/moetrain"
packages_of "$name" >"$stage/moetrain/requirements.txt"
sources_of "$name" >"$stage/moetrain/sources.txt"
[ "$name" != gpu ] || packages_of rollout >"$stage/moetrain/rollout.txt"

arguments=(--build-arg "stage=$stage" --build-arg "commit=$commit")
if [ -n "$base" ]; then
  arguments+=(--build-arg "base=$base")
  [ ! -e "$base" ] || arguments+=(--build-arg bootstrap=localimage)
fi
if [ -n "$wheelhouse" ]; then
  arguments+=(--bind "$(realpath "$wheelhouse"):/wheelhouse:ro")
fi
# zstd: a third of gzip's time for the same size, and quicker to start from.
"${apptainer[@]}" build --mksquashfs-args '-comp zstd -Xcompression-level 3' "${arguments[@]}" \
  ${options[@]+"${options[@]}"} "$out.part" "$stage/moetrain/containers/$def"

{
  echo "# $(basename "$out"): $def of commit $commit, base ${base:-as $def has it}"
  echo "# sha256 $(sha256sum "$out.part" | cut -d ' ' -f 1)"
  # The image itself says what is in it.
  "${apptainer[@]}" inspect --labels "$out.part" | sed -n 's/^org\.moetrain\.package\.\([^:]*\): \(.*\)$/\1==\2/p'
  # shellcheck disable=SC2016
  "${apptainer[@]}" exec "$out.part" dpkg-query -W -f 'deb ${Package}=${Version}\n'
} >"$stage/lock"
grep -q '==' "$stage/lock" || die "the image has no labels of packages; nothing was kept."
mv "$stage/lock" "$out.lock"
mv "$out.part" "$out"
echo "$out: $(du -h "$out" | cut -f 1), $(grep -c '==' "$out.lock") Python packages, locked in $out.lock"
