"""One table for all benchmarks: take turns, compare, and write rows that say whether a goal holds.

A benchmark script has `main(repeats) -> list[dict]`, whose rows come from `compare` or `same`:
{part, ours, peer, unit, ratio, goal, holds, spread}. The goal gives the ratio its sense: "<= 1.05" means ours / peer,
">= 8" means peer / ours (so many times faster), "none" is for reading only. Ratios travel between machines; the other
numbers do not. `publish(rows)` prints a Markdown table, what does not hold first, and writes JSON where it is asked to.
"""

import json
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

Row = dict[str, Any]


def cpu_seconds() -> float:
    "CPU time of this process and of its ended children; a busy neighbour does not lengthen it."
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def take_turns(
    ways: Mapping[str, Callable[[], object]],  # name -> what to time
    repeats: int,  # turns that count
    warm: int = 1,  # turns before that do not
    clock: Callable[[], float] = cpu_seconds,  # seconds
) -> dict[str, list[float]]:  # name -> seconds of each turn
    "Time several ways in alternation in this process, so that all of them see the same machine."
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warm + repeats):
        for name, way in ways.items():
            start = clock()
            way()
            if turn >= warm:
                taken[name].append(clock() - start)
    return taken


def _holds(ratio: float, goal: str) -> bool:
    "Whether a ratio reaches its goal."
    sign, _, bound = goal.partition(" ")
    if sign not in ("<=", ">=", "none"):
        raise ValueError(f"goal {goal!r}: '<= x', '>= x' or 'none'.")
    return sign == "none" or (ratio <= float(bound) if sign == "<=" else ratio >= float(bound))


def compare(
    part: str,  # what was measured
    ours: Sequence[float],  # of each turn
    peer: Sequence[float],  # of the same turns
    unit: str,  # of both, as "ms/image"
    goal: str,  # "<= 1.05": ours / peer; ">= 8": peer / ours; "none"
) -> Row:
    "A row from the medians; `spread` holds the quartiles of the ratio of each turn."
    over = goal.startswith(">=")
    ratios = [(b / a if over else a / b) for a, b in zip(ours, peer, strict=True)]
    one, two = median(ours), median(peer)
    ratio = two / one if over else one / two
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    values = {"part": part, "ours": one, "peer": two, "unit": unit, "ratio": ratio, "goal": goal}
    return {**values, "holds": _holds(ratio, goal), "spread": [low, high]}


def below(
    part: str,  # what was measured
    ours: Sequence[float],  # of each turn
    limit: float,  # that the median may reach
    unit: str,  # of both
) -> Row:
    "A row about an absolute figure, such as a fixed cost in seconds: the limit stands where the peer would."
    return compare(part, ours, [limit] * len(ours), unit, "<= 1")


def same(
    part: str,  # what is equal
    difference: float,  # the largest between ours and the peer's
    tolerance: float = 0.0,
) -> Row:
    "A row that says whether both compute the same: to be made before anything is timed."
    values = {"part": part, "ours": difference, "peer": tolerance, "unit": "largest difference", "ratio": None}
    return {**values, "goal": f"<= {tolerance:g}", "holds": bool(difference <= tolerance), "spread": None}


def machine() -> dict[str, Any]:
    "What a figure depends on besides the code."
    import torch

    models = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    cpu = models[0] if models else platform.processor()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"cpu": cpu, "cores": os.cpu_count(), **versions}


def _lines(path: str) -> list[str]:
    "The lines of a file; none where it cannot be read."
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def _cell(value: Any) -> str:
    "A number with three digits."
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(
    rows: Sequence[Row],  # of `compare` and `same`
) -> str:
    "The table, rows whose goal does not hold first."
    lines = ["| part | ours | peer | unit | ratio | spread | goal | holds |", "|---|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["holds"]):
        spread = "" if row["spread"] is None else "-".join(map(_cell, row["spread"]))
        cells = [row["part"], *(_cell(row[key]) for key in ("ours", "peer", "unit", "ratio")), spread, row["goal"]]
        lines.append(f"| {' | '.join([*cells, 'yes' if row['holds'] else '**no**'])} |")
    return "\n".join(lines) + "\n"


def publish(
    rows: Sequence[Row],  # of `compare` and `same`
    path: str | Path | None = None,  # JSON {machine, rows}; None: only print
) -> None:
    "Print the table with the machine, and write both."
    print(markdown(rows) + "\n" + ", ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
    if path is not None:
        text = json.dumps({"machine": machine(), "rows": list(rows)}, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")
