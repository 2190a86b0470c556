#!/usr/bin/env bash
# transformers 5.19.0 on Python 3.12: `import transformers` asks the file system for every file of every installed distribution that has
# no top_level.txt. transformers calls importlib.metadata.packages_distributions() when it is imported, and Python 3.12 looks there whether
# each file of a RECORD exists (3.11 does not). Nothing of it is kept for the next process, and no setting leaves it out.
# Input: an environment with transformers and some packages that people have beside it.
# Expected: a few hundred requests, for what is imported.
# Seen: one for each file that is listed; with the answer put in its place none of them, and the import is as before.
#   files listed by distributions without top_level.txt: 7390
#   of these looked at during import transformers: 7390 in 0.56 s of CPU
#   looked at when packages_distributions is answered from the lists: 0 in 0.41 s
# moetrain meets it in each rank: 33,000 requests to a cluster's metadata server and half a second of CPU; moetrain/distributions.py.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.19.0 datasets==4.8.4 sympy==1.14.0
cat > "$work/count.py" <<'PY'
import importlib.metadata
import os
import sys
import time

listed = set()
for distribution in importlib.metadata.distributions():
    if not (distribution.read_text("top_level.txt") or "").split():
        listed |= {os.path.normpath(distribution.locate_file(path)) for path in distribution.files or []}
if sys.argv[1:] == ["lists"]:  # the answer, which costs nothing any more
    answer = importlib.metadata.packages_distributions()
    importlib.metadata.packages_distributions = lambda: answer
asked, look = set(), os.stat


def stat(path, *args, **kwargs):
    if not isinstance(path, int):
        asked.add(os.path.normpath(os.fspath(path)))
    return look(path, *args, **kwargs)


os.stat = stat
begin = time.process_time()
import transformers.utils  # noqa: E402

seconds = time.process_time() - begin
print(len(listed), len(listed & asked), f"{seconds:.2f}", transformers.__version__)
PY
cd "$work"
read -r listed asked seconds version < <(env/bin/python count.py)
read -r _ fewer quick _ < <(env/bin/python count.py lists)
env/bin/python -c 'import sys; print("versions: transformers", sys.argv[1], "Python", sys.version.split()[0])' "$version"
echo "files listed by distributions without top_level.txt: $listed"
echo "of these looked at during import transformers: $asked in $seconds s of CPU"
echo "looked at when packages_distributions is answered from the lists: $fewer in $quick s"
if ((listed < 5000 || asked != listed || fewer * 50 > listed)); then
    echo "this has changed"
    exit 1
fi
