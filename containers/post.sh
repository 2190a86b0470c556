# shellcheck shell=sh
# Steps that the %post of every image here shares. It runs as root inside the image; what build.sh
# staged lies in /opt/moetrain, and a wheelhouse, if there is one, in /wheelhouse.
set -eu

source_dir=/opt/moetrain
export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1

die() {
    echo "moetrain image: error: $*" >&2
    exit 2
}

# Debian packages, unless the base has them already (without internet it must).
system_packages() {
    missing=
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    apt-get update -qq || die "no package mirror here, and the base lacks$missing: take a base that has them"
    # shellcheck disable=SC2086
    apt-get install -y -qq --no-install-recommends $missing
    rm -rf /var/lib/apt/lists/*
}

# environment FOLDER REQUIREMENTS: a virtual environment with exactly these packages.
environment() {
    python3 -m venv "$1"
    install "$1" "$2"
}

# No dependencies are followed: the list is complete, and `check_packages` says if it is not.
install() {
    if [ -f /wheelhouse/requirements.txt ]; then
        "$1/bin/pip" install --quiet --no-deps --no-index --find-links /wheelhouse --requirement "$2"
    else
        "$1/bin/pip" install --quiet --no-deps --requirement "$2"
    fi
}

# What is compiled against the torch that is there.
install_sources() {
    folder=$1
    shift
    if [ -f /wheelhouse/requirements.txt ]; then
        "$folder/bin/pip" install --no-deps --no-build-isolation --no-index --find-links /wheelhouse "$@"
    else
        "$folder/bin/pip" install --no-deps --no-build-isolation --no-binary :all: "$@"
    fi
}

# install_git FOLDER URL COMMIT; without internet the wheelhouse holds NAME.tar.gz of that commit.
install_git() {
    name=$(basename "$2")
    mkdir -p "/tmp/$name"
    if [ -f /wheelhouse/requirements.txt ]; then
        [ -f "/wheelhouse/$name-$3.tar.gz" ] || die "the wheelhouse lacks $name-$3.tar.gz"
        tar -xzf "/wheelhouse/$name-$3.tar.gz" -C "/tmp/$name"
    else
        git -C "/tmp/$name" init -q
        git -C "/tmp/$name" fetch -q --depth 1 "$2" "$3"
        git -C "/tmp/$name" checkout -q FETCH_HEAD
    fi
    "$1/bin/pip" install --no-deps --no-build-isolation "/tmp/$name"
    rm -rf "/tmp/$name"
}

# check_packages FOLDER [PACKAGE ...]: but for what these packages ask for.
check_packages() {
    folder=$1
    shift
    "$folder/bin/python" "$source_dir/containers/complete.py" "$@" || die "the lists of packages lack what is said above"
}

moetrain_itself() {
    "$1/bin/pip" install --quiet --no-deps --no-build-isolation "$source_dir"
}

# labels FOLDER COMMIT [FOLDER]: what `moetrain doctor` compares with a checkout. Of the second
# environment only vLLM is told.
labels() {
    cp "$source_dir/containers/labels.py" /tmp/labels.py
    "$1/bin/python" /tmp/labels.py "$2" >>"${APPTAINER_LABELS:-$SINGULARITY_LABELS}"
    [ -z "${3:-}" ] || "$3/bin/python" /tmp/labels.py "$2" vllm >>"${APPTAINER_LABELS:-$SINGULARITY_LABELS}"
    rm /tmp/labels.py
}

clean() {
    rm -rf "$source_dir/build" "$source_dir"/*.egg-info /root/.cache
}
