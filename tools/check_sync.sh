#!/usr/bin/env bash
# Fail if a module, a notebook or the README differs from what the notebooks give. For a clean checkout: anything
# uncommitted counts, new files included (which is why this asks `git status`, not `git diff`).
set -euo pipefail
cd "$(dirname "$0")/.."
git() { command git -c safe.directory='*' "$@"; }
git rev-parse --is-inside-work-tree >/dev/null
tools/sync.sh
changed=$(git status --porcelain)
if [ -n "$changed" ]; then
    echo "not in sync with the notebooks, or not committed:" >&2
    echo "$changed" >&2
    git --no-pager diff --stat >&2
    echo "run 'make sync' and commit the result" >&2
    exit 1
fi
echo "modules, notebooks and README are in sync"
