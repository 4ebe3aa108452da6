#!/bin/sh
# Ask whether a version in constraints.txt has a known hole. Needs pip-audit (pip install pip-audit) and the network; the
# variable AUDIT names another program. Exit code: 0 nothing found, or not audited (one line says why); 1 something found.
here=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
audit=${AUDIT:-pip-audit}
command -v "$audit" >/dev/null 2>&1 || { echo "not audited: $audit is not installed (pip install pip-audit)"; exit 0; }
said=$("$audit" -r "$here/constraints.txt" --no-deps --disable-pip --progress-spinner off 2>&1)
code=$?
if [ "$code" -ne 0 ] && printf '%s' "$said" | grep -qiE 'connection|timed out|timeout|unreachable|resolve|max retries|proxy|HTTPError|JSONDecodeError|ServiceError'; then
  echo "not audited: the data base of known holes cannot be reached ($(printf '%s' "$said" | tail -n 1 | cut -c1-120))"
  exit 0
fi
left_out=$(printf '%s\n' "$said" | grep -c 'could not be audited')
if [ "$code" -eq 0 ] && [ "$left_out" -gt 0 ]; then
  echo "not audited: the index that was asked knows nothing about known holes of $left_out packages"
  exit 0
fi
printf '%s\n' "$said"
exit "$code"
