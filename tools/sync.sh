#!/usr/bin/env bash
# Write everything that is made from the notebooks anew: vlm_itl/*.py, the cleaned notebooks, README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
# nbdev_export leaves modules of deleted notebooks behind, so they go first; __init__.py holds the version and stays.
find vlm_itl -name '*.py' ! -name '__init__.py' -delete
nbdev_export
nbdev_clean
python tools/make_readme.py
