"""All benchmarks that ten quiet minutes allow, one after the other, into one table.

Run as `make bench`, or `python benchmarks/bench_all.py [part ...]`. Each part is a script of its own, in a process of
its own, and says in its first lines what it compares; longer forms (more turns, larger pools) are run by hand. What
fails is a row, too. Rows go to results/bench.json, the Markdown table to results/bench.md, what does not hold first;
with names of parts, only their rows are replaced.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from table import machine, markdown

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
PARTS: dict[str, list[str]] = {  # script -> its arguments in `make bench`
    "bench_preprocess": ["3"],
    "bench_metrics": ["5"],
    "bench_startup": ["2"],
    "bench_step": ["2"],
    "bench_bald": ["1"],
    "bench_round": ["1"],
    "bench_judge": ["1"],
    "bench_sweep": ["1"],
    "bench_processes": ["2"],
}
LIMIT = 600  # seconds for one part


def rows_of(name: str, arguments: list[str]) -> list[dict[str, Any]]:
    "The rows of a part: what its `main` gives back, or prints one JSON object a line."
    code = (
        "import importlib, json, sys; sys.path.insert(0, sys.argv[1]); "
        "rows = importlib.import_module(sys.argv[2]).main(*map(int, sys.argv[3:])); "
        "print(*map(json.dumps, rows or ()), sep='\\n')"
    )
    quiet = {"VLM_ITL_PROGRESS": "0", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(HERE), name, *arguments]
    try:
        done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return [failed(name, f"took more than {LIMIT} s")]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        found.append(failed(name, lines[-1][:200]))
    return [{"spread": None, **row, "script": name} for row in found if "part" in row]


def failed(name: str, why: str) -> dict[str, Any]:
    "A row for a part that could not be measured."
    nothing = {"ours": None, "peer": None, "unit": why, "ratio": None, "goal": "runs", "holds": False}
    return {"part": f"{name} failed", **nothing, "spread": None, "script": name}


def kept_rows(names: list[str]) -> list[dict[str, Any]]:
    "The rows of the last table whose parts are not measured now."
    last = RESULTS / "bench.json"
    if not names or not last.is_file():
        return []
    return [row for row in json.loads(last.read_text(encoding="utf-8"))["rows"] if row["script"] not in names]


def main(names: list[str]) -> None:
    "Run the parts; the table is written after each, so that one that is stopped keeps what it has."
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        sys.exit(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}.")
    rows = kept_rows(names)
    text, started = "", time.perf_counter()
    for name in names or PARTS:
        begun = time.perf_counter()
        rows += rows_of(name, PARTS[name])
        print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
        minutes = (time.perf_counter() - started) / 60
        text = write_table(rows, f"{', '.join(names) or 'all parts'}: {minutes:.1f} minutes")
    print(text)


def write_table(rows: list[dict[str, Any]], took: str) -> str:
    "Keep the rows as JSON and as Markdown, with the machine; the text is given back."
    text = f"{markdown(rows)}\n{', '.join(f'{key} {value}' for key, value in machine().items())}; {took}.\n"
    (RESULTS / "bench.md").write_text(text, encoding="utf-8")
    record = {"command": "make bench", "machine": machine(), "rows": rows}
    (RESULTS / "bench.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return text


if __name__ == "__main__":
    main(sys.argv[1:])
