#!/usr/bin/env bash
# Fail if a module, a notebook or the README differs from what the notebooks give. For a clean checkout: anything
# uncommitted counts, new files included (which is why this asks `git status`, not `git diff`).
set -euo pipefail
cd "$(dirname "$0")/.."
git() { command git -c safe.directory='*' "$@"; }
git rev-parse --is-inside-work-tree >/dev/null
if [ -n "$(git status --porcelain)" ]; then
    # Stop before anything is rewritten: an edit of a module that is not yet in its notebook would be lost.
    git status --short >&2
    echo "this compares with what is committed: commit first ('make sync' writes modules and README)" >&2
    exit 1
fi
tools/sync.sh
changed=$(git status --porcelain)
if [ -n "$changed" ]; then
    echo "not in sync with the notebooks:" >&2
    echo "$changed" >&2
    git --no-pager diff --stat >&2
    echo "commit what has just been written (it is what 'make sync' gives)" >&2
    exit 1
fi
echo "modules, notebooks and README are in sync"
